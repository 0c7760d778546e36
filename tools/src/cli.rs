//! The command line: which subcommands there are.

use crate::doctor::{self, DoctorArgs};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The secondary side of QEMU COLO as a program of its own
///
/// An unmodified QEMU primary migrates to it with x-colo and is then checkpointed for as long as it runs;
/// colo-ring keeps the guest's RAM and device state as of the last committed checkpoint.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "colo-ring", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what this machine lacks, what that means, and the command that mends it
    ///
    /// Everything is tried or read, nothing is changed. Exit code 0 if a receiver works here, 1 if something
    /// essential is missing.
    #[command(
        after_help = "Example:\n  colo-ring doctor\n  colo-ring doctor --json | jq '.checks[] | select(.state != \"ok\")'"
    )]
    Doctor(DoctorArgs),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Doctor(args) => doctor::run(&args),
    };
    result.unwrap_or_else(|error| error.report())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_subcommand_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli
            .get_subcommands()
            .filter(|command| command.get_name() != "help")
        {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{} has no example", command.get_name());
            assert!(
                help.contains("--json"),
                "{} prints nothing for machines",
                command.get_name()
            );
        }
        cli.debug_assert();
    }
}
