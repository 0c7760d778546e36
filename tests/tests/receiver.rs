//! The whole receiver, in process, against the synthetic primary: every backend, sync mode and shape of primary.

use colo_ring::receiver::{Dumped, Event, ListenAddress, Outcome, Receiver, ReceiverOptions, SessionState};
use colo_ring::ring::BackendKind;
use colo_ring_tests::command::until;
use colo_ring_tests::receiver::dump;
use colo_ring_tests::{HANG_LIMIT, receiver_options as options};
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const BACKENDS: [BackendKind; 3] = [BackendKind::Uring, BackendKind::Epoll, BackendKind::Threads];

/// A receiver with what it said.
struct Bench {
    receiver: Receiver,
    said: Arc<Mutex<Vec<String>>>,
    directory: TempDir,
}

impl Bench {
    fn start(options: ReceiverOptions) -> Self {
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let ears = said.clone();
        let directory = tempfile::tempdir().unwrap();
        let receiver = Receiver::start(options, move |event| {
            ears.lock().unwrap().push(match event {
                Event::Warning(remark) | Event::Note(remark) => remark.text,
                Event::Stall(stall) => format!("session {} is stalled", stall.status.session),
                Event::Replaced { old, new } => format!("session {old} is replaced by {new}"),
                Event::Protected { session, .. } => format!("session {session} is protected"),
                Event::GivenUp { session, .. } => format!("session {session} is given up"),
                Event::Began { session, .. } => format!("session {session} began"),
                Event::Ending => "the receiver ends".to_owned(),
                Event::Ended(status) => format!("session {} ended: {}", status.session, status.end.unwrap()),
            });
        });
        Self {
            receiver: receiver.unwrap(),
            said,
            directory,
        }
    }

    fn address(&self) -> Address {
        self.receiver.addresses()[0].to_string().parse().unwrap()
    }

    fn dump(&self, session: u32) -> Dumped {
        dump(&self.receiver, session, self.directory.path()).unwrap()
    }

    /// The committed checkpoint is what the primary has.
    fn compare(&self, session: u32, primary: &SynthPrimary) {
        let dumped = self.dump(session);
        assert_eq!(dumped.blocks.len(), primary.blocks().len());
        for block in &dumped.blocks {
            let file = std::fs::read(self.directory.path().join(&block.file)).unwrap();
            let image = primary.image(&block.name).unwrap();
            let pages = file.chunks(4096).zip(image.chunks(4096));
            let differing = pages.filter(|(a, b)| a != b).count();
            assert_eq!((file.len(), differing), (image.len(), 0), "block {}", block.name);
        }
        let device_state = std::fs::read(self.directory.path().join(&dumped.device_state_file)).unwrap();
        assert_eq!(device_state, primary.device_state());
    }

    fn end(self) -> (Outcome, Vec<String>) {
        self.receiver.stop_handle().stop();
        let outcome = self.receiver.wait().unwrap();
        let said = self.said.lock().unwrap().clone();
        (outcome, said)
    }
}

fn primary(version: Version, channels: u8, seed: u64) -> SynthOptions {
    SynthOptions {
        ram_bytes: 10 << 20,
        channels,
        dirty_pages: Distribution::Fixed(700),
        seed,
        ..SynthOptions::new(version)
    }
}

/// A whole session with checkpoints, compared after precopy and after each.
fn protect(options: ReceiverOptions, shape: SynthOptions) {
    let bench = Bench::start(options);
    let mut primary = SynthPrimary::connect(&bench.address(), &shape).unwrap();
    bench.compare(1, &primary);
    for _ in 0..6 {
        primary.checkpoint().unwrap();
        bench.compare(1, &primary);
    }
    primary.close().unwrap();
    let (outcome, said) = bench.end();
    let session = &outcome.sessions[0];
    assert_eq!(
        (session.checkpoint, session.state),
        (Some(6), SessionState::Ended),
        "{said:?}"
    );
    assert_eq!(outcome.report.total.checkpoints, 6);
}

/// Connections that say "main channel" and no more are sessions in plain mode: they are not taken without end.
#[test]
fn sessions_are_limited() {
    use std::io::{Read, Write};
    let bench = Bench::start(options(BackendKind::Epoll, 0));
    let ListenAddress::Tcp(address) = bench.receiver.addresses()[0] else {
        panic!("a TCP address was asked for");
    };
    let connect = || {
        let mut connection = std::net::TcpStream::connect(address).unwrap();
        connection.write_all(b"QEVM").unwrap();
        connection
    };
    let idle: Vec<_> = (0..256).map(|_| connect()).collect();
    let began = || {
        bench
            .said
            .lock()
            .unwrap()
            .iter()
            .filter(|text| text.ends_with("began"))
            .count()
    };
    until("sessions that begin", || (began() == idle.len()).then_some(()));
    let mut last = connect();
    last.set_read_timeout(Some(HANG_LIMIT)).unwrap();
    assert_eq!(
        last.read_to_end(&mut Vec::new()).unwrap(),
        0,
        "the 257th is closed"
    );
    drop(idle);
    let (_, said) = bench.end();
    assert!(
        said.iter()
            .any(|text| text.contains("256 sessions are running or kept"))
    );
}

