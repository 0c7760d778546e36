//! Small captures: the content of every page is replaced by a fingerprint of it.
//!
//! What a secondary must get right is where each page belongs, in what order the pages come and what is zero; what is
//! in a page does not matter to it. So a page that is not zero becomes 4 KiB that depend on all of its bytes, and
//! that compress to some 20 bytes:
//!
//! * equal pages stay equal, different pages stay different (this is checked), zero pages stay zero;
//! * byte `i` is byte `(i + i / 512) % 8` of a 64-bit hash, so a part of a page at a wrong place shows as well.
//!
//! Nothing of a guest's memory is in the result, and so no code of its kernel and firmware either.

use colo_ring_tools::capture_file::{
    CaptureError, CaptureInfo, CaptureReader, CaptureWriter, Compression, ConnectionId, Direction, EndKind,
    Event,
};
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

const PAGE: usize = 4096;
const INIT: usize = 64;
const HEADER: usize = 1344;

/// Flags of a packet that say how its pages are compressed, or that they are device state.
const FLAGS_REFUSED: usize = 0x7e;

/// Why a recording cannot be made smaller.
#[derive(Debug, Error)]
pub enum ShrinkError {
    /// The capture file cannot be read or written.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Its end is missing.
    #[error("{} is not complete", .0.display())]
    Incomplete(PathBuf),
    /// A file of raw streams cannot be read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The index is not UTF-8.
    #[error("index.jsonl is no text")]
    IndexText,
    /// A line of the index is malformed.
    #[error("index.jsonl: {0}")]
    IndexLine(#[from] serde_json::Error),
    /// The index has more bytes than the streams.
    #[error("the index has more bytes than the streams")]
    IndexTooLong,
    /// The index has fewer bytes than the streams.
    #[error("the index has fewer bytes than the streams")]
    IndexTooShort,
    /// Nothing would become smaller.
    #[error("there is no multifd channel: only those are made smaller")]
    NoChannel,
    /// Pages are compressed.
    #[error("a packet's flags are {0:#x}: its pages are compressed")]
    Compressed(usize),
    /// Two different pages would become equal.
    #[error("two different pages have the fingerprint {0:#x}")]
    SameFingerprint(u64),
}

/// What happened; data as a range of its stream.
enum What {
    Open(String),
    Data(Direction, std::ops::Range<usize>),
    End(Direction, EndKind),
}

/// A recorded session.
pub struct Recording {
    info: CaptureInfo,
    /// The bytes of each connection and direction.
    streams: Vec<[Vec<u8>; 2]>,
    /// In the order in which it was recorded.
    records: Vec<(Duration, usize, What)>,
}

/// What was done.
pub struct Shrunk {
    pages: usize,
    zero: usize,
    different: usize,
}

impl fmt::Display for Shrunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pages,
            zero,
            different,
        } = self;
        write!(
            f,
            "{pages} pages with content: {zero} of them zero, {different} different others"
        )
    }
}

impl Recording {
    fn data(&mut self, at: Duration, connection: usize, direction: Direction, bytes: &[u8]) {
        let stream = &mut self.streams[connection][direction.index()];
        let begin = stream.len();
        stream.extend_from_slice(bytes);
        let what = What::Data(direction, begin..stream.len());
        self.records.push((at, connection, what));
    }
}

/// Reads a capture file.
///
/// # Errors
/// If it cannot be read to its end.
pub fn read_capture(path: &Path) -> Result<Recording, ShrinkError> {
    let mut reader = CaptureReader::open(path)?;
    let mut recording = Recording {
        info: reader.info().clone(),
        streams: Vec::new(),
        records: Vec::new(),
    };
    while let Some(record) = reader.next()? {
        match record.event {
            Event::Open { connection, label } => {
                recording.streams.push(Default::default());
                let what = What::Open(label.to_owned());
                recording.records.push((record.at, connection.0.into(), what));
            }
            Event::Data {
                connection,
                direction,
                bytes,
            } => recording.data(record.at, connection.0.into(), direction, bytes),
            Event::End {
                connection,
                direction,
                how,
            } => recording
                .records
                .push((record.at, connection.0.into(), What::End(direction, how))),
            Event::Note(_) | Event::Finish(_) => {}
        }
    }
    match reader.is_torn() {
        Some(_) => Err(ShrinkError::Incomplete(path.to_owned())),
        None => Ok(recording),
    }
}

#[derive(Deserialize)]
struct IndexLine {
    t_ns: u64,
    channel: usize,
    direction: String,
    length: usize,
}

