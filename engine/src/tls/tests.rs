//! A connection with TLS, without a socket's timing: what a client has sent comes in pieces of any size, and ends anywhere.

use super::credentials::Files;
use super::*;
use crate::ring::{Connection, Loss, Move, PlanCursor, ReceivePlan};
use proptest::prelude::*;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use tempfile::TempDir;

/// Certificates, made once.
struct Certificates {
    server: ServerCredentials,
    client: Arc<ClientConfig>,
    directory: TempDir,
}

fn certificates() -> &'static Certificates {
    static MADE: OnceLock<Certificates> = OnceLock::new();
    MADE.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/make-certs");
        let made = Command::new(script).arg(directory.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let at = |name: &str| -> PathBuf { directory.path().join(name) };
        Certificates {
            server: ServerCredentials::load(&at("receiver"), true, Allowed::default()).unwrap(),
            client: client_config(&at("primary")).unwrap(),
            directory,
        }
    })
}

/// What a connection inside has seen.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    lost: Option<String>,
    is_parked: bool,
}

/// A connection inside: it plans pieces of these lengths, in turn.
struct Inside {
    socket: TcpStream,
    lengths: Vec<usize>,
    next: usize,
    plan: Box<ReceivePlan>,
    memory: Box<[u8]>,
    seen: Arc<Mutex<Seen>>,
}

impl Connection for Inside {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    fn tenant(&self) -> u64 {
        1
    }
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        if self.seen.lock().unwrap().is_parked {
            return None;
        }
        self.plan.clear();
        let mut at = 0;
        for turn in 0..3 {
            let length = self.lengths[(self.next + turn) % self.lengths.len()];
            self.plan.push(self.memory[at..].as_mut_ptr(), length);
            // Not adjacent.
            at += length + 1;
        }
        Some(&mut self.plan)
    }
    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        let (mut at, mut left) = (0, bytes);
        let mut seen = self.seen.lock().unwrap();
        for turn in 0..3 {
            let length = self.lengths[(self.next + turn) % self.lengths.len()];
            let here = length.min(left);
            seen.bytes.extend_from_slice(&self.memory[at..at + here]);
            left -= here;
            at += length + 1;
        }
        assert_eq!(left, 0, "no more than was planned");
        self.next += 1;
        ControlFlow::Continue(())
    }
    fn lost(&mut self, loss: Loss) {
        let text = match loss {
            Loss::Eof => "end".to_owned(),
            Loss::Error(error) => error.to_string(),
        };
        self.seen.lock().unwrap().lost = Some(text);
    }
    fn resume(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn attached(&mut self, _core: usize) {}
    fn moves_to(&self) -> Option<Move> {
        None
    }
}

/// Both ends after their handshake.
struct Ends {
    client: ClientConnection,
    /// The client's socket.
    far: TcpStream,
    encrypted: Encrypted<Inside>,
    outgoing: Arc<Outgoing>,
    seen: Arc<Mutex<Seen>>,
}

impl Ends {
    fn new(lengths: &[usize]) -> Self {
        Self::with(certificates().client.clone(), lengths)
    }

    fn with(config: Arc<ClientConfig>, lengths: &[usize]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shaking = std::thread::spawn(move || {
            let name = ServerName::try_from("localhost").unwrap();
            let mut client = ClientConnection::new(config, name).unwrap();
            client.set_buffer_limit(None);
            let mut far = TcpStream::connect(address).unwrap();
            while client.is_handshaking() {
                client.complete_io(&mut far).unwrap();
            }
            (client, far)
        });
        let (near, _) = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (channel, socket) = runtime.block_on(async {
            let mut near = tokio::net::TcpStream::from_std(near).unwrap();
            let channel = accept(&mut near, &certificates().server).await.unwrap();
            (channel, near.into_std().unwrap())
        });
        assert_eq!(
            channel.about.identity.as_ref().unwrap().to_string(),
            "CN=primary,O=colo-ring laboratory"
        );
        let (client, far) = shaking.join().unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let inside = Inside {
            socket,
            lengths: lengths.to_vec(),
            next: 0,
            plan: ReceivePlan::new(),
            memory: vec![0; lengths.iter().sum::<usize>() * 3 + 8].into(),
            seen: seen.clone(),
        };
        let receiving = Receiving::new(channel).unwrap();
        let outgoing = receiving.outgoing().clone();
        Self {
            client,
            far,
            encrypted: Encrypted::new(inside, receiving),
            outgoing,
            seen,
        }
    }

    /// Records of these bytes, cut as the client likes.
    fn records(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.client.writer().write_all(bytes).unwrap();
        let mut records = Vec::new();
        while self.client.wants_write() {
            self.client.write_tls(&mut records).unwrap();
        }
        records
    }

