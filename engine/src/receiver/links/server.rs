//! Serves a guard's connection, as a task of the control thread.

use super::registry::{Bound, Guest, LinkPlace, Links};
use super::session_output::Next;
use crate::link::{Hello, LINE_MAX, LINK_VERSION, LinkError, ToGuard, ToReceiver};
use crate::net::Accepted;
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
    #[error("it did not say which guest it guards within {0:?}")]
    Silent(Duration),
    #[error("it did not answer a barrier within {0:?}")]
    Hangs(Duration),
    #[error("a line of more than {LINE_MAX} bytes")]
    TooLong,
    #[error("a line that is not understood ({0})")]
    NotUnderstood(#[from] serde_json::Error),
    #[error("{0}")]
    Protocol(#[from] LinkError),
    #[error("{0:?} is not expected here")]
    Unexpected(ToReceiver),
    #[error("another guard of the same guest has taken its place")]
    Replaced,
    #[error("{0}")]
    Refused(String),
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
    let end = match serve_until_end(accepted, &links, deadline, &*events, &mut name).await {
        Ok(never) => match never {},
        Err(end) => end,
    };
    let who = match name.is_empty() {
        true => format!("a guard at {from}"),
        false => format!("the guard of {name} at {from}"),
    };
    events(match end {
        LinkEnd::Closed | LinkEnd::Broken(_) => Event::Note(format!("{who}: {end}")),
        end => Event::Warning(format!("{who}: {end}")),
    });
}

async fn serve_until_end(
    accepted: Accepted,
    links: &Arc<Links>,
    deadline: Duration,
    events: &Events,
    name: &mut String,
) -> Result<std::convert::Infallible, LinkEnd> {
    let origin = accepted.peer.origin;
    let is_tcp = accepted.is_tcp;
    // A UNIX socket as well: reading and writing are the same for every family.
    let stream = std::net::TcpStream::from(accepted.socket);
    stream.set_nonblocking(true)?;
    if is_tcp {
        stream.set_nodelay(true)?;
    }
    let mut stream = TcpStream::from_std(stream)?;
    let mut link = Link::new(&mut stream);
    let hello = tokio::time::timeout(deadline, link.read()).await;
    let (place, guest, hello) = match hello.map_err(|_| LinkEnd::Silent(deadline))?? {
        ToReceiver::Hello(hello) => match check(&hello, links) {
            Ok((place, uuid)) => (place, Guest { uuid, origin }, hello),
            Err(reason) => {
                link.write(&ToGuard::Refused {
                    reason: reason.clone(),
                })
                .await?;
                return Err(LinkEnd::Refused(reason));
            }
        },
        other => return Err(LinkEnd::Unexpected(other)),
    };
    name.clone_from(&hello.name);
    link.write(&ToGuard::Welcome {
        version: LINK_VERSION,
    })
    .await?;
    loop {
        let bound = link.wait_for_session(&place, guest, &hello).await?;
        events(Event::Note(format!(
            "session {} is guarded as {}: its output waits for its commit",
            bound.session, hello.name
        )));
        let served = link.serve_session(&bound, timeout_of(&hello)).await;
        if served.is_err() && bound.output.detach(bound.link) {
            events(Event::Warning(format!(
                "session {}: the link to its guard is lost; checkpoints go on without it, and the guard lets no output go \
                 until it is back",
                bound.session
            )));
        }
        served?;
    }
}

fn timeout_of(hello: &Hello) -> Duration {
    Duration::from_millis(hello.timeout_ms.into()).min(TIMEOUT_MAX)
}

/// Whether a guard is taken: its place, and the UUID of its guest.
fn check(hello: &Hello, links: &Arc<Links>) -> Result<(LinkPlace, Option<[u8; 16]>), String> {
    if hello.version != LINK_VERSION {
        let version = hello.version;
        return Err(format!(
            "it speaks version {version} of the link protocol, this receiver version {LINK_VERSION}"
        ));
    }
    if hello.name.is_empty() || hello.name.len() > NAME_MAX || hello.name.chars().any(char::is_control) {
        return Err(format!(
            "the guest's name must have 1 to {NAME_MAX} printable bytes"
        ));
    }
    let uuid = match &hello.uuid {
        None => None,
        Some(text) => Some(parse_uuid(text).ok_or("the guest's UUID must have 32 hexadecimal digits")?),
    };
    let place = links.connected().ok_or("too many guards are connected")?;
    Ok((place, uuid))
}

/// 32 hexadecimal digits, with or without hyphens.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|letter| *letter != '-')
        .map(|letter| letter.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
    bytes.try_into().ok()
}

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
        place: &LinkPlace,
        guest: Guest,
        hello: &Hello,
    ) -> Result<Bound, LinkEnd> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        place.wait(guest, hello.clone(), sender);
        let bound = tokio::select! {
            bound = receiver.recv() => bound.ok_or(LinkEnd::Closed)?,
            read = self.read() => {
                // One that was bound in this moment is given up again.
                receiver.close();
                while let Ok(bound) = receiver.try_recv() {
                    bound.output.detach(bound.link);
                }
                return Err(match read {
                    Ok(message) => LinkEnd::Unexpected(message),
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

    /// Asks and tells until the session ends.
    async fn serve_session(&mut self, bound: &Bound, timeout: Duration) -> Result<(), LinkEnd> {
        let mut deadline = None;
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
                Next::Wait { for_answer: false } => deadline = None,
                Next::Wait { for_answer: true } => {
                    deadline.get_or_insert_with(|| Instant::now() + timeout);
                }
            }
            let expired = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = bound.output.changed() => {}
                read = self.read() => match read? {
                    ToReceiver::Placed { checkpoint } => bound.output.placed(bound.link, checkpoint)?,
                    ToReceiver::Released { checkpoint } => bound.output.released(bound.link, checkpoint)?,
                    other @ ToReceiver::Hello(_) => return Err(LinkEnd::Unexpected(other)),
                },
                () = expired => return Err(LinkEnd::Hangs(timeout)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_with_and_without_hyphens() {
        let whole = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!(parse_uuid("00112233445566778899AABBCCDDEEFF"), Some(whole));
        assert_eq!(whole[..3], [0, 0x11, 0x22]);
        for wrong in [
            "",
            "0011",
            "g0112233445566778899aabbccddeeff",
            "00112233445566778899aabbccddeeff0",
        ] {
            assert_eq!(parse_uuid(wrong), None, "{wrong}");
        }
    }
}
