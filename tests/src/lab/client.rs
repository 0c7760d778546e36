//! Clients of the service of a guest with a network card, `tests/guest/net-server.rs`.

use crate::HANG_LIMIT;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
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
    pub error: Option<ClientError>,
}

/// What can go wrong with a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// The guest has answered something that it may not.
    Wrong(String),
    /// The connection has ended.
    Ended(String),
}

impl ClientError {
    fn of(number: u64, error: &std::io::Error) -> Self {
        let text = format!("answer {number}: {error}");
        match error.kind() {
            ErrorKind::InvalidData => Self::Wrong(text),
            _ => Self::Ended(text),
        }
    }
}

/// What a client asks for, over one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// The next number, again and again, with this pause after each.
    Count(Duration),
    /// The same, with pauses from half of that to one and a half, so that it is in step with nothing.
    CountIrregularly(Duration),
    /// The next number this often, whether or not the last one came back.
    CountEvery(Duration),
    /// Numbered lines both ways at a time, as fast as they go.
    Exchange,
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
        Self::start_at(GUEST_ADDRESS, load)
    }

    /// The same, at that address of the guest.
    ///
    /// # Errors
    /// As [`Client::start`].
    pub fn start_at(address: impl ToSocketAddrs, load: Load) -> Result<Self, LabError> {
        let stream = wait_for("the guest's service", HANG_LIMIT, || {
            Ok(TcpStream::connect(&address).ok())
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
    // The writer outlives the reader, which waits for what the guest answers.
    let (sent, is_read) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let is_read = &is_read;
        match load {
            Load::CountEvery(pause) => drop(scope.spawn(move || send_numbers(stream, pause, is_read))),
            Load::Exchange => drop(scope.spawn(|| send_lines(stream, &sent, is_read))),
            _ => {}
        }
        read_answers(stream, load, (answers, &sent), stop, &mut report);
        is_read.store(true, Ordering::Relaxed);
        let _ = stream.shutdown(Shutdown::Both);
    });
    report
}

fn read_answers(
    stream: &TcpStream,
    load: Load,
    (answers, sent): (&AtomicU64, &AtomicU64),
    stop: &AtomicBool,
    report: &mut ClientReport,
) {
    let (mut reader, mut last) = (BufReader::new(stream), Instant::now());
    let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut arrived = 0;
    for number in 1_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        let answered = match load {
            Load::Count(_) | Load::CountIrregularly(_) => count(stream, &mut reader, number),
            Load::CountEvery(_) => expect(&mut reader, &format!("{number}\n")),
            Load::Exchange => read_line(&mut reader, number, &mut arrived, sent),
        };
        if let Err(error) = answered {
            report.error = Some(ClientError::of(number, &error));
            break;
        }
        let now = Instant::now();
        report.answers = number;
        report.longest_gap = report.longest_gap.max(now - last);
        if load != Load::Exchange {
            let latency_us = u64::try_from((now - asked).as_micros());
            report.latencies_us.push(latency_us.unwrap_or(u64::MAX));
        }
        last = now;
        answers.store(number, Ordering::Relaxed);
        match load {
            Load::Count(pause) => std::thread::sleep(pause),
            Load::CountIrregularly(pause) => std::thread::sleep(pause.mul_f64(random.random_range(0.5..1.5))),
            Load::CountEvery(_) | Load::Exchange => {}
        }
    }
}

/// Sends 1, 2, 3 and so on, whatever comes back. Its reader reports a connection that ends.
fn send_numbers(mut stream: &TcpStream, pause: Duration, is_read: &AtomicBool) {
    for number in 1_u64.. {
        if is_read.load(Ordering::Relaxed) || stream.write_all(format!("{number}\n").as_bytes()).is_err() {
            return;
        }
        std::thread::sleep(pause);
    }
}

/// The client's side of [`Load::Exchange`].
fn send_lines(mut stream: &TcpStream, sent: &AtomicU64, is_read: &AtomicBool) {
    let mut is_sent = stream.write_all(b"exchange\n").is_ok();
    for number in 1_u64.. {
        if !is_sent || is_read.load(Ordering::Relaxed) {
            return;
        }
        sent.store(number, Ordering::SeqCst);
        is_sent = stream.write_all(format!("{number:<63}\n").as_bytes()).is_ok();
    }
}

/// A line of the guest: its number, and how many of the client's lines have arrived.
fn read_line(
    reader: &mut impl BufRead,
    number: u64,
    arrived: &mut u64,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    let line = next_line(reader)?;
    let words: Vec<Option<u64>> = line.split_whitespace().map(|word| word.parse().ok()).collect();
    match words[..] {
        [Some(found), Some(now)]
            if found == number && now >= *arrived && now <= sent.load(Ordering::SeqCst) =>
        {
            *arrived = now;
            Ok(())
        }
        _ => Err(wrong(&format!("{} after {arrived} had arrived", line.trim()))),
    }
}

fn wrong(answer: &str) -> std::io::Error {
    std::io::Error::new(ErrorKind::InvalidData, format!("{answer:?}"))
}

fn count(mut stream: &TcpStream, reader: &mut impl BufRead, number: u64) -> std::io::Result<()> {
    stream.write_all(format!("{number}\n").as_bytes())?;
    expect(reader, &format!("{number}\n"))
}

fn expect(reader: &mut impl BufRead, expected: &str) -> std::io::Result<()> {
    let line = next_line(reader)?;
    match line == expected {
        true => Ok(()),
        false => Err(wrong(&line)),
    }
}

fn next_line(reader: &mut impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    // Cut off by the connection's end.
    match line.ends_with('\n') {
        true => Ok(line),
        false => Err(ErrorKind::UnexpectedEof.into()),
    }
}
