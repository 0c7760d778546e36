//! The control socket's protocol: a client sends requests, one JSON object a line, and gets a response line for each.
//!
//! | request | response |
//! |---|---|
//! | `{"command":"status"}` | a [`StatusReport`] |
//! | `{"command":"dump","session":1,"directory":"/absolute"}` | the checkpoint's number and the files written |
//! | `{"command":"discard","session":1}` | an ended session's checkpoint was discarded, and its memory released |
//! | `{"command":"end","session":1}` | a running session has ended; its checkpoint, if there is one, is kept |
//! | `{"command":"claim","session":1,"force":false,"retry":false}` | the checkpoint is claimed: a [`ClaimedCheckpoint`] |
//! | `{"command":"handover","session":1}` | the guard of the claimed session has ended its primary, after a last checkpoint |
//! | `{"command":"restore","session":1,"to":"unix:/q","shared":"pc.ram","keep":null}` | the checkpoint was written: a [`RestoreReport`] |
//! | `{"command":"release","session":1,"may_have_run":false}` | the claim was released: the failover has failed |
//! | `{"command":"promoted","session":1}` | the memory was released: a guest runs from the checkpoint |
//!
//! The last five are sent over one connection: a claim ends with it (`promotion.rs`).
//!
//! A response is `{"ok":true,"answer":…}` or `{"ok":false,"error":"…"}`. Only its owner may connect to the socket (mode
//! 0600), because a client can read the guests' memory.

use crate::receiver::{DiskStatus, Dumped, GuestBlock, RestoreReport, RestoreRequest, StatusReport};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// Report the state of the receiver and its sessions.
    Status,
    /// Write the last committed checkpoint of a session to files.
    Dump {
        /// The session's number.
        session: u32,
        /// An existing directory, absolute, since the receiver may run elsewhere.
        directory: PathBuf,
        /// The guest's disks are left out.
        #[serde(default)]
        without_disks: bool,
    },
    /// Discard the checkpoint of an ended session.
    Discard {
        /// The session's number.
        session: u32,
    },
    /// End a running session, as if its primary were lost.
    End {
        /// The session's number.
        session: u32,
    },
    /// Claim a session's last committed checkpoint for a failover. The claim ends with the client's connection.
    Claim {
        /// The session's number.
        session: u32,
        /// Also if its primary is connected; the session is then ended by [`Request::Restore`].
        force: bool,
        /// Also if it was given away before with unknown result.
        retry: bool,
    },
    /// Have the guard of the claimed, live session make a last checkpoint and end the primary. Answered when that has ended.
    Handover {
        /// The session's number.
        session: u32,
    },
    /// Restore the claimed checkpoint.
    Restore(RestoreRequest),
    /// Release the claim: the failover has failed.
    Release {
        /// The session's number.
        session: u32,
        /// Whether a guest may have run from the checkpoint.
        may_have_run: bool,
    },
    /// Release the memory: a guest runs from the checkpoint.
    Promoted {
        /// The session's number.
        session: u32,
    },
}

/// A claimed checkpoint: what a failover needs to know before it changes anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimedCheckpoint {
    /// The session.
    #[serde(rename = "claimed")]
    pub session: u32,
    /// Its last committed checkpoint; 0 is the state at the end of precopy.
    pub checkpoint: u64,
    /// Its age in milliseconds.
    pub checkpoint_age_ms: u64,
    /// Where the primary is or was.
    pub peer: String,
    /// How the session ended; none if its primary is still connected.
    pub end: Option<String>,
    /// The primary's versioned machine type.
    pub machine: String,
    /// The RAM blocks, in the primary's order.
    pub blocks: Vec<GuestBlock>,
    /// The guest's disks. Their bases are at the checkpoint when it is restored.
    #[serde(default)]
    pub disks: Vec<DiskStatus>,
}

/// A response.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<StatusReport>),
    /// To [`Request::Dump`].
    Dumped(Dumped),
    /// To [`Request::Discard`].
    Discarded {
        /// The session whose memory was released.
        discarded: u32,
    },
    /// To [`Request::End`].
    SessionEnded {
        /// The session.
        ended: u32,
        /// Its last committed checkpoint, which is kept.
        checkpoint: Option<u64>,
    },
    /// To [`Request::Claim`].
    Claimed(ClaimedCheckpoint),
    /// To [`Request::Handover`].
    HandedOver {
        /// The session.
        handed_over: u32,
        /// Its last checkpoint.
        checkpoint: u64,
    },
    /// To [`Request::Restore`].
    Restored(RestoreReport),
    /// To [`Request::Release`].
    Released {
        /// The session.
        released: u32,
        /// What became of its checkpoint; none if it is as before the claim.
        promotion: Option<String>,
    },
    /// To [`Request::Promoted`].
    Promoted {
        /// The session.
        promoted: u32,
    },
}
