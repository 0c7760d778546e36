//! Serves the control socket: one task a client.
//!
//! A client that has claimed nothing and asks nothing is disconnected after a while, and at once where its place is needed: a monitor that leaks
//! its connections must not keep a failover out. Clients that wait for long requests, such as dumps, have half of the places at most.

use super::error::RequestError;
use super::protocol::{Request, Response};
use super::request_line::{RequestLine, RequestLines};
use crate::receiver::promotion::ClientId;
use crate::receiver::{GuestRules, Limits};
use crate::text;
use serde::Serialize;
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

/// Clients at a time. Then one that is idle makes room for a new one.
const CLIENTS_MAX: usize = 16;

/// Clients at a time that wait for long requests.
const LONG_MAX: usize = CLIENTS_MAX / 2;

/// How long a client without a claim may ask nothing, or not read an answer.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Takes the response to a request.
pub(in crate::receiver) type Reply = oneshot::Sender<Result<Response, RequestError>>;

/// A request and where its response goes.
pub(in crate::receiver) struct PendingRequest {
    pub(in crate::receiver) by: ClientId,
    pub(in crate::receiver) request: Request,
    /// What came with it, open.
    pub(in crate::receiver) files: Vec<OwnedFd>,
    pub(in crate::receiver) reply: Reply,
}

impl PendingRequest {
    /// One of this process, and where its response arrives.
    pub(in crate::receiver) fn new(
        request: Request,
        files: Vec<OwnedFd>,
    ) -> (Self, oneshot::Receiver<Result<Response, RequestError>>) {
        let (reply, response) = oneshot::channel();
        let pending = Self {
            by: ClientId::OWN,
            request,
            files,
            reply,
        };
        (pending, response)
    }
}

/// What a client of the control socket does.
pub(in crate::receiver) enum ClientEvent {
    /// A request.
    Request(PendingRequest),
    /// Its connection has ended.
    Disconnected(ClientId),
    /// The operator of the process changes limits.
    Limits(Limits),
    /// They change the rules for guests.
    Guests(GuestRules),
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
    let mut clients: Vec<Client> = Vec::new();
    let mut tasks = JoinSet::new();
    let mut last = ClientId::OWN;
    let long = Rc::default();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // A shortage of descriptors: temporary.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = tasks.join_next() => {
                clients.retain(|client| !client.task.is_finished());
                continue;
            }
        };
        clients.retain(|client| !client.task.is_finished());
        while clients.len() >= CLIENTS_MAX {
            match oldest_idle(&clients) {
                Some(position) => clients.swap_remove(position).conversation.close.notify_one(),
                // All of them wait for answers: one will be idle soon.
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
            clients.retain(|client| !client.task.is_finished());
        }
        last = ClientId(last.0 + 1);
        let conversation = Rc::new(Conversation::new(last, Rc::clone(&long)));
        let (served, ask) = (conversation.clone(), ask.clone());
        let task = tasks.spawn_local(async move {
            tokio::select! {
                // A client that has disconnected needs no response.
                _ = serve_client(stream, &served, &ask) => {}
                () = served.close.notified() => {}
            }
            // It fails when the receiver has ended: then there are no claims.
            let _ = ask.send(ClientEvent::Disconnected(served.by)).await;
        });
        clients.push(Client { conversation, task });
    }
}

/// A client and the task that serves it.
struct Client {
    conversation: Rc<Conversation>,
    task: AbortHandle,
}

/// The client that has asked nothing for the longest time, and has claimed nothing.
fn oldest_idle(clients: &[Client]) -> Option<usize> {
    let idle = clients.iter().enumerate();
    let idle = idle.filter_map(|(position, client)| Some((client.conversation.idle_since.get()?, position)));
    idle.min().map(|(_, position)| position)
}

/// What is known of a client.
pub(in crate::receiver) struct Conversation {
    by: ClientId,
    /// Ends it.
    close: Notify,
    /// None while it waits for an answer, and while it has a claim: its failover may be waiting for QEMU.
    idle_since: Cell<Option<Instant>>,
    claims: Cell<u32>,
    long: Rc<LongRequests>,
}

/// How many clients wait for long requests.
#[derive(Default)]
pub(in crate::receiver) struct LongRequests(Cell<usize>);

/// One of them waits.
struct LongRequest(Rc<LongRequests>);

impl LongRequest {
    fn begin(all: &Rc<LongRequests>) -> Result<Self, RequestError> {
        let waiting = all.0.get();
        if waiting >= LONG_MAX {
            return Err(RequestError::Busy(waiting));
        }
        all.0.set(waiting + 1);
        Ok(Self(all.clone()))
    }
}

impl Drop for LongRequest {
    fn drop(&mut self) {
        self.0.0.set(self.0.0.get() - 1);
    }
}

impl Conversation {
    pub(in crate::receiver) fn new(by: ClientId, long: Rc<LongRequests>) -> Self {
        Self {
            by,
            close: Notify::new(),
            idle_since: Cell::new(Some(Instant::now())),
            claims: Cell::new(0),
            long,
        }
    }

