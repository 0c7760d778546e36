//! Reading HdrHistogram interval logs of any writer.
//!
//! The `hdrhistogram` crate decodes the histograms. Lines are taken apart here, because the crate's own iterator
//! refuses what other tools write: blank lines, numbers without a fraction, a last line without its end. A file is
//! never trusted: lines, decompressed histograms, counts and tags all have limits, so that memory stays bounded.
//!
//! A log that was cut, as a killed process leaves it, is read up to the cut. Damage before the end is an error that
//! names line and byte.

mod payload;

pub use payload::{PLAIN_BYTES_MAX, PayloadError};

use colo_ring::metrics::SIGNIFICANT_DIGITS;
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Bytes of a line at most. A histogram of five digits over the whole range of 64 bits stays below.
pub const LINE_BYTES_MAX: usize = 8 << 20;

/// Tags that [`Log`] keeps apart; intervals of further ones are in the total alone.
pub const TAGS_MAX: usize = 256;

/// Comments that [`Log`] keeps: the head of a log.
pub const COMMENTS_MAX: usize = 32;

/// Values counted in one log at most: sums of counts then fit 64 bits with room.
pub const COUNT_MAX: u64 = 1 << 53;

/// Why a log could not be read.
#[derive(Debug, Error)]
pub enum HlogError {
    /// The system's error.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line that does not belong into a log.
    #[error("{}, line {line} (byte {offset}): {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: u64,
        /// Where it begins.
        offset: u64,
        /// What is wrong.
        reason: LineError,
    },
    /// The file ends without an interval.
    #[error("{} has no interval{}", path.display(), torn.as_ref().map(|torn| format!("; {torn}")).unwrap_or_default())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What its last line is, if that is torn.
        torn: Option<Torn>,
    },
}

/// What is wrong with a line.
#[derive(Debug, Error)]
pub enum LineError {
    /// No line of a log looks so.
    #[error(
        "neither a comment nor an interval \"[Tag=TAG,]START,LENGTH,MAX,HISTOGRAM\": is this an HdrHistogram log?"
    )]
    Foreign,
    /// Longer than any.
    #[error("longer than {LINE_BYTES_MAX} bytes: is this an HdrHistogram log?")]
    TooLong,
    /// A number that is none.
    #[error("{field} is {text:?}, and seconds or a value were expected")]
    Number {
        /// Which of the three.
        field: &'static str,
        /// The text.
        text: String,
    },
    /// The histogram.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// More values than can be counted.
    #[error("with this interval the log counts more than {COUNT_MAX} values")]
    TooMany,
}

/// The end of a log that was cut in the middle of a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Torn {
    /// Number of the cut line.
    pub line: u64,
    /// Where it begins: the log is whole up to there.
    pub offset: u64,
    /// What is missing.
    pub reason: String,
}

impl std::fmt::Display for Torn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "cut in line {} (byte {}): {}",
            self.line, self.offset, self.reason
        )
    }
}

/// One line with something in it.
#[derive(Debug)]
pub enum Entry {
    /// `#[StartTime: ...`: seconds since 1970.
    StartTime(f64),
    /// `#[BaseTime: ...`: seconds that times of intervals count from.
    BaseTime(f64),
    /// Another comment, without its `#`.
    Comment(String),
    /// An interval.
    Interval(Interval),
    /// The cut end. Nothing follows.
    Torn(Torn),
}

/// An interval.
#[derive(Debug)]
pub struct Interval {
    /// Its line, from 1.
    pub line: u64,
    /// Where the line begins.
    pub offset: u64,
    /// What it belongs to.
    pub tag: Option<String>,
    /// Its start in seconds, since [`Entry::BaseTime`] or, in logs with numbers that large, since 1970.
    pub start_s: f64,
    /// Its length in seconds.
    pub length_s: f64,
    /// Its values.
    pub histogram: Histogram<u64>,
}

/// Reads a log entry by entry.
pub struct Reader<R> {
    source: R,
    path: PathBuf,
    line: u64,
    offset: u64,
    counted: u64,
    buffer: Vec<u8>,
}

impl Reader<BufReader<File>> {
    /// Opens a file.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, HlogError> {
        let file = File::open(path).map_err(|source| HlogError::Read {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::new(BufReader::new(file), path))
    }
}

impl<R: BufRead> Reader<R> {
    /// Reads `source`; errors name it as `path`.
    pub fn new(source: R, path: &Path) -> Self {
        Self {
            source,
            path: path.to_owned(),
            line: 0,
            offset: 0,
            counted: 0,
            buffer: Vec::new(),
        }
    }

    /// The next entry, or None at the end.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is none of a log.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, HlogError> {
        loop {
            self.offset += self.buffer.len() as u64;
            self.line += 1;
            self.buffer.clear();
            let limit = LINE_BYTES_MAX as u64 + 1;
            let mut limited = (&mut self.source).take(limit);
            let read = limited.read_until(b'\n', &mut self.buffer);
            read.map_err(|source| HlogError::Read {
                path: self.path.clone(),
                source,
            })?;
            if self.buffer.is_empty() {
                return Ok(None);
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(self.error(LineError::TooLong));
            }
            match self.parse_line() {
                Ok(Some(entry)) => return Ok(Some(entry)),
                Ok(None) => {}
                Err(reason) if self.buffer.ends_with(b"\n") => return Err(self.error(reason)),
                Err(reason) => {
                    return Ok(Some(Entry::Torn(Torn {
                        line: self.line,
                        offset: self.offset,
                        reason: reason.to_string(),
                    })));
                }
            }
        }
    }

    fn error(&self, reason: LineError) -> HlogError {
        HlogError::Line {
            path: self.path.clone(),
            line: self.line,
            offset: self.offset,
            reason,
        }
    }

    fn parse_line(&mut self) -> Result<Option<Entry>, LineError> {
        let line = self.buffer.trim_ascii();
        if let Some(comment) = line.strip_prefix(b"#") {
            return Ok(Some(parse_comment(&String::from_utf8_lossy(comment))));
        }
        let legend = line.starts_with(b"\"") || line.starts_with(b"StartTimestamp");
        if line.is_empty() || legend {
            return Ok(None);
        }
        let text = str::from_utf8(line).map_err(|_| LineError::Foreign)?;
        let interval = parse_interval(text, self.line, self.offset)?;
        self.counted = self.counted.saturating_add(interval.histogram.len());
        if self.counted > COUNT_MAX {
            return Err(LineError::TooMany);
        }
        Ok(Some(Entry::Interval(interval)))
    }
}

