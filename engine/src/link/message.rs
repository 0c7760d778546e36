//! The link's messages: JSON lines.

use crate::units::CheckpointId;
use serde::{Deserialize, Serialize};

/// The version of the protocol that is spoken here.
pub const LINK_VERSION: u32 = 6;

/// The first bytes of a guard's connection, by which the receiver knows it from a migration.
pub const PREFACE: [u8; 4] = *b"LINK";

/// Longest line, in bytes, with its end.
pub const LINE_MAX: usize = 4096;

/// A guard's first message.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hello {
    /// [`LINK_VERSION`] of the guard.
    pub version: u32,
    /// The operator's name for the guest.
    pub name: String,
    /// The guest's UUID, where it has one, as QEMU writes it.
    pub uuid: Option<String>,
    /// After so many milliseconds without an answer to a barrier the receiver gives up the link and acknowledges the
    /// checkpoint: a guard that hangs stops its guest for no longer.
    pub timeout_ms: u32,
    /// To which session of the guest the link is to belong.
    pub wants: Wanted,
}

/// Which of a guest's sessions a guard wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// The next one that begins: the guard is about to have the guest protected. Its gates are open until its first line.
    Next,
    /// The one that there is: the guard has found the guest protected. Its gates hold from the start.
    Running,
    /// The one of this number, whose link was lost.
    Session(u32),
}

/// The only message of a connection that does not guard: it asks what the receiver calls a guest that is about to be protected, and may
/// name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Call {
    /// [`LINK_VERSION`] of the caller.
    pub version: u32,
    /// The operator's name for the guest, if it is to have one from here.
    pub name: Option<String>,
    /// The guest's UUID, where it has one, as QEMU writes it.
    pub uuid: Option<String>,
}

/// From the guard to the receiver.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToReceiver {
    /// The first message.
    Hello(Hello),
    /// The first message, and the last.
    Call(Call),
    /// The line of this checkpoint is drawn behind everything that the guest has sent before it stopped.
    Placed {
        /// The checkpoint of [`ToGuard::Barrier`].
        checkpoint: CheckpointId,
    },
    /// From now on the receiver keeps a request of the primary for a checkpoint, whose guest runs on, until [`Self::Begin`].
    Keep {
        /// It begins at the latest so many milliseconds after the last commit.
        limit_ms: u32,
    },
    /// The checkpoint that follows this one may begin: at once, or when the primary has asked for it.
    Begin {
        /// The checkpoint of the last [`ToGuard::Barrier`]; none if there was none on this link. Where another one has begun meanwhile,
        /// the message is of no effect.
        after: Option<CheckpointId>,
    },
    /// To [`ToGuard::Handover`]: the guard can end the guest's QEMU, and has it make a checkpoint now.
    HandoverReady,
    /// To [`ToGuard::Handover`] or [`ToGuard::Last`]: the guard cannot end it. The guest runs on there.
    HandoverRefused {
        /// Why.
        reason: String,
    },
    /// To [`ToGuard::Last`]: the guest's QEMU has ended.
    PrimaryEnded,
    /// The guard ends the protection now. If it says [`Self::Left`] next, the end of the session that comes is no loss.
    Leaving,
    /// QEMU has left COLO, and its guest runs on.
    Left,
    /// Is the receiver there? At any time after [`ToGuard::Welcome`].
    Ping,
}

/// From the receiver to the guard.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuard {
    /// The guard is known from now on.
    Welcome {
        /// [`LINK_VERSION`] of the receiver.
        version: u32,
    },
    /// The guard is not taken; the connection ends.
    Refused {
        /// Why.
        reason: String,
    },
    /// To [`ToReceiver::Call`], once the guest has its first checkpoint; the connection ends.
    Called {
        /// The session's number at the receiver.
        session: u32,
        /// What the receiver calls the guest; none if it has the session's number alone.
        name: Option<String>,
    },
    /// The link belongs to this session from now on.
    Bound {
        /// Its number at the receiver.
        session: u32,
    },
    /// The guest is stopped: draw the line of this checkpoint, and say so.
    Barrier {
        /// Counted from 0, the end of precopy.
        checkpoint: CheckpointId,
    },
    /// This checkpoint is the one that a failover would resume.
    Committed {
        /// Its number.
        checkpoint: CheckpointId,
    },
    /// The operator wants the guest to go on at the receiver. A guard that can end its QEMU says so and asks that for a checkpoint: the next
    /// one that begins after its answer is the last.
    Handover,
    /// The last checkpoint is committed, and its output is let go: the guest, which is stopped, must never run there again.
    Last {
        /// Its number.
        checkpoint: CheckpointId,
    },
    /// The session has ended, and with it the link.
    Ended {
        /// Its number.
        session: u32,
        /// Why.
        reason: String,
    },
    /// To [`ToReceiver::Ping`], at once.
    Pong,
}
