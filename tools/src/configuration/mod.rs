//! The configuration file of `receive`: its options, by the names that they have on the command line.
//!
//! There is one list of options, clap's. A key of the file is looked up in it, and its value becomes a word of the command line, which clap then
//! reads with the words that were given. So the file has every option that there is and no other, with the same values, checks and help. A word
//! that was given wins: what the file says of that option, or of one that it excludes, is left out.
//!
//! Beside it, `guests.d` has a file for each guest that something holds for by itself.

mod fault;
mod guests;

pub(crate) use fault::{Fault, Faults};
pub(crate) use guests::GuestFile;

use fault::{Place, place};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where the file is if nothing is said.
pub(crate) const DEFAULT_FILE: &str = "/etc/colo-ring/receive.toml";

/// Most bytes of a file.
const FILE_MAX: u64 = 1 << 20;

/// Options that are about the command line itself.
const NOT_IN_FILES: [&str; 3] = ["config", "help", "version"];

/// An option that a file sets.
#[derive(Debug)]
struct Setting {
    /// Its name for clap.
    id: clap::Id,
    /// Its name in files and on the command line.
    name: String,
    /// Where that is in the file.
    place: Place,
    words: Vec<OsString>,
    /// Whether the command line says nothing else.
    is_in_force: bool,
}

/// A file that was read, and is right as far as each option is by itself.
#[derive(Debug)]
pub(crate) struct Configuration {
    path: PathBuf,
    settings: Vec<Setting>,
}

impl Configuration {
    /// Reads the file at `path`, or the one at its usual place; none if there is no such file and none was asked for. `command` has the
    /// options.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub(crate) fn read(path: Option<&Path>, command: &Command) -> Result<Option<Self>, Faults> {
        let (path, is_asked) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        let text = match read_text(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_asked => return Ok(None),
            text => text.map_err(|error| Faults::from(Fault::of_file(path, error.to_string())))?,
        };
        let settings = settings(&text, command);
        let settings = settings.map_err(|faults| Faults::located(path, &text, faults))?;
        Ok(Some(Self {
            path: path.to_owned(),
            settings,
        }))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What is wrong with several options together, at the first of them that the file sets; none if it sets none of them: `message` names
    /// them, as `--NAME`.
    pub(crate) fn fault(&self, message: &str) -> Option<Fault> {
        let names = message.split("--").skip(1).map(|rest| {
            let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-');
            &rest[..end.unwrap_or(rest.len())]
        });
        let in_force = || self.settings.iter().filter(|setting| setting.is_in_force);
        let mut set = names.filter_map(|name| in_force().find(|setting| setting.name == name));
        set.next()
            .map(|setting| Fault::at(&self.path, setting.place, message.to_owned()))
    }

    /// How many options it sets.
    pub(crate) fn len(&self) -> usize {
        self.settings.len()
    }

    /// Gives way to the command line: an option that was given there, or is excluded by one, is not in force.
    fn yield_to(&mut self, given: &ArgMatches, command: &Command) {
        let is_given = |id: &clap::Id| given.value_source(id.as_str()) == Some(ValueSource::CommandLine);
        // Either of two may be the one that says so.
        let excludes = |one: &Arg, other: &clap::Id| {
            let conflicts = command.get_arg_conflicts_with(one);
            conflicts.iter().any(|conflict| conflict.get_id() == other)
        };
        let is_excluded = |id: &clap::Id| {
            let own = command.get_arguments().find(|arg| arg.get_id() == id);
            let mut given = command.get_arguments().filter(|arg| is_given(arg.get_id()));
            given.any(|arg| excludes(arg, id) || own.is_some_and(|own| excludes(own, arg.get_id())))
        };
        for setting in &mut self.settings {
            setting.is_in_force = !is_given(&setting.id) && !is_excluded(&setting.id);
        }
    }

    /// What it adds to the command line.
    fn words(&self) -> Vec<OsString> {
        let in_force = self.settings.iter().filter(|setting| setting.is_in_force);
        in_force
            .flat_map(|setting| setting.words.iter().cloned())
            .collect()
    }
}

/// A command line with what a file adds.
#[derive(Debug)]
pub(crate) struct Merged {
    pub(crate) words: Vec<OsString>,
    pub(crate) configuration: Option<Configuration>,
    pub(crate) guests: Vec<GuestFile>,
}

impl Merged {
    /// What is wrong with the options together, with its place if the file sets one of them.
    pub(crate) fn located(&self, message: String) -> String {
        located(self.configuration.as_ref(), message)
    }
}

/// What is wrong with the options together, with its place if that file sets one of them.
pub(crate) fn located(configuration: Option<&Configuration>, message: String) -> String {
    let fault = configuration.and_then(|configuration| configuration.fault(&message));
    fault.map_or(message, |fault| fault.to_string())
}

/// Adds the file to the words behind `receive`. `command` has the options, with `--config`.
///
/// # Errors
/// What is wrong with the file.
pub(crate) fn merge(given: Vec<OsString>, command: &Command) -> Result<Merged, Faults> {
    let mut command = command.clone().no_binary_name(true);
    command.build();
    // What is wrong with these words is found when all of them are read.
    let known = command
        .clone()
        .ignore_errors(true)
        .try_get_matches_from(&given)
        .unwrap_or_default();
    let path = known.try_get_one::<PathBuf>("config").ok().flatten();
    let path = path.map(PathBuf::as_path);
    let configuration = Configuration::read(path, &command);
    let guests = match directory(path).filter(|directory| directory.is_dir()) {
        Some(directory) => GuestFile::read_all(&directory),
        None => Ok(Vec::new()),
    };
    let (mut configuration, mut guests) = both(configuration, guests)?;
    guests.iter_mut().for_each(|guest| guest.yield_to(&known));
    if let Some(configuration) = &mut configuration {
        configuration.yield_to(&known, &command);
    }
    let mut words = configuration.as_ref().map_or_else(Vec::new, Configuration::words);
    words.extend(given);
    Ok(Merged {
        words,
        configuration,
        guests,
    })
}

