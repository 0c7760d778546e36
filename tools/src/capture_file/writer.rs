//! Writing a capture.

use super::block::{self, Chain, Kind};
use super::order::{Order, Totals};
use super::{
    BLOCK_MAX, CaptureError, CaptureInfo, DATA_MAX, Event, FORMAT_VERSION, INFO_MAX, MAGIC, OrderError,
    Record, TEXT_MAX, record,
};
use colo_ring::files::{self, Readers};
use schemars::JsonSchema;
use serde::Serialize;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;
use zstd::bulk::Compressor;

/// A block is written when it has this many bytes. With the longest record behind them it is still within the limit.
const BLOCK_TARGET: usize = 1 << 20;

const _: () = assert!(BLOCK_TARGET + record::HEADER_LEN + DATA_MAX <= BLOCK_MAX);

/// The fastest of zstd's ordinary levels: a recorder has to keep up with a guest.
const ZSTD_LEVEL: i32 = 1;

/// How blocks are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are: the least work while recording
    None,
    /// With zstd, at its fastest ordinary level; a block that does not get smaller is written as it is
    Zstd,
}

/// A capture that is being written.
///
/// Records are collected to blocks. Each block is one write, so what was flushed can be read whatever becomes of the
/// writer. After a failed write nothing more is written: the file stays readable up to there. A
/// writer that is dropped without [`Self::finish`] leaves out what was not flushed.
pub struct CaptureWriter<W: Write = File> {
    out: W,
    /// Bytes written.
    offset: u64,
    compressor: Option<Compressor<'static>>,
    /// Records that are not in the file yet.
    records: Vec<u8>,
    /// Where a block is put together, header and content.
    block: Vec<u8>,
    /// Behind the last block that was put together.
    chain: Chain,
    order: Order,
    /// What was recorded when the last block was written.
    written: Totals,
    /// The time of the last record.
    last_at: Duration,
    failed: bool,
}

impl CaptureWriter<File> {
    /// Begins a capture in a new file.
    ///
    /// # Errors
    /// If the file exists already or cannot be made, or `info` is too long.
    pub fn create(path: &Path, info: &CaptureInfo, compression: Compression) -> Result<Self, CaptureError> {
        let file = files::create_new(path, Readers::Owner);
        let file = file.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => CaptureError::Exists(path.to_owned()),
            _ => CaptureError::Open {
                path: path.to_owned(),
                source,
            },
        })?;
        Self::new(file, info, compression)
    }

    /// Begins a capture in place of a file of this user.
    ///
    /// # Errors
    /// If something else is there, or the file cannot be made, or `info` is too long.
    pub fn replace(path: &Path, info: &CaptureInfo, compression: Compression) -> Result<Self, CaptureError> {
        let file = files::replace(path, Readers::Owner).map_err(|source| CaptureError::Open {
            path: path.to_owned(),
            source,
        })?;
        Self::new(file, info, compression)
    }
}

impl<W: Write> CaptureWriter<W> {
    /// Begins a capture at the start of `out`, which should not collect bytes itself.
    ///
    /// # Errors
    /// If it cannot be written, or `info` is too long.
    pub fn new(out: W, info: &CaptureInfo, compression: Compression) -> Result<Self, CaptureError> {
        let compressor = match compression {
            Compression::None => None,
            Compression::Zstd => {
                let new = Compressor::new(ZSTD_LEVEL);
                Some(new.map_err(|source| CaptureError::Write { offset: 0, source })?)
            }
        };
        let mut writer = Self {
            out,
            offset: 0,
            compressor,
            records: Vec::with_capacity(BLOCK_TARGET + record::HEADER_LEN + DATA_MAX),
            block: Vec::new(),
            chain: Chain::Unlinked,
            order: Order::default(),
            written: Totals::default(),
            last_at: Duration::ZERO,
            failed: false,
        };
        writer.chain = Chain::After(encode_header(&mut writer.block, info)?);
        writer.write_block()?;
        Ok(writer)
    }

