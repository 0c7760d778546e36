//! The control socket's protocol: a client sends requests, one JSON object a line, and gets a response line for each.
//!
//! | request | response |
//! |---|---|
//! | `{"command":"status"}` | a [`StatusReport`] |
//! | `{"command":"find","guest":"web3","runs":false}` | the number of the session whose guest has that name or UUID |
//! | `{"command":"contents","session":1}` | what a dump of the session consists of |
//! | `{"command":"dump","session":1,"disks":[]}`, with files | the checkpoint that was written to them |
//! | `{"command":"recorder","session":1}`, with a file | the session's flight recorder was copied to it |
//! | `{"command":"discard","session":1}` | an ended session's checkpoint was discarded, and its memory released |
//! | `{"command":"end","session":1}` | a running session has ended; its checkpoint, if there is one, is kept |
//! | `{"command":"claim","session":1,"force":false,"retry":false}` | the checkpoint is claimed: a [`ClaimedCheckpoint`] |
//! | `{"command":"handover","session":1}` | the guard of the claimed session has ended its primary, after a last checkpoint |
//! | `{"command":"restore","session":1,"to":"unix:/q","shared":"pc.ram","keep":null}`, with files | the checkpoint was written: a [`RestoreReport`] |
//! | `{"command":"release","session":1,"may_have_run":false}` | the claim was released: the failover has failed |
//! | `{"command":"promoted","session":1}` | the memory was released: a guest runs from the checkpoint |
//!
//! The last five are sent over one connection: a claim ends with it (`promotion.rs`).
//!
//! **Files** are open, and sent with a request's line (`SCM_RIGHTS`): the receiver opens nothing that a client names, and connects to nothing.
//! A dump takes an empty one for each RAM block, in their order, for the device state, the stream's header, the vmdesc, and for each of the
//! `disks`. A restore takes the connection to a QEMU or an empty file; with `"keep":{"disks":[…]}` also one for a complete stream and one for
//! each of the disks.
//!
//! A response is `{"ok":true,"answer":…}` or `{"ok":false,"error":"…"}`. Only its owner may connect to the socket (mode
//! 0600), because a client can read the guests' memory.

use crate::receiver::{
    CopiedFlight, DiskStatus, DumpContents, DumpedCheckpoint, GuestBlock, RestoreReport, RestoreRequest,
    SessionTitle, StatusReport,
};
use serde::{Deserialize, Serialize};

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// Report the state of the receiver and its sessions.
    Status,
    /// Find the session of a guest.
    Find {
        /// Its name or its UUID; the number of a session finds that.
        guest: String,
        /// Only among sessions that run.
        #[serde(default)]
        runs: bool,
    },
    /// What a dump of a session consists of.
    Contents {
        /// The session's number.
        session: u32,
    },
    /// Write the last committed checkpoint of a session to the files that come with the request ([`DumpFiles`](crate::receiver::DumpFiles)).
    Dump {
        /// The session's number.
        session: u32,
        /// The guest's disks for which there are files.
        disks: Vec<String>,
    },
    /// Copy the flight recorder of a session to the file that comes with the request ([`FlightLog`](crate::store::FlightLog)).
    Recorder {
        /// The session's number.
        session: u32,
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

impl Request {
    /// Whether its answer waits for a disk, or for the end of a session, and no failover waits for it.
    pub(super) fn takes_long(&self) -> bool {
        matches!(
            self,
            Self::Dump { .. } | Self::Recorder { .. } | Self::Discard { .. } | Self::End { .. }
        )
    }
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
    /// The guest's name: the operator's, or its UUID; none if it has neither.
    #[serde(default)]
    pub guest: Option<String>,
    /// Its UUID.
    #[serde(default)]
    pub uuid: Option<String>,
    /// The address that its primary came to.
    #[serde(default)]
    pub listener: Option<String>,
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
    /// To [`Request::Find`].
    Found {
        /// The session.
        found: SessionTitle,
    },
    /// To [`Request::Contents`].
    Contents(DumpContents),
    /// To [`Request::Dump`].
    Dumped(DumpedCheckpoint),
    /// To [`Request::Recorder`].
    Recorder(CopiedFlight),
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