/// Reads a directory of raw streams, `connN.p2s.bin` and `connN.s2p.bin`, with an index of when their pieces came.
///
/// # Errors
/// If it is not such a directory.
pub fn read_directory(directory: &Path) -> Result<Recording, ShrinkError> {
    let read = |name: String| {
        let path = directory.join(name);
        std::fs::read(&path).map_err(|source| ShrinkError::Read { path, source })
    };
    let index = String::from_utf8(read("index.jsonl".to_owned())?).map_err(|_| ShrinkError::IndexText)?;
    let mut recording = Recording {
        info: CaptureInfo::now("prototype", serde_json::Value::Null),
        streams: Vec::new(),
        records: Vec::new(),
    };
    let mut raw: Vec<[Vec<u8>; 2]> = Vec::new();
    for line in index.lines() {
        let line: IndexLine = serde_json::from_str(line)?;
        let at = Duration::from_nanos(line.t_ns);
        let connection = line.channel;
        let direction = match line.direction.as_str() {
            "open" => {
                raw.push([
                    read(format!("conn{connection}.p2s.bin"))?,
                    read(format!("conn{connection}.s2p.bin"))?,
                ]);
                recording.streams.push(Default::default());
                let what = What::Open(String::new());
                recording.records.push((at, connection, what));
                continue;
            }
            "p2s" => Direction::ToSecondary,
            "s2p" => Direction::ToPrimary,
            _ => continue,
        };
        let begin = recording.streams[connection][direction.index()].len();
        let stream = &raw[connection][direction.index()];
        let bytes = stream
            .get(begin..begin + line.length)
            .ok_or(ShrinkError::IndexTooLong)?;
        recording.data(at, connection, direction, bytes);
    }
    let all = raw
        .iter()
        .zip(&recording.streams)
        .all(|(raw, taken)| raw.iter().map(Vec::len).eq(taken.iter().map(Vec::len)));
    match all {
        true => Ok(recording),
        false => Err(ShrinkError::IndexTooShort),
    }
}

/// Writes a recording with fingerprints for pages.
///
/// # Errors
/// If it has no multifd channel, compressed pages, two pages with one fingerprint, or cannot be written.
pub fn shrink(
    mut recording: Recording,
    primary: Option<String>,
    output: &Path,
) -> Result<Shrunk, ShrinkError> {
    let mut fingerprints = Fingerprints::default();
    let mut channels = 0;
    for [to_secondary, _] in &mut recording.streams {
        if to_secondary.starts_with(&[0x11, 0x22, 0x33, 0x44]) {
            fingerprints.replace_pages(to_secondary)?;
            channels += 1;
        }
    }
    if channels == 0 {
        return Err(ShrinkError::NoChannel);
    }
    let mut info = recording.info.clone();
    info.options = serde_json::json!({ "pages": "replaced by fingerprints" });
    info.primary = primary.or(info.primary);
    info.channels = Some(channels);
    write(&recording, &info, output)?;
    Ok(Shrunk {
        pages: fingerprints.pages,
        zero: fingerprints.zero,
        different: fingerprints.known.len(),
    })
}

fn write(recording: &Recording, info: &CaptureInfo, output: &Path) -> Result<(), CaptureError> {
    let mut writer = CaptureWriter::create(output, info, Compression::Zstd)?;
    for (at, position, what) in &recording.records {
        let connection = ConnectionId(u16::try_from(*position).expect("few connections"));
        let event = match what {
            What::Open(label) => Event::Open { connection, label },
            What::Data(direction, range) => Event::Data {
                connection,
                direction: *direction,
                bytes: &recording.streams[*position][direction.index()][range.clone()],
            },
            What::End(direction, how) => Event::End {
                connection,
                direction: *direction,
                how: *how,
            },
        };
        writer.write(*at, event)?;
    }
    writer.finish().map(drop)
}

#[derive(Default)]
struct Fingerprints {
    /// Pages with content that were seen.
    pages: usize,
    /// Those that were zero.
    zero: usize,
    /// The page behind each fingerprint.
    known: HashMap<u64, Vec<u8>>,
}

impl Fingerprints {
    /// Replaces the pages in everything that a channel carried.
    fn replace_pages(&mut self, channel: &mut [u8]) -> Result<(), ShrinkError> {
        let mut at = INIT;
        while let Some(header) = channel.get(at..at + HEADER) {
            let number = |at: usize| {
                let bytes = header[at..at + 4].iter();
                bytes.fold(0, |number: usize, byte| number << 8 | usize::from(*byte))
            };
            let (flags, normal) = (number(8), number(16));
            if flags & FLAGS_REFUSED != 0 {
                return Err(ShrinkError::Compressed(flags));
            }
            at += HEADER;
            for _ in 0..normal {
                // The recording may end within a page.
                let end = channel.len().min(at + PAGE);
                self.replace(&mut channel[at..end])?;
                at = end;
            }
        }
        Ok(())
    }

    fn replace(&mut self, page: &mut [u8]) -> Result<(), ShrinkError> {
        self.pages += 1;
        if page.iter().all(|byte| *byte == 0) {
            self.zero += 1;
            return Ok(());
        }
        let fingerprint = hash(page);
        let known = self.known.entry(fingerprint).or_insert_with(|| page.to_vec());
        if known != page {
            return Err(ShrinkError::SameFingerprint(fingerprint));
        }
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = fingerprint.to_le_bytes()[(at + at / 512) % 8];
        }
        Ok(())
    }
}

/// FNV-1a over 64 bits, mixed as splitmix64 does; never 0.
fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (fnv ^ (fnv >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pages_stay_equal_and_zero_stays_zero() {
        let mut fingerprints = Fingerprints::default();
        let mut pages = [[0; PAGE], [1; PAGE], [1; PAGE], [2; PAGE]];
        for page in &mut pages {
            fingerprints.replace(page).unwrap();
        }
        assert_eq!(pages[0], [0; PAGE]);
        assert!(pages[1] == pages[2] && pages[1] != pages[3] && pages[1] != [1; PAGE]);
        assert_eq!((fingerprints.zero, fingerprints.known.len()), (1, 2));
    }
}
