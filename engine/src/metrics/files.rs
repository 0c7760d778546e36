//! Files of measurements: their names, and those that appear whole or not at all.

use super::MetricsError;
use crate::files::{self, Readers};
use crate::text;
use serde::Serialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// `PREFIX` with `suffix` behind it: the files of one run lie beside each other.
pub fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes `value` as JSON for people and machines. The file appears whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), MetricsError> {
    let write = || {
        let text = text::json(value)? + "\n";
        files::write(path, text.as_bytes(), Readers::ByUmask)
    };
    write().map_err(|source| MetricsError::Write {
        path: path.to_owned(),
        source,
    })
}
