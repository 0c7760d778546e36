//! Serves the control socket: one task a client.

use super::error::RequestError;
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

/// Takes the response to a request.
pub(in crate::receiver) type Reply = oneshot::Sender<Result<Response, RequestError>>;

/// A request and where its response goes.
pub(in crate::receiver) struct PendingRequest {
    pub(in crate::receiver) by: ClientId,
    pub(in crate::receiver) request: Request,
    pub(in crate::receiver) reply: Reply,
}

/// What a client of the control socket does.
pub(in crate::receiver) enum ClientEvent {
    /// A request.
    Request(PendingRequest),
    /// Its connection has ended.
    Disconnected(ClientId),
}

/// A response line.
#[derive(Serialize)]
struct Line {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Response>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Serves the socket until the receiver ends.
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
                    // A client that has disconnected needs no response.
                    let _ = serve_client(stream, by, &ask).await;
                    // It fails when the receiver has ended: then there are no claims.
                    let _ = ask.send(ClientEvent::Disconnected(by)).await;
                    drop(place);
                });
            }
            // A shortage of descriptors: temporary.
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
        let is_whole = line.ends_with(b"\n");
        let result = match is_whole {
            true => ask_control(&line, by, ask).await,
            false => Err(RequestError::TooLong(REQUEST_MAX)),
        };
        let (answer, error) = match result {
            Ok(response) => (Some(response), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let mut text = serde_json::to_vec(&Line {
            ok: error.is_none(),
            answer,
            error,
        })?;
        text.push(b'\n');
        write.write_all(&text).await?;
        if !is_whole {
            return Ok(());
        }
    }
}

async fn ask_control(
    line: &[u8],
    by: ClientId,
    ask: &mpsc::Sender<ClientEvent>,
) -> Result<Response, RequestError> {
    let request = serde_json::from_slice(line)?;
    let (reply, response) = oneshot::channel();
    let pending = ClientEvent::Request(PendingRequest { by, request, reply });
    ask.send(pending).await.map_err(|_| RequestError::Ended)?;
    response.await.map_err(|_| RequestError::Ended)?
}
