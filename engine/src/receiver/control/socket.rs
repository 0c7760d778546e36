//! Serves the control socket: one task a client.
#![forbid(unsafe_code)]

use super::protocol::{Request, Response};
use crate::receiver::promotion::ClientId;
use serde::Serialize;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Longest request line, in bytes.
const REQUEST_MAX: u64 = 64 << 10;

/// Clients at a time; more wait to be accepted.
const CLIENTS_MAX: usize = 16;

/// A request and where its response goes.
pub(in crate::receiver) struct PendingRequest {
    pub(in crate::receiver) by: ClientId,
    pub(in crate::receiver) request: Request,
    pub(in crate::receiver) reply: oneshot::Sender<Result<Response, String>>,
}

/// What a client of the control socket does.
pub(in crate::receiver) enum ClientEvent {
    /// A request.
    Request(PendingRequest),
    /// Its connection has ended.
    Disconnected(ClientId),
}

/// A line as it goes back.
#[derive(Serialize)]
struct Line {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Response>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Serves the socket for ever.
pub(in crate::receiver) async fn serve(listener: UnixListener, ask: mpsc::Sender<ClientEvent>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    let mut last = ClientId::OWN;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let ask = ask.clone();
                last = ClientId(last.0 + 1);
                let by = last;
                tokio::task::spawn_local(async move {
                    // A client that went away needs no answer.
                    let _ = serve_client(stream, by, &ask).await;
                    // Without a director there is nothing left that could be claimed.
                    let _ = ask.send(ClientEvent::Disconnected(by)).await;
                    drop(place);
                });
            }
            // A shortage of descriptors passes.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
}

async fn serve_client(
    mut stream: UnixStream,
    by: ClientId,
    ask: &mpsc::Sender<ClientEvent>,
) -> std::io::Result<()> {
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

async fn put(line: &[u8], by: ClientId, ask: &mpsc::Sender<ClientEvent>) -> Result<Response, String> {
    let request = serde_json::from_slice(line).map_err(|error| format!("not understood: {error}"))?;
    let (reply, answer) = oneshot::channel();
    let gone = || "the receiver is ending".to_owned();
    let asked = ClientEvent::Request(PendingRequest { by, request, reply });
    ask.send(asked).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}
