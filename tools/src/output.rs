//! What the command prints: results on standard output, everything else on standard error.

use crate::log::{self, Fields};
use crate::stderr;
pub use colo_ring::text::printable;
use colo_ring::text::{self, printable_lines};
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Why a subcommand failed.
#[derive(Debug, Error)]
pub enum CommandError {
    /// Options that cannot go together or that this machine cannot honour: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// It was tried and failed: exit code 1. The message says what to do.
    #[error("{0}")]
    Failed(String),
    /// Standard output cannot be written.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

impl CommandError {
    /// A failure, in its own words.
    pub fn failed(error: impl Display) -> Self {
        Self::Failed(error.to_string())
    }

    /// The same with another message.
    #[must_use]
    pub(crate) fn map_message(self, change: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Usage(message) => Self::Usage(change(message)),
            Self::Failed(message) => Self::Failed(change(message)),
            Self::Output(error) => Self::Output(error),
        }
    }

    /// Tells it on standard error, for machines on standard output, too, and returns the exit code that belongs to it.
    pub fn report(&self) -> ExitCode {
        let exit_code = match self {
            // The reader of the output has closed it.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
            Self::Usage(_) => 2,
            Self::Failed(_) | Self::Output(_) => 1,
        };
        tell(&format!("colo-ring: {self}"));
        print_error(&self.to_string(), exit_code);
        ExitCode::from(exit_code)
    }
}

/// Whether errors are printed as JSON: what `--json` asks for.
static ERRORS_AS_JSON: AtomicBool = AtomicBool::new(false);

/// Whether standard output has a document, or is for something else: an error would not be a document of its own there.
static OUTPUT_TAKEN: AtomicBool = AtomicBool::new(false);

/// From now on errors are printed as JSON, too.
pub(crate) fn errors_as_json() {
    ERRORS_AS_JSON.store(true, Ordering::Relaxed);
}

/// Standard output is for something else than results.
pub(crate) fn take_output() {
    OUTPUT_TAKEN.store(true, Ordering::Relaxed);
}

/// Why a command failed. It is all of standard output, unless the command has printed lines of JSON before.
#[derive(Serialize, JsonSchema)]
pub(crate) struct ErrorReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// What is wrong and what to do about it, as on standard error.
    error: &'a str,
    /// The exit code: 1 failed, 2 wrong usage.
    exit_code: u8,
}

/// Prints an error for machines, if that is asked for.
pub(crate) fn print_error(error: &str, exit_code: u8) {
    if !ERRORS_AS_JSON.load(Ordering::Relaxed) || OUTPUT_TAKEN.load(Ordering::Relaxed) {
        return;
    }
    let report = ErrorReport {
        schema: "colo-ring.error",
        schema_version: 1,
        error,
        exit_code,
    };
    // Where standard output cannot be written, standard error has it.
    let _ = text::json_line(&report).map(|line| print(&(line + "\n")));
}

/// A line of the log, on standard error. One that begins with `warning:` is a warning, one with `colo-ring:` an error.
pub fn tell(line: &str) {
    tell_of(line, Fields::default());
}

/// The same with what is known beside the text.
pub(crate) fn tell_of(line: &str, fields: Fields) {
    let line = stderr::shortened(printable_lines(line));
    if let Some(entry) = log::entry(&line, fields) {
        stderr::write_entry(entry);
    }
}

/// A result for people, on standard output.
///
/// # Errors
/// If standard output cannot be written.
pub fn print(text: &str) -> Result<(), CommandError> {
    draw(&printable_lines(text))
}

