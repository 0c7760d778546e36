//! Clients of the service of a guest with a network card, `tests/guest/net-server.rs`.

use crate::HANG_LIMIT;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use super::{GUEST_ADDRESS, LabError, wait_for};

/// What a client has seen.
#[derive(Clone, Debug, Default)]
pub struct ClientReport {
    /// Numbers that came back.
    pub answers: u64,
    /// The longest time between two of them.
    pub longest_gap: Duration,
    /// How long each took, in microseconds, in order.
    pub latencies_us: Vec<u64>,
    /// What went wrong, if something has.
    pub error: Option<String>,
}

/// What a client asks for, over one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// The next number, again and again, with this pause after each.
    Count(Duration),
    /// The same, with pauses from half of that to one and a half, so that it is in step with nothing.
    CountIrregularly(Duration),
    /// Numbered lines out of the guest, as fast as they come.
    Bulk,
    /// Bytes into the guest, as fast as it takes them.
    Sink,
}

/// A client of the guest's service.
#[derive(Debug)]
pub struct Client {
    answers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<ClientReport>,
}

impl Client {
    /// Connects, and asks again and again.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start(load: Load) -> Result<Self, LabError> {
        let stream = wait_for("the guest's service", HANG_LIMIT, || {
            Ok(TcpStream::connect(GUEST_ADDRESS).ok())
        })?;
        let connected = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(HANG_LIMIT)));
        connected.map_err(LabError::io("set up the client"))?;
        let answers = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (counted, stopped) = (answers.clone(), stop.clone());
        let thread = std::thread::spawn(move || ask(&stream, load, &counted, &stopped));
        Ok(Self {
            answers,
            stop,
            thread,
        })
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Waits until so many more answers have come.
    ///
    /// # Errors
    /// [`LabError::Timeout`]; [`LabError::Ended`] when the connection has ended.
    pub fn wait_answers(&self, more: u64) -> Result<(), LabError> {
        let goal = self.answers() + more;
        wait_for(&format!("{goal} answers"), HANG_LIMIT, || {
            if self.answers() < goal && self.thread.is_finished() {
                return Err(LabError::Ended {
                    what: "the client's connection".into(),
                    detail: format!("after {} answers", self.answers()),
                });
            }
            Ok((self.answers() >= goal).then_some(()))
        })
    }

    /// Whether so many answers come within that time.
    #[must_use]
    pub fn goes_on(&self, more: u64, within: Duration) -> bool {
        let (goal, deadline) = (self.answers() + more, Instant::now() + within);
        while self.answers() < goal && !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.answers() >= goal
    }

    /// Ends it.
    ///
    /// # Panics
    /// If its thread has.
    #[must_use]
    pub fn end(self) -> ClientReport {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client")
    }
}

fn ask(stream: &TcpStream, load: Load, answers: &AtomicU64, stop: &AtomicBool) -> ClientReport {
    let mut report = ClientReport::default();
    let (mut reader, mut last) = (BufReader::new(stream), Instant::now());
    let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
    for number in 1_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        let answered = match load {
            Load::Count(_) | Load::CountIrregularly(_) => count(stream, &mut reader, number),
            Load::Bulk => bulk(stream, &mut reader),
            Load::Sink => sink(stream, &mut reader),
        };
        if let Err(error) = answered {
            report.error = Some(format!("request {number}: {error}"));
            break;
        }
        let now = Instant::now();
        report.answers = number;
        report.longest_gap = report.longest_gap.max(now - last);
        report
            .latencies_us
            .push(u64::try_from((now - asked).as_micros()).unwrap_or(u64::MAX));
        last = now;
        answers.store(number, Ordering::Relaxed);
        match load {
            Load::Count(pause) => std::thread::sleep(pause),
            Load::CountIrregularly(pause) => std::thread::sleep(pause.mul_f64(random.random_range(0.5..1.5))),
            Load::Bulk | Load::Sink => {}
        }
    }
    report
}

/// Bytes of a request for bulk data: 1024 lines of 16 bytes.
const BULK_BYTES: u64 = 16 << 10;

fn wrong(answer: &str) -> std::io::Error {
    std::io::Error::other(format!("answered by {answer:?}"))
}

fn count(mut stream: &TcpStream, reader: &mut impl BufRead, number: u64) -> std::io::Result<()> {
    stream.write_all(format!("{number}\n").as_bytes())?;
    expect(reader, &format!("{number}\n"))
}

fn bulk(mut stream: &TcpStream, reader: &mut impl BufRead) -> std::io::Result<()> {
    stream.write_all(format!("bulk {BULK_BYTES}\n").as_bytes())?;
    (1..=BULK_BYTES / 16).try_for_each(|number| expect(reader, &format!("{number:015}\n")))
}

fn sink(mut stream: &TcpStream, reader: &mut impl BufRead) -> std::io::Result<()> {
    let mut request = format!("sink {BULK_BYTES}\n").into_bytes();
    request.extend((0..BULK_BYTES).map(|_| b'x'));
    stream.write_all(&request)?;
    expect(reader, &format!("done {BULK_BYTES}\n"))
}

fn expect(reader: &mut impl BufRead, expected: &str) -> std::io::Result<()> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    match line == expected {
        true => Ok(()),
        false => Err(wrong(&line)),
    }
}
