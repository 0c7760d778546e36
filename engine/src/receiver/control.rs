//! The control socket: one JSON object a line, asked and answered.
//!
//! | request | answer |
//! |---|---|
//! | `{"command":"status"}` | a [`StatusReport`] |
//! | `{"command":"dump","session":1,"directory":"/absolute"}` | the checkpoint's number and the files written |
//! | `{"command":"discard","session":1}` | an ended session's checkpoint and memory are given up |
//! | `{"command":"claim","session":1,"force":false,"retry":false}` | what a failover must know: a [`Claimed`] |
//! | `{"command":"feed","session":1,"to":"unix:/q","shared":"pc.ram","keep":null}` | the checkpoint was written: a [`Fed`] |
//! | `{"command":"release","session":1,"may_have_run":false}` | the failover did not succeed |
//! | `{"command":"promoted","session":1}` | a guest runs from it; memory is given up |
//!
//! The last four belong together, in one conversation: a claim ends with it (`promotion.rs`).
//!
//! Answers are `{"ok":true,"answer":…}` or `{"ok":false,"error":"…"}`. The socket is its owner's alone (mode 0600):
//! who can speak here can read the guests' memory.
#![forbid(unsafe_code)]

use super::dump::Dumped;
use super::feed::{Fed, Feed};
use super::promotion::Conversation;
use super::status::{GuestBlock, StatusReport};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Longest request line, in bytes.
const REQUEST_MAX: u64 = 64 << 10;

/// Conversations at a time; more wait to be accepted.
const CONVERSATIONS_MAX: usize = 16;

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
        /// Also if its primary is connected; the session is then ended by [`Request::Feed`].
        force: bool,
        /// Also if it was given away before and nobody has said what became of it.
        retry: bool,
    },
    /// Give the claimed checkpoint away.
    Feed(Feed),
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
pub struct Claimed {
    /// The session.
    pub claimed: u32,
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
pub enum Answer {
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
    Claimed(Claimed),
    /// To [`Request::Feed`].
    Fed(Fed),
    /// To [`Request::Release`].
    Released {
        /// The session.
        released: u32,
        /// What is still to be said of its checkpoint; nothing if it is there as before.
        promotion: Option<String>,
    },
    /// To [`Request::Promoted`].
    Promoted {
        /// The session.
        promoted: u32,
    },
}

/// A request on its way to the director, with the way back.
pub(super) struct Asked {
    pub(super) by: Conversation,
    pub(super) request: Request,
    pub(super) reply: oneshot::Sender<Result<Answer, String>>,
}

/// What comes from the control socket.
pub(super) enum Said {
    /// A request.
    Asked(Asked),
    /// A conversation is over.
    Left(Conversation),
}

/// A line as it goes back.
#[derive(Serialize)]
struct Line {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Answer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Serves the socket for ever.
pub(super) async fn serve(listener: UnixListener, ask: mpsc::Sender<Said>) {
    let places = Arc::new(Semaphore::new(CONVERSATIONS_MAX));
    let mut last = Conversation::OWN;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let ask = ask.clone();
                last = Conversation(last.0 + 1);
                let by = last;
                tokio::task::spawn_local(async move {
                    // A client that went away needs no answer.
                    let _ = converse(stream, by, &ask).await;
                    // Without a director there is nothing left that could be claimed.
                    let _ = ask.send(Said::Left(by)).await;
                    drop(place);
                });
            }
            // A shortage of descriptors passes.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
}

async fn converse(mut stream: UnixStream, by: Conversation, ask: &mpsc::Sender<Said>) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let count = (&mut read).take(REQUEST_MAX).read_until(b'\n', &mut line).await?;
        if count == 0 {
            return Ok(());
        }
        let result = match line.ends_with(b"\n") {
            true => put(&line, by, ask).await,
            false => Err(format!("a request is one line of at most {REQUEST_MAX} bytes")),
        };
        let ended = !line.ends_with(b"\n");
        let (answer, error) = match result {
            Ok(answer) => (Some(answer), None),
            Err(error) => (None, Some(error)),
        };
        let mut text = serde_json::to_vec(&Line {
            ok: error.is_none(),
            answer,
            error,
        })?;
        text.push(b'\n');
        write.write_all(&text).await?;
        if ended {
            return Ok(());
        }
    }
}

async fn put(line: &[u8], by: Conversation, ask: &mpsc::Sender<Said>) -> Result<Answer, String> {
    let request = serde_json::from_slice(line).map_err(|error| format!("not understood: {error}"))?;
    let (reply, answer) = oneshot::channel();
    let gone = || "the receiver is ending".to_owned();
    let asked = Said::Asked(Asked { by, request, reply });
    ask.send(asked).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}
