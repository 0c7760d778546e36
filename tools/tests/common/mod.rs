//! What the tests of `compare` and `inspect` share.

use colo_ring_tests::command::Scratch;
use colo_ring_tests::schema;
use std::process::{Command, Output};

pub fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_colo-ring"))
}

/// Runs it to its end. Returns its exit code, standard output and standard error.
pub fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command().args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Runs it, which must work and say nothing else. Returns its standard output.
pub fn output(args: &[&str]) -> String {
    let (code, stdout, stderr) = run(args);
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args:?}");
    stdout
}

pub fn json(args: &[&str]) -> serde_json::Value {
    schema::document(output(&[args, &["--json"]].concat()).as_bytes())
}

/// The subcommand refuses each of these files: its name, its content, if it is there at all, and what is said of it.
pub fn assert_refused(subcommand: &str, files: &[(&str, Option<&[u8]>, &str)]) {
    let scratch = Scratch::new();
    for (name, content, says) in files {
        let path = scratch.file(name);
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let (code, stdout, said) = run(&[subcommand, &path]);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{path}: {said}");
        assert!(said.contains(says) && said.contains(&path), "{says}: {said}");
    }
}

/// A log that another language's HdrHistogram library wrote.
pub fn foreign_log(language: &str) -> String {
    format!("{}/../tests/hdr/{language}.hlog", env!("CARGO_MANIFEST_DIR"))
}