    /// A request was answered.
    fn answered(&self, response: Option<&Response>) {
        let claims = self.claims.get();
        self.claims.set(match response {
            Some(Response::Claimed(_)) => claims + 1,
            Some(Response::Released { .. } | Response::Promoted { .. }) => claims.saturating_sub(1),
            _ => claims,
        });
        self.idle_since.set((self.claims.get() == 0).then(Instant::now));
    }

    /// Waits for what it sends or reads; without a claim not for ever.
    async fn within<T>(&self, doing: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        match self.claims.get() {
            0 => tokio::time::timeout(IDLE_MAX, doing).await?,
            _ => doing.await,
        }
    }
}

/// Serves a client until it disconnects.
pub(in crate::receiver) async fn serve_client(
    mut stream: UnixStream,
    conversation: &Conversation,
    ask: &mpsc::Sender<ClientEvent>,
) -> io::Result<()> {
    let mut lines = RequestLines::default();
    loop {
        let Some(next) = conversation.within(lines.next(&stream)).await? else {
            return Ok(());
        };
        conversation.idle_since.set(None);
        let goes_on = next.is_ok();
        let result = match next {
            Ok(line) => ask_control(line, conversation, ask).await,
            Err(error) => Err(error),
        };
        conversation.answered(result.as_ref().ok());
        let (answer, error) = match result {
            Ok(response) => (Some(response), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let line = Line {
            ok: error.is_none(),
            answer,
            error,
        };
        let text = text::json_line(&line)? + "\n";
        conversation.within(stream.write_all(text.as_bytes())).await?;
        if !goes_on {
            return Ok(());
        }
    }
}

async fn ask_control(
    line: RequestLine,
    conversation: &Conversation,
    ask: &mpsc::Sender<ClientEvent>,
) -> Result<Response, RequestError> {
    let RequestLine { text, files } = line;
    let request: Request = serde_json::from_slice(&text)?;
    let _waits = match request.takes_long() {
        true => Some(LongRequest::begin(&conversation.long)?),
        false => None,
    };
    let (reply, response) = oneshot::channel();
    let pending = ClientEvent::Request(PendingRequest {
        by: conversation.by,
        request,
        files,
        reply,
    });
    ask.send(pending).await.map_err(|_| RequestError::Ended)?;
    response.await.map_err(|_| RequestError::Ended)?
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};

    struct Client(BufReader<UnixStream>);

    impl Client {
        async fn ask(path: &std::path::Path, request: &str) -> Self {
            let mut stream = UnixStream::connect(path).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            Self(BufReader::new(stream))
        }

        async fn answer(&mut self) -> String {
            let mut line = String::new();
            self.0.read_line(&mut line).await.unwrap();
            line
        }
    }

    /// Dumps to disks that hang, say.
    #[test]
    fn clients_that_wait_long_keep_no_failover_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.unwrap(), async {
            let (ask, mut asked) = mpsc::channel(64);
            tokio::task::spawn_local(serve(UnixListener::bind(&path).unwrap(), ask));
            let mut waiting = Vec::new();
            let mut dumping = Vec::new();
            for _ in 0..LONG_MAX {
                dumping.push(Client::ask(&path, "{\"command\":\"dump\",\"session\":1,\"disks\":[]}\n").await);
                match asked.recv().await {
                    Some(ClientEvent::Request(pending)) => waiting.push(pending),
                    _ => panic!("a dump was asked for"),
                }
            }
            for command in ["dump", "recorder", "discard", "end"]
                .iter()
                .cycle()
                .take(2 * CLIENTS_MAX)
            {
                let request = format!("{{\"command\":\"{command}\",\"session\":1,\"disks\":[]}}\n");
                let refused = Client::ask(&path, &request).await.answer().await;
                assert!(refused.contains("8 clients are waiting for dumps"), "{refused}");
            }
            let claim = "{\"command\":\"claim\",\"session\":1,\"force\":false,\"retry\":false}\n";
            let mut failover = Client::ask(&path, claim).await;
            while waiting.len() == LONG_MAX {
                match asked.recv().await {
                    Some(ClientEvent::Request(pending)) => waiting.push(pending),
                    Some(_) => {}
                    None => panic!("it serves"),
                }
            }
            let claimed = waiting.pop().unwrap();
            assert!(matches!(claimed.request, Request::Claim { .. }));
            let _ = claimed.reply.send(Err(RequestError::NoSession(1)));
            assert!(failover.answer().await.contains("there is no session 1"));
            // A dump that is done makes room for one.
            let _ = waiting.remove(0).reply.send(Err(RequestError::NoSession(2)));
            assert!(dumping[0].answer().await.contains("there is no session 2"));
            drop(Client::ask(&path, "{\"command\":\"end\",\"session\":3}\n").await);
            loop {
                match asked.recv().await {
                    Some(ClientEvent::Request(pending))
                        if pending.request == (Request::End { session: 3 }) =>
                    {
                        break;
                    }
                    Some(_) => {}
                    None => panic!("it serves"),
                }
            }
        });
    }
}
