//! Serves a guard's connection, as a task of the control thread.

use super::registry::{Bound, Guest, LinkTicket, Links};
use super::session_output::{Awaited, Next};
use crate::link::{Hello, LINE_MAX, LINK_VERSION, LinkError, ToGuard, ToReceiver};
use crate::net::{Accepted, Origin};
use crate::receiver::disks::parse_uuid;
use crate::receiver::{Event, Events};
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Longest name of a guest, in bytes.
const NAME_MAX: usize = 128;

/// Longest time that a guard may ask to be waited for.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// Why a link has ended.
#[derive(Debug, Error)]
enum LinkEnd {
    #[error("its connection ended")]
    Closed,
    #[error("its connection broke: {0}")]
    Broken(#[from] io::Error),
    #[error("no hello within {0:?}")]
    Silent(Duration),
    #[error("it did not answer a barrier within {0:?}")]
    Hangs(Duration),
    #[error("a line of more than {LINE_MAX} bytes")]
    TooLong,
    /// The error's own text may repeat what was sent.
    #[error("a line that is not understood ({:?} error at byte {})", .0.classify(), .0.column())]
    NotUnderstood(#[from] serde_json::Error),
    #[error("{0}")]
    Protocol(#[from] LinkError),
    #[error("a message that does not belong here")]
    Unexpected,
    #[error("another guard of the same guest has taken its place")]
    Replaced,
    #[error("{0}")]
    Refused(String),
    #[error("its session has ended")]
    Ended,
}

/// Serves a connection whose preface was read, until it ends.
pub(in crate::receiver) async fn serve(
    accepted: Accepted,
    links: Arc<Links>,
    deadline: Duration,
    events: Arc<Events>,
) {
    let from = accepted.from.clone();
    let mut name = String::new();
    let end = serve_until_end(accepted, &links, deadline, &*events, &mut name).await;
    let guard = match name.is_empty() {
        true => format!("a guard at {from}"),
        false => format!("the guard of {name} at {from}"),
    };
    events(match end {
        // The session's own end was reported.
        LinkEnd::Ended => return,
        LinkEnd::Closed | LinkEnd::Broken(_) => Event::Note(format!("{guard}: {end}")),
        end => Event::Warning(format!("{guard}: {end}")),
    });
}

/// Serves it, and returns why it ended.
async fn serve_until_end(
    accepted: Accepted,
    links: &Arc<Links>,
    deadline: Duration,
    events: &Events,
    name: &mut String,
) -> LinkEnd {
    let Some(ticket) = links.connected() else {
        return LinkEnd::Refused("too many guards are connected".to_owned());
    };
    let origin = accepted.peer.origin;
    let mut stream = match stream(accepted) {
        Ok(stream) => stream,
        Err(error) => return error.into(),
    };
    let mut link = Link::new(&mut stream);
    let end = link.serve(&ticket, origin, deadline, events, name).await;
    let Err(end) = end else { return LinkEnd::Ended };
    if let LinkEnd::Refused(_) | LinkEnd::Replaced = end {
        let reason = end.to_string();
        // It may be gone.
        let _ = tokio::time::timeout(deadline, link.write(&ToGuard::Refused { reason })).await;
    }
    end
}

/// A UNIX socket as well: reading and writing are the same for every family.
fn stream(accepted: Accepted) -> io::Result<TcpStream> {
    let is_tcp = accepted.is_tcp;
    let stream = std::net::TcpStream::from(accepted.socket);
    stream.set_nonblocking(true)?;
    if is_tcp {
        stream.set_nodelay(true)?;
    }
    TcpStream::from_std(stream)
}

fn timeout_of(hello: &Hello) -> Duration {
    Duration::from_millis(hello.timeout_ms.into()).min(TIMEOUT_MAX)
}

/// The UUID of a guard's guest.
///
/// # Errors
/// [`LinkEnd::Refused`], with the reason.
fn check(hello: &Hello) -> Result<Option<[u8; 16]>, LinkEnd> {
    if hello.version != LINK_VERSION {
        let version = hello.version;
        return Err(LinkEnd::Refused(format!(
            "it speaks version {version} of the link protocol, this receiver version {LINK_VERSION}"
        )));
    }
    if hello.name.is_empty() || hello.name.len() > NAME_MAX || hello.name.chars().any(char::is_control) {
        return Err(LinkEnd::Refused(format!(
            "the guest's name must have 1 to {NAME_MAX} printable bytes"
        )));
    }
    match &hello.uuid {
        None => Ok(None),
        Some(text) => match parse_uuid(text) {
            Some(uuid) => Ok(Some(uuid)),
            None => Err(LinkEnd::Refused(
                "the guest's UUID must have 36 characters, as QEMU writes it".to_owned(),
            )),
        },
    }
}

/// How long the end of a primary may take, beyond the guard's own limit: then its guard hangs.
const PRIMARY_END_LIMIT: Duration = Duration::from_secs(60);

/// A connection, line by line.
struct Link<'a> {
    reader: BufReader<ReadHalf<'a>>,
    writer: WriteHalf<'a>,
    /// A line that is not here whole.
    line: Vec<u8>,
}

impl<'a> Link<'a> {
    fn new(stream: &'a mut TcpStream) -> Self {
        let (reader, writer) = stream.split();
        Self {
            reader: BufReader::with_capacity(LINE_MAX, reader),
            writer,
            line: Vec::with_capacity(LINE_MAX),
        }
    }

    /// Serves the guard: it says which guest it guards, and is served while that guest has a session.
    async fn serve(
        &mut self,
        ticket: &LinkTicket,
        origin: Origin,
        deadline: Duration,
        events: &Events,
        name: &mut String,
    ) -> Result<(), LinkEnd> {
        let hello = tokio::time::timeout(deadline, self.read()).await;
        let ToReceiver::Hello(hello) = hello.map_err(|_| LinkEnd::Silent(deadline))?? else {
            return Err(LinkEnd::Unexpected);
        };
        let uuid = check(&hello)?;
        name.clone_from(&hello.name);
        let version = LINK_VERSION;
        self.write(&ToGuard::Welcome { version }).await?;
        let bound = self
            .wait_for_session(ticket, Guest { uuid, origin }, &hello)
            .await?;
        let session = bound.session;
        events(Event::Note(format!(
            "session {session} is guarded as {}: its output waits for its commit",
            hello.name
        )));
        let served = self.serve_session(&bound, timeout_of(&hello)).await;
        if served.is_err() && bound.output.detach(bound.link) {
            events(Event::Warning(format!(
                "session {session}: the link to its guard is lost; checkpoints continue without it, and the guard releases \
                 no output until it is back"
            )));
        }
        served
    }

    /// Reads a message. May be given up at any time, and called again.
    async fn read(&mut self) -> Result<ToReceiver, LinkEnd> {
        let left = LINE_MAX.saturating_sub(self.line.len()) as u64;
        let mut limited = (&mut self.reader).take(left);
        limited.read_until(b'\n', &mut self.line).await?;
        if !self.line.ends_with(b"\n") {
            return Err(match self.line.len() < LINE_MAX {
                true => LinkEnd::Closed,
                false => LinkEnd::TooLong,
            });
        }
        let message = serde_json::from_slice(&self.line);
        self.line.clear();
        Ok(message?)
    }

    async fn write(&mut self, message: &ToGuard) -> Result<(), LinkEnd> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.writer.write_all(&line).await?)
    }

