//! `guests.d/*.toml` beside the configuration file: what holds for one guest, a file for each.

use super::fault::{Place, place};
use super::{Fault, Faults, Located, read_text};
use clap::ArgMatches;
use clap::parser::ValueSource;
use colo_ring::net::ListenAddress;
use colo_ring::receiver::{GuestName, GuestRule, GuestUuid, NameError, NameRule, PeerNetwork};
use colo_ring::tls::Allowed;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;

/// The directory of the files, beside the configuration file.
const DIRECTORY: &str = "guests.d";

/// Most files: more guests than a receiver has sessions.
const FILES_MAX: usize = 4096;

/// Longest time without progress in a first copy, in seconds, as of `--precopy-timeout`.
const PRECOPY_TIMEOUT_MAX: u64 = 86_400;

/// The keys of a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Keys {
    name: Spanned<GuestName>,
    listener: Option<ListenAddress>,
    peer: Option<PeerNetwork>,
    uuid: Option<GuestUuid>,
    tls_allow: Option<Spanned<Vec<String>>>,
    precopy_timeout: Option<Spanned<u64>>,
    on_loss: Option<String>,
    on_stall: Option<String>,
}

/// What a file says of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestFile {
    path: PathBuf,
    /// Where the name is, for faults that other files and options have a part in.
    name_at: Place,
    /// By what it is recognised.
    rule: NameRule,
    tls_allow: Vec<String>,
    tls_allow_at: Option<Place>,
    precopy_deadline: Option<Duration>,
    on_loss: Option<String>,
    on_stall: Option<String>,
}

impl GuestFile {
    /// Reads all of them.
    ///
    /// # Errors
    /// What is wrong with any of them.
    pub(super) fn read_all(beside: &Path) -> Result<Vec<Self>, Faults> {
        let directory = beside.join(DIRECTORY);
        let paths = match paths(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            paths => paths.map_err(|error| Faults::from(Fault::of_file(&directory, error.to_string())))?,
        };
        let mut files: Vec<Self> = Vec::new();
        let mut faults = Vec::new();
        for path in paths {
            match Self::read(&path, &files) {
                Ok(file) => files.push(file),
                Err(Faults(of_file)) => faults.extend(of_file),
            }
        }
        match faults.is_empty() {
            true => Ok(files),
            false => Err(Faults(faults)),
        }
    }

    fn read(path: &Path, others: &[Self]) -> Result<Self, Faults> {
        let text = read_text(path).map_err(|error| Faults::from(Fault::of_file(path, error.to_string())))?;
        Self::parse(path, &text, others).map_err(|faults| Faults::located(path, &text, faults))
    }

