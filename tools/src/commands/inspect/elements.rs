//! What is on the main channel, element by element, as the engine's own session reads it.

use crate::streams::{Flow, Streams, ends_initial_state};
use colo_ring::session::{Action, Session, SessionError, SessionLimits};
use colo_ring::wire::colo::Message;
use colo_ring::wire::ram::{BlockEntry, BlockRef, RamRecord};
use colo_ring::wire::stream::{Command, Section, parse_footer};

/// One element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    /// Its first byte on the channel.
    pub offset: usize,
    /// Its length.
    pub bytes: usize,
    /// What it is.
    pub what: String,
    /// Whether it is a page.
    pub is_page: bool,
}

/// Calls `each` for every element, up to the end or to where the session cannot go on. Returns why it ended early, with
/// the byte.
///
/// # Errors
/// What `each` returns.
pub(super) fn walk<E>(
    streams: &Streams,
    mut each: impl FnMut(Element) -> Result<(), E>,
) -> Result<Option<String>, E> {
    let flow = &streams.main.to_secondary;
    let limits = SessionLimits::of_protocol(u8::try_from(streams.channels.len()).unwrap_or(u8::MAX));
    let mut walk = Walk {
        flow,
        session: Session::new(limits),
        position: 0,
        begin: 0,
    };
    for chunk in flow.chunks() {
        // The end of the initial state is known from the silence behind it, so it goes chunk by chunk.
        match walk.elements_to(chunk.end, &mut each)? {
            Ok(()) => {}
            Err(error) => return Ok(Some(error.to_string())),
        }
    }
    Ok((walk.position < flow.bytes().len()).then(|| {
        format!(
            "main channel, byte {}: the capture ends inside an element",
            walk.position
        )
    }))
}

struct Walk<'a> {
    flow: &'a Flow,
    session: Session,
    position: usize,
    /// Where the element begins that is being read: device state is taken in pieces.
    begin: usize,
}

impl Walk<'_> {
    fn elements_to<E>(
        &mut self,
        end: usize,
        each: &mut impl FnMut(Element) -> Result<(), E>,
    ) -> Result<Result<(), SessionError>, E> {
        let bytes = self.flow.bytes();
        loop {
            let (consumed, action) = match self.session.step(&bytes[self.position..end]) {
                Ok(step) => step,
                Err(error) => return Ok(Err(error)),
            };
            self.position += consumed;
            let is_commit = matches!(action, Action::Commit(_));
            let is_request = matches!(action, Action::FinishFlush);
            let described = match &action {
                Action::NeedMore => return Ok(Ok(())),
                Action::LooksEnded(_) => {
                    if ends_initial_state(&bytes[self.position..]) {
                        self.session.silence();
                    }
                    None
                }
                Action::Commit(checkpoint) => {
                    Some((format!("device state of checkpoint {}", checkpoint.0), false))
                }
                _ if consumed == 0 => None,
                action => Some(self.describe(&bytes[self.begin..self.position], action)),
            };
            if is_commit {
                self.session.committed();
            }
            if is_request {
                self.session.flush_finished();
            }
            if let Some((what, is_page)) = described {
                let element = Element {
                    offset: self.begin,
                    bytes: self.position - self.begin,
                    what,
                    is_page,
                };
                self.begin = self.position;
                each(element)?;
            }
        }
    }

    fn describe(&self, element: &[u8], action: &Action<'_>) -> (String, bool) {
        if self.begin == 0 {
            return (
                format!("header, machine type {}", self.session.machine_type()),
                false,
            );
        }
        let is_page = matches!(action, Action::Page(_));
        (name(element, is_page), is_page)
    }
}

/// What these bytes are. What was read as one element is a whole one of some kind, and no two kinds have the same bytes
/// where the session reads either.
fn name(element: &[u8], is_page: bool) -> String {
    let whole = |consumed: usize| consumed == element.len();
    if is_page {
        return page_name(element);
    }
    if let Ok(Some((section, consumed))) = Section::parse(element)
        && whole(consumed)
    {
        return section_name(&section);
    }
    if let Some(id) = element.last_chunk().map(|id| u32::from_be_bytes(*id))
        && let Ok(Some(((), consumed))) = parse_footer(element, id)
        && whole(consumed)
    {
        return format!("footer of section {id}");
    }
    if let Ok(Some((message, consumed))) = Message::parse(element)
        && whole(consumed)
    {
        return match message {
            Message::CheckpointRequest => "CHECKPOINT_REQUEST".to_owned(),
            Message::VmstateSend => "VMSTATE_SEND".to_owned(),
            Message::VmstateSize(bytes) => format!("VMSTATE_SIZE, {bytes} bytes"),
            other => format!("{other:?}"),
        };
    }
    if let Ok(Some((record, consumed))) = RamRecord::parse(element)
        && whole(consumed)
    {
        return match record {
            RamRecord::MemSize { total } => format!("MEM_SIZE, {total} bytes of RAM"),
            RamRecord::Eos => "end of the section's records".to_owned(),
            RamRecord::MultifdFlush => "MULTIFD_FLUSH, a sync point".to_owned(),
            _ => page_name(element),
        };
    }
    if let Ok(Some((block, consumed))) = BlockEntry::parse(element)
        && whole(consumed)
    {
        let name = block.name.escape_ascii();
        return format!("RAM block {name}, {} bytes", block.used_length);
    }
    "not named".to_owned()
}

fn section_name(section: &Section<'_>) -> String {
    match section {
        Section::Eof => "end of the sections".to_owned(),
        Section::RamStart { id } => format!("start of section {id}, RAM"),
        Section::Part { id } => format!("part of section {id}"),
        Section::End { id } => format!("last part of section {id}"),
        Section::Full { id, idstr, .. } => format!("section {id}, {}", idstr.escape_ascii()),
        Section::VmDescription { length } => format!("vmdesc, {length} bytes"),
        Section::Command(command) => match command {
            Command::OpenReturnPath => "command OPEN_RETURN_PATH".to_owned(),
            Command::Ping(value) => format!("command PING {value}"),
            Command::EnableColo => "command ENABLE_COLO".to_owned(),
            Command::SwitchoverStart => "command SWITCHOVER_START".to_owned(),
        },
    }
}

fn page_name(element: &[u8]) -> String {
    let in_block = |block: &BlockRef<'_>| match block {
        BlockRef::Continue => "the same block".to_owned(),
        BlockRef::Named(name) => name.escape_ascii().to_string(),
    };
    match RamRecord::parse(element) {
        Ok(Some((RamRecord::Zero { block, offset }, _))) => {
            format!("zero page {offset:#x} of {}", in_block(&block))
        }
        Ok(Some((RamRecord::Page { block, offset, .. }, _))) => {
            format!("page {offset:#x} of {}", in_block(&block))
        }
        Ok(Some((RamRecord::Xbzrle { block, offset, delta }, _))) => format!(
            "page {offset:#x} of {}, XBZRLE of {} bytes",
            in_block(&block),
            delta.len()
        ),
        _ => "page".to_owned(),
    }
}