#[test]
fn every_backend_and_shape_of_primary() {
    for backend in BACKENDS {
        for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
            for channels in [0, 1, 4] {
                let name = format!("{}-{version:?}-{channels}", backend.name());
                println!("{name}");
                protect(
                    options(backend, channels),
                    primary(version, channels, u64::from(channels)),
                );
            }
        }
    }
}

#[test]
fn many_channels() {
    for backend in BACKENDS {
        protect(options(backend, 255), primary(Version::V11_1, 255, 9));
    }
}

#[test]
fn without_registered_buffers() {
    let options = ReceiverOptions {
        registered: false,
        ..options(BackendKind::Uring, 4)
    };
    protect(options, primary(Version::V11_1, 4, 3));
}

#[test]
fn over_a_unix_socket_and_ipv6() {
    for backend in BACKENDS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("listen");
        let listen = vec![ListenAddress::Unix(path.clone())];
        protect(
            ReceiverOptions {
                listen,
                ..options(backend, 2)
            },
            primary(Version::V11_1, 2, 4),
        );
        assert!(!path.exists(), "it was removed");
        let listen = vec!["tcp:[::1]:0".parse().unwrap()];
        protect(
            ReceiverOptions {
                listen,
                ..options(backend, 2)
            },
            primary(Version::V11_1, 2, 5),
        );
    }
}

#[test]
fn several_guests_and_a_broken_one() {
    for backend in BACKENDS {
        let bench = Bench::start(options(backend, 2));
        let mut first = SynthPrimary::connect(&bench.address(), &primary(Version::V11_1, 2, 1)).unwrap();
        let mut second = SynthPrimary::connect(&bench.address(), &primary(Version::V10_0, 2, 2)).unwrap();
        let mut third = SynthPrimary::connect(&bench.address(), &primary(Version::V7_2, 2, 3)).unwrap();
        for _ in 0..3 {
            first.checkpoint().unwrap();
            second.checkpoint().unwrap();
            third.checkpoint().unwrap();
        }
        second.close().unwrap();
        first.checkpoint().unwrap();
        third.checkpoint().unwrap();
        bench.compare(1, &first);
        bench.compare(3, &third);
        let (outcome, _) = bench.end();
        let checkpoints: Vec<_> = outcome
            .sessions
            .iter()
            .map(|session| session.checkpoint)
            .collect();
        assert_eq!(checkpoints, [Some(4), Some(3), Some(4)]);
    }
}

#[test]
fn strangers_and_mismatches_get_a_message_and_cost_nothing() {
    use std::io::{Read, Write};
    let bench = Bench::start(options(BackendKind::Uring, 2));
    let ListenAddress::Tcp(port) = bench.receiver.addresses()[0] else {
        panic!("a TCP address")
    };
    let mut browser = std::net::TcpStream::connect(port).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let closed = browser.read(&mut [0; 16]);
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    let wrong = primary(Version::V11_1, 3, 1);
    // It may notice only when it sends pages that a channel of its own was closed.
    let is_refused = match SynthPrimary::connect(&bench.address(), &wrong) {
        Err(_) => true,
        Ok(mut primary) => (0..10).any(|_| primary.checkpoint().is_err()),
    };
    assert!(is_refused);
    let large = SynthOptions {
        ram_bytes: 8 << 30,
        ..primary(Version::V11_1, 2, 1)
    };
    assert!(SynthPrimary::connect(&bench.address(), &large).is_err());
    let mut good = SynthPrimary::connect(&bench.address(), &primary(Version::V11_1, 2, 1)).unwrap();
    good.checkpoint().unwrap();
    good.close().unwrap();
    let (_, said) = bench.end();
    let all = said.join("\n");
    for part in [
        "but HTTP",
        "channel 2 connected, but only channels 0 to 1",
        "MiB more exceed --ram-limit",
    ] {
        assert!(all.contains(part), "{part:?} is missing in:\n{all}");
    }
}

#[test]
fn once_ends_with_the_first_session() {
    let options = ReceiverOptions {
        once: true,
        ..options(BackendKind::Uring, 1)
    };
    let bench = Bench::start(options);
    let mut primary = SynthPrimary::connect(&bench.address(), &primary(Version::V11_1, 1, 1)).unwrap();
    primary.checkpoint().unwrap();
    primary.close().unwrap();
    let outcome = bench.receiver.wait().unwrap();
    assert_eq!(outcome.sessions.len(), 1);
    assert_eq!(outcome.sessions[0].checkpoint, Some(1));
}
