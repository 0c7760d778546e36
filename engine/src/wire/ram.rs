//! The RAM section's records and its block list (spec §7).

use super::cursor::{Cursor, Stop, put_str8};
use super::{Parsed, WireError};
use crate::blocks::{BLOCK_NAME_MAX, BLOCKS_MAX, BlockListError, BlockTable};
use crate::units::PAGE_SIZE;

/// Longest record: the word, a block's name with its length byte, a page.
pub const RECORD_MAX: usize = 8 + 1 + BLOCK_NAME_MAX + PAGE_SIZE;

const FLAG_FULL: u64 = 0x001;
const FLAG_ZERO: u64 = 0x002;
const FLAG_MEM_SIZE: u64 = 0x004;
const FLAG_PAGE: u64 = 0x008;
const FLAG_EOS: u64 = 0x010;
const FLAG_CONTINUE: u64 = 0x020;
const FLAG_XBZRLE: u64 = 0x040;
const FLAG_HOOK: u64 = 0x080;
const FLAG_COMPRESS_PAGE: u64 = 0x100;
const FLAG_MULTIFD_FLUSH: u64 = 0x200;
/// The bits below a page's size: flags. Those above: an offset or a size.
const FLAG_BITS: u64 = PAGE_SIZE as u64 - 1;

const XBZRLE_ENCODING: u8 = 1;

/// Which block a page record belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockRef<'a> {
    /// That of the last page record on this stream, which may be in an earlier section or checkpoint.
    Continue,
    /// The block of this name, not yet looked up.
    Named(&'a [u8]),
}

/// One record of a RAM section's body. Offsets are page-aligned; [`BlockTable::page`]
/// checks that they lie in the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamRecord<'a> {
    /// The block list follows, whose lengths add up to `total`. Only in START.
    MemSize {
        /// Bytes of RAM over all blocks.
        total: u64,
    },
    /// A page becomes all zero.
    Zero {
        /// The page's block.
        block: BlockRef<'a>,
        /// Its byte offset there.
        offset: u64,
    },
    /// A page's new content.
    Page {
        /// The page's block.
        block: BlockRef<'a>,
        /// Its byte offset there.
        offset: u64,
        /// Its content.
        content: &'a [u8; PAGE_SIZE],
    },
    /// A page's change against its newest received content: see [`super::xbzrle`].
    Xbzrle {
        /// The page's block.
        block: BlockRef<'a>,
        /// Its byte offset there.
        offset: u64,
        /// 1 to 4096 bytes, not checked further.
        delta: &'a [u8],
    },
    /// End of this body; the footer follows.
    Eos,
    /// A sync point with the multifd channels. Act on it before reading on (spec §10).
    MultifdFlush,
}

impl<'a> RamRecord<'a> {
    /// Parses one record.
    ///
    /// # Errors
    /// If the flags are not exactly one known kind, or a length is out of bounds.
    pub fn parse(input: &'a [u8]) -> Parsed<Self> {
        Cursor::parse(input, |cursor| {
            let word = cursor.be64()?;
            let (flags, offset) = (word & FLAG_BITS, word & !FLAG_BITS);
            let continued = flags & FLAG_CONTINUE != 0;
            Ok(match flags & !FLAG_CONTINUE {
                FLAG_ZERO => {
                    let block = block(cursor, continued)?;
                    match cursor.u8()? {
                        0 => Self::Zero { block, offset },
                        fill => {
                            return Err(WireError::value("the fill byte of a zero page", fill, "0x0").into());
                        }
                    }
                }
                FLAG_PAGE => Self::Page {
                    block: block(cursor, continued)?,
                    offset,
                    content: cursor.array()?,
                },
                FLAG_XBZRLE => Self::Xbzrle {
                    block: block(cursor, continued)?,
                    offset,
                    delta: delta(cursor)?,
                },
                FLAG_MEM_SIZE if !continued => Self::MemSize { total: offset },
                FLAG_EOS if word == FLAG_EOS => Self::Eos,
                FLAG_MULTIFD_FLUSH if word == FLAG_MULTIFD_FLUSH => Self::MultifdFlush,
                _ => return Err(refused_flags(word).into()),
            })
        })
    }

    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut page = |flag: u64, offset: u64, block: BlockRef<'_>| {
            let (modifier, name) = match block {
                BlockRef::Continue => (FLAG_CONTINUE, None),
                BlockRef::Named(name) => (0, Some(name)),
            };
            out.extend_from_slice(&(offset | flag | modifier).to_be_bytes());
            if let Some(name) = name {
                put_str8(out, name);
            }
        };
        match *self {
            Self::MemSize { total } => out.extend_from_slice(&(total | FLAG_MEM_SIZE).to_be_bytes()),
            Self::Eos => out.extend_from_slice(&FLAG_EOS.to_be_bytes()),
            Self::MultifdFlush => out.extend_from_slice(&FLAG_MULTIFD_FLUSH.to_be_bytes()),
            Self::Zero { block, offset } => {
                page(FLAG_ZERO, offset, block);
                out.push(0);
            }
            Self::Page {
                block,
                offset,
                content,
            } => {
                page(FLAG_PAGE, offset, block);
                out.extend_from_slice(content);
            }
            Self::Xbzrle { block, offset, delta } => {
                page(FLAG_XBZRLE, offset, block);
                let length = u16::try_from(delta.len()).expect("a delta is no longer than a page");
                out.push(XBZRLE_ENCODING);
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(delta);
            }
        }
    }
}

