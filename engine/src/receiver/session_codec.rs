//! A session as it is written to the RAM directory with its first checkpoint: texts and numbers one after the other.

use super::guest::StoredGuest;
use super::names::{GuestName, NameError};
use crate::blocks::{BLOCKS_MAX, BlockListError, BlockTable};
use crate::disk::StoredDisk;
use crate::session::GuestDescription;
use crate::store::StoreError;
use crate::wire::stream::StreamHeader;
use crate::wire::{WireError, state_buffer};
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
    /// A name or a UUID that no guest can have.
    #[error(transparent)]
    Name(NameError),
    /// The migration stream's header is damaged.
    #[error("its stream header is invalid")]
    Header,
    /// It is too long.
    #[error("{0} bytes follow its end")]
    Trailing(usize),
    /// There is no memory for its vmdesc.
    #[error(transparent)]
    NoMemory(#[from] WireError),
}

/// What is constant for a session.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StoredSession {
    pub(super) guest: StoredGuest,
    pub(super) description: GuestDescription,
    pub(super) disks: Vec<StoredDisk>,
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Most bytes of an encoded session.
fn bytes_max(guest: &StoredGuest, description: &GuestDescription, disks: &[StoredDisk]) -> usize {
    const NUMBERS: usize = 64;
    const UUID_CHARS: usize = 36;
    let texts = [
        guest.peer.len(),
        guest.listener.as_ref().map_or(0, String::len),
        guest.name.as_ref().map_or(0, |name| name.as_str().len()),
        UUID_CHARS,
        description.machine_type.len(),
        description.header.len(),
        description.vmdesc.len(),
    ];
    let blocks = description.blocks.iter().map(|(_, block)| block.name.len());
    let disks = disks.iter().map(|disk| disk.directory.len() + disk.name.len());
    let of =
        |lengths: &mut dyn Iterator<Item = usize>| -> usize { lengths.map(|length| length + NUMBERS).sum() };
    of(&mut texts.into_iter()) + of(&mut blocks.into_iter()) + of(&mut disks.into_iter()) + NUMBERS
}

/// Encodes a session.
///
/// # Errors
/// If there is no memory for it.
pub(super) fn encode(
    guest: &StoredGuest,
    description: &GuestDescription,
    disks: &[StoredDisk],
) -> Result<Vec<u8>, StoreError> {
    let (mut out, most) = (Vec::new(), bytes_max(guest, description, disks));
    let reserved = out.try_reserve_exact(most);
    reserved.map_err(|_| StoreError::no_tables::<u8>(most))?;
    put_bytes(&mut out, guest.peer.as_bytes());
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
    put_bytes(&mut out, guest.listener.as_deref().unwrap_or_default().as_bytes());
    let name = guest.name.as_ref().map(GuestName::as_str);
    put_bytes(&mut out, name.unwrap_or_default().as_bytes());
    let uuid = guest.uuid.map(String::from);
    put_bytes(&mut out, uuid.unwrap_or_default().as_bytes());
    debug_assert!(out.len() <= most, "nothing else was allocated");
    Ok(out)
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
    let vmdesc = state_buffer::copy(rest.bytes()?)?;
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
    // Receivers before this one ended here.
    let [listener, name, uuid] = match rest.0.is_empty() {
        true => Default::default(),
        false => [rest.text()?, rest.text()?, rest.text()?],
    };
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
    let present = |text: String| Some(text).filter(|text| !text.is_empty());
    let name = present(name).map(|name| name.parse()).transpose();
    let uuid = present(uuid).map(|uuid| uuid.parse()).transpose();
    Ok(StoredSession {
        guest: StoredGuest {
            peer,
            listener: present(listener),
            uuid: uuid.map_err(DecodeError::Name)?,
            name: name.map_err(DecodeError::Name)?,
        },
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

    fn guest() -> StoredGuest {
        StoredGuest {
            peer: "10.0.0.1:5".into(),
            ..StoredGuest::default()
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
        let uuid = "0c5a1f00-0000-4000-8000-0000000000ff";
        let all = (Some("tcp:[::]:4444"), Some("web3"), Some(uuid));
        for (listener, name, uuid) in [all, (None, None, None)] {
            let guest = StoredGuest {
                listener: listener.map(str::to_owned),
                name: name.map(|name| name.parse().unwrap()),
                uuid: uuid.map(|uuid| uuid.parse().unwrap()),
                ..guest()
            };
            let bytes = encode(&guest, &description(), &disks()).unwrap();
            let stored = decode(&bytes).unwrap();
            assert_eq!(
                (stored.guest, stored.description, stored.disks),
                (guest, description(), disks())
            );
        }
    }

    /// It had no listener, no name and no UUID.
    #[test]
    fn what_an_earlier_receiver_has_left_is_decoded() {
        let bytes = encode(&guest(), &description(), &disks()).unwrap();
        let earlier = &bytes[..bytes.len() - 24];
        assert_eq!(decode(earlier).unwrap().guest, guest());
    }

    #[test]
    fn damaged_bytes_do_not_panic() {
        let bytes = encode(&guest(), &description(), &disks()).unwrap();
        // That of an earlier receiver is whole without its last three texts.
        for length in (0..bytes.len()).filter(|length| *length != bytes.len() - 24) {
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
