//! Checkpoints of receivers that are gone, found in the RAM directory: offered as sessions that have ended.
//!
//! What a receiver must know of a session beside its checkpoint is written down here, too: with the first checkpoint, as
//! texts and numbers one after the other.
#![forbid(unsafe_code)]

use super::budget::Budget;
use super::guest::{Guest, Memory, Services};
use super::{Event, Events};
use crate::blocks::{BLOCKS_MAX, BlockTable};
use crate::session::SessionRecord;
use crate::store::{Recoverable, RecoverableCheckpoint, labels_in};
use std::path::Path;
use std::sync::Arc;

/// What a session's files are named by.
pub(super) fn label(session: u32) -> String {
    format!("session-{session}")
}

fn session_of(found: &str) -> Option<u32> {
    let number: u32 = found.strip_prefix("session-")?.parse().ok()?;
    // Not another way to write it.
    (label(number) == found).then_some(number)
}

/// What stays the same for a session.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) peer: String,
    pub(super) record: SessionRecord,
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// A session as it is written down.
pub(super) fn encode(peer: &str, record: &SessionRecord) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, peer.as_bytes());
    put_bytes(&mut out, record.machine_type.as_bytes());
    put_bytes(&mut out, &record.header);
    put_bytes(&mut out, &record.vmdesc);
    out.extend_from_slice(&u64::from(record.ram_section).to_le_bytes());
    out.extend_from_slice(&(record.blocks.iter().len() as u64).to_le_bytes());
    for (_, block) in record.blocks.iter() {
        put_bytes(&mut out, &block.name);
        out.extend_from_slice(&block.used_length.to_le_bytes());
    }
    out
}

/// What is left to read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn number(&mut self) -> Result<u64, String> {
        let (number, rest) = self.0.split_first_chunk().ok_or("it ends within a number")?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    fn bytes(&mut self) -> Result<&'a [u8], String> {
        let length = usize::try_from(self.number()?).map_err(|_| "a text is too long")?;
        let (bytes, rest) = (self.0.split_at_checked(length)).ok_or("it ends within a text")?;
        self.0 = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, String> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| "a text is not UTF-8".to_owned())
    }
}

/// Reads what [`encode`] has written.
///
/// # Errors
/// In words. Nothing is allocated by a number that stands there.
pub(super) fn decode(bytes: &[u8]) -> Result<Described, String> {
    let mut rest = Rest(bytes);
    let peer = rest.text()?;
    let machine_type = rest.text()?;
    let header = rest.bytes()?.to_vec();
    let vmdesc = rest.bytes()?.to_vec();
    let ram_section = u32::try_from(rest.number()?).map_err(|_| "the RAM section's number is too large")?;
    let count = rest.number()?;
    if count > BLOCKS_MAX as u64 {
        return Err(format!("{count} RAM blocks are more than {BLOCKS_MAX}"));
    }
    let mut blocks = Vec::new();
    let mut total = 0u64;
    for _ in 0..count {
        let name = rest.bytes()?.into();
        let length = rest.number()?;
        total = total.checked_add(length).ok_or("the RAM blocks are too long")?;
        blocks.push((name, length));
    }
    if !rest.0.is_empty() {
        return Err(format!("{} bytes follow its end", rest.0.len()));
    }
    let blocks = BlockTable::new(blocks, total).map_err(|error| error.to_string())?;
    // A failover sends the header on: it must be one.
    let mut with_next = header.clone();
    with_next.push(0);
    match crate::wire::stream::StreamHeader::parse(&with_next) {
        Ok(Some(_)) => {}
        _ => return Err("its stream header is none".to_owned()),
    }
    let record = SessionRecord {
        header,
        machine_type,
        ram_section,
        blocks: Arc::new(blocks),
        vmdesc,
    };
    Ok(Described { peer, record })
}

/// What guests' memory is taken of.
pub(super) struct Budgets {
    pub(super) ram: Arc<Budget>,
    pub(super) device_states: Arc<Budget>,
}

