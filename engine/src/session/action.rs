//! What the main channel's state machine asks its driver to do.

#[cfg(doc)]
use super::Session;
use crate::blocks::BlockTable;
use crate::units::{CheckpointId, PAGE_SIZE, PageIndex};
use crate::wire::colo::Message;
use crate::wire::return_path::RpMessage;
use crate::wire::vmdesc::Evidence;
use std::sync::Arc;

/// What the driver does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Nothing: more bytes are needed.
    NeedMore,
    /// Nothing: step again.
    Continue,
    /// Send these bytes, whole, in one write.
    Send(Outbound),
    /// The block list is complete: allocate the guest's memory before the next step, which may release the channels.
    Memory(Arc<BlockTable>),
    /// Apply a page that was received on the main channel.
    Page(Page<'a>),
    /// A sync point: wait until all channels have arrived, and release them.
    Marker,
    /// The checkpoint's transfer begins: the primary's guest is stopped.
    TransferBegins,
    /// All RAM of the round is here. Close the gate: no channel may write until [`Action::OpenGate`].
    RamComplete,
    /// What has arrived looks like all of the initial device state, and this speaks for it beside its form. If nothing more arrives for
    /// some time, call [`Session::silence`]; if something does, it was not, and the next step goes on.
    LooksEnded(Evidence),
    /// Everything of this checkpoint is here: commit it with [`Session::device_state`], then call
    /// [`Session::committed`].
    Commit(CheckpointId),
    /// The primary asks for a checkpoint, and its guest runs on until it is answered, however late that is. When the pages of the last
    /// checkpoint are in the RAM image, so that new ones may arrive, call [`Session::flush_finished`].
    FinishFlush,
    /// Open the gate: the primary may send pages as soon as it has the CHECKPOINT_REPLY that follows.
    OpenGate,
}

/// A message to the primary on the main channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// PONG, on the return path.
    Pong(u32),
    /// The initial state is committed: SHUT if the return path is open, and CHECKPOINT_READY.
    Ready {
        /// Whether OPEN_RETURN_PATH was received.
        return_path: bool,
    },
    /// CHECKPOINT_REPLY.
    Reply,
    /// VMSTATE_RECEIVED and VMSTATE_LOADED.
    Loaded,
}

impl Outbound {
    /// Bytes of the longest.
    pub const LEN_MAX: usize = 12;

    /// Replaces the content of `out` by its bytes: at most [`Self::LEN_MAX`].
    pub fn encode(self, out: &mut Vec<u8>) {
        out.clear();
        match self {
            Outbound::Pong(value) => RpMessage::Pong(value).encode(out),
            Outbound::Ready { return_path } => {
                if return_path {
                    RpMessage::Shut(0).encode(out);
                }
                Message::CheckpointReady.encode(out);
            }
            Outbound::Reply => Message::CheckpointReply.encode(out),
            Outbound::Loaded => {
                Message::VmstateReceived.encode(out);
                Message::VmstateLoaded.encode(out);
            }
        }
    }
}

/// A page that was received on the main channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page<'a> {
    /// Its place in the guest's RAM.
    pub page: PageIndex,
    /// Its new content.
    pub content: PageContent<'a>,
}

/// New content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// These bytes.
    Bytes(&'a [u8; PAGE_SIZE]),
    /// All zero.
    Zero,
    /// A delta against its newest received content, checked ([`crate::wire::xbzrle`]).
    Xbzrle(&'a [u8]),
}
