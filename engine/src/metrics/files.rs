//! Files of measurements: their names, and those that appear whole or not at all.

use super::MetricsError;
use serde::Serialize;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `PREFIX` with `suffix` behind it: the files of one run lie beside each other.
pub fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes `value` as JSON for people and machines. The file appears whole or not at all: it is written beside its
/// place, then renamed.
///
/// # Errors
/// If it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), MetricsError> {
    let beside = with_suffix(path, ".new");
    let write = || {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        let mut file = std::fs::File::create(&beside)?;
        file.write_all(&text)?;
        std::fs::rename(&beside, path)
    };
    write().map_err(|source| MetricsError::Write {
        path: path.to_owned(),
        source,
    })
}