fn block<'a>(cursor: &mut Cursor<'a>, continued: bool) -> Result<BlockRef<'a>, Stop> {
    if continued {
        return Ok(BlockRef::Continue);
    }
    Ok(BlockRef::Named(cursor.str8()?))
}

fn delta<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Stop> {
    let encoding = cursor.u8()?;
    if encoding != XBZRLE_ENCODING {
        return Err(WireError::value("the encoding of an XBZRLE page", encoding, "0x1").into());
    }
    let length = cursor.be16()?;
    if length == 0 || usize::from(length) > PAGE_SIZE {
        return Err(WireError::value("the length of an XBZRLE delta", length, "1 to 0x1000").into());
    }
    cursor.take(usize::from(length))
}

fn refused_flags(word: u64) -> WireError {
    match word & FLAG_BITS & !FLAG_CONTINUE {
        FLAG_COMPRESS_PAGE => WireError::refused(
            "pages compressed on the main channel",
            "switch its capability compress off",
        ),
        FLAG_HOOK => WireError::refused("an RDMA record", "migrate to a tcp: or unix: address, not rdma:"),
        FLAG_FULL => WireError::refused("the obsolete RAM record FULL", "use QEMU 7.2 to 11"),
        _ => WireError::value(
            "a RAM record's word",
            word,
            "exactly one of the flags 0x2, 0x4, 0x8, 0x10, 0x40, 0x200, an address only with those that take one",
        ),
    }
}

/// One entry of the block list, as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEntry<'a> {
    /// The block's name.
    pub name: &'a [u8],
    /// Its bytes in use.
    pub used_length: u64,
}

impl<'a> BlockEntry<'a> {
    /// Parses one entry. A primary set up for COLO sends none of the optional fields (spec §7.2).
    ///
    /// # Errors
    /// None here; [`BlockList::push`] checks the entry.
    pub fn parse(input: &'a [u8]) -> Parsed<Self> {
        Cursor::parse(input, |cursor| {
            let (name, used_length) = (cursor.str8()?, cursor.be64()?);
            Ok(Self { name, used_length })
        })
    }

    /// Appends the entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_str8(out, self.name);
        out.extend_from_slice(&self.used_length.to_be_bytes());
    }
}

/// Collects the block list until its lengths have reached the announced total. Holds at most [`BLOCKS_MAX`] entries.
#[derive(Debug)]
pub struct BlockList {
    entries: Vec<(Box<[u8]>, u64)>,
    total: u64,
    sum: u64,
}

impl BlockList {
    /// A list whose lengths will add up to `total` bytes.
    ///
    /// # Errors
    /// If that is nothing.
    pub fn new(total: u64) -> Result<Self, WireError> {
        if total == 0 {
            return Err(BlockListError::Sum { sum: 0, total }.into());
        }
        let entries = Vec::new();
        Ok(Self {
            entries,
            total,
            sum: 0,
        })
    }

    /// Takes the next entry. Returns the table once the total has been reached: the entry was the last.
    ///
    /// # Errors
    /// As soon as the list cannot be completed any more, or if the completed list is refused.
    pub fn push(&mut self, entry: BlockEntry<'_>) -> Result<Option<BlockTable>, WireError> {
        if self.entries.len() == BLOCKS_MAX {
            return Err(BlockListError::TooMany.into());
        }
        self.entries.push((entry.name.into(), entry.used_length));
        self.sum = self.sum.saturating_add(entry.used_length);
        if entry.used_length != 0 && self.sum < self.total {
            return Ok(None);
        }
        // Complete, too long, or holding an entry that the table refuses.
        Ok(Some(BlockTable::new(
            std::mem::take(&mut self.entries),
            self.total,
        )?))
    }
}

/// Appends the MEM_SIZE record and the block list.
pub fn encode_block_list(out: &mut Vec<u8>, table: &BlockTable) {
    let total = table.total_bytes();
    RamRecord::MemSize { total }.encode(out);
    for (_, block) in table.iter() {
        let (name, used_length) = (&*block.name, block.used_length);
        BlockEntry { name, used_length }.encode(out);
    }
}

/// The same with capability `x-ignore-shared` on: each length is followed by the guest-physical address of the block.
/// QEMU reads it only for the blocks that it ignores. Here that is the main memory, which begins at 0.
pub fn encode_block_list_ignoring_shared(out: &mut Vec<u8>, table: &BlockTable) {
    let total = table.total_bytes();
    RamRecord::MemSize { total }.encode(out);
    for (_, block) in table.iter() {
        let (name, used_length) = (&*block.name, block.used_length);
        BlockEntry { name, used_length }.encode(out);
        out.extend_from_slice(&0u64.to_be_bytes());
    }
}
