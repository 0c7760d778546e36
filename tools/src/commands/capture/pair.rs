//! A primary's connection and ours to the secondary in its place: bytes, ends and resets of the one become the other's.

use super::session::{Session, Wish};
use super::stream::Stream;
use crate::capture_file::{ConnectionId, Direction, EndKind};
use crate::net::Address;
use colo_ring::net::{Accepted, HostWatch};
use nix::sys::socket::Shutdown;
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Most bytes of one read: what is held up for each other.
const READ_MAX: usize = 128 << 10;

/// After one side is gone, a write to the other that does not come to an end is broken off.
const LINGER: Duration = Duration::from_secs(1);

struct Pair {
    connection: ConnectionId,
    primary: Stream,
    secondary: Stream,
    /// One side was reset or failed.
    broken: Cell<bool>,
    broke: Notify,
}

/// Forwards a connection until it has ended in both directions, or is to be cut.
pub(super) async fn run(session: Rc<Session>, accepted: Accepted, mut wish: watch::Receiver<Wish>) {
    let Some(connection) = session.open(&accepted.from) else {
        return;
    };
    let connecting = async {
        let primary = Stream::new(accepted.socket, accepted.is_tcp, session.uring)?;
        let connected = connect(&session.to).await;
        let secondary = connected
            .and_then(|socket| Stream::new(socket, matches!(session.to, Address::Tcp(_)), session.uring));
        if secondary.is_err() {
            // As if no process had listened, as far as that is still possible.
            primary.reset_on_close();
        }
        Ok((primary, secondary?))
    };
    let connected = tokio::select! {
        connected = connecting => connected,
        () = cut(&mut wish) => return,
    };
    match connected {
        Ok((primary, secondary)) => {
            let pair = Pair {
                connection,
                primary,
                secondary,
                broken: Cell::new(false),
                broke: Notify::new(),
            };
            pair.forward_both(&session, &mut wish).await;
        }
        Err(error) => session.refused(connection, &error),
    }
}

impl Pair {
    async fn forward_both(&self, session: &Session, wish: &mut watch::Receiver<Wish>) {
        let both = async {
            tokio::join!(
                self.forward(session, Direction::ToSecondary),
                self.forward(session, Direction::ToPrimary)
            )
        };
        tokio::pin!(both);
        // An operation that is in flight is never dropped: shutting down its socket ends it.
        tokio::select! {
            _ = &mut both => return,
            () = cut(wish) => {}
            () = self.broke.notified() => {
                if tokio::time::timeout(LINGER, &mut both).await.is_ok() {
                    return;
                }
            }
        }
        self.primary.shutdown(Shutdown::Both);
        self.secondary.shutdown(Shutdown::Both);
        both.await;
    }

    /// One direction, to its end.
    async fn forward(&self, session: &Session, direction: Direction) {
        let (from, to) = match direction {
            Direction::ToSecondary => (&self.primary, &self.secondary),
            Direction::ToPrimary => (&self.secondary, &self.primary),
        };
        let how = loop {
            session.recorder.room().await;
            let (count, bytes) = from.read(session.recorder.buffer(), READ_MAX).await;
            let read_at = Instant::now();
            match count {
                Ok(0) if self.broken.get() => break EndKind::Reset,
                Ok(0) => break EndKind::Eof,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break EndKind::Reset,
            }
            from.quick_ack();
            let (written, bytes) = to.write_all(bytes).await;
            let forwarded_at = Instant::now();
            // The kernel delays acknowledgements again after a write.
            to.quick_ack();
            session.passed(self.connection, direction, bytes, read_at, forwarded_at);
            if written.is_err() {
                break EndKind::Reset;
            }
        };
        session.ended(self.connection, direction, how);
        match how {
            EndKind::Eof => to.shutdown(Shutdown::Write),
            EndKind::Reset => self.break_off(),
        }
    }

    /// Makes a reset of one side the other's, too. The other direction's read ends by it.
    fn break_off(&self) {
        self.broken.set(true);
        self.broke.notify_one();
        for side in [&self.primary, &self.secondary] {
            side.reset_on_close();
            side.shutdown(Shutdown::Read);
        }
    }
}

/// Connects to the secondary. The socket blocks.
async fn connect(to: &Address) -> io::Result<OwnedFd> {
    match to {
        Address::Tcp(host_port) => {
            let stream = tokio::net::TcpStream::connect(host_port).await?;
            stream.set_nodelay(true)?;
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            let socket = stream.into();
            // It may take its time, as it may without a recorder: a primary's own socket has no limit for that.
            HostWatch::default().apply_to_silence(&socket)?;
            Ok(socket)
        }
        Address::Unix(path) => {
            let stream = tokio::net::UnixStream::connect(path).await?.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream.into())
        }
    }
}

/// Until connections are to be cut.
async fn cut(wish: &mut watch::Receiver<Wish>) {
    // Its sender lives as long as the process.
    let _ = wish.wait_for(|wish| *wish == Wish::Cut).await;
}
