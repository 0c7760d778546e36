//! A committed checkpoint as the incoming migration stream of a fresh QEMU (spec §16).
//!
//! Two forms. The **complete** stream has everything and suits any QEMU with the same machine. The **shared** one leaves
//! the main memory out: the fresh QEMU has mapped the image's file already (capability `x-ignore-shared`).
//!
//! Memory use is one buffer of `BUFFER_BYTES`, independent of the guest's size.

use crate::blocks::BlockTable;
use crate::session::GuestDescription;
use crate::units::{BlockId, PAGE_BYTES, PAGE_SIZE, PageIndex};
use crate::wire::ram::{
    BlockRef, RECORD_MAX, RamRecord, encode_block_list, encode_block_list_ignoring_shared,
};
use crate::wire::stream::{Section, StreamHeader, encode_capability, encode_footer};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use thiserror::Error;

/// The capability with which the fresh QEMU uses the shared file that it has mapped as its main memory.
pub const IGNORE_SHARED: &str = "x-ignore-shared";

/// Bytes that are written at a time.
const BUFFER_BYTES: usize = 256 << 10;

/// A vmdesc without content: the fresh QEMU expects one and does not read it.
const EMPTY_VMDESC: &[u8] = b"{}";

/// Where the guest's main memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// From the stream, like everything else.
    Complete,
    /// The fresh QEMU has mapped this block's file; the others are in the stream.
    Shared(BlockId),
}

/// What a stream contained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Its length in bytes.
    pub bytes: u64,
    /// Pages with content.
    pub pages: u64,
    /// Pages of zeros, which take 9 bytes.
    pub zero_pages: u64,
}

/// Why a stream was not written to its end.
#[derive(Debug, Error)]
#[error("{source}")]
pub struct StreamError {
    /// The error of the system.
    pub source: io::Error,
    /// Whether all was written that a QEMU needs to run the guest. If not, no guest runs from it.
    pub complete: bool,
}

impl From<io::Error> for StreamError {
    fn from(source: io::Error) -> Self {
        let complete = false;
        Self { source, complete }
    }
}

/// Writes the stream of a checkpoint. `read` fills in a page of it.
///
/// # Errors
/// Those of `out`: the fresh QEMU closed the connection, or a disk is full.
///
/// # Panics
/// If `description.header` is not a valid header; that of a session always is.
pub fn write_stream(
    description: &GuestDescription,
    device_state: &[u8],
    read: impl FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
    form: Form,
    out: impl Write,
) -> Result<StreamReport, StreamError> {
    let mut writer = Writer {
        out,
        buffer: Vec::with_capacity(BUFFER_BYTES + RECORD_MAX),
        report: StreamReport::default(),
    };
    begin(&mut writer.buffer, description, form);
    Section::End {
        id: description.ram_section,
    }
    .encode(&mut writer.buffer);
    writer.pages(&description.blocks, read, form)?;
    end_ram(&mut writer.buffer, description.ram_section);
    writer.bytes(device_state)?;
    writer.flush()?;
    // From here on the guest may run: QEMU can do without a vmdesc.
    let length = u32::try_from(EMPTY_VMDESC.len()).expect("two bytes");
    Section::VmDescription { length }.encode(&mut writer.buffer);
    writer.buffer.extend_from_slice(EMPTY_VMDESC);
    let ended = writer.flush().and_then(|()| writer.out.flush());
    ended.map_err(|source| {
        let complete = true;
        StreamError { source, complete }
    })?;
    Ok(writer.report)
}

/// Header, configuration, and the RAM section's START with the block list alone.
fn begin(out: &mut Vec<u8>, description: &GuestDescription, form: Form) {
    match form {
        Form::Complete => out.extend_from_slice(&description.header),
        Form::Shared(_) => header_ignoring_shared(out, &description.header),
    }
    let id = description.ram_section;
    Section::RamStart { id }.encode(out);
    match form {
        Form::Complete => encode_block_list(out, &description.blocks),
        Form::Shared(_) => encode_block_list_ignoring_shared(out, &description.blocks),
    }
    end_ram(out, id);
}

fn end_ram(out: &mut Vec<u8>, id: u32) {
    RamRecord::Eos.encode(out);
    encode_footer(out, id);
}

/// The header with the capability that the fresh QEMU has, in place of those that the primary had.
fn header_ignoring_shared(out: &mut Vec<u8>, header: &[u8]) {
    // The parser needs the byte that follows the header, to see that no subsection does.
    let mut with_next = header.to_vec();
    with_next.push(0);
    let parsed = StreamHeader::parse(&with_next).ok().flatten();
    let (mut parsed, _) = parsed.expect("the header was parsed when it came");
    parsed.capabilities = false;
    parsed.encode(out);
    encode_capability(out, IGNORE_SHARED.as_bytes());
}

/// Collects small pieces and writes them in large ones.
struct Writer<W> {
    out: W,
    buffer: Vec<u8>,
    report: StreamReport,
}

impl<W: Write> Writer<W> {
    fn pages(
        &mut self,
        table: &BlockTable,
        mut read: impl FnMut(PageIndex, &mut [u8; PAGE_SIZE]),
        form: Form,
    ) -> io::Result<()> {
        let mut content = [0; PAGE_SIZE];
        let blocks = table.iter().filter(|(id, _)| form != Form::Shared(*id));
        for (_, ram_block) in blocks {
            let mut block = BlockRef::Named(&ram_block.name);
            for at in 0..ram_block.pages() {
                read(PageIndex::new(ram_block.first_page.get() + at), &mut content);
                let offset = at * PAGE_BYTES;
                // Sent too where it is zero: the fresh QEMU has firmware of its own in some blocks.
                if content == [0; PAGE_SIZE] {
                    RamRecord::Zero { block, offset }.encode(&mut self.buffer);
                    self.report.zero_pages += 1;
                } else {
                    let content = &content;
                    RamRecord::Page {
                        block,
                        offset,
                        content,
                    }
                    .encode(&mut self.buffer);
                    self.report.pages += 1;
                }
                if self.buffer.len() >= BUFFER_BYTES {
                    self.flush()?;
                }
                block = BlockRef::Continue;
            }
        }
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() <= BUFFER_BYTES {
            self.buffer.extend_from_slice(bytes);
            return Ok(());
        }
        self.flush()?;
        self.out.write_all(bytes)?;
        self.report.bytes += bytes.len() as u64;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.buffer)?;
        self.report.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
