use super::*;
use crate::commands::guard::gate::GateError;
use crate::net::Address;
use crate::tls::TlsArgs;
use colo_ring::link::{Hello, LINK_VERSION, Wanted};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::AtomicBool;

const LONG: Duration = Duration::from_secs(60);

/// A gate whose descriptor is always ready, as that of a device that was deleted is.
struct Broken {
    ready: EventFd,
    recovers: Arc<AtomicBool>,
    opened: Arc<AtomicU64>,
    waiting: u64,
}

impl Broken {
    fn fail(&self) -> Result<(), GateError> {
        match self.recovers.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(GateError::Io {
                nic: "net0".to_owned(),
                source: io::Error::other("it is gone"),
            }),
        }
    }
}

impl OutputGate for Broken {
    fn nic(&self) -> &'static str {
        "net0"
    }

    fn kind(&self) -> &'static str {
        "relay"
    }

    fn wait_for<'a>(&'a self, fds: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        fds.push((self.ready.as_fd(), PollFlags::POLLIN));
    }

    fn go_on(&mut self) -> Result<(), GateError> {
        self.fail()?;
        // It waits as a whole one does.
        let _ = self.ready.read();
        Ok(())
    }

    fn place(&mut self, _checkpoint: CheckpointId) -> Result<(), GateError> {
        Ok(())
    }

    fn committed(&mut self, _checkpoint: CheckpointId) -> Result<(), GateError> {
        Ok(())
    }

    fn forget_barriers(&mut self) {}

    fn open(&mut self) -> Result<(), GateError> {
        self.fail()?;
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn recover(&mut self) -> Result<(), GateError> {
        self.fail()
    }

    fn waiting(&self) -> u64 {
        self.waiting
    }

    fn counts(&self) -> Counts {
        Counts::default()
    }

    fn take_hold_times_us(&mut self, _into: &mut Vec<u64>) {}
}

/// A link, and its receiver's end, which is silent after its welcome.
fn link() -> (Link, UnixStream) {
    let directory = tempfile::tempdir().unwrap();
    let address = directory.path().join("receiver");
    let listener = UnixListener::bind(&address).unwrap();
    let receiver = std::thread::spawn(move || {
        let mut link = listener.accept().unwrap().0;
        let mut hello = String::new();
        BufReader::new(&link).read_line(&mut hello).unwrap();
        let version = LINK_VERSION;
        let welcome = serde_json::to_string(&ToGuard::Welcome { version }).unwrap();
        writeln!(link, "{welcome}").unwrap();
        link
    });
    let hello = Hello {
        version: LINK_VERSION,
        name: "web3".to_owned(),
        uuid: None,
        timeout_ms: 1000,
        wants: Wanted::Next,
    };
    let link = Link::connect(&Address::Unix(address), &TlsArgs::default(), hello, LONG).unwrap();
    (link, receiver.join().unwrap())
}

/// How long it takes until a checkpoint is asked for, where output waits before it is to be followed.
fn followed_after() -> Duration {
    let gate = Broken {
        ready: EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap(),
        recovers: Arc::new(AtomicBool::new(true)),
        opened: Arc::default(),
        waiting: 1,
    };
    let (events, told) = mpsc::channel();
    let (events, gates) = (Mutex::new(events), vec![Box::new(gate) as Box<dyn OutputGate>]);
    let report = move |event| events.lock().unwrap().send(event).unwrap();
    let path = OutputPath::start(gates, Heartbeat::of_nobody(), LONG, report).unwrap();
    let (link, _receiver) = link();
    path.set_link(link);
    // It waits for something to happen by then.
    std::thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    path.follow_output();
    assert!(matches!(
        told.recv_timeout(LONG).unwrap(),
        PathEvent::OutputBegins
    ));
    began.elapsed()
}

#[test]
fn output_that_waits_already_is_followed_at_once() {
    let soonest = (0..5).map(|_| followed_after()).min().unwrap();
    let of_next_look = Duration::from_millis(BEAT.into());
    assert!(soonest < of_next_look / 2, "{soonest:?}");
}

#[test]
fn a_gate_that_has_failed_says_so_once_until_it_recovers() {
    let (recovers, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let broken = Broken {
        ready: EventFd::from_value_and_flags(1, EfdFlags::EFD_NONBLOCK).unwrap(),
        recovers: recovers.clone(),
        opened: opened.clone(),
        waiting: 0,
    };
    let heartbeat = Heartbeat::of_nobody();
    let (events, told) = mpsc::channel();
    let (events, gates) = (Mutex::new(events), vec![Box::new(broken) as Box<dyn OutputGate>]);
    let report = move |event| events.lock().unwrap().send(event).unwrap();
    let path = OutputPath::start(gates, heartbeat, LONG, report).unwrap();
    let failed = |event| matches!(event, PathEvent::GateFailed(_));
    assert!(failed(told.recv_timeout(LONG).unwrap()));
    // The protection ends, and what is tried afterwards fails as well.
    assert!(!path.open().recv_timeout(LONG).unwrap(), "it holds still");
    assert!(told.recv_timeout(2 * LOOK_EVERY).is_err());
    assert_eq!(opened.load(Ordering::SeqCst), 0);
    recovers.store(true, Ordering::SeqCst);
    let began = Instant::now();
    while opened.load(Ordering::SeqCst) == 0 && began.elapsed() < LONG {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(opened.load(Ordering::SeqCst), 1, "it is opened late");
    recovers.store(false, Ordering::SeqCst);
    // It is in use again: what fails first of it is said.
    assert!(!path.open().recv_timeout(LONG).unwrap(), "it holds still");
    assert!(failed(told.recv_timeout(LONG).unwrap()));
}