/// A text with commands to the terminal, on standard output: what others have chosen in it is printable already.
///
/// # Errors
/// If standard output cannot be written.
pub(crate) fn draw(text: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// A result for machines, on standard output.
///
/// # Errors
/// If standard output cannot be written.
pub fn print_json(value: &impl Serialize) -> Result<(), CommandError> {
    take_output();
    let text = text::json(value).map_err(io::Error::from)?;
    print(&(text + "\n"))
}

/// The line at the bottom of a terminal that shows progress. Without a terminal there is none.
pub struct ProgressLine {
    shown: bool,
    terminal: bool,
}

impl ProgressLine {
    /// A line that is still empty; `wanted` is whether there should be one at all.
    pub fn new(wanted: bool) -> Self {
        Self {
            shown: false,
            terminal: wanted && io::stderr().is_terminal(),
        }
    }

    /// Whether it is visible: otherwise its content need not be computed.
    pub fn is_shown(&self) -> bool {
        self.terminal
    }

    /// Shows `text` in place of what was shown.
    pub fn show(&mut self, text: &str) {
        if self.terminal {
            stderr::write(format!("\r\x1b[K{}", printable(text)));
            self.shown = true;
        }
    }

    /// Shows how much of a number of steps is done, and which one is next.
    pub fn bar(&mut self, done: usize, all: usize, next: &str) {
        self.show(&bar(done, all, next));
    }

    /// Takes the line away, before another line is printed.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            stderr::write("\r\x1b[K".to_owned());
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Bytes as MiB, for people.
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn bar(done: usize, all: usize, next: &str) -> String {
    const WIDTH: usize = 30;
    let full = WIDTH * done.min(all) / all.max(1);
    format!("[{:<WIDTH$}] {done} of {all}: {next}", "=".repeat(full))
}

/// Columns of a terminal.
pub(crate) const COLUMNS: usize = 80;

/// A paragraph in lines that fit a terminal.
pub fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last().map_or(0, |line| line.chars().count());
        match lines.last_mut() {
            Some(line) if last == 0 => line.push_str(word),
            Some(line) if last + 1 + word.chars().count() <= COLUMNS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.join("\n") + "\n"
}

/// A table of texts: the first column to the left, the others to the right, as numbers are.
pub fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| printable(cell)).collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A listing of any length, item by item: lines of a table for people; for machines one JSON object whose last key is
/// the list.
pub struct Lines {
    out: BufWriter<StdoutLock<'static>>,
    json: bool,
    widths: Vec<usize>,
    empty: bool,
}

impl Lines {
    /// Begins a listing. `around` is the object that the list, named `key`, is put into.
    ///
    /// # Errors
    /// If standard output cannot be written.
    pub fn new(json: bool, around: &impl Serialize, key: &str) -> Result<Self, CommandError> {
        let mut out = BufWriter::new(io::stdout().lock());
        if json {
            take_output();
            let object = text::json(around).map_err(io::Error::from)?;
            let open = object.trim_end().trim_end_matches('}').trim_end();
            write!(out, "{open},\n  \"{key}\": [")?;
        }
        Ok(Self {
            out,
            json,
            widths: Vec::new(),
            empty: true,
        })
    }

    /// The table's head: names separated by `|`, and how wide the columns are at least.
    ///
    /// # Errors
    /// If standard output cannot be written.
    pub fn head(&mut self, names: &str, widths: &[usize]) -> Result<(), CommandError> {
        self.widths = widths.to_vec();
        if !self.json {
            let names: Vec<_> = names.split('|').map(str::to_owned).collect();
            self.line(&names)?;
        }
        Ok(())
    }

    /// An item: what it is for machines, and its cells for people.
    ///
    /// # Errors
    /// If standard output cannot be written.
    pub fn item(
        &mut self,
        item: &impl Serialize,
        cells: impl FnOnce() -> Vec<String>,
    ) -> Result<(), CommandError> {
        if !self.json {
            return self.line(&cells());
        }
        let separator = if std::mem::take(&mut self.empty) { "" } else { "," };
        let text = text::json_line(item).map_err(io::Error::from)?;
        Ok(write!(self.out, "{separator}\n    {text}")?)
    }

    fn line(&mut self, cells: &[String]) -> Result<(), CommandError> {
        let padded = cells.iter().enumerate().map(|(column, cell)| {
            let width = self.widths.get(column).copied().unwrap_or(0);
            format!("{:>width$}", printable(cell))
        });
        let line = padded.collect::<Vec<_>>().join("  ");
        Ok(writeln!(self.out, "{}", line.trim_end())?)
    }

    /// Ends the listing.
    ///
    /// # Errors
    /// If standard output cannot be written.
    pub fn finish(mut self) -> Result<(), CommandError> {
        if self.json {
            let close = if self.empty { "" } else { "\n  " };
            writeln!(self.out, "{close}]\n}}")?;
        }
        Ok(self.out.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_fills_up() {
        let filled = |done, all| bar(done, all, "x").matches('=').count();
        assert_eq!(
            [filled(0, 8), filled(4, 8), filled(8, 8), filled(0, 0)],
            [0, 15, 30, 0]
        );
        assert_eq!(
            bar(1, 2, "next"),
            format!("[{}{}] 1 of 2: next", "=".repeat(15), " ".repeat(15))
        );
    }

    #[test]
    fn tables_line_up() {
        let rows = [vec!["phase", "p50"], vec!["transfer", "1.00 µs"], vec!["x"]];
        let rows = rows.map(|row| row.into_iter().map(str::to_owned).collect());
        assert_eq!(table(&rows), "phase         p50\ntransfer  1.00 µs\nx\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn no_cell_commands_a_terminal_or_adds_a_row() {
        let row = ["a\u{1b}[2J", "b\nc"].map(str::to_owned).to_vec();
        assert_eq!(table(&[row]), "a\\u{1b}[2J  b\\nc\n");
    }
}
