//! One interval log in HdrHistogram's V2 format: the file that other HdrHistogram tools read.
//!
//! Every interval is appended in one write of whole lines to an unbuffered file, so that whatever ends the process
//! leaves a log that can be read up to its last whole line.

use super::recorder::MetricsError;
use crate::files::{self, Readers};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, IntervalLogWriterError, Tag};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Values are nanoseconds; the maximum that stands in clear in each line is divided by this to read as
/// milliseconds, as the format's convention wants it.
pub const VALUES_PER_LOGGED_UNIT: f64 = 1_000_000.0;

const LEGEND: &str =
    "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\"\n";

/// The interval log of one phase, being written.
pub struct IntervalLog {
    path: PathBuf,
    file: File,
    serializer: V2DeflateSerializer,
    lines: Vec<u8>,
}

impl IntervalLog {
    /// Creates the file, replacing one of an earlier run, and writes its head. Times in it count from `started`.
    ///
    /// # Errors
    /// If the file cannot be made or written.
    pub fn create(path: PathBuf, comments: &[String], started: SystemTime) -> Result<Self, MetricsError> {
        let file = files::replace(&path, Readers::ByUmask).map_err(|source| MetricsError::Create {
            path: path.clone(),
            source,
        })?;
        let mut log = Self {
            path,
            file,
            serializer: V2DeflateSerializer::new(),
            lines: Vec::new(),
        };
        let mut builder = IntervalLogWriterBuilder::new();
        for comment in comments {
            builder.add_comment(comment);
        }
        builder.with_start_time(started).with_base_time(started);
        builder.with_max_value_divisor(VALUES_PER_LOGGED_UNIT);
        builder
            .begin_log_with(&mut log.lines, &mut log.serializer)
            .map_err(|source| log_error(&log.path, source))?;
        log.lines.extend_from_slice(LEGEND.as_bytes());
        log.append()?;
        Ok(log)
    }

    /// Adds an interval to the lines that [`Self::append`] will write: `histogram` in nanoseconds, `start` since the
    /// log's start. Blanks, commas and line ends cannot be in a tag: with them the interval has none.
    ///
    /// # Errors
    /// If the histogram cannot be encoded.
    pub fn add(
        &mut self,
        tag: Option<&str>,
        histogram: &Histogram<u64>,
        start: Duration,
        length: Duration,
    ) -> Result<(), MetricsError> {
        // The crate's writer begins with a head of its own each time: here it goes to a scratch buffer of its own,
        // and the lines of the head, the only ones with a '#', stay behind.
        let mut scratch = Vec::new();
        IntervalLogWriterBuilder::new()
            .with_max_value_divisor(VALUES_PER_LOGGED_UNIT)
            .begin_log_with(&mut scratch, &mut self.serializer)
            .map_err(|source| log_error(&self.path, source))?
            .write_histogram(histogram, start, length, tag.and_then(Tag::new))
            .map_err(|error| match error {
                IntervalLogWriterError::IoError(source) => log_error(&self.path, source),
                IntervalLogWriterError::SerializeError(error) => {
                    log_error(&self.path, std::io::Error::other(error.to_string()))
                }
            })?;
        let interval = scratch
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| !line.starts_with(b"#"));
        self.lines.extend(interval.flatten());
        Ok(())
    }

    /// Adds a comment to the lines that [`Self::append`] will write.
    pub fn comment(&mut self, text: &str) {
        for line in text.lines() {
            self.lines.push(b'#');
            self.lines.extend_from_slice(line.as_bytes());
            self.lines.push(b'\n');
        }
    }

    /// Writes what was added; nothing of it is kept for another attempt, so that a full disk cannot fill memory.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn append(&mut self) -> Result<(), MetricsError> {
        let written = self.file.write_all(&self.lines);
        self.lines.clear();
        written.map_err(|source| log_error(&self.path, source))
    }
}

fn log_error(path: &Path, source: std::io::Error) -> MetricsError {
    MetricsError::Write {
        path: path.to_owned(),
        source,
    }
}
