//! A connection of the data plane whose bytes come in records: see the module above.

use super::handshake::Channel;
use super::record::{Incoming, Outgoing, Record, RecordError, record_length};
use crate::ring::{Connection, Loss, Move, PlanCursor, ReceivePlan, StreamBuffer};
use std::collections::TryReserveError;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::RawFd;
use std::sync::Arc;

/// Ciphertext that is received at a time: what a core's own cache holds beside the pages that it becomes, and many records.
const BUFFER_BYTES: usize = 128 << 10;

/// What a connection opens in one turn of its core, in bytes: all that one receive can bring.
const TURN_BYTES: usize = BUFFER_BYTES;

/// What a record counts for, beside its bytes: one without content is work, too.
const RECORD_WORK: usize = 512;

/// What the connection inside may do with what it is handed, whose bytes can be few: zero pages. Without TLS it is handed one packet a turn.
const HAND_ON_WORK: usize = 16 << 10;

/// What a change of keys counts for: two derivations, and an answer.
const KEY_UPDATE_WORK: usize = 8 << 10;

/// How much more work a byte is than one that is only received: a core falls behind earlier.
const WORK: u64 = 2;

/// What a connection takes in addition.
pub(crate) const CONNECTION_BYTES: u64 = BUFFER_BYTES as u64 + (32 << 10);

/// What is left of a record.
#[derive(Clone, Debug)]
struct Opened {
    /// Of its content: positions behind the beginning of the record.
    content: Range<usize>,
    length: usize,
    is_key_update: bool,
}

/// A connection with TLS. It receives records into a buffer of its own, opens them there, and hands what they hold to the places that the
/// connection inside has planned: the one copy.
pub(crate) struct Encrypted<C> {
    inner: C,
    incoming: Incoming,
    outgoing: Arc<Outgoing>,
    /// What was opened before the connection came here.
    first: Vec<u8>,
    buffer: StreamBuffer,
    /// The record at the beginning of the buffer, if it is opened.
    opened: Option<Opened>,
    plan: Box<ReceivePlan>,
    /// Whether its next turn has something to do.
    has_more: bool,
    /// close_notify has come. The connection inside gets the end once it wants more than it was handed.
    is_closed: bool,
}

/// Why a connection ends by what it has received.
enum End {
    Closed,
    Broken(RecordError),
}

impl<C: Connection> Encrypted<C> {
    /// A connection whose handshake is done.
    pub(crate) fn new(inner: C, receiving: Receiving) -> Self {
        let Receiving {
            incoming,
            outgoing,
            first,
            buffer,
        } = receiving;
        outgoing.set_more(!first.is_empty());
        Self {
            inner,
            incoming,
            outgoing,
            has_more: !first.is_empty(),
            first,
            buffer,
            opened: None,
            plan: ReceivePlan::new(),
            is_closed: false,
        }
    }

    /// Whether something can be handed on without another receive.
    fn has_some(&self) -> bool {
        let is_whole = || match record_length(self.buffer.bytes()) {
            Ok(Some(length)) => length <= self.buffer.bytes().len(),
            Ok(None) => false,
            // To be found when it is opened.
            Err(_) => true,
        };
        !self.first.is_empty() || self.opened.is_some() || (!self.is_closed && is_whole())
    }

    /// Hands on what is here, as far as the connection inside has a place for it.
    fn pump(&mut self) -> ControlFlow<()> {
        let mut work = 0;
        self.has_more = false;
        while self.has_some() {
            if self.inner.has_more() {
                break;
            }
            if work >= TURN_BYTES {
                self.has_more = true;
                break;
            }
            let fd = self.inner.fd();
            let Some(plan) = self.inner.plan() else { break };
            let mut filling = Filling {
                plan,
                cursor: PlanCursor::default(),
                filled: 0,
            };
            let end = loop {
                if filling.is_full() || work >= TURN_BYTES {
                    break Ok(());
                }
                if !self.first.is_empty() {
                    let taken = filling.fill(&self.first);
                    self.first.drain(..taken);
                    continue;
                }
                let opened = match self.opened.take() {
                    Some(opened) => opened,
                    None if self.is_closed => break Ok(()),
                    None => match open(&mut self.buffer, &mut self.incoming, &self.outgoing, fd) {
                        Ok(Some(opened)) => opened,
                        Ok(None) => break Ok(()),
                        Err(End::Closed) => {
                            self.is_closed = true;
                            break Ok(());
                        }
                        Err(End::Broken(error)) => break Err(error),
                    },
                };
                let content = &self.buffer.bytes()[opened.content.clone()];
                let taken = filling.fill(content);
                work += taken
                    + match opened.is_key_update {
                        true => KEY_UPDATE_WORK,
                        false => RECORD_WORK,
                    };
                if taken < content.len() {
                    self.opened = Some(Opened {
                        content: opened.content.start + taken..opened.content.end,
                        ..opened
                    });
                } else {
                    self.buffer.consume(opened.length);
                }
            };
            let filled = filling.filled;
            let has_more = !self.first.is_empty() || (!self.is_closed && !self.buffer.bytes().is_empty());
            // Before the connection inside sees its bytes: it may ask whether any follow.
            self.outgoing.set_more(has_more);
            if filled > 0 {
                work += HAND_ON_WORK;
                self.inner.received(filled)?;
            }
            if let Err(error) = end {
                if let Some(alert) = error.alert() {
                    self.outgoing.alert(fd, alert);
                }
                let error = io::Error::new(io::ErrorKind::InvalidData, error);
                self.inner.lost(Loss::Error(error));
                return ControlFlow::Break(());
            }
        }
        let is_over = self.is_closed && !self.has_some() && !self.inner.has_more();
        if is_over && self.inner.plan().is_some() {
            self.inner.lost(Loss::Eof);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

/// A plan that is filled from records.
struct Filling<'a> {
    plan: &'a mut ReceivePlan,
    cursor: PlanCursor,
    filled: usize,
}

impl Filling<'_> {
    fn is_full(&self) -> bool {
        self.filled == self.plan.remaining()
    }

    /// Copies as many bytes as there is room for.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        let count = self.plan.write(&mut self.cursor, bytes);
        self.filled += count;
        count
    }
}

