//! Reading a capture, whole or while it grows.

use super::block::{self, Chain, Header, Kind};
use super::order::Order;
use super::{
    BLOCK_MAX, BlockError, CaptureError, CaptureInfo, FORMAT_VERSION, INFO_MAX, MAGIC, OLDEST_VERSION,
    Record, Totals, record,
};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use zstd::bulk::Decompressor;

/// Bytes of the header before the information.
const PREFIX_LEN: usize = 16;

/// Bytes of the header's checksum.
const CHECKSUM_LEN: usize = 4;

/// A capture that is being read. It holds one block at a time.
pub struct CaptureReader<R: Read + Seek = File> {
    file: BufReader<R>,
    info: CaptureInfo,
    /// Where the block in `records` begins.
    block_at: u64,
    /// Where the next block begins.
    next_at: u64,
    /// Before the next block.
    chain: Chain,
    /// The file must be positioned again: the last attempt to read that block did not give one.
    read_again: bool,
    /// The records of one block, and how many bytes of them were read.
    records: Vec<u8>,
    position: usize,
    /// The content of a block as it is stored.
    stored: Vec<u8>,
    decompressor: Option<Decompressor<'static>>,
    order: Order,
    tear: Option<TearReason>,
}

/// Where and why a capture ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tear {
    /// All before this byte of the file was read.
    pub offset: u64,
    /// What is there.
    pub reason: TearReason,
}

/// Why a capture ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TearReason {
    /// The file ends after a whole block, but was not finished: its writer was killed, or still writes.
    Unfinished,
    /// The last block is not complete.
    Incomplete {
        /// Bytes of it that are there.
        present: u64,
    },
    /// The last block is complete, but its checksum is wrong.
    Checksum,
    /// Nothing but zeros: room that was given to the file and never written, as after a loss of power.
    Zeros,
}

impl fmt::Display for Tear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at byte {}: ", self.offset)?;
        match self.reason {
            TearReason::Unfinished => f.write_str("the recording was not finished"),
            TearReason::Incomplete { present } => {
                write!(
                    f,
                    "the last block is not complete ({present} bytes of it are there)"
                )
            }
            TearReason::Checksum => f.write_str("the checksum of the last block is wrong"),
            TearReason::Zeros => f.write_str("there are only zeros from there on"),
        }
    }
}

impl CaptureReader<File> {
    /// Opens a capture and reads its header.
    ///
    /// # Errors
    /// If it cannot be opened, is something else, of another version, or its header is damaged.
    pub fn open(path: &Path) -> Result<Self, CaptureError> {
        let file = File::open(path).map_err(|source| CaptureError::Open {
            path: path.to_owned(),
            source,
        })?;
        Self::new(file)
    }
}

impl<R: Read + Seek> CaptureReader<R> {
    /// Reads the header of a capture from the start of `file`.
    ///
    /// # Errors
    /// See [`CaptureReader::open`].
    pub fn new(file: R) -> Result<Self, CaptureError> {
        let mut file = BufReader::new(file);
        let (info, header_len, chain) = read_header(&mut file)?;
        Ok(Self {
            file,
            info,
            block_at: 0,
            next_at: header_len,
            chain,
            read_again: false,
            records: Vec::new(),
            position: 0,
            stored: Vec::new(),
            decompressor: None,
            order: Order::default(),
            tear: None,
        })
    }

    /// What the capture says of itself.
    pub fn info(&self) -> &CaptureInfo {
        &self.info
    }

