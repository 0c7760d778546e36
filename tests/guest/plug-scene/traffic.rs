//! What the guest sends, as the host sees it.

use crate::{Done, HOST, LIMIT, text, wait};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const GUEST: &str = "169.254.78.2:7777";
const PORT: u16 = 7778;

/// What has come of the guest's datagrams.
#[derive(Default)]
pub struct Observed {
    count: AtomicU64,
    last: AtomicU64,
    /// Numbers that were left out.
    missing: AtomicU64,
    wrong: Mutex<Option<String>>,
}

impl Observed {
    pub fn start() -> Done<Arc<Self>> {
        let socket = UdpSocket::bind((HOST, PORT)).map_err(text("a UDP socket"))?;
        let observed = Arc::new(Self::default());
        let shared = observed.clone();
        std::thread::spawn(move || {
            let mut datagram = [0; 2048];
            loop {
                match socket.recv(&mut datagram) {
                    Ok(length) => {
                        if let Some(number) = datagram[..length].first_chunk() {
                            shared.note(u64::from_be_bytes(*number));
                        }
                    }
                    Err(error) => println!("the datagrams' socket: {error}"),
                }
            }
        });
        Ok(observed)
    }

    fn note(&self, number: u64) {
        let last = self.last.swap(number, SeqCst);
        if number <= last {
            let wrong = format!("datagram {number} came after {last}");
            self.wrong.lock().expect("no panic").get_or_insert(wrong);
        } else {
            self.missing.fetch_add(number - last - 1, SeqCst);
        }
        self.count.fetch_add(1, SeqCst);
    }

    pub fn count(&self) -> u64 {
        self.count.load(SeqCst)
    }

    pub fn check(&self) -> Done<()> {
        self.wrong.lock().expect("no panic").clone().map_or(Ok(()), Err)
    }

    pub fn summary(&self) -> String {
        format!(
            "{} datagrams, {} never came",
            self.count(),
            self.missing.load(SeqCst)
        )
    }

    pub fn check_none_missing(&self) -> Done<()> {
        self.check()?;
        match self.missing.load(SeqCst) {
            0 => Ok(()),
            missing => Err(format!("{missing} datagrams are missing")),
        }
    }

    pub fn wait(&self, count: u64) -> Done<()> {
        let done = wait(&format!("{count} datagrams"), || {
            Ok((self.count() >= count).then_some(()))
        });
        done.map_err(|error| {
            format!(
                "{error}; {} came, the last was {}",
                self.count(),
                self.last.load(SeqCst)
            )
        })
    }
}

/// Asks for the next number over one connection, again and again.
pub struct Client {
    answers: Arc<AtomicU64>,
    longest_gap_ms: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    error: Arc<Mutex<Option<String>>>,
}

impl Client {
    pub fn start() -> Done<Self> {
        let stream = connect()?;
        let client = Self {
            answers: Arc::default(),
            longest_gap_ms: Arc::default(),
            is_over: Arc::default(),
            error: Arc::default(),
        };
        let (answers, gap) = (client.answers.clone(), client.longest_gap_ms.clone());
        let (is_over, error) = (client.is_over.clone(), client.error.clone());
        std::thread::spawn(move || {
            let (mut reader, mut last) = (BufReader::new(&stream), Instant::now());
            for number in 1_u64.. {
                if is_over.load(SeqCst) {
                    return;
                }
                if let Err(said) = ask(
                    &stream,
                    &mut reader,
                    &format!("{number}\n"),
                    &format!("{number}\n"),
                ) {
                    error
                        .lock()
                        .expect("no panic")
                        .get_or_insert(format!("request {number}: {said}"));
                    return;
                }
                answers.store(number, SeqCst);
                gap.fetch_max(
                    u64::try_from(last.elapsed().as_millis()).unwrap_or(u64::MAX),
                    SeqCst,
                );
                last = Instant::now();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Ok(client)
    }

    pub fn answers(&self) -> u64 {
        self.answers.load(SeqCst)
    }

    pub fn summary(&self) -> String {
        let gap_ms = self.longest_gap_ms.load(SeqCst);
        format!("{} answers, longest gap {gap_ms} ms", self.answers())
    }

    pub fn wait_answers(&self, more: u64) -> Done<()> {
        let goal = self.answers() + more;
        wait(&format!("{goal} answers"), || {
            if let Some(error) = self.error.lock().expect("no panic").clone() {
                return Err(error);
            }
            Ok((self.answers() >= goal).then_some(()))
        })
    }
}

pub fn connect() -> Done<TcpStream> {
    let stream = wait("guest's service", || Ok(TcpStream::connect(GUEST).ok()))?;
    let set = stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(LIMIT)));
    set.map(|()| stream).map_err(text("a connection"))
}

fn ask(mut stream: &TcpStream, reader: &mut impl BufRead, request: &str, expected: &str) -> Done<()> {
    stream.write_all(request.as_bytes()).map_err(text("write"))?;
    let mut line = String::new();
    reader.read_line(&mut line).map_err(text("read"))?;
    match line == expected {
        true => Ok(()),
        false => Err(format!("answered by {line:?}")),
    }
}

pub fn burst(mut stream: &TcpStream, count: u64, bytes: u64, pause_us: u64) -> Done<()> {
    let request = format!("burst {PORT} {count} {bytes} {pause_us}\n");
    stream.write_all(request.as_bytes()).map_err(text("write"))
}