/// Takes the checkpoint of one label, if there is one for us.
fn recover(
    directory: &Path,
    session: u32,
    services: &Arc<Services>,
    budgets: &Budgets,
) -> Result<Result<Arc<Guest>, String>, String> {
    let label = label(session);
    let left = match RecoverableCheckpoint::find(directory, &label).map_err(|error| error.to_string())? {
        Recoverable::Checkpoint(left) => left,
        Recoverable::InUse => return Ok(Err("it belongs to another receiver, which is running".to_owned())),
        Recoverable::Nothing => {
            return Ok(Err(
                "its receiver ended in precopy, so there is nothing to resume; its files were removed"
                    .to_owned(),
            ));
        }
        Recoverable::Unknown => return Err("there is no commit record".to_owned()),
    };
    let described = decode(left.session());
    let Described { peer, record } =
        described.map_err(|why| format!("what is written of the session: {why}"))?;
    let ram = budgets.ram.take(record.blocks.total_bytes())?;
    let device_state = budgets.device_states.take(left.device_state_bytes() as u64 * 2)?;
    let (age, is_given) = (left.age(), left.is_given());
    let committed = left
        .recover(record.blocks.clone())
        .map_err(|error| error.to_string())?;
    let memory = Memory {
        store: None,
        committed: Arc::new(committed),
        _ram: ram,
        device_state,
        fallbacks: Vec::new(),
    };
    let guest = Guest::recovered(session, peer, services.clone(), record, memory, age);
    if is_given {
        guest
            .promotion()
            .was_given("a QEMU by the receiver before this one");
    }
    Ok(Ok(guest))
}

/// Takes what earlier receivers have left in the RAM directory, tells about everything there, and says which number is the
/// first that no session's files have.
pub(super) fn recover_all(
    directory: &Path,
    services: &Arc<Services>,
    budgets: &Budgets,
    events: &Events,
) -> (Vec<Arc<Guest>>, u32) {
    let labels = match labels_in(directory) {
        Ok(labels) => labels,
        Err(error) => {
            events(Event::Warning(error.to_string()));
            return (Vec::new(), 1);
        }
    };
    let mut sessions: Vec<u32> = labels.iter().filter_map(|found| session_of(found)).collect();
    sessions.sort_unstable();
    let mut guests = Vec::new();
    for session in &sessions {
        let files = directory.join(format!("{}.*", label(*session)));
        let files = files.display();
        match recover(directory, *session, services, budgets) {
            Ok(Ok(guest)) => {
                let checkpoint = guest.committed().and_then(|committed| committed.checkpoint());
                events(Event::Note(format!(
                    "session {session} of {} was recovered from {files}: checkpoint {} is whole",
                    guest.peer,
                    checkpoint.map_or(0, |id| id.0)
                )));
                guests.push(guest);
            }
            Ok(Err(why)) => events(Event::Note(format!("{files}: {why}"))),
            Err(error) => events(Event::Warning(format!(
                "{files} cannot be used and stay as they are: {error}; remove them if no virtual machine runs on them"
            ))),
        }
    }
    (guests, sessions.last().map_or(1, |last| last.saturating_add(1)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::wire::stream::StreamHeader;

    fn record() -> SessionRecord {
        let entries = vec![
            (b"pc.ram".as_slice().into(), 8192),
            (b"\xff".as_slice().into(), 4096),
        ];
        let mut header = Vec::new();
        let machine = b"pc-q35-11.1".to_vec();
        test_header(&machine).encode(&mut header);
        SessionRecord {
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

    #[test]
    fn what_is_written_is_read() {
        let bytes = encode("tcp:10.0.0.1:5", &record());
        let described = decode(&bytes).unwrap();
        assert_eq!(
            (described.peer.as_str(), described.record),
            ("tcp:10.0.0.1:5", record())
        );
    }

    #[test]
    fn whatever_stands_there_is_refused_or_read() {
        let bytes = encode("x", &record());
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

    #[test]
    fn only_our_own_names_are_sessions() {
        assert_eq!(session_of("session-7"), Some(7));
        for name in [
            "session-07",
            "session-",
            "session-+7",
            "session-4294967296",
            "guest",
        ] {
            assert_eq!(session_of(name), None, "{name}");
        }
    }
}
