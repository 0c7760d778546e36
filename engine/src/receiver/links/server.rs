//! Serves a guard's connection, as a task of the control thread.

use super::registry::{Bound, GuestMarks, LinkTicket, Links};
use super::session_output::{Awaited, Next};
use crate::link::{Call, Hello, LINE_MAX, LINK_VERSION, LinkError, ToGuard, ToReceiver};
use crate::net::{Accepted, Origin};
use crate::receiver::Event;
use crate::receiver::assemble::Who;
use crate::receiver::guest::{Guests, SessionTitle};
use crate::receiver::names::{GuestName, NameError};
use crate::receiver::refusals::{Refusals, Refused};
use crate::receiver::remark::Remark;
use crate::receiver::uuid::parse_uuid;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

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
    #[error(
        "there are too many guards, and of those of its host that wait for a guest it has waited longest"
    )]
    Crowded,
    #[error("another guard of the same guest has taken its place")]
    Replaced,
    #[error("{0}")]
    Refused(String),
    #[error("its session has ended")]
    Ended,
}

/// Serves a connection whose preface was read, until it ends.
pub(in crate::receiver) async fn serve(
    (accepted, who): (Accepted, Who),
    (links, guests): (Arc<Links>, Arc<Guests>),
    deadline: Duration,
    refusals: Arc<Refusals>,
) {
    let (from, origin) = (accepted.from.clone(), accepted.peer.origin);
    let (mut name, mut bound_to) = (String::new(), None);
    let told = |event| refusals.report(origin, Refused::Guard, &from, || event);
    let end = serve_until_end(
        (accepted, who),
        (&links, &guests),
        deadline,
        &told,
        &mut name,
        &mut bound_to,
    )
    .await;
    if let LinkEnd::Ended = end {
        // The session's own end was reported.
        return;
    }
    let (guard, refused) = match name.is_empty() {
        true => (format!("a guard at {from}"), Refused::Stranger),
        false => (format!("the guard of {name} at {from}"), Refused::Client),
    };
    let refused = if bound_to.is_some() {
        Refused::Guard
    } else {
        refused
    };
    let event = || {
        let remark = Remark {
            session: bound_to,
            text: format!("{guard}: {end}"),
        };
        match end {
            LinkEnd::Closed | LinkEnd::Broken(_) => Event::Note(remark),
            _ => Event::Warning(remark),
        }
    };
    refusals.report(origin, refused, &from, event);
}