    /// Records what happened at `at` after the start. More data than fits a record becomes several, empty data none.
    ///
    /// # Errors
    /// If it does not fit what was recorded before, is too long a text, or cannot be written. [`Event::Finish`] is
    /// for [`Self::finish`] alone.
    pub fn write(&mut self, at: Duration, event: Event<'_>) -> Result<(), CaptureError> {
        let too_long = |what, text: &str| CaptureError::TooLong {
            what,
            bytes: text.len(),
            max: TEXT_MAX,
        };
        match event {
            Event::Finish(_) => Err(OrderError::Finished.into()),
            Event::Open { label, .. } if label.len() > TEXT_MAX => Err(too_long("the label", label)),
            Event::Note(text) if text.len() > TEXT_MAX => Err(too_long("the note", text)),
            Event::Data {
                connection,
                direction,
                bytes,
            } => bytes.chunks(DATA_MAX).try_for_each(|bytes| {
                let event = Event::Data {
                    connection,
                    direction,
                    bytes,
                };
                self.append(at, event)
            }),
            event => self.append(at, event),
        }
    }

    /// Writes what is collected, so that readers see it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn flush(&mut self) -> Result<(), CaptureError> {
        if self.failed {
            return Err(CaptureError::Ended);
        }
        if self.records.is_empty() {
            return Ok(());
        }
        let raw_len = self.records.len();
        self.block.clear();
        self.block.resize(block::HEADER_LEN, 0);
        let kind = match &mut self.compressor {
            Some(compressor) => compress(compressor, &self.records, &mut self.block),
            None => Kind::Stored,
        };
        if kind == Kind::Stored {
            self.block.truncate(block::HEADER_LEN);
            self.block.extend_from_slice(&self.records);
        }
        let (header, content) = self.block.split_at_mut(block::HEADER_LEN);
        let fields = block::Header::new(kind, content, raw_len);
        header.copy_from_slice(&fields.encode(&mut self.chain));
        self.records.clear();
        self.write_block()?;
        self.written = self.order.totals();
        Ok(())
    }

    /// Ends the capture in an orderly way.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> Result<Totals, CaptureError> {
        let totals = self.order.totals();
        self.append(self.last_at, Event::Finish(totals))?;
        self.flush()?;
        Ok(totals)
    }

    /// What the file contains so far, without what is not flushed.
    pub fn totals(&self) -> Totals {
        self.written
    }

    fn append(&mut self, at: Duration, event: Event<'_>) -> Result<(), CaptureError> {
        if self.failed {
            return Err(CaptureError::Ended);
        }
        self.order.take(&event)?;
        self.last_at = at;
        record::encode(&mut self.records, &Record { at, event });
        if self.records.len() >= BLOCK_TARGET {
            self.flush()?;
        }
        Ok(())
    }

    fn write_block(&mut self) -> Result<(), CaptureError> {
        let written = self.out.write_all(&self.block).and_then(|()| self.out.flush());
        if let Err(source) = written {
            self.failed = true;
            let offset = self.offset;
            return Err(CaptureError::Write { offset, source });
        }
        self.offset += self.block.len() as u64;
        Ok(())
    }
}

/// Appends `records` as a frame to `block`, if that is shorter than they are.
fn compress(compressor: &mut Compressor<'_>, records: &[u8], block: &mut Vec<u8>) -> Kind {
    let begin = block.len();
    // Room for less than the records: a frame that does not fit is of no use, and zstd says so.
    block.resize(begin + records.len() - 1, 0);
    match compressor.compress_to_buffer(records, &mut block[begin..]) {
        Ok(length) => {
            block.truncate(begin + length);
            Kind::Zstd
        }
        Err(_) => Kind::Stored,
    }
}

/// Appends the header to `out`, which is empty. Returns its checksum.
fn encode_header(out: &mut Vec<u8>, info: &CaptureInfo) -> Result<u32, CaptureError> {
    let text = serde_json::to_vec(info).map_err(|error| CaptureError::Header(error.to_string()))?;
    let too_long = || CaptureError::TooLong {
        what: "the information in the header",
        bytes: text.len(),
        max: INFO_MAX,
    };
    let length = u32::try_from(text.len()).map_err(|_| too_long())?;
    if text.len() > INFO_MAX {
        return Err(too_long());
    }
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    // Flags: none are known.
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&text);
    let checksum = crc32c::crc32c(out);
    out.extend_from_slice(&checksum.to_le_bytes());
    Ok(checksum)
}