    /// Lets bytes arrive in pieces of these lengths, as a backend does it. Returns what was not taken.
    fn arrive<'a>(&mut self, mut bytes: &'a [u8], pieces: &[usize]) -> &'a [u8] {
        let mut lengths = pieces.iter().cycle();
        while !bytes.is_empty() {
            while self.encrypted.has_more() {
                if self.encrypted.resume().is_break() {
                    return bytes;
                }
            }
            let Some(plan) = self.encrypted.plan() else {
                return bytes;
            };
            let count = plan.remaining().min(bytes.len()).min(*lengths.next().unwrap());
            let (now, later) = bytes.split_at(count);
            assert_eq!(plan.write(&mut PlanCursor::default(), now), count);
            bytes = later;
            if self.encrypted.received(count).is_break() {
                return bytes;
            }
        }
        while self.encrypted.has_more() && self.encrypted.resume().is_continue() {}
        bytes
    }

    fn seen(&self) -> Vec<u8> {
        self.seen.lock().unwrap().bytes.clone()
    }

    fn lost(&self) -> Option<String> {
        self.seen.lock().unwrap().lost.clone()
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 % 251).to_le_bytes()[0]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever the pieces are, and the places: the same bytes, in their order.
    #[test]
    fn bytes_come_out_in_order(
        writes in prop::collection::vec(0..40_000usize, 1..6),
        pieces in prop::collection::vec(1..70_000usize, 1..6),
        lengths in prop::collection::vec(1..9_000usize, 1..6),
    ) {
        let mut ends = Ends::new(&lengths);
        let mut sent = Vec::new();
        for (number, length) in writes.iter().enumerate() {
            let bytes = pattern(*length);
            let mut records = ends.records(&bytes);
            if number % 2 == 1 {
                ends.client.refresh_traffic_keys().unwrap();
                records.extend(ends.records(&[]));
            }
            sent.extend_from_slice(&bytes);
            prop_assert!(ends.arrive(&records, &pieces).is_empty());
            prop_assert!(ends.seen() == sent);
            prop_assert!(!ends.outgoing.has_more());
        }
        ends.client.send_close_notify();
        let records = ends.records(&[]);
        ends.arrive(&records, &pieces);
        prop_assert_eq!(ends.lost(), Some("end".to_owned()));
    }
}

#[test]
fn a_cut_at_any_byte_hands_on_whole_records_alone() {
    let mut ends = Ends::new(&[300, 1]);
    let (first, second) = (pattern(700), pattern(400));
    let records = [ends.records(&first), ends.records(&second)];
    let whole = records.concat();
    let mut at = 0;
    // One byte after the other, and each could be the last.
    for (position, byte) in whole.iter().enumerate() {
        assert!(ends.arrive(&[*byte], &[1]).is_empty());
        let expected = match position + 1 {
            arrived if arrived < records[0].len() => 0,
            arrived if arrived < whole.len() => first.len(),
            _ => first.len() + second.len(),
        };
        assert_eq!(ends.seen().len(), expected, "at byte {position}");
        let is_between = position + 1 == records[0].len() || position + 1 == whole.len();
        assert_eq!(ends.outgoing.has_more(), !is_between, "at byte {position}");
        at = position;
    }
    assert_eq!(at + 1, whole.len());
    ends.encrypted.lost(Loss::Eof);
    assert_eq!(ends.lost(), Some("end".to_owned()));
    assert!(ends.seen() == [first, second].concat());
}

#[test]
fn a_connection_that_waits_takes_nothing_and_loses_nothing() {
    let mut ends = Ends::new(&[1000]);
    let bytes = pattern(300_000);
    let records = ends.records(&bytes);
    ends.seen.lock().unwrap().is_parked = true;
    assert_eq!(ends.arrive(&records, &[usize::MAX]).len(), records.len());
    assert!(ends.encrypted.plan().is_none() && !ends.encrypted.has_more());
    ends.seen.lock().unwrap().is_parked = false;
    // What was received before it waits, too.
    let rest = {
        let plan = ends.encrypted.plan().expect("it wants bytes");
        let count = plan.remaining();
        plan.write(&mut PlanCursor::default(), &records[..count]);
        ends.seen.lock().unwrap().is_parked = true;
        assert!(ends.encrypted.received(count).is_continue());
        assert!(ends.seen().is_empty() && ends.outgoing.has_more());
        assert!(ends.encrypted.plan().is_none() && !ends.encrypted.has_more());
        &records[count..]
    };
    ends.seen.lock().unwrap().is_parked = false;
    assert!(ends.encrypted.resume().is_continue());
    assert!(ends.arrive(rest, &[9_999]).is_empty());
    assert!(ends.seen() == bytes);
}

/// One turn opens no more than a receive can bring, whatever is in it.
#[test]
fn records_without_content_are_work_too() {
    let mut ends = Ends::new(&[1000]);
    let mut records = Vec::new();
    // As many as the client takes of the answers to them.
    for _ in 0..30 {
        ends.client.refresh_traffic_keys().unwrap();
        records.extend(ends.records(&[]));
    }
    let plan = ends.encrypted.plan().unwrap();
    assert_eq!(plan.write(&mut PlanCursor::default(), &records), records.len());
    assert!(ends.encrypted.received(records.len()).is_continue());
    assert!(ends.encrypted.has_more());
    while ends.encrypted.has_more() {
        assert!(ends.encrypted.resume().is_continue());
    }
    let bytes = pattern(10);
    let records = ends.records(&bytes);
    assert!(ends.arrive(&records, &[5]).is_empty());
    assert!(ends.seen() == bytes);
    // Each was answered by a key of this end's, if it was asked for: the client reads what comes.
    ends.outgoing.send(ends.encrypted.fd(), b"answer").unwrap();
    let mut answer = Vec::new();
    while answer.len() < 6 {
        ends.client.read_tls(&mut ends.far).unwrap();
        let state = ends.client.process_new_packets().unwrap();
        let length = answer.len();
        answer.resize(length + state.plaintext_bytes_to_read(), 0);
        std::io::Read::read_exact(&mut ends.client.reader(), &mut answer[length..]).unwrap();
    }
    assert_eq!(answer, b"answer");
}