    /// The next record; `None` where the file ends now. It may be called again when the file has grown.
    ///
    /// # Errors
    /// If the file is damaged before its end. The same error comes again then.
    // Not an iterator: the record borrows from the reader.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, CaptureError> {
        if self.position == self.records.len() && !self.load_block()? {
            return Ok(None);
        }
        let (offset, position) = (self.block_at, self.position);
        let damaged = |what| CaptureError::Damaged { offset, what };
        let decoded = record::decode(&self.records[position..]);
        let (record, length) = decoded.map_err(|error| damaged(BlockError::Record { position, error }))?;
        let fits = self.order.take(&record.event);
        fits.map_err(|error| damaged(BlockError::Order { position, error }))?;
        self.position += length;
        Ok(Some(record))
    }

    /// Whether and where the file ends early, once [`Self::next`] has returned `None`. A finished capture does not.
    pub fn is_torn(&self) -> Option<Tear> {
        self.tear.map(|reason| Tear {
            offset: self.next_at,
            reason,
        })
    }

    /// What was read so far.
    pub fn totals(&self) -> Totals {
        self.order.totals()
    }

    /// Bytes of memory that its buffers take.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.records.capacity() + self.stored.capacity()
    }

    /// Reads the next block. False where there is none that is whole.
    fn load_block(&mut self) -> Result<bool, CaptureError> {
        self.tear = None;
        if std::mem::replace(&mut self.read_again, true) {
            // What was torn may have been completed.
            let position = self.file.seek(SeekFrom::Start(self.next_at));
            position.map_err(|source| self.read_error(source))?;
        }
        let (header, chain) = match self.read_block_header()? {
            Ok(read) => read,
            Err(tear) => {
                self.tear = tear;
                return Ok(false);
            }
        };
        if let Some(reason) = self.read_content(&header)? {
            self.tear = Some(reason);
            return Ok(false);
        }
        (self.position, self.block_at) = (0, self.next_at);
        self.records.clear();
        match header.kind {
            Kind::Stored => std::mem::swap(&mut self.records, &mut self.stored),
            Kind::Zstd => self.inflate(&header).map_err(|what| self.damaged(what))?,
        }
        self.next_at += (block::HEADER_LEN + header.stored_len) as u64;
        self.chain = chain;
        self.read_again = false;
        Ok(true)
    }

    /// The header of the next block and the chain behind it, or why there is none: nothing where the capture is
    /// finished.
    fn read_block_header(&mut self) -> Result<Result<(Header, Chain), Option<TearReason>>, CaptureError> {
        let mut header = Vec::with_capacity(block::HEADER_LEN);
        let mut part = self.file.by_ref().take(block::HEADER_LEN as u64);
        part.read_to_end(&mut header)
            .map_err(|source| self.read_error(source))?;
        if self.order.is_finished() {
            return match header.len() {
                0 => Ok(Err(None)),
                _ => Err(self.damaged(BlockError::AfterEnd)),
            };
        }
        let Ok(header) = <[u8; block::HEADER_LEN]>::try_from(&header[..]) else {
            return Ok(Err(Some(match header.len() {
                0 => TearReason::Unfinished,
                present => TearReason::Incomplete {
                    present: present as u64,
                },
            })));
        };
        match Header::decode(&header, self.chain) {
            Ok(decoded) => Ok(Ok(decoded)),
            Err(_) if self.only_zeros_left()? => Ok(Err(Some(if header == [0; block::HEADER_LEN] {
                TearReason::Zeros
            } else {
                TearReason::Checksum
            }))),
            Err(what) => Err(self.damaged(what)),
        }
    }

    /// Reads a block's content to `stored`, as far as it is there. Returns why it is torn, if it is.
    fn read_content(&mut self, header: &Header) -> Result<Option<TearReason>, CaptureError> {
        self.stored.clear();
        // It grows with what is there, whatever the header says.
        let mut part = self.file.by_ref().take(header.stored_len as u64);
        let read = part.read_to_end(&mut self.stored);
        read.map_err(|source| self.read_error(source))?;
        if self.stored.len() < header.stored_len {
            let present = (block::HEADER_LEN + self.stored.len()) as u64;
            return Ok(Some(TearReason::Incomplete { present }));
        }
        if crc32c::crc32c(&self.stored) == header.checksum {
            return Ok(None);
        }
        if self.only_zeros_left()? {
            return Ok(Some(TearReason::Checksum));
        }
        Err(self.damaged(BlockError::ContentChecksum))
    }

    /// Decompresses `stored` to `records`.
    fn inflate(&mut self, header: &Header) -> Result<(), BlockError> {
        let decompressor = match &mut self.decompressor {
            Some(decompressor) => decompressor,
            none => none.insert(Decompressor::new().map_err(BlockError::Decompress)?),
        };
        // Once, for the largest block there can be; the frame ends where this ends.
        self.records.reserve_exact(BLOCK_MAX);
        let length = decompressor
            .decompress_to_buffer(&self.stored, &mut self.records)
            .map_err(BlockError::Decompress)?;
        if length != header.raw_len {
            self.records.clear();
            return Err(BlockError::Decompressed {
                seen: length,
                announced: header.raw_len,
            });
        }
        Ok(())
    }

    /// Whether nothing but zeros is left of the file, or nothing at all.
    fn only_zeros_left(&mut self) -> Result<bool, CaptureError> {
        loop {
            let offset = self.next_at;
            let bytes = self
                .file
                .fill_buf()
                .map_err(|source| CaptureError::Read { offset, source })?;
            if bytes.is_empty() {
                return Ok(true);
            }
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            let length = bytes.len();
            self.file.consume(length);
        }
    }

    fn damaged(&self, what: BlockError) -> CaptureError {
        CaptureError::Damaged {
            offset: self.next_at,
            what,
        }
    }

    fn read_error(&self, source: io::Error) -> CaptureError {
        CaptureError::Read {
            offset: self.next_at,
            source,
        }
    }
}

