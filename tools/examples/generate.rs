//! Writes the manual pages and the completions of shells, as a package installs them: `generate DIR`.
//!
//! They are made of the definitions that the command line itself is made of.

use clap_complete::{Shell, generate_to};
use std::fs::create_dir_all;
use std::io;
use std::path::PathBuf;

fn main() -> io::Result<()> {
    let Some(out) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::other("give the directory that they are written to"));
    };
    let (pages, completions) = (out.join("man"), out.join("completions"));
    create_dir_all(&pages)?;
    create_dir_all(&completions)?;
    let mut command = colo_ring_tools::command_line();
    clap_mangen::generate_to(command.clone(), &pages)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "colo-ring", &completions)?;
    }
    Ok(())
}
