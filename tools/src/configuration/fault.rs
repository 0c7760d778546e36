//! What is wrong with a configuration, and where.

use super::Located;
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A place and what is wrong there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct Fault {
    /// The file.
    file: PathBuf,
    /// From 1; none where it is about the whole file.
    line: Option<usize>,
    /// In characters, from 1.
    column: Option<usize>,
    /// What is wrong.
    message: String,
}

/// Line and column, from 1.
pub(super) type Place = (usize, usize);

impl Fault {
    pub(super) fn at(file: &Path, (line, column): Place, message: String) -> Self {
        Self {
            line: Some(line),
            column: Some(column),
            ..Self::of_file(file, message)
        }
    }

    /// One of the whole file.
    pub(crate) fn of_file(file: &Path, message: String) -> Self {
        Self {
            file: file.to_owned(),
            line: None,
            column: None,
            message,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// At least one.
#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) struct Faults(pub(crate) Vec<Fault>);

impl From<Fault> for Faults {
    fn from(fault: Fault) -> Self {
        Self(vec![fault])
    }
}

impl Faults {
    /// Those of a text, in its order.
    pub(super) fn located(file: &Path, text: &str, mut faults: Vec<Located>) -> Self {
        faults.sort_by_key(|(span, _)| span.start);
        let fault = |(span, message): Located| Fault::at(file, place(text, span.start), message);
        Self(faults.into_iter().map(fault).collect())
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, fault) in self.0.iter().enumerate() {
            let separator = if position == 0 { "" } else { "\n" };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

/// Line and column of a byte.
pub(super) fn place(text: &str, byte: usize) -> Place {
    let before = text.get(..byte).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |end| end + 1);
    (line, before[start..].chars().count() + 1)
}
