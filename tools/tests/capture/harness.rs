//! The command under test, and what is around it.

use colo_ring_tests::command::{Scratch, until, without_io_uring};
use colo_ring_tests::schema;
use colo_ring_tools::capture_file::{CaptureReader, ConnectionId, Direction, EndKind, Event, Tear};
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{Distribution, SynthOptions, Version};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// A running subcommand that listens; killed when dropped.
pub struct Running {
    process: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    pub address: Address,
}

/// How a subcommand has ended.
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub log: String,
}

impl Ended {
    pub fn report(&self) -> Value {
        schema::parse(self.out.as_bytes())
            .unwrap_or_else(|wrong| panic!("{wrong}: {:?}, {}", self.out, self.log))
    }
}

/// What a command line is run by.
#[derive(Clone, Copy)]
pub enum By<'a> {
    /// As it is.
    Itself,
    /// A shell that sets a limit first.
    Limited(&'a str),
    /// A thread that may not use io_uring.
    WithoutUring,
}

fn command(by: By<'_>) -> Command {
    let program = env!("CARGO_BIN_EXE_colo-ring");
    match by {
        By::Itself | By::WithoutUring => Command::new(program),
        By::Limited(limit) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("{limit} && exec \"$0\" \"$@\""), program]);
            shell
        }
    }
}

pub fn run(args: &[&str]) -> Ended {
    let output = command(By::Itself).args(args).output().unwrap();
    Ended {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Running {
    /// Starts it and waits until it says that it listens.
    pub fn start(by: By<'_>, args: &[&str]) -> Self {
        let mut command = command(by);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = match by {
            By::WithoutUring => without_io_uring(libc::EPERM, || command.spawn()),
            By::Itself | By::Limited(_) => command.spawn(),
        }
        .unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let (mut log, mut line) = (String::new(), String::new());
        while !line.starts_with("listening on ") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended: {log}");
            log.push_str(&line);
        }
        let address = line.trim_start_matches("listening on ").trim().parse().unwrap();
        let log = Arc::new(Mutex::new(log));
        let of_reader = log.clone();
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).unwrap_or(0) > 0 {
                of_reader.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        Self {
            process,
            log,
            reader: Some(reader),
            address,
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
    }

    /// Waits until it has said something.
    pub fn wait_for(&self, text: &str) {
        until(text, || self.log.lock().unwrap().contains(text).then_some(()));
    }

    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Ended {
        let mut out = String::new();
        let code = until("its end", || self.process.try_wait().unwrap()).code();
        self.process
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        self.reader.take().unwrap().join().unwrap();
        let log = self.log.lock().unwrap().clone();
        Ended { code, out, log }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `colo-ring capture` in front of `to`, on a free TCP port, with its file in `scratch`.
pub fn capture(scratch: &Scratch, to: &Address, by: By<'_>, more: &[&str]) -> Running {
    capture_on("tcp:127.0.0.1:0", scratch, to, by, more)
}

/// The same on an address of choice.
pub fn capture_on(listen: &str, scratch: &Scratch, to: &Address, by: By<'_>, more: &[&str]) -> Running {
    let (to, out) = (to.to_string(), scratch.file("cap"));
    let args = [
        "capture", "--listen", listen, "--to", &to, "--out", &out, "--json",
    ];
    Running::start(by, &[&args, more].concat())
}

/// `colo-ring receive` for one session of [`guest`].
pub fn receiver(scratch: &Scratch) -> Running {
    let control = format!("unix:{}", scratch.file("control"));
    Running::start(
        By::Itself,
        &[
            "receive",
            "--listen",
            "tcp:127.0.0.1:0",
            "--channels",
            "2",
            "--hugepages",
            "off",
            "--control",
            &control,
            "--once",
            "--json",
        ],
    )
}

pub fn guest() -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        channels: 2,
        dirty_pages: Distribution::Fixed(50),
        interval: Duration::from_millis(5),
        ..SynthOptions::new(Version::V11_1)
    }
}

/// One direction of a connection, as a file has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Flow {
    pub bytes: Vec<u8>,
    pub end: Option<EndKind>,
}

/// A file's connections, each with its direction to the secondary first; its notes; and whether it ends early.
#[derive(Debug)]
pub struct Contents {
    pub flows: BTreeMap<ConnectionId, [Flow; 2]>,
    pub notes: Vec<String>,
    pub tear: Option<Tear>,
}

impl Contents {
    /// The bytes of both directions of the connection whose primary's bytes begin so.
    pub fn beginning(&self, first: &[u8]) -> &[Flow; 2] {
        let found = self
            .flows
            .values()
            .find(|flows| flows[0].bytes.starts_with(first));
        found.unwrap_or_else(|| panic!("no connection begins with {first:?}"))
    }
}

pub fn read(scratch: &Scratch) -> Contents {
    let mut reader = CaptureReader::open(Path::new(&scratch.file("cap"))).unwrap();
    assert_eq!(reader.info().captured, "proxy");
    let mut contents = Contents {
        flows: BTreeMap::new(),
        notes: Vec::new(),
        tear: None,
    };
    let mut last = BTreeMap::<(ConnectionId, Direction), Duration>::new();
    while let Some(record) = reader.next().unwrap() {
        match record.event {
            Event::Open { connection, .. } => drop(contents.flows.insert(connection, <[Flow; 2]>::default())),
            Event::Data {
                connection,
                direction,
                bytes,
            } => {
                let flow = &mut contents.flows.get_mut(&connection).unwrap()[direction.index()];
                flow.bytes.extend_from_slice(bytes);
                let before = last.insert((connection, direction), record.at);
                assert!(before.is_none_or(|before| before <= record.at), "time goes back");
            }
            Event::End {
                connection,
                direction,
                how,
            } => contents.flows.get_mut(&connection).unwrap()[direction.index()].end = Some(how),
            Event::Note(text) => contents.notes.push(text.to_owned()),
            Event::Finish(_) => {}
        }
    }
    contents.tear = reader.is_torn();
    contents
}