/// Serves it, and returns why it ended.
async fn serve_until_end(
    (accepted, who): (Accepted, Who),
    (links, guests): (&Arc<Links>, &Guests),
    deadline: Duration,
    events: &dyn Fn(Event),
    name: &mut String,
    bound_to: &mut Option<SessionTitle>,
) -> LinkEnd {
    let origin = accepted.peer.origin;
    let Some(ticket) = links.connected(origin) else {
        return LinkEnd::Refused("too many guards are connected, of all hosts or of this one".to_owned());
    };
    let mut stream = match stream(accepted) {
        Ok(stream) => stream,
        Err(error) => return error.into(),
    };
    let mut link = Link::new(&mut stream, guests);
    let end = link
        .serve(&ticket, (origin, who), deadline, events, name, bound_to)
        .await;
    let Err(end) = end else { return LinkEnd::Ended };
    if let LinkEnd::Refused(_) | LinkEnd::Replaced | LinkEnd::Crowded = end {
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

/// The UUID of a guest, as a guard says it.
///
/// # Errors
/// [`LinkEnd::Refused`], with the reason. So do the others of these.
fn check_uuid(uuid: Option<&str>) -> Result<Option<[u8; 16]>, LinkEnd> {
    let parsed = uuid.map(|text| {
        parse_uuid(text).ok_or_else(|| {
            LinkEnd::Refused("the guest's UUID must have 36 characters, as QEMU writes it".to_owned())
        })
    });
    parsed.transpose()
}

fn check_name(name: &str) -> Result<GuestName, LinkEnd> {
    name.parse()
        .map_err(|error: NameError| LinkEnd::Refused(error.to_string()))
}

fn check_version(version: u32) -> Result<(), LinkEnd> {
    match version == LINK_VERSION {
        true => Ok(()),
        false => Err(LinkEnd::Refused(format!(
            "it speaks version {version} of the link protocol, this receiver version {LINK_VERSION}"
        ))),
    }
}

/// How long the end of a primary may take, beyond the guard's own limit: then its guard hangs.
const PRIMARY_END_LIMIT: Duration = Duration::from_secs(60);

/// A connection, line by line.
struct Link<'a> {
    guests: &'a Guests,
    reader: BufReader<ReadHalf<'a>>,
    writer: WriteHalf<'a>,
    /// A line that is not here whole.
    line: Vec<u8>,
}

impl<'a> Link<'a> {
    fn new(stream: &'a mut TcpStream, guests: &'a Guests) -> Self {
        let (reader, writer) = stream.split();
        Self {
            guests,
            reader: BufReader::with_capacity(LINE_MAX, reader),
            writer,
            line: Vec::with_capacity(LINE_MAX),
        }
    }

    /// Serves the guard: it says which guest it guards, and is served while that guest has a session.
    async fn serve(
        &mut self,
        ticket: &LinkTicket,
        (origin, who): (Origin, Who),
        deadline: Duration,
        events: &dyn Fn(Event),
        name: &mut String,
        bound_to: &mut Option<SessionTitle>,
    ) -> Result<(), LinkEnd> {
        let hello = tokio::time::timeout(deadline, self.read()).await;
        let hello = match hello.map_err(|_| LinkEnd::Silent(deadline))?? {
            ToReceiver::Hello(hello) => hello,
            ToReceiver::Call(call) => return self.serve_call(ticket, (origin, who), call).await,
            _ => return Err(LinkEnd::Unexpected),
        };
        check_version(hello.version)?;
        let uuid = check_uuid(hello.uuid.as_deref())?;
        let guest_name = check_name(&hello.name)?;
        name.clone_from(&hello.name);
        self.check_claim(&guest_name, &who)?;
        let version = LINK_VERSION;
        self.write(&ToGuard::Welcome { version }).await?;
        let marks = GuestMarks { uuid, origin, who };
        let bound = self.wait_for_session(ticket, marks, &hello, guest_name).await?;
        let session = bound.guest.title();
        *bound_to = Some(session.clone());
        let text = format!("session {session} is guarded: its output waits for its commit");
        events(Event::note(Remark::of(&session, text)));
        let served = self.serve_session(&bound, timeout_of(&hello)).await;
        if served.is_err() && bound.output.detach(bound.link) && !bound.output.has_left() {
            let text = format!(
                "session {session}: the link to its guard is lost; checkpoints continue without it, and the guard releases \
                 no output until it is back"
            );
            events(Event::warning(Remark::of(&session, text)));
        }
        served
    }

    /// Names a guest that is about to be protected, and tells what it is called once it is.
    async fn serve_call(
        &mut self,
        ticket: &LinkTicket,
        (origin, who): (Origin, Who),
        call: Call,
    ) -> Result<(), LinkEnd> {
        check_version(call.version)?;
        let uuid = check_uuid(call.uuid.as_deref())?;
        let name = call.name.as_deref().map(check_name).transpose()?;
        name.as_ref()
            .map_or(Ok(()), |name| self.check_claim(name, &who))?;
        let version = LINK_VERSION;
        self.write(&ToGuard::Welcome { version }).await?;
        let (sender, called) = oneshot::channel();
        ticket.call(GuestMarks { uuid, origin, who }, name, sender);
        let guest = tokio::select! {
            guest = called => guest.map_err(|_| LinkEnd::Crowded)?,
            // Its caller has nothing to say any more, and may go.
            read = self.read() => return match read {
                Ok(_) => Err(LinkEnd::Unexpected),
                Err(LinkEnd::Closed | LinkEnd::Broken(_)) => Ok(()),
                Err(end) => Err(end),
            },
        };
        let called = ToGuard::Called {
            session: guest.session(),
            name: guest.name().map(String::from),
        };
        // It may be gone: what is called so stays called so.
        let _ = self.write(&called).await;
        Ok(())
    }

    /// A peer has no name that a rule gives to other identities.
    fn check_claim(&self, name: &GuestName, who: &Who) -> Result<(), LinkEnd> {
        let claimed = self.guests.check_claim(name, who);
        claimed.map_err(|not_allowed| LinkEnd::Refused(not_allowed.to_string()))
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

    /// The guard asks whether this receiver is there.
    async fn answer_ping(&mut self, timeout: Duration) -> Result<(), LinkEnd> {
        let written = tokio::time::timeout(timeout, self.write(&ToGuard::Pong)).await;
        written.map_err(|_| LinkEnd::Hangs(timeout))?
    }

    /// Waits until the link belongs to a session. The guard only asks meanwhile whether this receiver is there.
    async fn wait_for_session(
        &mut self,
        ticket: &LinkTicket,
        guest: GuestMarks,
        hello: &Hello,
        name: GuestName,
    ) -> Result<Bound, LinkEnd> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        ticket.wait(guest, (hello.clone(), name), sender);
        let bound = loop {
            let read = tokio::select! {
                bound = receiver.recv() => break bound.ok_or(LinkEnd::Crowded)?,
                read = self.read() => read,
            };
            let answered = match read {
                Ok(ToReceiver::Ping) => self.answer_ping(timeout_of(hello)).await,
                Ok(_) => Err(LinkEnd::Unexpected),
                Err(end) => Err(end),
            };
            if let Err(end) = answered {
                // One that was bound in this moment is given up again.
                receiver.close();
                while let Ok(bound) = receiver.try_recv() {
                    bound.output.detach(bound.link);
                }
                return Err(end);
            }
        };
        let session = bound.guest.session();
        self.write(&ToGuard::Bound { session })
            .await
            .inspect_err(|_| _ = bound.output.detach(bound.link))?;
        Ok(bound)
    }

    /// Exchanges messages until the session ends.
    async fn serve_session(&mut self, bound: &Bound, timeout: Duration) -> Result<(), LinkEnd> {
        let mut deadline: Option<(Awaited, Instant)> = None;
        let (mut committed, mut keep_limit) = (Instant::now(), Duration::ZERO);
        loop {
            match bound.output.next(bound.link) {
                Next::Send(message) => {
                    if let ToGuard::Committed { .. } = message {
                        committed = Instant::now();
                    }
                    let written = tokio::time::timeout(timeout, self.write(&message)).await;
                    written.map_err(|_| LinkEnd::Hangs(timeout))??;
                    continue;
                }
                Next::Ended(reason) => {
                    let session = bound.guest.session();
                    return self.write(&ToGuard::Ended { session, reason }).await;
                }
                Next::Replaced => return Err(LinkEnd::Replaced),
                Next::Wait(Awaited::Nothing) => deadline = None,
                Next::Wait(awaited @ Awaited::Begin) => deadline = Some((awaited, committed + keep_limit)),
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
                    ToReceiver::Keep { limit_ms } => {
                        keep_limit = Duration::from_millis(limit_ms.into());
                        bound.output.keep(bound.link);
                    }
                    ToReceiver::Begin { after } => bound.output.begin(bound.link, after),
                    ToReceiver::HandoverReady => bound.output.handover_ready(bound.link),
                    ToReceiver::HandoverRefused { reason } => bound.output.handover_refused(bound.link, reason),
                    ToReceiver::Leaving => bound.output.leaving(bound.link),
                    ToReceiver::Left => bound.output.left(bound.link),
                    ToReceiver::PrimaryEnded => bound.output.primary_ended(bound.link)?,
                    ToReceiver::Ping => self.answer_ping(timeout).await?,
                    ToReceiver::Hello(_) | ToReceiver::Call(_) => return Err(LinkEnd::Unexpected),
                },
                () = expired => match deadline {
                    Some((Awaited::Begin, _)) => bound.output.begin_now(bound.link),
                    _ => return Err(LinkEnd::Hangs(timeout)),
                },
            }
        }
    }
}
