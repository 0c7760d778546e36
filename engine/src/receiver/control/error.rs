//! Why a request to the receiver fails.

use crate::disk::DiskError;
use crate::link::HandoverError;
use crate::receiver::dump::DumpError;
use crate::receiver::flight::FlightCopyError;
use crate::receiver::guest::SessionTitle;
use crate::receiver::promotion::PromotionError;
use crate::receiver::restore::RestoreError;
use crate::text::seconds;
use thiserror::Error;

/// Why a request fails. Its text is the `error` of a response.
#[derive(Debug, Error)]
pub enum RequestError {
    /// A disk's log cannot be applied.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It is no request.
    #[error("not understood: {0}")]
    Syntax(#[from] serde_json::Error),
    /// It has no end.
    #[error("a request is one line of at most {0} bytes")]
    TooLong(usize),
    /// Files that came with it were lost.
    #[error("files of the request were lost: the receiver has too many open; raise its `ulimit -n`")]
    FilesLost,
    /// It brings more files than any request needs.
    #[error("a request brings at most {0} files")]
    TooManyFiles(usize),
    /// Too many clients are waiting for long requests.
    #[error(
        "{0} clients are waiting for dumps, or for sessions to end or to be discarded, which is the limit: try again when one has finished"
    )]
    Busy(usize),
    /// The receiver answers no more.
    #[error("the receiver has ended")]
    Ended,
    /// No session has had that number.
    #[error("there is no session {0}; `colo-ring status` lists them")]
    NoSession(u32),
    /// No session's guest is called so.
    #[error("there is no session of a guest {0:.200}; `colo-ring status` lists them")]
    NoGuest(String),
    /// Several sessions' guests are called so.
    #[error("several sessions are of a guest {guest:.200}: {sessions}; choose one with --session")]
    Ambiguous {
        /// What was asked for.
        guest: String,
        /// Each with its state.
        sessions: String,
    },
    /// The session's guest runs elsewhere.
    #[error(
        "session {session} was promoted at checkpoint {checkpoint}: its guest runs elsewhere, and nothing of it is \
         kept here"
    )]
    WasPromoted {
        /// The session.
        session: SessionTitle,
        /// Its last checkpoint.
        checkpoint: u64,
    },
    /// The session's checkpoint was discarded.
    #[error("session {0} was discarded")]
    WasDiscarded(SessionTitle),
    /// The session has ended before its first checkpoint.
    #[error("session {session} left no checkpoint: {end}")]
    LeftNothing {
        /// The session.
        session: SessionTitle,
        /// Why it ended.
        end: String,
    },
    /// The session has no checkpoint yet.
    #[error("session {0} has no committed checkpoint yet")]
    NoCheckpoint(SessionTitle),
    /// The session has no checkpoint to resume yet.
    #[error("session {0} is in precopy: there is nothing to resume, and its guest runs on the primary")]
    Precopy(SessionTitle),
    /// The session is live.
    #[error("session {0} is running: its primary is connected; `colo-ring end` ends it")]
    Running(SessionTitle),
    /// Only a connected primary's guest can be handed over.
    #[error("session {0} has ended: its guest is resumed by failover without --planned")]
    NotConnected(SessionTitle),
    /// The guest is not handed over.
    #[error("session {session} was not handed over: {source}")]
    Handover {
        /// The session.
        session: SessionTitle,
        /// Why.
        source: HandoverError,
    },
    /// The session has ended already.
    #[error("session {0} has ended already; `colo-ring discard` gives up its checkpoint")]
    HasEnded(SessionTitle),
    /// The session is live, and so is its guest.
    #[error(
        "the primary of session {session} ({peer}) is connected, and its last checkpoint is {} old: its guest \
         runs there. If it is to be resumed here nevertheless, --force closes the session; with it, --fence CMD makes sure \
         that the primary is off, or --unfenced says that you have",
        seconds(*age_ms)
    )]
    Connected {
        /// The session.
        session: SessionTitle,
        /// Where its primary is.
        peer: String,
        /// The age of its checkpoint in milliseconds.
        age_ms: u64,
    },
    /// Its checkpoint's promotion does not allow it.
    #[error("session {session}: {source}")]
    Promotion {
        /// The session.
        session: SessionTitle,
        /// Why not.
        source: PromotionError,
    },
    /// A dump failed.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// A flight recorder was not copied.
    #[error(transparent)]
    Flight(#[from] FlightCopyError),
    /// A restore failed.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}