    fn parse(path: &Path, text: &str, others: &[Self]) -> Result<Self, Vec<Located>> {
        let keys: Keys = toml::from_str(text).map_err(|error| {
            let message = error.message().replace('\n', ", ");
            vec![(error.span().unwrap_or(0..0), message)]
        })?;
        let mut faults = Vec::new();
        let rule = NameRule {
            name: keys.name.get_ref().clone(),
            listener: keys.listener,
            peer: keys.peer,
            uuid: keys.uuid,
        };
        if rule.check().is_err() {
            let message = format!(
                "{} has none of listener, peer and uuid, by which it is recognised",
                rule.name
            );
            faults.push((keys.name.span(), message));
        }
        if let Some(other) = others.iter().find(|other| other.rule.name == rule.name) {
            let message = format!("{} has a file already: {}", rule.name, other.path.display());
            faults.push((keys.name.span(), message));
        }
        if let Some(none) = keys
            .tls_allow
            .as_ref()
            .filter(|allowed| allowed.get_ref().is_empty())
        {
            let message = "tls-allow: name an identity, or leave it out to allow all".to_owned();
            faults.push((none.span(), message));
        }
        let is_possible = |seconds: &Spanned<u64>| (1..=PRECOPY_TIMEOUT_MAX).contains(seconds.get_ref());
        if let Some(wrong) = keys
            .precopy_timeout
            .as_ref()
            .filter(|seconds| !is_possible(seconds))
        {
            let message = format!("precopy-timeout: write seconds, from 1 to {PRECOPY_TIMEOUT_MAX}");
            faults.push((wrong.span(), message));
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(Self {
            path: path.to_owned(),
            name_at: place(text, keys.name.span().start),
            rule,
            tls_allow_at: (keys.tls_allow.as_ref()).map(|allowed| place(text, allowed.span().start)),
            tls_allow: keys.tls_allow.map(Spanned::into_inner).unwrap_or_default(),
            precopy_deadline: keys
                .precopy_timeout
                .map(|seconds| Duration::from_secs(*seconds.get_ref())),
            on_loss: keys.on_loss,
            on_stall: keys.on_stall,
        })
    }

    /// Leaves out what an option of the command line says.
    pub(super) fn yield_to(&mut self, given: &ArgMatches) {
        let is_given = |id: &str| given.value_source(id) == Some(ValueSource::CommandLine);
        if is_given("precopy_timeout") {
            self.precopy_deadline = None;
        }
        if is_given("on_loss") {
            self.on_loss = None;
        }
        if is_given("on_stall") {
            self.on_stall = None;
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn name(&self) -> &GuestName {
        &self.rule.name
    }

    #[cfg(test)]
    pub(super) fn tls_allow(&self) -> &[String] {
        &self.tls_allow
    }

    /// What is wrong where connections have no identities: that a guest must have one of some.
    pub(crate) fn needless_identities(files: &[Self]) -> Option<Fault> {
        let (file, place) = files.iter().find_map(|file| Some((file, file.tls_allow_at?)))?;
        let message = "tls-allow names identities, which connections have with --tls alone, and not with --tls-verify-peer off";
        Some(Fault::at(&file.path, place, message.to_owned()))
    }

    /// What is wrong with the [rules](Self::rules), in the file that it is about; none if that is an option.
    pub(crate) fn fault(files: &[Self], options: &[NameRule], error: &NameError) -> Option<Fault> {
        // An option's conditions stand in place of a file's.
        let file_of = |name: &GuestName| {
            let is_option = options.iter().any(|rule| rule.name == *name);
            let file = files.iter().find(|file| file.rule.name == *name);
            file.filter(|_| !is_option)
        };
        match error {
            NameError::Ambiguous(one, other) => {
                let (one, other) = (file_of(one), file_of(other));
                let beside = one.zip(other).map(|(one, _)| {
                    let (name, path) = (&one.rule.name, one.path.display());
                    format!("; {name} is of {path}")
                });
                let message = format!("{error}{}", beside.unwrap_or_default());
                Some(other.or(one)?.fault_of_name(message))
            }
            NameError::NoListener { name, .. } => Some(file_of(name)?.fault_of_name(error.to_string())),
            _ => None,
        }
    }

    fn fault_of_name(&self, message: String) -> Fault {
        Fault::at(&self.path, self.name_at, message)
    }

    pub(crate) fn on_loss(&self) -> Option<&str> {
        self.on_loss.as_deref()
    }

    pub(crate) fn on_stall(&self) -> Option<&str> {
        self.on_stall.as_deref()
    }

    /// What holds for the guest, by the conditions of this file or by others.
    fn rule(&self, name: NameRule) -> GuestRule {
        GuestRule {
            name,
            allowed: Allowed::new(self.tls_allow.clone()),
            precopy_deadline: self.precopy_deadline,
        }
    }

    /// The rules for all guests: `options` are those of `--guest`, whose conditions stand in place of the files'.
    pub(crate) fn rules(files: &[Self], options: &[NameRule]) -> Vec<GuestRule> {
        let of_option = |rule: &NameRule| match files.iter().find(|file| file.rule.name == rule.name) {
            Some(file) => file.rule(rule.clone()),
            None => rule.clone().into(),
        };
        let is_left = |file: &&Self| options.iter().all(|rule| rule.name != file.rule.name);
        let left = files
            .iter()
            .filter(is_left)
            .map(|file| file.rule(file.rule.clone()));
        options.iter().map(of_option).chain(left).collect()
    }

    /// What has changed from files to others, in lines of the log.
    pub(crate) fn changes(old: &[Self], new: &[Self]) -> Vec<String> {
        let gone = old.iter().filter(|file| file.find_in(new).is_none());
        let gone = gone.map(|file| format!("the guest {} has no file any more", file.name()));
        let changed = new.iter().filter_map(|file| match file.find_in(old) {
            None => Some(format!(
                "the guest {} is new, of {}",
                file.name(),
                file.path.display()
            )),
            Some(old) => file.changes_since(old),
        });
        let mut lines: Vec<_> = gone.chain(changed).collect();
        if hooks(old) != hooks(new) {
            lines.push(
                "on-loss or on-stall of a guest has changed, which takes effect when the receiver is started again".to_owned(),
            );
        }
        lines
    }

    /// The file of the same guest.
    fn find_in<'a>(&self, files: &'a [Self]) -> Option<&'a Self> {
        files.iter().find(|file| file.name() == self.name())
    }

    fn changes_since(&self, old: &Self) -> Option<String> {
        let keys = [
            ("conditions", self.rule != old.rule),
            ("tls-allow", self.tls_allow != old.tls_allow),
            ("precopy-timeout", self.precopy_deadline != old.precopy_deadline),
        ];
        let changed: Vec<_> = keys
            .into_iter()
            .filter(|(_, is)| *is)
            .map(|(key, _)| key)
            .collect();
        (!changed.is_empty())
            .then(|| format!("the guest {} has changed: {}", self.name(), changed.join(", ")))
    }
}

/// The commands of all guests that have any.
fn hooks(files: &[GuestFile]) -> BTreeMap<&GuestName, [Option<&str>; 2]> {
    let hooks = files
        .iter()
        .map(|file| (file.name(), [file.on_loss(), file.on_stall()]));
    hooks
        .filter(|(_, hooks)| hooks.iter().any(Option::is_some))
        .collect()
}

/// The files, in the order of their names. Those of editors, and what begins with a dot, are none.
fn paths(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    match paths.len() > FILES_MAX {
        true => Err(io::Error::other(format!(
            "{} files are more than {FILES_MAX}",
            paths.len()
        ))),
        false => Ok(paths),
    }
}
