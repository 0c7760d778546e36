//! By how much forwarding lengthened each checkpoint.
//!
//! The guest is paused until LOADED is back, so two stretches of a checkpoint count, and the secondary's own work
//! between them does not:
//!
//! * **to the secondary**: it cannot be done before the checkpoint's last byte is there, on whichever connection. So:
//!   from when the last of these bytes was *read* by us to when the last of them was *handed to the kernel* for the
//!   secondary. Those are the bytes that the primary sent on any connection between our forwarding of CHECKPOINT_REPLY
//!   and our reading of VMSTATE_RECEIVED: what it sends on its main channel after REPLY is VMSTATE_SEND.
//! * **to the primary**: from when VMSTATE_LOADED was read to when it was handed to the kernel for the primary.
//!
//! Their sum is one value per checkpoint. What it does not contain is what we cannot see from here: the time from a
//! byte's arrival at this host to our being woken for it, and the second way through a network stack. Where the secondary
//! reads slower than the primary sends, our writes wait for it, and the value contains that wait, although without
//! us the primary's would have waited.
//!
//! Only the secondary's answers are parsed, a few bytes per checkpoint; the primary's bytes are not looked at.

use crate::capture_file::{ConnectionId, Direction};
use colo_ring::metrics::{SIGNIFICANT_DIGITS, display_nanoseconds};
use colo_ring::wire::colo::Message;
use colo_ring::wire::return_path::RpMessage;
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};

/// Bytes that went through us.
#[derive(Clone, Copy, Debug)]
pub struct Passed<'a> {
    /// On which connection.
    pub connection: ConnectionId,
    /// Which way.
    pub direction: Direction,
    /// The bytes.
    pub bytes: &'a [u8],
    /// When they had been read.
    pub read_at: Instant,
    /// When they had been written to the other side's socket.
    pub forwarded_at: Instant,
}

/// Follows the checkpoints of one main channel.
pub struct Delays {
    main: Option<ConnectionId>,
    to_primary: MessageParser,
    state: State,
    added: Histograms,
    /// Why nothing is measured any more.
    given_up: Option<&'static str>,
}

#[derive(Clone, Copy)]
enum State {
    /// The guest runs.
    Between,
    /// REPLY is on its way; what comes from the primary belongs to the checkpoint.
    Transfer(Option<Latest>),
    /// RECEIVED has come.
    Received(Duration),
}

/// The latest of some bytes.
#[derive(Clone, Copy)]
struct Latest {
    read_at: Instant,
    forwarded_at: Instant,
}

struct Histograms {
    to_secondary: Histogram<u64>,
    to_primary: Histogram<u64>,
    both: Histogram<u64>,
}

/// What forwarding added, over the checkpoints of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Added {
    /// Checkpoints measured.
    pub checkpoints: u64,
    /// Both ways: by how much the checkpoint was lengthened.
    pub both: Figures,
    /// The primary's last bytes.
    pub to_secondary: Figures,
    /// The secondary's LOADED.
    pub to_primary: Figures,
}

/// Figures of a distribution; all zero without any checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Figures {
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

impl Figures {
    fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            p50_ns: histogram.value_at_quantile(0.5),
            p99_ns: histogram.value_at_quantile(0.99),
            max_ns: histogram.max(),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, max] = [self.p50_ns, self.p99_ns, self.max_ns].map(display_nanoseconds);
        write!(f, "p50 {p50}, p99 {p99}, max {max}")
    }
}

impl Delays {
    /// Before the first connection.
    pub fn new() -> Self {
        let empty = || Histogram::new(SIGNIFICANT_DIGITS).expect("0 to 5 significant digits are allowed");
        Self {
            main: None,
            to_primary: MessageParser::default(),
            state: State::Between,
            added: Histograms {
                to_secondary: empty(),
                to_primary: empty(),
                both: empty(),
            },
            given_up: None,
        }
    }

    /// A connection has turned out to be a main channel.
    pub fn found_main(&mut self, connection: ConnectionId) {
        if self.main.replace(connection).is_some() {
            self.give_up("several main channels went through");
        }
    }

