//! `colo-ring check`: what is wrong with the configuration of `receive`.

use super::receive;
use crate::configuration::{self, DEFAULT_FILE, Fault, Faults, GuestFile};
use crate::output::{CommandError, print, print_json};
use clap::{Args, FromArgMatches};
use schemars::JsonSchema;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `colo-ring check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = DEFAULT_FILE)]
    config: PathBuf,

    /// Print the result as JSON (schema colo-ring.check, version 1)
    #[arg(long)]
    json: bool,
}

/// A guest that has a file.
#[derive(Serialize, JsonSchema)]
struct CheckedGuest {
    /// Its name.
    name: String,
    /// The file.
    file: PathBuf,
}

impl CheckedGuest {
    fn of(guest: &GuestFile) -> Self {
        Self {
            name: guest.name().to_string(),
            file: guest.path().to_owned(),
        }
    }
}

/// What is wrong with a configuration.
#[derive(Serialize, JsonSchema)]
pub(crate) struct CheckReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The file.
    config: &'a Path,
    /// How many options it sets; none if it cannot be read.
    options: Option<usize>,
    /// The guests that have a file in guests.d beside it; empty if anything is wrong.
    guests: Vec<CheckedGuest>,
    /// What is wrong; empty if nothing is.
    faults: &'a [Fault],
}

/// Reads the configuration and says what is wrong with it. Exit code 1 if anything is.
///
/// # Errors
/// If standard output cannot be written.
pub fn run(args: &CheckArgs) -> Result<ExitCode, CommandError> {
    let (found, faults) = match check(&args.config) {
        Ok(found) => (Some(found), Vec::new()),
        Err(Faults(faults)) => (None, faults),
    };
    let (options, guests) = found.unzip();
    let guests = guests.unwrap_or_default();
    if args.json {
        print_json(&CheckReport {
            schema: "colo-ring.check",
            schema_version: 1,
            config: &args.config,
            options,
            guests: guests.iter().map(CheckedGuest::of).collect(),
            faults: &faults,
        })?;
    } else {
        faults.iter().try_for_each(|fault| print(&format!("{fault}\n")))?;
        if let Some(options) = options {
            let file = args.config.display();
            print(&format!(
                "{file}: nothing is wrong; {options} options, all others as in `colo-ring receive --help`\n"
            ))?;
            for guest in &guests {
                print(&format!(
                    "{}: nothing is wrong; the guest {}\n",
                    guest.path().display(),
                    guest.name()
                ))?;
            }
        }
    }
    Ok(match faults.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// How many options it sets, and the guests beside it.
fn check(file: &Path) -> Result<(usize, Vec<GuestFile>), Faults> {
    let command = receive::command();
    let words = vec!["--config".into(), file.into()];
    let merged = configuration::merge(words, &command)?;
    // What the options are together.
    let whole = |text: String| {
        let configuration = merged.configuration.as_ref();
        let fault = configuration.and_then(|configuration| configuration.fault(&text));
        Faults::from(fault.unwrap_or_else(|| Fault::of_file(file, text)))
    };
    let matches = command.no_binary_name(true).try_get_matches_from(merged.words);
    let mut args = matches
        .and_then(|matches| receive::ReceiveArgs::from_arg_matches(&matches))
        .map_err(|error| whole(configuration::in_a_line(&error)))?;
    args.guest_files.clone_from(&merged.guests);
    if let Some(fault) = args.guest_fault() {
        return Err(fault.into());
    }
    args.into_options().map_err(|error| whole(error.to_string()))?;
    let options = merged
        .configuration
        .map_or(0, |configuration| configuration.len());
    Ok((options, merged.guests))
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring_tests::command::Scratch;
    use std::fs;

    /// What is wrong with this configuration and these guests' files, without the directory.
    fn faults(text: &str, guests: &[(&str, &str)]) -> String {
        let scratch = Scratch::new();
        let file = scratch.path().join("receive.toml");
        fs::write(&file, text).unwrap();
        fs::create_dir(scratch.path().join("guests.d")).unwrap();
        for (name, text) in guests {
            fs::write(scratch.path().join("guests.d").join(name), text).unwrap();
        }
        let directory = format!("{}/", scratch.path().display());
        let faults = check(&file).unwrap_err().to_string();
        faults.replace(&directory, "")
    }

    #[test]
    fn options_that_contradict_each_other_have_a_place() {
        for (text, begin) in [
            (
                "listen = \"unix:/x\"\nuser-timeout = 5\nkeepalive = 10\n",
                "receive.toml:2:1: --user-timeout must not be shorter",
            ),
            // The other one is as it is without being set.
            (
                "listen = \"unix:/x\"\n  keepalive = 3600\n",
                "receive.toml:2:3: --user-timeout must not be shorter",
            ),
            (
                "cores = \"0\"\nnuma-node = 0\nlisten = \"unix:/x\"\n",
                "receive.toml:1:1: the argument '--cores",
            ),
            (
                "listen = \"unix:/x\"\nguest = [\"a,peer=::1\", \"b,peer=::1\"]\n",
                "receive.toml:2:1: --guest: the guests a and b have the same conditions",
            ),
            ("channels = 2\n", "receive.toml: the following required"),
        ] {
            let said = faults(text, &[]);
            assert!(said.starts_with(begin), "{said}");
        }
    }

    #[test]
    fn a_guests_file_that_fits_no_other_has_a_place() {
        let listen = "listen = \"unix:/x\"\n";
        let other = ("a.toml", "name = \"db\"\npeer = \"::1\"\n");
        for (guests, said) in [
            (
                [other, ("web.toml", "listener = \"unix:/y\"\nname = \"web\"\n")],
                "guests.d/web.toml:2:8: the guest web: nothing listens on unix:/y",
            ),
            (
                [other, ("web.toml", "peer = \"::1\"\nname = \"web\"\n")],
                "guests.d/web.toml:2:8: the guests db and web have the same conditions; db is of guests.d/a.toml",
            ),
            (
                [
                    other,
                    (
                        "web.toml",
                        "name = \"web\"\npeer = \"::2\"\ntls-allow = [\"CN=a\"]\n",
                    ),
                ],
                "guests.d/web.toml:3:13: tls-allow names identities, which connections have with --tls alone, and not with \
                 --tls-verify-peer off",
            ),
        ] {
            assert_eq!(faults(listen, &guests), said);
        }
        // The conditions that count are those of the option.
        let option = "listen = \"unix:/x\"\nguest = \"web,listener=unix:/z\"\n";
        let web = ("web.toml", "name = \"web\"\npeer = \"::2\"\n");
        assert!(
            faults(option, &[web]).starts_with("receive.toml:2:1: --guest: the guest web: nothing listens")
        );
    }
}
