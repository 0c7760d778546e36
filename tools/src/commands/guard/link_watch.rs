//! Notices that a receiver does not answer any more: one that hangs, or whose host has vanished, closes no connection.
//!
//! A thread of its own, which waits for nothing but time: the link's thread may wait for QEMU, which waits for the receiver. It asks
//! ([`ToReceiver::Ping`]) when nothing has arrived for a quarter of the time that a receiver has, and takes whatever
//! arrives then for an answer, also what the link's thread has not read yet.

use super::link::LinkSocket;
use super::path::PathEvent;
use colo_ring::link::ToReceiver;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// In how many parts that time is waited for, and after how many silent ones the receiver is asked. Parts are counted, not time: after one
/// in which this process stood, as its host may, the answer may still be on its way.
const PARTS: u32 = 16;
const SILENT_PARTS: u32 = 4;

/// After how many it is lost. One more may have been silent in part, and the last ones are for the end of the protection: the guest may be stopped.
const LOST_PARTS: u32 = 13;

/// Watches a link for as long as it is there.
pub(super) struct LinkWatch {
    /// Its end ends the thread.
    _end: mpsc::Sender<()>,
}

impl LinkWatch {
    /// Starts to watch, and reports [`PathEvent::ReceiverSilent`] once, at most `limit` after the receiver has said the last.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(super) fn start(
        socket: Arc<LinkSocket>,
        limit: Duration,
        report: Arc<dyn Fn(PathEvent) + Send + Sync>,
    ) -> std::io::Result<Self> {
        let (end, ended) = mpsc::channel();
        let thread = std::thread::Builder::new().name("guard-link".to_owned());
        thread.spawn(move || {
            if is_silent(&socket, limit, &ended) {
                report(PathEvent::ReceiverSilent(limit));
            }
        })?;
        Ok(Self { _end: end })
    }
}

/// Returns when the receiver does not answer, or else when the watch ends.
fn is_silent(socket: &LinkSocket, limit: Duration, ended: &mpsc::Receiver<()>) -> bool {
    let part = limit / PARTS;
    let (mut heard, mut silent_parts) = (socket.heard(), 0);
    loop {
        match ended.recv_timeout(part) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return false,
        }
        let now = socket.heard();
        silent_parts = if now == heard { silent_parts + 1 } else { 0 };
        heard = now;
        match silent_parts {
            // A link that is broken is noticed when it is read.
            SILENT_PARTS => drop(socket.send(&ToReceiver::Ping)),
            LOST_PARTS => return true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Socket;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const LIMIT: Duration = Duration::from_millis(200);

    /// For answers of this test, also on a busy machine.
    const LONG: Duration = Duration::from_secs(4);

    /// A link, its other end, and what is reported.
    fn watched(limit: Duration) -> (LinkWatch, UnixStream, mpsc::Receiver<PathEvent>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (report, reported) = mpsc::channel();
        let report = Arc::new(move |event| report.send(event).unwrap());
        let watch = LinkWatch::start(Arc::new(LinkSocket::of(Socket::Unix(ours))), limit, report).unwrap();
        (watch, theirs, reported)
    }

    #[test]
    fn a_receiver_that_answers_nothing_is_noticed() {
        let (_watch, mut receiver, reported) = watched(LIMIT);
        let event = reported.recv().unwrap();
        assert!(matches!(event, PathEvent::ReceiverSilent(LIMIT)), "{event:?}");
        let mut asked = [0; 64];
        let count = receiver.read(&mut asked).unwrap();
        assert_eq!(&asked[..count], b"{\"type\":\"ping\"}\n");
    }

    /// Nothing reads the answers: the link's thread may wait for QEMU.
    #[test]
    fn a_receiver_that_answers_is_there() {
        let (watch, mut receiver, reported) = watched(LONG);
        let mut asked = [0; 64];
        for _ in 0..3 {
            assert!(receiver.read(&mut asked).unwrap() > 0);
            receiver.write_all(b"{\"type\":\"pong\"}\n").unwrap();
        }
        assert!(reported.try_recv().is_err());
        drop(watch);
        // The thread ends by that, and with it the reporter.
        assert!(reported.recv().is_err());
    }
}