    /// Bytes have gone through. To be called in the order in which they were forwarded.
    pub fn passed(&mut self, passed: &Passed<'_>) {
        if self.given_up.is_some() {
            return;
        }
        match (passed.direction, &mut self.state) {
            (Direction::ToSecondary, State::Transfer(latest)) => {
                let Passed {
                    read_at,
                    forwarded_at,
                    ..
                } = *passed;
                let before = latest.unwrap_or(Latest {
                    read_at,
                    forwarded_at,
                });
                *latest = Some(Latest {
                    read_at: before.read_at.max(read_at),
                    forwarded_at: before.forwarded_at.max(forwarded_at),
                });
            }
            (Direction::ToPrimary, _) if self.main == Some(passed.connection) => self.answered(passed),
            _ => {}
        }
    }

    /// What was measured, or why nothing.
    ///
    /// # Errors
    /// In words.
    pub fn added(&self) -> Result<Added, &'static str> {
        match self.given_up {
            Some(why) => Err(why),
            None => Ok(Added {
                checkpoints: self.added.both.len(),
                both: Figures::of(&self.added.both),
                to_secondary: Figures::of(&self.added.to_secondary),
                to_primary: Figures::of(&self.added.to_primary),
            }),
        }
    }

    /// Whether the guest is protected: READY has gone through. Where that is not known, it may be.
    pub fn is_protected(&self) -> bool {
        self.to_primary.ready || self.given_up.is_some()
    }

    /// Checkpoints so far.
    pub fn checkpoints(&self) -> u64 {
        self.added.both.len()
    }

    fn answered(&mut self, passed: &Passed<'_>) {
        let mut bytes = passed.bytes;
        while !bytes.is_empty() {
            match self.to_primary.next(&mut bytes) {
                Ok(Some(message)) => self.message(message, passed),
                Ok(None) => {}
                Err(NotColo) => return self.give_up("the secondary's answers are not COLO's, or encrypted"),
            }
        }
    }

    fn message(&mut self, message: Message, passed: &Passed<'_>) {
        self.state = match (message, self.state) {
            (Message::CheckpointReply, _) => State::Transfer(None),
            (Message::VmstateReceived, State::Transfer(Some(latest))) => {
                State::Received(latest.forwarded_at.saturating_duration_since(latest.read_at))
            }
            (Message::VmstateLoaded, State::Received(to_secondary)) => {
                let to_primary = passed.forwarded_at.saturating_duration_since(passed.read_at);
                self.added.record(to_secondary, to_primary);
                State::Between
            }
            (_, state) => state,
        };
    }

    fn give_up(&mut self, why: &'static str) {
        self.given_up = Some(why);
    }
}

impl Histograms {
    fn record(&mut self, to_secondary: Duration, to_primary: Duration) {
        let values = [
            (&mut self.to_secondary, to_secondary),
            (&mut self.to_primary, to_primary),
            (&mut self.both, to_secondary + to_primary),
        ];
        for (histogram, value) in values {
            let nanoseconds = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
            histogram
                .record(nanoseconds)
                .expect("a histogram that resizes itself takes any value");
        }
    }
}

/// Parses what the secondary sends on the main channel, message by message.
#[derive(Default)]
struct MessageParser {
    /// The start of a message whose rest has not come.
    pending: Vec<u8>,
    /// READY has come: no return-path message follows.
    ready: bool,
}

/// Something else than a COLO secondary's answers.
struct NotColo;

