//! Writes what is made of the program's own definitions: `generate DIR` the manual pages, the completions of shells and the JSON Schemas, as a
//! package installs them; `generate --schemas DIR` the schemas alone.

use clap_complete::{Shell, generate_to};
use std::fs::{create_dir_all, write};
use std::io;
use std::path::{Path, PathBuf};

fn main() -> io::Result<()> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    match args.as_slice() {
        [option, out] if option == "--schemas" => schemas(Path::new(out)),
        [out] => {
            let out = PathBuf::from(out);
            pages(&out.join("man"), &out.join("completions"))?;
            schemas(&out.join("schema"))
        }
        _ => Err(io::Error::other("give the directory that they are written to")),
    }
}

/// What the definition of the command line makes.
fn pages(pages: &Path, completions: &Path) -> io::Result<()> {
    create_dir_all(pages)?;
    create_dir_all(completions)?;
    let mut command = colo_ring_tools::command_line();
    clap_mangen::generate_to(command.clone(), pages)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "colo-ring", completions)?;
    }
    Ok(())
}

/// A file for each schema: status.json for `colo-ring.status`.
fn schemas(out: &Path) -> io::Result<()> {
    create_dir_all(out)?;
    for (name, schema) in colo_ring_tools::json_schemas() {
        let file = name.trim_start_matches("colo-ring.");
        let text = serde_json::to_string_pretty(&schema)? + "\n";
        write(out.join(format!("{file}.json")), text)?;
    }
    Ok(())
}
