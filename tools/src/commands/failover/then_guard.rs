//! What comes after a failover: a guard, which protects the guest again.

use crate::commands::guard::GuardArgs;
use crate::output::CommandError;
use crate::own_program;
use clap::Parser;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

/// The options of a guard, but for its guest's monitor, which only the failover knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuardOptions(Vec<String>);

#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct OnlyGuard {
    #[command(flatten)]
    _args: GuardArgs,
}

impl GuardOptions {
    /// Takes the words of a text as a shell reads them, if a guard would.
    ///
    /// # Errors
    /// What a guard would say of them.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let words = shlex::split(text).ok_or("a quote is not closed")?;
        let any_monitor = ["--qmp".to_owned(), "/".to_owned()];
        OnlyGuard::try_parse_from(any_monitor.iter().chain(&words)).map_err(|error| {
            let said = error.to_string();
            // Without hints and usage, which are the failover's.
            let reason = said.split("\n\n").next().unwrap_or_default();
            let words: Vec<_> = reason.split_whitespace().collect();
            words.join(" ").replacen("error: ", "", 1)
        })?;
        Ok(Self(words))
    }

    /// Becomes the guard of the QEMU with that monitor. Returns only if it cannot.
    pub(super) fn become_guard(&self, monitor: &Path) -> Result<ExitCode, CommandError> {
        let failed = |error: std::io::Error| {
            CommandError::Failed(format!(
                "the guest runs, but its guard could not be started: {error}"
            ))
        };
        Err(failed(self.guard(monitor).exec()))
    }

    fn guard(&self, monitor: &Path) -> Command {
        let mut guard = own_program::command();
        guard.arg("guard").arg("--qmp").arg(monitor).args(&self.0);
        guard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_s_options_are_checked_before_the_failover() {
        let options =
            GuardOptions::parse("--to tcp:192.0.2.3:4444 --name web3 --hist '/var/my run'").unwrap();
        assert_eq!(
            options.0,
            [
                "--to",
                "tcp:192.0.2.3:4444",
                "--name",
                "web3",
                "--hist",
                "/var/my run"
            ]
        );
        // Also after an update, which removes the file that this was started from.
        let guard = options.guard(Path::new("/run/q"));
        assert_eq!(guard.get_program(), "/proc/self/exe");
        let arguments: Vec<_> = guard.get_args().take(3).collect();
        assert_eq!(arguments, ["guard", "--qmp", "/run/q"]);
        for (text, reason) in [
            ("--to tcp:192.0.2.3:4444", "--name"),
            ("--to tcp:192.0.2.3:4444 --name web3 --nonsense", "--nonsense"),
            ("--to 'tcp:192.0.2.3:4444 --name web3", "quote"),
            ("--to nowhere --name web3", "nowhere"),
            (
                "--to tcp:192.0.2.3:4444 --name 'web 3'",
                "cannot be a guest's name",
            ),
            ("--to tcp:192.0.2.3:4444 --name web3 --qmp /other", "--qmp"),
        ] {
            let refused = GuardOptions::parse(text).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }
}
