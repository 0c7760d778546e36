//! What SIGHUP does: the configuration is read again, and what can change while guests are protected is changed.

use super::ReceiveArgs;
use crate::configuration::{self, Configuration, GuestFile};
use crate::output::{CommandError, tell};
use clap::{ArgMatches, FromArgMatches};
use colo_ring::receiver::{GuestRules, Limits, Receiver};
use std::ffi::OsString;

/// Options that can change while the receiver runs, by their names for clap: those of [`ReceiveArgs::limits`], and [`GUEST`]. All others take
/// a new start: guests have their memory, cores and connections by them.
const RELOADED: [&str; 3] = ["precopy_timeout", "sessions_per_origin", GUEST];

/// Names of guests. A session that runs keeps its name.
const GUEST: &str = "guest";

/// The options in force.
pub(super) struct InForce {
    /// The words behind `receive`, as they were given.
    given: Vec<OsString>,
    /// As the receiver was started.
    options: ArgMatches,
    limits: Limits,
    guests: GuestRules,
    guest_files: Vec<GuestFile>,
    configuration: Option<Configuration>,
}

impl InForce {
    /// Reads the words behind `receive`, with the configuration.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn read(given: Vec<OsString>) -> Result<Self, CommandError> {
        let command = super::command().no_binary_name(true);
        let merged = configuration::merge(given.clone(), &command).map_err(CommandError::failed)?;
        let failed =
            |error: clap::Error| CommandError::Usage(merged.located(configuration::in_a_line(&error)));
        let options = command.try_get_matches_from(&merged.words).map_err(failed)?;
        let mut args = ReceiveArgs::from_arg_matches(&options).map_err(failed)?;
        args.guest_files.clone_from(&merged.guests);
        // It has a place of its own.
        if let Some(fault) = args.guest_fault() {
            return Err(CommandError::Usage(fault.to_string()));
        }
        let checked = args.check().and_then(|()| args.guest_rules());
        let guests = checked.map_err(|error| error.map_message(|message| merged.located(message)))?;
        let limits = args.limits();
        Ok(Self {
            given,
            options,
            limits,
            guests,
            guest_files: merged.guests,
            configuration: merged.configuration,
        })
    }

    /// Says where options come from, beside the command line.
    pub(super) fn tell_files(&self) {
        if let Some(configuration) = &self.configuration {
            let file = configuration.path().display();
            tell(&format!(
                "configuration: {} options of {file}",
                configuration.len()
            ));
        }
        for guest in &self.guest_files {
            tell(&format!(
                "configuration: the guest {} of {}",
                guest.name(),
                guest.path().display()
            ));
        }
    }

    /// An error in what the options are together, with its place if the configuration sets one of them.
    pub(super) fn located(&self, error: CommandError) -> CommandError {
        error.map_message(|message| configuration::located(self.configuration.as_ref(), message))
    }

    pub(super) fn guest_files(&self) -> &[GuestFile] {
        &self.guest_files
    }

    /// Reads them again. If anything is wrong with them, everything stays as it is.
    pub(super) fn reload(&mut self, receiver: &Receiver) {
        match self.read_again() {
            Err(error) => tell(&format!("warning: SIGHUP: everything stays as it is: {error}")),
            Ok((lines, new)) => {
                receiver.set_limits(new.limits);
                receiver.set_guests(new.guests.clone());
                // The others are as they were when the receiver was started.
                (self.limits, self.guests, self.guest_files) = (new.limits, new.guests, new.guest_files);
                lines.iter().for_each(|line| tell(line));
            }
        }
    }

    /// What is to be said of it, and what was read.
    fn read_again(&self) -> Result<(Vec<String>, Self), CommandError> {
        let new = Self::read(self.given.clone())?;
        let mut lines = Vec::new();
        if new.limits != self.limits {
            lines.push(format!("SIGHUP: limits in force: {}", new.limits));
        }
        let files = GuestFile::changes(&self.guest_files, &new.guest_files);
        if new.guests != self.guests || !files.is_empty() {
            lines.extend(files.into_iter().map(|line| format!("SIGHUP: {line}")));
            lines.push(format!(
                "SIGHUP: {} rules for guests in force; sessions that run keep their names",
                new.guests.iter().count()
            ));
        }
        for arg in super::command().get_arguments() {
            let id = arg.get_id().as_str();
            let is_old = RELOADED.contains(&id) || values(&new.options, id) == values(&self.options, id);
            if let Some(name) = arg.get_long().filter(|_| !is_old) {
                lines.push(format!(
                    "SIGHUP: --{name} has changed, which takes effect when the receiver is started again"
                ));
            }
        }
        if lines.is_empty() {
            lines.push("SIGHUP: the configuration is as before".to_owned());
        }
        Ok((lines, new))
    }
}

/// The values of an option as they were written.
fn values(options: &ArgMatches, id: &str) -> Vec<OsString> {
    let raw = options.try_get_raw(id).ok().flatten();
    raw.into_iter().flatten().map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring_tests::command::Scratch;
    use std::time::Duration;

    /// The file has a value that would go, and is not what is wrong.
    #[test]
    fn what_the_command_line_says_has_no_place_in_the_file() {
        let scratch = Scratch::new();
        let file = scratch.file("receive.toml");
        std::fs::write(&file, "listen = \"unix:/x\"\nuser-timeout = 9\n").unwrap();
        let given = ["--config", &file, "--user-timeout", "1"].map(OsString::from);
        let refused = InForce::read(given.to_vec()).map(drop).unwrap_err().to_string();
        assert!(refused.starts_with("--user-timeout must not be"), "{refused}");
    }

    #[test]
    fn what_is_reloaded_exists_and_the_rest_is_said() {
        let command = super::super::command();
        for id in RELOADED {
            assert!(command.get_arguments().any(|arg| arg.get_id() == id), "{id}");
        }
        let scratch = Scratch::new();
        let file = scratch.file("receive.toml");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("listen = \"tcp:[::1]:4444\"\nprecopy-timeout = 100\n");
        let given = vec!["--config".into(), file.clone().into()];
        let in_force = InForce::read(given).unwrap();
        assert_eq!(in_force.limits.precopy_deadline, Duration::from_secs(100));
        assert_eq!(
            in_force.read_again().unwrap().0,
            ["SIGHUP: the configuration is as before"]
        );
        write("listen = \"tcp:[::1]:4445\"\nprecopy-timeout = 50\n");
        let (lines, new) = in_force.read_again().unwrap();
        assert_eq!(new.limits.precopy_deadline, Duration::from_secs(50));
        let said = lines.join("\n");
        assert!(
            said.contains("limits in force: a first copy may stand still for 50 s"),
            "{said}"
        );
        assert!(said.contains("--listen has changed, which takes"), "{said}");
        write("listen = \"unix:/x\"\nuser-timeout = 1\n");
        let refused = in_force.read_again().map(drop).unwrap_err().to_string();
        assert!(
            refused.contains("receive.toml:2:1: --user-timeout must not be"),
            "{refused}"
        );
        write("listen = \"unix:/x\"\n\ncores = \"0\"\nnuma-node = 0\n");
        let refused = in_force.read_again().map(drop).unwrap_err().to_string();
        assert!(
            refused.contains("receive.toml:3:1: the argument '--cores"),
            "{refused}"
        );
        write("listen = 4");
        assert!(
            in_force
                .read_again()
                .map(drop)
                .unwrap_err()
                .to_string()
                .contains("receive.toml:1:10: ")
        );
    }
}
