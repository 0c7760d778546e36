//! Bytes, ends and resets, between a client and a server that know nothing of COLO.

use crate::harness::{By, Running, capture, capture_on, read};
use colo_ring_tests::command::{Scratch, until};
use colo_ring_tools::capture_file::EndKind;
use colo_ring_tools::net::Address;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

const CONNECTIONS: u8 = 5;
const LENGTH: usize = 1 << 20;
const TRAILER: &[u8] = b"said after the other side had closed";

/// A connected socket of either kind.
enum Link {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Link {
    fn connect(address: &Address) -> Self {
        match address {
            Address::Tcp(host_port) => Self::Tcp(TcpStream::connect(host_port).unwrap()),
            Address::Unix(path) => Self::Unix(UnixStream::connect(path).unwrap()),
        }
    }

    fn try_clone(&self) -> Self {
        match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone().unwrap()),
            Self::Unix(stream) => Self::Unix(stream.try_clone().unwrap()),
        }
    }

    fn close_write(&self) {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write).unwrap(),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write).unwrap(),
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).unwrap(),
            Self::Unix(stream) => stream.write_all(bytes).unwrap(),
        }
    }

    fn read_all(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Tcp(stream) => stream.read_to_end(&mut bytes).unwrap(),
            Self::Unix(stream) => stream.read_to_end(&mut bytes).unwrap(),
        };
        bytes
    }

    fn read_byte(&mut self) -> u8 {
        let mut byte = [0];
        match self {
            Self::Tcp(stream) => stream.read_exact(&mut byte).unwrap(),
            Self::Unix(stream) => stream.read_exact(&mut byte).unwrap(),
        }
        byte[0]
    }
}

enum Server {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Server {
    fn bind(scratch: &Scratch, unix: bool) -> (Self, Address) {
        if unix {
            let path = scratch.file("secondary");
            return (
                Self::Unix(UnixListener::bind(&path).unwrap()),
                Address::Unix(path.into()),
            );
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap().to_string());
        (Self::Tcp(listener), address)
    }

    fn accept(&self) -> Link {
        match self {
            Self::Tcp(listener) => Link::Tcp(listener.accept().unwrap().0),
            Self::Unix(listener) => Link::Unix(listener.accept().unwrap().0),
        }
    }
}

/// Bytes that no other seed gives, with pauses in them: (bytes, length of each write).
fn noise(seed: u64) -> (Vec<u8>, Vec<usize>) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut bytes = vec![0; LENGTH];
    random.fill(&mut bytes[..]);
    let mut cuts = Vec::new();
    let mut left = bytes.len();
    while left > 0 {
        let most = if random.random() { 9 } else { 300_000 };
        let length = random.random_range(1..=most);
        cuts.push(length.min(left));
        left -= length.min(left);
    }
    (bytes, cuts)
}

