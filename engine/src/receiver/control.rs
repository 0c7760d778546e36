//! The control socket: one JSON object a line, asked and answered.
//!
//! | request | answer |
//! |---|---|
//! | `{"command":"status"}` | a [`StatusReport`] |
//! | `{"command":"dump","session":1,"directory":"/absolute"}` | the checkpoint's number and the files written |
//! | `{"command":"discard","session":1}` | an ended session's checkpoint and memory are given up |
//!
//! Answers are `{"ok":true,"answer":…}` or `{"ok":false,"error":"…"}`. The socket is its owner's alone (mode 0600):
//! who can speak here can read the guests' memory.
#![forbid(unsafe_code)]

use super::dump::Dumped;
use super::status::StatusReport;
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
}

/// A request on its way to the director, with the way back.
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) reply: oneshot::Sender<Result<Answer, String>>,
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
pub(super) async fn serve(listener: UnixListener, ask: mpsc::Sender<Asked>) {
    let places = Arc::new(Semaphore::new(CONVERSATIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let ask = ask.clone();
                tokio::task::spawn_local(async move {
                    // A client that went away needs no answer.
                    let _ = converse(stream, ask).await;
                    drop(place);
                });
            }
            // A shortage of descriptors passes.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
}

async fn converse(mut stream: UnixStream, ask: mpsc::Sender<Asked>) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let count = (&mut read).take(REQUEST_MAX).read_until(b'\n', &mut line).await?;
        if count == 0 {
            return Ok(());
        }
        let result = match line.ends_with(b"\n") {
            true => put(&line, &ask).await,
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

async fn put(line: &[u8], ask: &mpsc::Sender<Asked>) -> Result<Answer, String> {
    let request = serde_json::from_slice(line).map_err(|error| format!("not understood: {error}"))?;
    let (reply, answer) = oneshot::channel();
    let gone = || "the receiver is ending".to_owned();
    ask.send(Asked { request, reply }).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}