/// What the header says, its length, and the chain behind it.
fn read_header(file: &mut impl Read) -> Result<(CaptureInfo, u64, Chain), CaptureError> {
    let cut = || CaptureError::Header("it is cut short".to_owned());
    let header = |what: &str| CaptureError::Header(what.to_owned());
    let mut bytes = Vec::new();
    read_up_to(file, PREFIX_LEN, &mut bytes)?;
    if let Some(what) = foreign(&bytes) {
        return Err(CaptureError::Foreign(what));
    }
    let prefix: &[u8; PREFIX_LEN] = bytes.as_slice().try_into().map_err(|_| cut())?;
    let version = u16::from_le_bytes([prefix[8], prefix[9]]);
    if !(OLDEST_VERSION..=FORMAT_VERSION).contains(&version) {
        return Err(CaptureError::Version(version));
    }
    if prefix[10..12] != [0, 0] {
        return Err(header("it has flags that are not known"));
    }
    let length = u32::from_le_bytes([prefix[12], prefix[13], prefix[14], prefix[15]]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > INFO_MAX {
        return Err(header("it announces that it is longer than a header can be"));
    }
    let whole = PREFIX_LEN + length + CHECKSUM_LEN;
    read_up_to(file, whole, &mut bytes)?;
    let (checked, checksum) = bytes.split_last_chunk::<CHECKSUM_LEN>().ok_or_else(cut)?;
    if bytes.len() < whole {
        return Err(cut());
    }
    let checksum = u32::from_le_bytes(*checksum);
    if crc32c::crc32c(checked) != checksum {
        return Err(header("its checksum is wrong"));
    }
    let chain = match version {
        1 => Chain::Unlinked,
        _ => Chain::After(checksum),
    };
    let info = serde_json::from_slice(&checked[PREFIX_LEN..]);
    let info = info.map_err(|error| header(&format!("the information in it: {error}")))?;
    Ok((info, whole as u64, chain))
}

/// Reads until `bytes` has this length or the file ends.
fn read_up_to(file: &mut impl Read, length: usize, bytes: &mut Vec<u8>) -> Result<(), CaptureError> {
    let offset = bytes.len() as u64;
    let mut part = file.take(length as u64 - offset);
    let read = part.read_to_end(bytes);
    read.map(drop)
        .map_err(|source| CaptureError::Read { offset, source })
}

/// What a file is that does not begin as a capture does.
fn foreign(start: &[u8]) -> Option<&'static str> {
    let begins = |magic: &[u8]| start.starts_with(magic);
    if MAGIC.starts_with(&start[..start.len().min(MAGIC.len())]) {
        return start.is_empty().then_some("it is empty");
    }
    Some(
        if begins(&MAGIC[..4]) || begins(&[&[MAGIC[0] & 0x7f], &MAGIC[1..4]].concat()) {
            "it was one, but a transfer as text has changed it: copy it again, as binary"
        } else if begins(b"\x0a\x0d\x0d\x0a") {
            "it is a pcapng recording of packets"
        } else if begins(b"\xd4\xc3\xb2\xa1") || begins(b"\xa1\xb2\xc3\xd4") {
            "it is a pcap recording of packets"
        } else if begins(b"\x28\xb5\x2f\xfd") {
            "it is compressed as a whole: `zstd -d` first"
        } else if begins(b"\x1f\x8b") {
            "it is compressed as a whole: `gunzip` first"
        } else if begins(b"#[") {
            "it is a log of latency histograms"
        } else if begins(b"QEVM") {
            "it is a bare migration stream"
        } else {
            "it begins otherwise"
        },
    )
}
