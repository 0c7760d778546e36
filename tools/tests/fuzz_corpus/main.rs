//! The fuzz targets over their corpora, which are streams and files of real programs: what `scripts/fuzz` begins with.

#[path = "../../../fuzz/src/lib.rs"]
mod fuzz;
mod mutations;
mod seeds;
mod sessions;

use std::fs;
use std::path::{Path, PathBuf};

fn names_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_target_passes_its_corpus() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    for (name, target) in fuzz::TARGETS {
        let inputs = names_in(&fuzz.join("corpus").join(name));
        let valid: usize = inputs.iter().map(|path| target(&fs::read(path).unwrap())).sum();
        println!("{name}: {} inputs, {valid} valid parts", inputs.len());
        assert!(valid > 0, "nothing in the corpus of {name} is valid");
    }
    let names = names_in(&fuzz.join("corpus"));
    let names: Vec<_> = names.iter().map(|path| path.file_name().unwrap()).collect();
    assert_eq!(names, fuzz::TARGETS.map(|(name, _)| name));
}