/// Two results, or all that is wrong with either.
fn both<A, B>(one: Result<A, Faults>, other: Result<B, Faults>) -> Result<(A, B), Faults> {
    match (one, other) {
        (Ok(one), Ok(other)) => Ok((one, other)),
        (Err(Faults(mut faults)), Err(Faults(more))) => {
            faults.extend(more);
            Err(Faults(faults))
        }
        (Err(faults), Ok(_)) | (Ok(_), Err(faults)) => Err(faults),
    }
}

/// The directory of the file at `path`, or of the one at its usual place: where a link leads to, by which files are confined. What is no file,
/// as /dev/null, is meant alone, and not what is beside it.
pub(crate) fn directory(path: Option<&Path>) -> Option<PathBuf> {
    let path = path.unwrap_or(Path::new(DEFAULT_FILE));
    if fs::metadata(path).is_ok_and(|about| !about.is_file()) {
        return Some(path.to_owned());
    }
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.parent()?;
    Some(match directory.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => directory.to_owned(),
    })
}

fn read_text(path: &Path) -> io::Result<String> {
    let length = fs::metadata(path)?.len();
    match length > FILE_MAX {
        true => Err(io::Error::other(format!(
            "{length} bytes are too many for a configuration"
        ))),
        false => fs::read_to_string(path),
    }
}

/// A fault and where it is in the text.
type Located = (Range<usize>, String);

fn settings(text: &str, command: &Command) -> Result<Vec<Setting>, Vec<Located>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut faults: Vec<Located> = (errors.iter())
        .map(|error| (error.span().unwrap_or(0..0), error.message().replace('\n', ", ")))
        .collect();
    // What is behind a fault of the syntax may be read wrongly.
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut settings = Vec::new();
    for (key, value) in table.get_ref() {
        match setting(text, key, value, command) {
            Ok(setting) => settings.push(setting),
            Err(fault) => faults.push(fault),
        }
    }
    match faults.is_empty() {
        true => Ok(settings),
        false => Err(faults),
    }
}

fn setting(
    text: &str,
    key: &Spanned<std::borrow::Cow<'_, str>>,
    value: &Spanned<DeValue<'_>>,
    command: &Command,
) -> Result<Setting, Located> {
    let name = key.get_ref();
    let own =
        |arg: &&Arg| arg.get_long() == Some(name) && !NOT_IN_FILES.contains(&&**name) && !arg.is_hide_set();
    let arg = command.get_arguments().find(own);
    let arg = arg.ok_or_else(|| (key.span(), unknown(name, command)))?;
    let wrong = |text: &str| (value.span(), format!("{name}: {text}"));
    let words = match (arg.get_action(), value.get_ref()) {
        (ArgAction::SetTrue, DeValue::Boolean(is_set)) => match is_set {
            true => vec![OsString::from(format!("--{name}"))],
            false => Vec::new(),
        },
        (ArgAction::SetTrue, _) => return Err(wrong("write true or false")),
        (ArgAction::Append, DeValue::Array(values)) => {
            let words = values
                .iter()
                .map(|value| word(arg, value).ok_or_else(|| (value.span(), not_a_value(name))));
            words.collect::<Result<_, _>>()?
        }
        _ => vec![word(arg, value).ok_or_else(|| (value.span(), not_a_value(name)))?],
    };
    check(&words, command).map_err(|text| wrong(&text))?;
    Ok(Setting {
        id: arg.get_id().clone(),
        name: name.to_string(),
        place: place(text, key.span().start),
        words,
        is_in_force: true,
    })
}

fn not_a_value(name: &str) -> String {
    format!("{name}: write a text in quotes, a whole number, or true or false for on or off")
}

/// An option with its value, as one word.
fn word(arg: &Arg, value: &Spanned<DeValue<'_>>) -> Option<OsString> {
    let is_switch = arg
        .get_possible_values()
        .iter()
        .any(|value| value.matches("off", false));
    let text = match value.get_ref() {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) if number.radix() == 10 => number.as_str().replace('_', ""),
        DeValue::Boolean(is_on) if is_switch => if *is_on { "on" } else { "off" }.to_owned(),
        _ => return None,
    };
    Some(format!("--{}={text}", arg.get_long()?).into())
}

/// Whether clap takes the values; nothing is said of what else belongs to them.
fn check(words: &[OsString], command: &Command) -> Result<(), String> {
    let Err(error) = command.clone().try_get_matches_from(words) else {
        return Ok(());
    };
    match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::ValueValidation | ErrorKind::NoEquals => Err(in_a_line(&error)),
        _ => Ok(()),
    }
}

/// What clap says of a value, without its advice about the command line.
pub(crate) fn in_a_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join(" ");
    line.trim_start_matches("error: ").to_owned()
}

/// What is said of a key that is no option.
fn unknown(name: &str, command: &Command) -> String {
    let error = command.clone().try_get_matches_from([format!("--{name}=")]);
    let suggested = error
        .err()
        .and_then(|error| match error.get(ContextKind::SuggestedArg) {
            Some(ContextValue::String(option)) => Some(option.trim_start_matches("--").to_owned()),
            _ => None,
        });
    let suggested = suggested.filter(|option| !NOT_IN_FILES.contains(&option.as_str()));
    match suggested {
        Some(option) => format!("unknown option {name:?}; there is {option:?}"),
        None => format!("unknown option {name:?}; `colo-ring receive --help` lists them"),
    }
}

#[cfg(test)]
mod tests;