/// A client with TLS 1.2 asks for another handshake, in a record that its key has made.
#[test]
fn a_second_handshake_is_refused() {
    use rustls::crypto::cipher::{OutboundChunks, OutboundPlainMessage};
    use rustls::{ConnectionTrafficSecrets, ContentType, ProtocolVersion};

    let made = certificates();
    let config = Files::client_with(&made.directory.path().join("primary"), &[&rustls::version::TLS12]);
    let mut ends = Ends::with(Arc::new(config), &[1000]);
    let suite = ends.client.negotiated_cipher_suite().unwrap();
    let rustls::SupportedCipherSuite::Tls12(suite) = suite else {
        panic!("TLS 1.2");
    };
    let spare = Ends::new(&[1000]).client;
    let secrets = std::mem::replace(&mut ends.client, spare);
    let (number, secrets) = secrets.dangerous_extract_secrets().unwrap().tx;
    let (ConnectionTrafficSecrets::Aes256Gcm { key, iv } | ConnectionTrafficSecrets::Aes128Gcm { key, iv }) =
        secrets
    else {
        panic!("AES-GCM");
    };
    let mut encrypter = suite
        .aead_alg
        .encrypter(key, &iv.as_ref()[..4], &iv.as_ref()[4..]);
    let hello = OutboundPlainMessage {
        typ: ContentType::Handshake,
        version: ProtocolVersion::TLSv1_2,
        payload: OutboundChunks::Single(&[1, 0, 0, 2, 3, 3]),
    };
    assert!(number > 0, "its Finished");
    let record = encrypter.encrypt(hello, number).unwrap().encode();
    ends.arrive(&record, &[usize::MAX]);
    let said = ends.lost().unwrap();
    assert!(said.contains("renegotiation"), "{said}");
}

/// Data and the end of the stream in one receive, to a connection that stops in the middle of the data.
#[test]
fn what_comes_before_the_end_is_handed_on_before_it() {
    let mut ends = Ends::new(&[10]);
    let bytes = pattern(100);
    let mut records = ends.records(&bytes);
    ends.client.send_close_notify();
    records.extend(ends.records(&[]));
    let plan = ends.encrypted.plan().unwrap();
    plan.write(&mut PlanCursor::default(), &records);
    ends.seen.lock().unwrap().is_parked = true;
    assert!(ends.encrypted.received(records.len()).is_continue());
    assert_eq!((ends.seen().len(), ends.lost()), (0, None));
    ends.seen.lock().unwrap().is_parked = false;
    assert!(ends.encrypted.resume().is_break());
    assert!(ends.seen() == bytes);
    assert_eq!(ends.lost(), Some("end".to_owned()));
}

/// A stranger's certificates are counted, and not computed with.
#[test]
fn very_many_certificates_are_not_looked_at() {
    let made = certificates();
    let directory = made.directory.path().join("primary");
    let pem = std::fs::read(directory.join("client-cert.pem")).unwrap();
    let ca = std::fs::read(directory.join("ca-cert.pem")).unwrap();
    let many = tempfile::tempdir().unwrap();
    for file in ["client-key.pem", "ca-cert.pem"] {
        std::fs::copy(directory.join(file), many.path().join(file)).unwrap();
    }
    let said = |intermediates: usize| {
        let chain = [&pem[..], &ca.repeat(intermediates)].concat();
        std::fs::write(many.path().join("client-cert.pem"), chain).unwrap();
        let config = client_config(many.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || {
            let name = ServerName::try_from("localhost").unwrap();
            let mut client = ClientConnection::new(config, name).unwrap();
            let mut far = TcpStream::connect(address).unwrap();
            while client.is_handshaking() && client.complete_io(&mut far).is_ok() {}
            // Until the other end has gone.
            let _ = std::io::Read::read(&mut far, &mut [0; 64]);
        });
        let (near, _) = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let said = runtime.block_on(async {
            let mut near = tokio::net::TcpStream::from_std(near).unwrap();
            accept(&mut near, &certificates().server).await.err()
        });
        client.join().unwrap();
        said.map(|error| error.to_string())
    };
    assert_eq!(said(4), None);
    let five = said(5).unwrap();
    assert!(five.contains("5 certificates of intermediate CAs"), "{five}");
    let hundreds = said(100).unwrap();
    assert!(hundreds.contains("more than"), "{hundreds}");
}