fn parse_comment(comment: &str) -> Entry {
    let seconds = |name: &str| {
        let text = comment.strip_prefix('[')?.strip_prefix(name)?;
        let number = text.split_whitespace().next()?;
        number.parse::<f64>().ok().filter(|seconds| seconds.is_finite())
    };
    if let Some(seconds) = seconds("StartTime:") {
        Entry::StartTime(seconds)
    } else if let Some(seconds) = seconds("BaseTime:") {
        Entry::BaseTime(seconds)
    } else {
        Entry::Comment(comment.to_owned())
    }
}

fn parse_interval(text: &str, line: u64, offset: u64) -> Result<Interval, LineError> {
    let (tag, fields) = match text.strip_prefix("Tag=") {
        Some(rest) => {
            let (tag, fields) = rest.split_once(',').ok_or(LineError::Foreign)?;
            (Some(tag.to_owned()), fields)
        }
        None => (None, text),
    };
    let fields: Vec<_> = fields.splitn(5, ',').map(str::trim).collect();
    let [start, length, max, payload] = fields[..] else {
        return Err(LineError::Foreign);
    };
    let number = |field, text: &str| match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err(LineError::Number {
            field,
            text: text.chars().take(40).collect(),
        }),
    };
    let start_s = number("the start", start)?;
    let length_s = number("the length", length)?;
    // For people only: the histogram has it exactly.
    number("the maximum", max)?;
    Ok(Interval {
        line,
        offset,
        tag,
        start_s,
        length_s,
        histogram: payload::decode(payload)?,
    })
}

/// A whole log, its intervals added up.
#[derive(Debug)]
pub struct Log {
    /// Seconds since 1970, if the log says when it began.
    pub start_time_s: Option<f64>,
    /// The first comments.
    pub comments: Vec<String>,
    /// How many intervals there are.
    pub intervals: u64,
    /// All values, with three significant digits.
    pub total: Histogram<u64>,
    /// Intervals and values by tag, of the first [`TAGS_MAX`] tags.
    pub tags: BTreeMap<String, (u64, Histogram<u64>)>,
    /// Tags beyond those may be missing in `tags`.
    pub tags_not_kept: bool,
    /// Where it is cut, if it is.
    pub torn: Option<Torn>,
}

impl Log {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is no log, or has no interval.
    pub fn read(path: &Path) -> Result<Self, HlogError> {
        Self::collect(&mut Reader::open(path)?)
    }

    /// Reads `reader` to its end.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn collect<R: BufRead>(reader: &mut Reader<R>) -> Result<Self, HlogError> {
        let mut log = Self {
            start_time_s: None,
            comments: Vec::new(),
            intervals: 0,
            total: empty(),
            tags: BTreeMap::new(),
            tags_not_kept: false,
            torn: None,
        };
        while let Some(entry) = reader.next_entry()? {
            match entry {
                Entry::StartTime(seconds) => log.start_time_s = Some(seconds),
                Entry::BaseTime(_) => {}
                Entry::Comment(comment) if log.comments.len() < COMMENTS_MAX => log.comments.push(comment),
                Entry::Comment(_) => {}
                Entry::Interval(interval) => log.add(&interval),
                Entry::Torn(torn) => {
                    log.torn = Some(torn);
                    break;
                }
            }
        }
        if log.intervals == 0 {
            return Err(HlogError::Empty {
                path: reader.path.clone(),
                torn: log.torn,
            });
        }
        Ok(log)
    }

    fn add(&mut self, interval: &Interval) {
        self.intervals += 1;
        add_values(&mut self.total, &interval.histogram);
        let Some(tag) = &interval.tag else { return };
        if self.tags.len() == TAGS_MAX && !self.tags.contains_key(tag) {
            self.tags_not_kept = true;
            return;
        }
        let (intervals, histogram) = self.tags.entry(tag.clone()).or_insert_with(|| (0, empty()));
        *intervals += 1;
        add_values(histogram, &interval.histogram);
    }
}

/// A histogram without values yet, of the digits that all ours have.
pub(crate) fn empty() -> Histogram<u64> {
    Histogram::new(SIGNIFICANT_DIGITS).expect("0 to 5 significant digits are allowed")
}

/// Adds value by value: `Histogram::add` would keep the source's digits, and with them its memory.
pub(crate) fn add_values(to: &mut Histogram<u64>, from: &Histogram<u64>) {
    for step in from.iter_recorded() {
        to.record_n(step.value_iterated_to(), step.count_at_value())
            .expect("a histogram that resizes itself takes any value");
    }
}

#[cfg(test)]
mod tests;