    /// Waits until the link belongs to a session. The guard has nothing to say meanwhile.
    async fn wait_for_session(
        &mut self,
        ticket: &LinkTicket,
        guest: Guest,
        hello: &Hello,
    ) -> Result<Bound, LinkEnd> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        ticket.wait(guest, hello.clone(), sender);
        let bound = tokio::select! {
            bound = receiver.recv() => bound.ok_or(LinkEnd::Closed)?,
            read = self.read() => {
                // One that was bound in this moment is given up again.
                receiver.close();
                while let Ok(bound) = receiver.try_recv() {
                    bound.output.detach(bound.link);
                }
                return Err(match read {
                    Ok(_) => LinkEnd::Unexpected,
                    Err(end) => end,
                });
            }
        };
        let session = bound.session;
        self.write(&ToGuard::Bound { session })
            .await
            .inspect_err(|_| _ = bound.output.detach(bound.link))?;
        Ok(bound)
    }

    /// Exchanges messages until the session ends.
    async fn serve_session(&mut self, bound: &Bound, timeout: Duration) -> Result<(), LinkEnd> {
        let mut deadline: Option<(Awaited, Instant)> = None;
        loop {
            match bound.output.next(bound.link) {
                Next::Send(message) => {
                    let written = tokio::time::timeout(timeout, self.write(&message)).await;
                    written.map_err(|_| LinkEnd::Hangs(timeout))??;
                    continue;
                }
                Next::Ended(reason) => {
                    let session = bound.session;
                    return self.write(&ToGuard::Ended { session, reason }).await;
                }
                Next::Replaced => return Err(LinkEnd::Replaced),
                Next::Wait(Awaited::Nothing) => deadline = None,
                Next::Wait(awaited) => {
                    let limit = match awaited {
                        Awaited::PrimaryEnd => timeout + PRIMARY_END_LIMIT,
                        _ => timeout,
                    };
                    // Another kind of answer has a time of its own.
                    match deadline {
                        Some((of, _)) if of == awaited => {}
                        _ => deadline = Some((awaited, Instant::now() + limit)),
                    }
                }
            }
            let expired = async {
                match deadline {
                    Some((_, deadline)) => sleep_until(deadline).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = bound.output.changed() => {}
                read = self.read() => match read? {
                    ToReceiver::Placed { checkpoint } => bound.output.placed(bound.link, checkpoint)?,
                    ToReceiver::Released { checkpoint } => bound.output.released(bound.link, checkpoint)?,
                    ToReceiver::HandoverReady => bound.output.handover_ready(bound.link),
                    ToReceiver::HandoverRefused { reason } => bound.output.handover_refused(bound.link, reason),
                    ToReceiver::Leaving => bound.output.leaving(bound.link),
                    ToReceiver::PrimaryEnded => bound.output.primary_ended(bound.link)?,
                    ToReceiver::Hello(_) => return Err(LinkEnd::Unexpected),
                },
                () = expired => return Err(LinkEnd::Hangs(timeout)),
            }
        }
    }
}
