//! The captured main channel, as the engine's own session reads it: where it waits for which answer, and where each
//! checkpoint begins and ends.

use super::{Flow, StreamsError};
use colo_ring::blocks::BlockTable;
use colo_ring::session::{Action, Outbound, Page, PageContent, Session, SessionError, SessionLimits};
use colo_ring::units::BlockId;
use colo_ring::wire::colo::Message;
use colo_ring::wire::ram::{BlockRef, RamRecord};
use std::ops::Range;
use std::sync::Arc;

/// What the session read from the main channel.
#[derive(Debug)]
pub(super) struct MainIndex {
    /// The versioned machine type.
    pub machine_type: String,
    /// Whether the primary opened the return path, so that PONG and SHUT precede READY.
    pub return_path: bool,
    /// Values of the PONGs before READY.
    pub pongs: Vec<u32>,
    /// The guest's RAM blocks.
    pub blocks: Option<Arc<BlockTable>>,
    /// The end of the initial state, where the primary waits for READY.
    pub ready: Option<Ready>,
    /// Every checkpoint that is complete on this channel.
    pub checkpoints: Vec<MainCheckpoint>,
    /// Where a write of the primary ends: where it flushes, and where bytes arrived at different times.
    pub pieces: Vec<usize>,
    /// Where and why reading ended before the last byte.
    pub stopped: Option<String>,
}

/// The end of precopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ready {
    /// Where the primary waits.
    pub position: usize,
    /// Sync points so far.
    pub markers: u64,
}

/// A checkpoint on the main channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MainCheckpoint {
    /// CHECKPOINT_REQUEST, after which the primary waits for REPLY.
    pub request: Range<usize>,
    /// VMSTATE_SEND to the last byte of device state, after which it waits for RECEIVED and LOADED.
    pub transfer: Range<usize>,
    /// Where the device state begins.
    pub device_state: usize,
    /// Sync points up to its end, since the start of the session.
    pub markers: u64,
    /// Pages with content on this channel.
    pub pages: u64,
    /// Zero pages on this channel.
    pub zero_pages: u64,
    /// Bytes of content of its pages: deltas count as long as they are.
    pub payload_bytes: u64,
    /// Whether there are deltas among them, which depend on what the secondary holds.
    pub has_deltas: bool,
    /// Its first page record.
    pub first_page: Option<PageRecord>,
    /// The block of the session's last page record, which CONTINUE refers to from here on.
    pub last_block: Option<BlockId>,
}

/// A page record and its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageRecord {
    /// Where it begins on the channel.
    pub position: usize,
    /// The block it belongs to.
    pub block: BlockId,
    /// Whether it refers to the record before, instead of naming its block.
    pub continues: bool,
}

impl MainIndex {
    /// Reads the channel to its end, or to the first byte that the session refuses.
    pub(super) fn read(flow: &Flow, channels: u8) -> Self {
        let mut reader = Reader::new(flow, channels);
        for chunk in flow.chunks() {
            let read = reader.read_to(chunk.end);
            reader.piece(chunk.end);
            if let Err(error) = read {
                reader.index.stopped = Some(error.to_string());
                break;
            }
        }
        let end = flow.bytes().len();
        let whole = reader.is_between_checkpoints && reader.position == end;
        if reader.index.stopped.is_none() && !whole {
            reader.index.stopped = Some(format!("main channel, byte {end}: {}", reader.session.ending()));
        }
        reader.index.machine_type = reader.session.machine_type().to_owned();
        reader.index
    }
}

/// Whether the initial device state ends where it looks so, before `rest`: there the primary waits for its answer, and a request
/// is the first that it sends then.
pub(crate) fn ends_initial_state(rest: &[u8]) -> bool {
    rest.is_empty() || matches!(Message::parse(rest), Ok(Some((Message::CheckpointRequest, _))))
}

struct Reader<'a> {
    bytes: &'a [u8],
    session: Session,
    position: usize,
    markers: u64,
    last_block: Option<BlockId>,
    /// The last CHECKPOINT_REQUEST.
    request: Range<usize>,
    /// The checkpoint that is being read.
    current: Option<MainCheckpoint>,
    is_between_checkpoints: bool,
    index: MainIndex,
}

impl<'a> Reader<'a> {
    fn new(flow: &'a Flow, channels: u8) -> Self {
        Self {
            bytes: flow.bytes(),
            session: Session::new(SessionLimits::of_protocol(channels)),
            position: 0,
            markers: 0,
            last_block: None,
            request: 0..0,
            current: None,
            is_between_checkpoints: false,
            index: MainIndex {
                machine_type: String::new(),
                return_path: false,
                pongs: Vec::new(),
                blocks: None,
                ready: None,
                checkpoints: Vec::new(),
                pieces: Vec::new(),
                stopped: None,
            },
        }
    }

