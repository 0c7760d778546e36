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
    let whole = |text: String| Faults::from(Fault::of_file(file, text));
    let matches = command.no_binary_name(true).try_get_matches_from(merged.words);
    let mut args = matches
        .and_then(|matches| receive::ReceiveArgs::from_arg_matches(&matches))
        .map_err(|error| whole(configuration::in_a_line(&error)))?;
    args.guest_files.clone_from(&merged.guests);
    args.into_options().map_err(|error| whole(error.to_string()))?;
    let options = merged
        .configuration
        .map_or(0, |configuration| configuration.len());
    Ok((options, merged.guests))
}
