//! A session as it is written to the RAM directory with its first checkpoint: texts and numbers one after the other.

use crate::blocks::{BLOCKS_MAX, BlockListError, BlockTable};
use crate::disk::StoredDisk;
use crate::session::GuestDescription;
use crate::wire::stream::StreamHeader;
use std::sync::Arc;
use thiserror::Error;

/// Why a stored session cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// It is cut off.
    #[error("it is truncated")]
    Truncated,
    /// A text is no text.
    #[error("a text in it is not UTF-8")]
    NotUtf8,
    /// An id out of range.
    #[error("the id of the RAM section is out of range")]
    RamSection,
    /// More RAM blocks than a stream may have.
    #[error("{0} RAM blocks are more than {BLOCKS_MAX}")]
    TooManyBlocks(u64),
    /// Lengths that overflow.
    #[error("the RAM blocks are too long")]
    TooLong,
    /// A block list that no stream may have.
    #[error(transparent)]
    Blocks(#[from] BlockListError),
    /// The migration stream's header is damaged.
    #[error("its stream header is invalid")]
    Header,
    /// It is too long.
    #[error("{0} bytes follow its end")]
    Trailing(usize),
}

/// What is constant for a session.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredSession {
    pub(super) peer: String,
    pub(super) description: GuestDescription,
    pub(super) disks: Vec<StoredDisk>,
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Encodes a session.
pub(super) fn encode(peer: &str, description: &GuestDescription, disks: &[StoredDisk]) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, peer.as_bytes());
    put_bytes(&mut out, description.machine_type.as_bytes());
    put_bytes(&mut out, &description.header);
    put_bytes(&mut out, &description.vmdesc);
    out.extend_from_slice(&u64::from(description.ram_section).to_le_bytes());
    out.extend_from_slice(&(description.blocks.iter().len() as u64).to_le_bytes());
    for (_, block) in description.blocks.iter() {
        put_bytes(&mut out, &block.name);
        out.extend_from_slice(&block.used_length.to_le_bytes());
    }
    out.extend_from_slice(&(disks.len() as u64).to_le_bytes());
    for disk in disks {
        put_bytes(&mut out, disk.directory.as_bytes());
        put_bytes(&mut out, disk.name.as_bytes());
        out.extend_from_slice(&disk.log.to_le_bytes());
        out.extend_from_slice(&disk.size.to_le_bytes());
    }
    out
}

/// The bytes that are not decoded yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn number(&mut self) -> Result<u64, DecodeError> {
        let (number, rest) = self.0.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = usize::try_from(self.number()?).map_err(|_| DecodeError::Truncated)?;
        let (bytes, rest) = (self.0.split_at_checked(length)).ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, DecodeError> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| DecodeError::NotUtf8)
    }
}

/// Decodes what [`encode`] has written.
///
/// # Errors
/// If it is damaged. No allocation is sized by a number in it.
pub(super) fn decode(bytes: &[u8]) -> Result<StoredSession, DecodeError> {
    let mut rest = Rest(bytes);
    let peer = rest.text()?;
    let machine_type = rest.text()?;
    let header = rest.bytes()?.to_vec();
    let vmdesc = rest.bytes()?.to_vec();
    let ram_section = u32::try_from(rest.number()?).map_err(|_| DecodeError::RamSection)?;
    let count = rest.number()?;
    if count > BLOCKS_MAX as u64 {
        return Err(DecodeError::TooManyBlocks(count));
    }
    let mut blocks = Vec::new();
    let mut total = 0u64;
    for _ in 0..count {
        let name = rest.bytes()?.into();
        let length = rest.number()?;
        total = total.checked_add(length).ok_or(DecodeError::TooLong)?;
        blocks.push((name, length));
    }
    let mut disks = Vec::new();
    for _ in 0..rest.number()? {
        disks.push(StoredDisk {
            directory: rest.text()?,
            name: rest.text()?,
            log: rest.number()?,
            size: rest.number()?,
        });
    }
    if !rest.0.is_empty() {
        return Err(DecodeError::Trailing(rest.0.len()));
    }
    let blocks = BlockTable::new(blocks, total)?;
    // A failover sends the header on: it must be valid.
    StreamHeader::parse_whole(&header).ok_or(DecodeError::Header)?;
    let description = GuestDescription {
        header,
        machine_type,
        ram_section,
        blocks: Arc::new(blocks),
        vmdesc,
    };
    Ok(StoredSession {
        peer,
        description,
        disks,
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn description() -> GuestDescription {
        let entries = vec![
            (b"pc.ram".as_slice().into(), 8192),
            (b"\xff".as_slice().into(), 4096),
        ];
        let mut header = Vec::new();
        let machine = b"pc-q35-11.1".to_vec();
        test_header(&machine).encode(&mut header);
        GuestDescription {
            header,
            machine_type: "pc-q35-11.1".into(),
            ram_section: 2,
            blocks: Arc::new(BlockTable::new(entries, 12288).unwrap()),
            vmdesc: b"{}".to_vec(),
        }
    }

    fn test_header(machine: &[u8]) -> StreamHeader {
        StreamHeader {
            machine_type: String::from_utf8(machine.to_vec()).unwrap(),
            target_page_bits: false,
            capabilities: false,
            uuid: None,
        }
    }

    fn disks() -> Vec<StoredDisk> {
        let disk = |name: &str, log| StoredDisk {
            directory: "/var/lib/disks".into(),
            name: name.into(),
            log,
            size: 1 << 30,
        };
        vec![disk("root", 7), disk("data", u64::MAX)]
    }

    #[test]
    fn decoding_reverses_encoding() {
        let bytes = encode("tcp:10.0.0.1:5", &description(), &disks());
        let stored = decode(&bytes).unwrap();
        assert_eq!(
            (stored.peer.as_str(), stored.description, stored.disks),
            ("tcp:10.0.0.1:5", description(), disks())
        );
    }

    #[test]
    fn damaged_bytes_do_not_panic() {
        let bytes = encode("x", &description(), &disks());
        for length in 0..bytes.len() {
            decode(&bytes[..length]).unwrap_err();
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut spoilt = bytes.clone();
                spoilt[at] = value;
                drop(decode(&spoilt));
            }
        }
        decode(&[bytes, vec![0]].concat()).unwrap_err();
    }
}