    /// Steps the session over the bytes up to `end`.
    fn read_to(&mut self, end: usize) -> Result<(), SessionError> {
        loop {
            let begin = self.position;
            let (consumed, action) = self.session.step(&self.bytes[begin..end])?;
            self.position += consumed;
            match action {
                Action::NeedMore => return Ok(()),
                Action::Continue => {}
                Action::Memory(blocks) => self.index.blocks = Some(blocks),
                Action::Page(page) => self.page(begin, page),
                Action::Marker => {
                    self.markers += 1;
                    self.piece(self.position);
                }
                Action::TransferBegins => {
                    if let Some(current) = &mut self.current {
                        current.transfer.start = begin;
                    }
                    self.piece(self.position);
                }
                Action::RamComplete => self.ram_complete(),
                Action::LooksEnded(_) => {
                    if ends_initial_state(&self.bytes[self.position..]) {
                        self.session.silence();
                    }
                }
                Action::Commit(_) => self.session.committed(),
                Action::FinishFlush => {
                    self.request = begin..self.position;
                    self.session.flush_finished();
                }
                Action::OpenGate => {}
                Action::Send(outbound) => self.wait(outbound),
            }
        }
    }

    /// After the EOF byte of a checkpoint come VMSTATE_SIZE and the device state.
    fn ram_complete(&mut self) {
        const SIZE_LEN: usize = 12;
        if let Some(current) = &mut self.current {
            current.device_state = self.position + SIZE_LEN;
            self.piece(self.position);
            self.piece(self.position + SIZE_LEN);
        }
    }

    fn page(&mut self, position: usize, page: Page<'_>) {
        let blocks = self
            .index
            .blocks
            .as_ref()
            .expect("pages come after the block list");
        let (block, _) = blocks.locate(page.page);
        self.last_block = Some(block);
        let Some(current) = &mut self.current else {
            return;
        };
        match page.content {
            PageContent::Zero => current.zero_pages += 1,
            PageContent::Bytes(bytes) => {
                current.pages += 1;
                current.payload_bytes += bytes.len() as u64;
            }
            PageContent::Xbzrle(delta) => {
                current.pages += 1;
                current.payload_bytes += delta.len() as u64;
                current.has_deltas = true;
            }
        }
        if current.first_page.is_none() {
            // The session has parsed it already.
            let record = RamRecord::parse(&self.bytes[position..]).ok().flatten();
            let continues = record.is_some_and(|(record, _)| block_of(&record) == Some(BlockRef::Continue));
            current.first_page = Some(PageRecord {
                position,
                block,
                continues,
            });
        }
    }

    /// The session sends a message: the primary waits for it here.
    fn wait(&mut self, outbound: Outbound) {
        self.piece(self.position);
        self.is_between_checkpoints = matches!(outbound, Outbound::Ready { .. } | Outbound::Loaded);
        match outbound {
            // The primary does not wait for it.
            Outbound::Pong(value) => self.index.pongs.push(value),
            Outbound::Ready { return_path } => {
                self.index.return_path = return_path;
                self.index.ready = Some(Ready {
                    position: self.position,
                    markers: self.markers,
                });
            }
            Outbound::Reply => {
                self.current = Some(MainCheckpoint {
                    request: self.request.clone(),
                    transfer: self.position..self.position,
                    device_state: self.position,
                    markers: 0,
                    pages: 0,
                    zero_pages: 0,
                    payload_bytes: 0,
                    has_deltas: false,
                    first_page: None,
                    last_block: None,
                });
            }
            Outbound::Loaded => {
                if let Some(mut checkpoint) = self.current.take() {
                    checkpoint.transfer.end = self.position;
                    checkpoint.markers = self.markers;
                    checkpoint.last_block = self.last_block;
                    self.index.checkpoints.push(checkpoint);
                }
            }
        }
    }

    fn piece(&mut self, end: usize) {
        // The end of VMSTATE_SIZE is inserted before its bytes were read.
        match self.index.pieces.binary_search(&end) {
            Ok(_) => {}
            Err(place) => self.index.pieces.insert(place, end),
        }
    }
}

fn block_of<'a>(record: &RamRecord<'a>) -> Option<BlockRef<'a>> {
    match record {
        RamRecord::Zero { block, .. } | RamRecord::Page { block, .. } | RamRecord::Xbzrle { block, .. } => {
            Some(*block)
        }
        _ => None,
    }
}

/// A checkpoint's transfer with the block named in its first page record, and how many bytes that adds.
///
/// # Errors
/// If there is no page record.
pub(super) fn with_block_named(
    bytes: &[u8],
    transfer: &Range<usize>,
    first: &PageRecord,
    blocks: &BlockTable,
) -> Result<(Vec<u8>, usize), StreamsError> {
    let broken = || StreamsError::Internal("a page record that was read cannot be read again");
    let parsed = RamRecord::parse(&bytes[first.position..]).map_err(|_| broken())?;
    let (mut record, consumed) = parsed.ok_or_else(broken)?;
    let name = BlockRef::Named(&blocks.block(first.block).name);
    match &mut record {
        RamRecord::Zero { block, .. } | RamRecord::Page { block, .. } | RamRecord::Xbzrle { block, .. } => {
            *block = name
        }
        _ => return Err(broken()),
    }
    let mut changed = bytes[transfer.start..first.position].to_vec();
    let before = changed.len();
    record.encode(&mut changed);
    let longer = changed.len() - before - consumed;
    changed.extend_from_slice(&bytes[first.position + consumed..transfer.end]);
    Ok((changed, longer))
}