fn send(link: &mut Link, (bytes, cuts): &(Vec<u8>, Vec<usize>)) {
    let mut rest = &bytes[..];
    for cut in cuts {
        let (now, later) = rest.split_at(*cut);
        link.write(now);
        rest = later;
        if cut % 8 == 0 {
            thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What the client with this number sends first: the first connection is a primary's, so that there is a session.
fn greeting(number: u8) -> Vec<u8> {
    match number {
        0 => b"QEVM\0".to_vec(),
        number => vec![number],
    }
}

fn client(address: &Address, number: u8) -> Vec<u8> {
    let mut link = Link::connect(address);
    let mut reading = link.try_clone();
    let reader = thread::spawn(move || reading.read_all());
    link.write(&greeting(number));
    send(&mut link, &noise(u64::from(number)));
    link.close_write();
    reader.join().unwrap()
}

/// Serves one connection. Returns its number and what came after the greeting.
fn serve(mut link: Link) -> (u8, Vec<u8>) {
    let first = link.read_byte();
    let number = if first == b'Q' {
        (0..4).map(|_| link.read_byte()).last().unwrap()
    } else {
        first
    };
    let mut writing = link.try_clone();
    let writer = thread::spawn(move || send(&mut writing, &noise(100 + u64::from(number))));
    let bytes = link.read_all();
    writer.join().unwrap();
    link.write(TRAILER);
    (number, bytes)
}

/// Both ways at once on several connections, in pieces of any size; the client closes its half first, and the server goes
/// on talking.
#[test]
fn what_goes_in_comes_out_and_stands_in_the_file() {
    for (name, listen_unix, to_unix, by) in [
        ("tcp", false, false, By::Itself),
        ("unix", true, true, By::Itself),
        ("mixed", false, true, By::Itself),
        ("tcp-ready", false, false, By::WithoutUring),
        ("unix-ready", true, true, By::WithoutUring),
    ] {
        let scratch = Scratch::new();
        let (server, to) = Server::bind(&scratch, to_unix);
        let listen = match listen_unix {
            true => format!("unix:{}", scratch.file("listen")),
            false => "tcp:127.0.0.1:0".to_owned(),
        };
        let mut proxy = capture_on(&listen, &scratch, &to, by, &[]);
        let serving: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                // One after the other, so that the session does not end before the last one has come.
                let address = proxy.address.clone();
                let client = thread::spawn(move || client(&address, number));
                let link = server.accept();
                (client, thread::spawn(move || serve(link)))
            })
            .collect();
        let contents_of = |number: u8| (noise(u64::from(number)).0, noise(100 + u64::from(number)).0);
        for (number, (client, server)) in (0..).zip(serving) {
            let (sent, answered) = contents_of(number);
            let (seen_number, seen) = server.join().unwrap();
            assert_eq!(seen_number, number);
            assert!(
                seen == sent,
                "{name}: {number} differs on its way to the secondary"
            );
            let answers = client.join().unwrap();
            assert!(
                answers == [&answered[..], TRAILER].concat(),
                "{name}: {number} differs on its way back"
            );
        }
        let ended = proxy.wait();
        assert_eq!(ended.code, Some(0), "{name}: {}", ended.log);
        assert_eq!(
            ended.report()["uring"],
            !matches!(by, By::WithoutUring),
            "{}",
            ended.log
        );
        assert_eq!(
            ended.log.contains("without io_uring"),
            matches!(by, By::WithoutUring)
        );

        let contents = read(&scratch);
        assert_eq!(
            (contents.tear, contents.flows.len()),
            (None, usize::from(CONNECTIONS))
        );
        for number in 0..CONNECTIONS {
            let (sent, answered) = contents_of(number);
            let [there, back] = contents.beginning(&greeting(number));
            assert!(
                there.bytes == [greeting(number), sent].concat(),
                "{name}: {number} in the file"
            );
            assert!(
                back.bytes == [&answered[..], TRAILER].concat(),
                "{name}: {number} in the file"
            );
            assert_eq!([there.end, back.end], [Some(EndKind::Eof); 2]);
        }
    }
}

fn pair_over_tcp(scratch: &Scratch, by: By<'_>) -> (Running, TcpStream, TcpStream) {
    let (server, to) = Server::bind(scratch, false);
    let proxy = capture(scratch, &to, by, &[]);
    let Link::Tcp(mut client) = Link::connect(&proxy.address) else {
        panic!("it listens on TCP")
    };
    let Link::Tcp(mut server) = server.accept() else {
        panic!("it listens on TCP")
    };
    client.write_all(b"QEVM").unwrap();
    let mut seen = [0; 4];
    server.read_exact(&mut seen).unwrap();
    (proxy, client, server)
}

fn reset(stream: TcpStream) {
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &at_once).unwrap();
    drop(stream);
}

/// A reset of one side is a reset for the other, not an end.
#[test]
fn a_reset_is_passed_on() {
    for by in [By::Itself, By::WithoutUring] {
        for client_resets in [true, false] {
            let scratch = Scratch::new();
            let (mut proxy, client, server) = pair_over_tcp(&scratch, by);
            let (gone, mut stays) = if client_resets {
                (client, server)
            } else {
                (server, client)
            };
            reset(gone);
            let error = stays.read(&mut [0]).expect_err("a reset");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            let ended = proxy.wait();
            assert_eq!(ended.code, Some(0), "{}", ended.log);
            let contents = read(&scratch);
            let flows = contents.beginning(b"QEVM");
            assert_eq!(flows.each_ref().map(|flow| flow.end), [Some(EndKind::Reset); 2]);
            assert_eq!(contents.tear, None);
        }
    }
}

/// As without the recorder: a side that sends to one that has closed both ways is reset.
#[test]
fn sending_to_one_that_has_gone_ends_in_a_reset() {
    let scratch = Scratch::new();
    let (mut proxy, mut client, server) = pair_over_tcp(&scratch, By::Itself);
    drop(server);
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the end is passed on first");
    let kind = until("a write that fails", || client.write_all(&[7; 1000]).err()).kind();
    assert!(
        matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{kind}"
    );
    assert_eq!(proxy.wait().code, Some(0));
    let contents = read(&scratch);
    let [there, back] = contents.beginning(b"QEVM");
    assert_eq!([there.end, back.end], [Some(EndKind::Reset), Some(EndKind::Eof)]);
}

/// One that does not read holds up the other, and nothing is piled up here: at most what sockets and one read hold.
#[test]
fn one_that_does_not_read_holds_up_the_other() {
    let scratch = Scratch::new();
    let (mut proxy, mut client, server) = pair_over_tcp(&scratch, By::Itself);
    client
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut accepted = 0;
    let full = loop {
        match client.write(&[1; 1 << 16]) {
            Ok(count) => accepted += count,
            Err(error) => break error,
        }
        assert!(accepted < 1 << 30, "it takes everything");
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    // Both go away while a write to the secondary waits.
    reset(client);
    drop(server);
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    let contents = read(&scratch);
    assert_eq!(contents.tear, None);
    let held = contents.beginning(b"QEVM")[0].bytes.len();
    assert!(held <= accepted + 4 && held > 0, "{held} of {accepted}");
}