impl MessageParser {
    /// Takes bytes up to the end of a message. None if there is none in them, or one of the return path.
    fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<Message>, NotColo> {
        while let Some((first, rest)) = bytes.split_first() {
            self.pending.push(*first);
            *bytes = rest;
            let framed = !self.ready
                && self
                    .pending
                    .first_chunk()
                    .is_some_and(|kind: &[u8; 2]| *kind != [0, 0]);
            if framed {
                if RpMessage::parse(&self.pending).map_err(|_| NotColo)?.is_some() {
                    self.pending.clear();
                }
            } else if let Some((message, _)) = Message::parse(&self.pending).map_err(|_| NotColo)? {
                self.pending.clear();
                self.ready = true;
                return Ok(Some(message));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: ConnectionId = ConnectionId(0);
    const PAGES: ConnectionId = ConnectionId(1);

    /// A session on a clock of microseconds.
    struct Session {
        start: Instant,
        delays: Delays,
    }

    impl Session {
        fn new() -> Self {
            let mut delays = Delays::new();
            delays.found_main(MAIN);
            Self {
                start: Instant::now(),
                delays,
            }
        }

        fn pass(
            &mut self,
            connection: ConnectionId,
            direction: Direction,
            bytes: &[u8],
            times_us: (u64, u64),
        ) {
            let at = |us| self.start + Duration::from_micros(us);
            let (read_at, forwarded_at) = (at(times_us.0), at(times_us.1));
            self.delays.passed(&Passed {
                connection,
                direction,
                bytes,
                read_at,
                forwarded_at,
            });
        }

        fn answer(&mut self, bytes: &[u8], times_us: (u64, u64)) {
            self.pass(MAIN, Direction::ToPrimary, bytes, times_us);
        }

        fn send(&mut self, connection: ConnectionId, times_us: (u64, u64)) {
            self.pass(connection, Direction::ToSecondary, b"something", times_us);
        }
    }

    const RETURN_PATH: [u8; 16] = *b"\0\x02\0\x04\0\0\0\x01\0\x01\0\x04\0\0\0\0";
    const READY: [u8; 4] = [0; 4];
    const REPLY: [u8; 4] = [0, 0, 0, 2];
    const RECEIVED: [u8; 4] = [0, 0, 0, 5];
    const LOADED: [u8; 4] = [0, 0, 0, 6];

    fn close(seen: u64, exact_us: u64) -> bool {
        seen.abs_diff(exact_us * 1000) <= exact_us
    }

    /// The last byte counts, on whichever connection it was, and the answer's own way.
    #[test]
    fn a_checkpoint_is_lengthened_by_the_last_byte_and_the_answer() {
        let mut session = Session::new();
        session.answer(&[&RETURN_PATH[..], &READY].concat(), (0, 10));
        session.answer(&REPLY, (100, 110));
        session.send(MAIN, (200, 220));
        session.send(PAGES, (250, 340));
        session.send(MAIN, (300, 330));
        session.answer(&RECEIVED, (400, 450));
        // Of the next checkpoint's pages or of nothing: after RECEIVED it does not count.
        session.send(PAGES, (500, 900));
        session.answer(&LOADED, (1000, 1007));
        let added = session.delays.added().unwrap();
        assert_eq!(added.checkpoints, 1);
        assert!(close(added.to_secondary.max_ns, 40), "{added:?}");
        assert!(close(added.to_primary.max_ns, 7), "{added:?}");
        assert!(close(added.both.p50_ns, 47), "{added:?}");
    }

    /// However the answers are cut or joined.
    #[test]
    fn answers_may_come_in_any_pieces() {
        let answers = [&RETURN_PATH[..], &READY, &REPLY].concat();
        for cut in 0..answers.len() {
            let mut session = Session::new();
            session.answer(&answers[..cut], (0, 1));
            session.answer(&answers[cut..], (1, 2));
            session.send(MAIN, (10, 12));
            session.answer(&[RECEIVED, LOADED, REPLY].concat(), (20, 23));
            session.send(MAIN, (30, 32));
            for byte in [RECEIVED, LOADED].concat() {
                session.answer(&[byte], (40, 43));
            }
            let added = session.delays.added().unwrap();
            assert_eq!(added.checkpoints, 2, "{cut}");
            assert!(
                close(added.both.p50_ns, 5) && close(added.both.max_ns, 5),
                "{added:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_told_is_not_measured() {
        let mut session = Session::new();
        session.answer(b"\x16\x03\x03\x00\x7a", (0, 1));
        assert!(session.delays.added().unwrap_err().contains("encrypted"));
        let mut session = Session::new();
        session.delays.found_main(PAGES);
        assert!(session.delays.added().unwrap_err().contains("several"));
    }

    /// A checkpoint that is given up in the middle counts as none.
    #[test]
    fn half_a_checkpoint_is_none() {
        let mut session = Session::new();
        session.answer(&[READY, REPLY].concat(), (0, 1));
        session.send(MAIN, (5, 6));
        session.answer(&RECEIVED, (7, 8));
        session.answer(&REPLY, (9, 10));
        session.answer(&LOADED, (11, 12));
        assert_eq!(session.delays.checkpoints(), 0);
    }
}
