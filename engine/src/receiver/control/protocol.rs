//! The control socket's protocol: a client sends requests, one JSON object a line, and gets a response line for each.
//!
//! | request | answer |
//! |---|---|
//! | `{"command":"status"}` | a [`StatusReport`] |
//! | `{"command":"dump","session":1,"directory":"/absolute"}` | the checkpoint's number and the files written |
//! | `{"command":"discard","session":1}` | an ended session's checkpoint and memory are given up |
//! | `{"command":"claim","session":1,"force":false,"retry":false}` | what a failover must know: a [`ClaimedCheckpoint`] |
//! | `{"command":"feed","session":1,"to":"unix:/q","shared":"pc.ram","keep":null}` | the checkpoint was written: a [`RestoreReport`] |
//! | `{"command":"release","session":1,"may_have_run":false}` | the failover did not succeed |
//! | `{"command":"promoted","session":1}` | a guest runs from it; memory is given up |
//!
//! The last four belong together, in one conversation: a claim ends with it (`promotion.rs`).
//!
//! Answers are `{"ok":true,"answer":…}` or `{"ok":false,"error":"…"}`. The socket is its owner's alone (mode 0600):
//! who can speak here can read the guests' memory.
#![forbid(unsafe_code)]

use crate::receiver::{Dumped, GuestBlock, RestoreReport, RestoreRequest, StatusReport};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// Everything about the receiver and its sessions.
    Status,
    /// Write the last committed checkpoint of a session to files.
    Dump {
        /// The session's number.
        session: u32,
        /// An existing directory, absolute, since the receiver may run elsewhere.
        directory: PathBuf,
    },
    /// Give up what an ended session left.
    Discard {
        /// The session's number.
        session: u32,
    },
    /// Claim a session's last committed checkpoint for a failover. It ends with the conversation.
    Claim {
        /// The session's number.
        session: u32,
        /// Also if its primary is connected; the session is then ended by [`Request::Restore`].
        force: bool,
        /// Also if it was given away before and nobody has client_event what became of it.
        retry: bool,
    },
    /// Give the claimed checkpoint away.
    #[serde(rename = "feed")]
    Restore(RestoreRequest),
    /// Give the claim up.
    Release {
        /// The session's number.
        session: u32,
        /// Whether a guest may have run from what was given.
        may_have_run: bool,
    },
    /// A guest runs from what was given.
    Promoted {
        /// The session's number.
        session: u32,
    },
}

/// What a failover must know of a checkpoint before it touches anything.
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
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<StatusReport>),
    /// To [`Request::Dump`].
    Dumped(Dumped),
    /// To [`Request::Discard`].
    Discarded {
        /// The session whose memory was given up.
        discarded: u32,
    },
    /// To [`Request::Claim`].
    Claimed(ClaimedCheckpoint),
    /// To [`Request::Restore`].
    Restored(RestoreReport),
    /// To [`Request::Release`].
    Released {
        /// The session.
        released: u32,
        /// What is still to be client_event of its checkpoint; nothing if it is there as before.
        promotion: Option<String>,
    },
    /// To [`Request::Promoted`].
    Promoted {
        /// The session.
        promoted: u32,
    },
}
