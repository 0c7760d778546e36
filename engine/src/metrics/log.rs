//! One interval log in HdrHistogram's V2 format: the file that other HdrHistogram tools read.
//!
//! Every interval is appended in one write of whole lines to an unbuffered file, so that whatever ends the process
//! leaves a log that can be read up to its last whole line. What a full disk leaves of a line is cut off, so that the next
//! interval is not appended to half a line, and a comment counts what is missing.

use super::earlier::hold;
use super::recorder::MetricsError;
use crate::files::{self, Readers};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, IntervalLogWriterError, Tag};
use nix::fcntl::Flock;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Values are nanoseconds; the maximum that stands in clear in each line is divided by this to read as
/// milliseconds, as the format's convention wants it.
pub const VALUES_PER_LOGGED_UNIT: f64 = 1_000_000.0;

const LEGEND: &str =
    "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\"\n";

/// The interval log of one phase, being written.
pub struct IntervalLog {
    lines: Lines,
    file: LogFile,
}

impl IntervalLog {
    /// Creates the file, replacing one that no program writes to, and writes its head. Times in it count from `started`.
    ///
    /// # Errors
    /// If the file cannot be made or written, or another program writes to it.
    pub fn create(path: PathBuf, comments: &[String], started: SystemTime) -> Result<Self, MetricsError> {
        let mut lines = Lines::new();
        let file = LogFile::create(path, &mut lines, comments, started)?;
        Ok(Self { lines, file })
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
        let added = self.lines.add(tag, histogram, start, length);
        added.map_err(|source| log_error(&self.file.path, source))
    }

    /// Adds a comment to the lines that [`Self::append`] will write.
    pub fn comment(&mut self, text: &str) {
        self.lines.comment(text);
    }

    /// Writes what was added; nothing of it is kept for another attempt, so that a full disk cannot fill memory.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn append(&mut self) -> Result<(), MetricsError> {
        self.file.append(&self.lines.take())
    }
}

/// Lines of a log that are not written yet.
pub(super) struct Lines {
    serializer: V2DeflateSerializer,
    bytes: Vec<u8>,
}

impl Lines {
    pub(super) fn new() -> Self {
        Self {
            serializer: V2DeflateSerializer::new(),
            bytes: Vec::new(),
        }
    }

    /// See [`IntervalLog::add`].
    pub(super) fn add(
        &mut self,
        tag: Option<&str>,
        histogram: &Histogram<u64>,
        start: Duration,
        length: Duration,
    ) -> io::Result<()> {
        // The crate's writer begins with a head of its own each time: here it goes to a scratch buffer of its own,
        // and the lines of the head, the only ones with a '#', stay behind.
        let mut scratch = Vec::new();
        IntervalLogWriterBuilder::new()
            .with_max_value_divisor(VALUES_PER_LOGGED_UNIT)
            .begin_log_with(&mut scratch, &mut self.serializer)?
            .write_histogram(histogram, start, length, tag.and_then(Tag::new))
            .map_err(|error| match error {
                IntervalLogWriterError::IoError(source) => source,
                IntervalLogWriterError::SerializeError(error) => io::Error::other(error.to_string()),
            })?;
        let interval = scratch
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| !line.starts_with(b"#"));
        self.bytes.extend(interval.flatten());
        Ok(())
    }

    pub(super) fn comment(&mut self, text: &str) {
        for line in text.lines() {
            self.bytes.push(b'#');
            self.bytes.extend_from_slice(line.as_bytes());
            self.bytes.push(b'\n');
        }
    }

    /// What was added.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    fn add_head(&mut self, comments: &[String], started: SystemTime) -> io::Result<()> {
        let mut builder = IntervalLogWriterBuilder::new();
        for comment in comments {
            builder.add_comment(comment);
        }
        builder.with_start_time(started).with_base_time(started);
        builder.with_max_value_divisor(VALUES_PER_LOGGED_UNIT);
        builder.begin_log_with(&mut self.bytes, &mut self.serializer)?;
        self.bytes.extend_from_slice(LEGEND.as_bytes());
        Ok(())
    }
}

/// The file of a log.
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    /// That this program writes to it.
    _lock: Option<Flock<File>>,
    /// Bytes of the file that are whole lines.
    length: u64,
    /// Intervals that were lost since the last one that was written.
    missing: u64,
}

impl LogFile {
    /// See [`IntervalLog::create`]. The head is encoded with `lines`, which are empty.
    pub(super) fn create(
        path: PathBuf,
        lines: &mut Lines,
        comments: &[String],
        started: SystemTime,
    ) -> Result<Self, MetricsError> {
        let file = files::replace(&path, Readers::ByUmask).map_err(|source| MetricsError::Create {
            path: path.clone(),
            source,
        })?;
        let lock = hold(&path, &file)?;
        let mut log = Self {
            path,
            file,
            _lock: lock,
            length: 0,
            missing: 0,
        };
        let head = lines.add_head(comments, started);
        head.map_err(|source| log_error(&log.path, source))?;
        log.append(&lines.take())?;
        Ok(log)
    }

    /// So many intervals were lost before they came here.
    pub(super) fn missed(&mut self, intervals: u64) {
        self.missing += intervals;
    }

    /// Writes lines in one piece.
    pub(super) fn append(&mut self, lines: &[u8]) -> Result<(), MetricsError> {
        if lines.is_empty() {
            return Ok(());
        }
        let count = self.missing;
        let noted = match count {
            0 => lines.into(),
            _ => {
                let note = format!("#{count} intervals are missing here: this file could not be written\n");
                Cow::from([note.as_bytes(), lines].concat())
            }
        };
        let written = self.file.write_all(&noted);
        match &written {
            Ok(()) => {
                self.length += noted.len() as u64;
                self.missing = 0;
            }
            Err(_) => {
                self.missing += 1;
                // A device or a FIFO cannot be cut, and has no half line that stays.
                let _ = self.file.set_len(self.length);
                let _ = self.file.seek(SeekFrom::Start(self.length));
            }
        }
        written.map_err(|source| log_error(&self.path, source))
    }

    /// Bytes that it has.
    pub(super) fn bytes(&self) -> u64 {
        self.length
    }
}

fn log_error(path: &Path, source: io::Error) -> MetricsError {
    MetricsError::Write {
        path: path.to_owned(),
        source,
    }
}