/// Opens records until one has content. None if the next is not whole.
fn open(
    buffer: &mut StreamBuffer,
    incoming: &mut Incoming,
    outgoing: &Outgoing,
    fd: RawFd,
) -> Result<Option<Opened>, End> {
    let length = record_length(buffer.bytes()).map_err(End::Broken)?;
    let Some(length) = length.filter(|length| *length <= buffer.bytes().len()) else {
        return Ok(None);
    };
    let record = &mut buffer.bytes_mut()[..length];
    let start = record.as_ptr().addr();
    match incoming.open(record).map_err(End::Broken)? {
        Record::Data(content) => {
            let from = content.as_ptr().addr().saturating_sub(start);
            let content = from..from + content.len();
            Ok(Some(Opened {
                content,
                length,
                is_key_update: false,
            }))
        }
        Record::KeyUpdate { is_requested } => {
            let updated = outgoing.key_update(fd, incoming, is_requested);
            updated.map_err(End::Broken)?;
            // As a record without content.
            Ok(Some(Opened {
                content: 0..0,
                length,
                is_key_update: true,
            }))
        }
        Record::Closed => Err(End::Closed),
    }
}

/// What an encrypted connection receives with.
pub(crate) struct Receiving {
    incoming: Incoming,
    outgoing: Arc<Outgoing>,
    first: Vec<u8>,
    buffer: StreamBuffer,
}

impl Receiving {
    /// Of a channel after its handshake.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn new(channel: Channel) -> Result<Self, TryReserveError> {
        Ok(Self {
            incoming: channel.incoming,
            outgoing: channel.outgoing,
            first: channel.plain,
            buffer: StreamBuffer::try_new(BUFFER_BYTES)?,
        })
    }

    /// What makes records for the peer.
    pub(crate) fn outgoing(&self) -> &Arc<Outgoing> {
        &self.outgoing
    }
}

impl<C: Connection> Connection for Encrypted<C> {
    fn fd(&self) -> RawFd {
        self.inner.fd()
    }

    fn tenant(&self) -> u64 {
        self.inner.tenant()
    }

    /// Room for records, if the connection inside wants bytes and has been handed all that are here.
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        if self.has_some() || self.is_closed {
            return None;
        }
        let is_bulk = self.inner.plan()?.bulk;
        let (space, bytes) = self.buffer.space()?;
        self.plan.clear();
        self.plan.push(space, bytes);
        self.plan.bulk = is_bulk;
        Some(&mut self.plan)
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        self.buffer.fill(bytes);
        self.outgoing.set_more(true);
        self.pump()
    }

    /// A stream that ends without close_notify, or in the middle of a record, is one that ends: what was handed on was whole records.
    fn lost(&mut self, loss: Loss) {
        self.inner.lost(loss);
    }

    fn leaked(&mut self) {
        self.inner.leaked();
    }

    fn resume(&mut self) -> ControlFlow<()> {
        self.inner.resume()?;
        self.pump()
    }

    fn has_more(&self) -> bool {
        self.has_more || self.inner.has_more()
    }

    fn attached(&mut self, core: usize) {
        self.inner.attached(core);
    }

    fn moves_to(&self) -> Option<Move> {
        let wanted = self.inner.moves_to()?;
        Some(Move {
            from_queued: wanted.from_queued / WORK,
            ..wanted
        })
    }
}
