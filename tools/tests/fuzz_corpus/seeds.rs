//! Makes those corpora that are cut from captured sessions and the project's own files, where a format has changed:
//!
//!     cargo test -p colo-ring-tools --test fuzz_corpus -- --ignored
//!
//! Those of the decoders and of NBD are streams of other programs, and stay.

use super::fuzz::{DISK_FILES, RAM_FILES, pieces};
use super::{names_in, sessions};
use colo_ring::link::{Hello, LINK_VERSION, ToReceiver, Wanted};
use colo_ring::receiver::{Request, RestoreRequest};
use colo_ring::units::CheckpointId;
use colo_ring::wire::codec::Method;
use colo_ring_tests::capture::capture_file;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, wrapped};
use colo_ring_tests::hostile::HostilePrimary;
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tools::capture_file::{
    CaptureInfo, CaptureReader, CaptureWriter, Compression, Direction, Event,
};
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{DiskOptions, Distribution, SynthOptions, SynthPrimary, Version};
use colo_ring_tools::run_file::{Checkpoint, Clock, RunFile};
use colo_ring_tools::streams::Streams;
use etherparse::PacketBuilder;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target)
}

fn put(target: &str, name: &str, bytes: &[u8]) {
    fs::create_dir_all(corpus(target)).unwrap();
    fs::write(corpus(target).join(name), bytes).unwrap();
    println!("{target}/{name}: {} bytes", bytes.len());
}

/// A capture of a synthetic session with a small guest.
fn synthetic(directory: &Path, options: &SynthOptions, compression: Compression) -> PathBuf {
    let path = directory.join("synthetic.cap");
    let info = CaptureInfo {
        created_unix_ns: 0,
        ..CaptureInfo::now("synth", serde_json::Value::Null)
    };
    let writer = CaptureWriter::replace(&path, &info, compression).unwrap();
    let mut primary = SynthPrimary::record(writer, options).unwrap();
    for _ in 0..2 {
        primary.checkpoint().unwrap();
    }
    primary.close().unwrap();
    path
}

fn small(version: Version, channels: u8) -> SynthOptions {
    SynthOptions {
        ram_bytes: 16 << 10,
        channels,
        dirty_pages: Distribution::Fixed(2),
        zero_share: 0.8,
        interval: Duration::ZERO,
        ..SynthOptions::new(version)
    }
}

fn put_sessions() {
    for name in ["colo-multifd4-7.2", "colo-multifd4-10"] {
        let session = Streams::load(&capture_file(name)).unwrap();
        put("session", name, &sessions::cut(&session));
        put("channel", name, &sessions::packets(&session));
    }
    let scratch = Scratch::new();
    let deltas = SynthOptions {
        xbzrle: true,
        zero_share: 0.2,
        ..small(Version::V11_1, 0)
    };
    for (name, options) in [
        ("plain", small(Version::V11_1, 0)),
        ("xbzrle", deltas),
        ("two-channels", small(Version::V11_1, 2)),
    ] {
        let path = synthetic(scratch.path(), &options, Compression::None);
        put("session", name, &sessions::cut(&Streams::load(&path).unwrap()));
    }
    for method in [Method::Zlib, Method::Zstd] {
        put("channel", method.name(), &sessions::compressed(method));
    }
}

fn put_control() {
    let session = 1;
    let requests = [
        Request::Status,
        Request::Contents { session },
        Request::Dump {
            session,
            disks: vec!["root".into()],
        },
        Request::Discard { session },
        Request::End { session },
        Request::Claim {
            session,
            force: false,
            retry: true,
        },
        Request::Handover { session },
        Request::Restore(RestoreRequest {
            session,
            to: "unix:/q".into(),
            shared: Some("pc.ram".into()),
            keep: None,
        }),
        Request::Release {
            session,
            may_have_run: true,
        },
        Request::Promoted { session },
    ];
    let lines: String = requests
        .iter()
        .map(|request| serde_json::to_string(request).unwrap() + "\n")
        .collect();
    put("control", "every-request", lines.as_bytes());
}

/// The input of a guard that goes through these messages; between them its session goes on.
fn link(messages: &[ToReceiver], handover_after: Option<usize>) -> Vec<u8> {
    let mut out = Vec::new();
    for (position, message) in messages.iter().enumerate() {
        let line = serde_json::to_string(message).unwrap() + "\n";
        for part in line.as_bytes().chunks(200) {
            out.push(u8::try_from(part.len()).unwrap() + 18);
            out.extend_from_slice(part);
        }
        if handover_after == Some(position) {
            out.push(16);
        }
        out.extend([0, 0, 0]);
    }
    out
}

fn put_links() {
    let hello = || {
        ToReceiver::Hello(Hello {
            version: LINK_VERSION,
            name: "guest1".into(),
            uuid: None,
            timeout_ms: 2000,
            wants: Wanted::Next,
        })
    };
    let placed = |number| ToReceiver::Placed {
        checkpoint: CheckpointId(number),
    };
    put(
        "link",
        "barriers",
        &link(
            &[
                hello(),
                placed(0),
                placed(1),
                ToReceiver::Leaving,
                ToReceiver::Left,
            ],
            None,
        ),
    );
    let refused = ToReceiver::HandoverRefused {
        reason: "busy".into(),
    };
    put("link", "refused", &link(&[hello(), placed(0), refused], Some(1)));
    let handed_over = [
        hello(),
        placed(0),
        ToReceiver::HandoverReady,
        placed(1),
        ToReceiver::PrimaryEnded,
    ];
    put("link", "handover", &link(&handed_over, Some(1)));
}

fn put_captures_and_recordings() {
    let scratch = Scratch::new();
    for (name, version, compression) in [
        ("zstd", Version::V11_1, Compression::Zstd),
        ("zstd-7.2", Version::V7_2, Compression::Zstd),
    ] {
        let empty = SynthOptions {
            zero_share: 1.0,
            ..small(version, 1)
        };
        let path = synthetic(scratch.path(), &empty, compression);
        put("capture", name, &fs::read(path).unwrap());
    }
    // Pieces of a session, so that it is small without compression.
    let path = scratch.path().join("plain.cap");
    let info = CaptureInfo {
        created_unix_ns: 0,
        ..CaptureInfo::now("synth", serde_json::Value::Null)
    };
    let mut writer = CaptureWriter::create(&path, &info, Compression::None).unwrap();
    let short = synthetic(scratch.path(), &small(Version::V11_1, 1), Compression::None);
    let mut packets = Packets::default();
    let mut reader = CaptureReader::open(&short).unwrap();
    while let Some(record) = reader.next().unwrap() {
        match record.event {
            Event::Finish(_) => break,
            Event::Data {
                connection,
                direction,
                bytes,
            } => {
                let bytes = &bytes[..bytes.len().min(100)];
                writer
                    .write(
                        record.at,
                        Event::Data {
                            connection,
                            direction,
                            bytes,
                        },
                    )
                    .unwrap();
                packets.data(connection.0, direction, bytes);
            }
            event => {
                if let Event::Open { connection, .. } = event {
                    packets.open(connection.0);
                }
                writer.write(record.at, event).unwrap();
            }
        }
    }
    writer.finish().unwrap();
    put("capture", "plain", &fs::read(&path).unwrap());
    put("pcap", "classic", &packets.classic());
    put("pcap", "next-generation", &packets.next_generation());
}

/// A session as packets on an Ethernet.
#[derive(Default)]
struct Packets {
    packets: Vec<Vec<u8>>,
    /// The next sequence numbers of each connection, the primary's first.
    next: Vec<[u32; 2]>,
}

impl Packets {
    fn put(&mut self, connection: u16, from_primary: bool, flag: Option<char>, payload: &[u8]) {
        let [own, other] = match (from_primary, self.next[usize::from(connection)]) {
            (true, [primary, secondary]) => [primary, secondary],
            (false, [primary, secondary]) => [secondary, primary],
        };
        let (hosts, ports) = match from_primary {
            true => ([[10, 0, 0, 1], [10, 0, 0, 2]], [50_000 + connection, 4444]),
            false => ([[10, 0, 0, 2], [10, 0, 0, 1]], [4444, 50_000 + connection]),
        };
        let builder = PacketBuilder::ethernet2([1; 6], [2; 6]).ipv4(hosts[0], hosts[1], 64);
        let mut tcp = builder.tcp(ports[0], ports[1], own, 1000);
        if flag == Some('S') {
            tcp = tcp.syn();
        }
        if flag != Some('S') || !from_primary {
            tcp = tcp.ack(other);
        }
        let mut packet = Vec::new();
        tcp.write(&mut packet, payload).unwrap();
        self.packets.push(packet);
        let length = u32::try_from(payload.len()).unwrap() + u32::from(flag.is_some());
        let next = &mut self.next[usize::from(connection)][usize::from(!from_primary)];
        *next = next.wrapping_add(length);
    }

    fn open(&mut self, connection: u16) {
        self.next.push([100, u32::MAX - 10]);
        self.put(connection, true, Some('S'), b"");
        self.put(connection, false, Some('S'), b"");
    }

    fn data(&mut self, connection: u16, direction: Direction, bytes: &[u8]) {
        self.put(connection, direction == Direction::ToSecondary, None, bytes);
    }

    fn classic(&self) -> Vec<u8> {
        let mut file = words(&[0xa1b2_3c4d, 0x0004_0002, 0, 0, 262_144, 1]);
        for packet in &self.packets {
            let length = u32::try_from(packet.len()).unwrap();
            file.extend(words(&[1_700_000_000, 5, length, length]));
            file.extend_from_slice(packet);
        }
        file
    }

    fn next_generation(&self) -> Vec<u8> {
        let block = |kind: u32, body: &[u8]| {
            let length = u32::try_from(12 + body.len()).unwrap();
            [&words(&[kind, length])[..], body, &words(&[length])].concat()
        };
        let mut file = block(0x0a0d_0d0a, &words(&[0x1a2b_3c4d, 1, u32::MAX, u32::MAX]));
        file.extend(block(1, &words(&[1, 0, 0x0001_0009, 9, 0])));
        for packet in &self.packets {
            let length = u32::try_from(packet.len()).unwrap();
            let mut body = words(&[0, 0x1797_0000, 0, length, length]);
            body.extend_from_slice(packet);
            body.resize(body.len().next_multiple_of(4), 0);
            file.extend(block(6, &body));
        }
        file
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn put_measurements() {
    let scratch = Scratch::new();
    let mut run = RunFile::new(
        "uring pool",
        "synth",
        serde_json::json!({}),
        Clock::Primary,
        SystemTime::UNIX_EPOCH,
    );
    run.compression = Some("zstd level 3".into());
    for n in 0..3 {
        let phases = [("pause", 1_000_000 + n), ("loaded", 900_000)];
        run.checkpoints.push(Checkpoint {
            n,
            at_ns: n * 700_000_000,
            phases_ns: phases
                .map(|(name, nanoseconds)| (name.to_owned(), nanoseconds))
                .into(),
            pages: 7,
            ..Checkpoint::default()
        });
    }
    let prefix = scratch.path().join("run");
    run.write(&prefix).unwrap();
    put(
        "run_file",
        "run",
        &fs::read(scratch.path().join("run.run.json")).unwrap(),
    );
    put(
        "hlog",
        "pause",
        &fs::read(scratch.path().join("run.pause.hlog")).unwrap(),
    );
    let tagged =
        "#[StartTime: 1441812279.474 (seconds since epoch)]\n\"StartTimestamp\",\"Interval_Length\"\n";
    let log = fs::read_to_string(scratch.path().join("run.pause.hlog")).unwrap();
    let interval = log.lines().rfind(|line| !line.starts_with(['#', '"'])).unwrap();
    put(
        "hlog",
        "tagged",
        format!("{tagged}Tag=a,{interval}\n{interval}").as_bytes(),
    );
}

/// The files of a directory as pieces, those of `names` in their order.
fn files(directory: &Path, names: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    for (stream, name) in names.iter().enumerate() {
        if let Ok(content) = fs::read(directory.join(name)) {
            pieces::encode(stream, &content, &mut out);
        }
    }
    out
}

/// Kills a receiver whose guest has two checkpoints: at once, so that the flush of the last one is often not over, or after it.
fn put_ram_directory(name: &str, is_flushed: bool) {
    let ram = SharedDirectory::new().unwrap();
    let receiver = RunningReceiver::start(wrapped(&[]), &["--ram-dir", ram.path().to_str().unwrap()]);
    let Address::Tcp(address) = receiver.address() else {
        panic!("it listens on TCP");
    };
    let mut primary = HostilePrimary::protected(address.parse::<std::net::SocketAddr>().unwrap(), 2);
    if is_flushed {
        primary.request();
    }
    drop(receiver);
    put("ram_dir", name, &files(ram.path(), &RAM_FILES));
}

fn put_directories() {
    put_ram_directory("flushed", true);
    put_ram_directory("flushing", false);
    let disks = SharedDirectory::new().unwrap();
    for disk in 0..2 {
        let base = File::create(disks.path().join(format!("disk-{disk}.raw"))).unwrap();
        base.set_len(64 << 10).unwrap();
    }
    let path = disks.path().to_str().unwrap();
    let receiver = RunningReceiver::start(wrapped(&[]), &["--disks", path, "--nbd", "tcp:127.0.0.1:0"]);
    let shape = SynthOptions {
        disks: Some(DiskOptions {
            to: receiver.disk_address().parse().unwrap(),
            name: "disk".into(),
            count: 2,
            writes: 1,
        }),
        ..guest()
    };
    let mut primary = SynthPrimary::connect(receiver.address(), &shape).unwrap();
    primary.checkpoint().unwrap();
    drop(receiver);
    println!("{:?}", names_in(disks.path()));
    put("disk_log", "checkpoint", &files(disks.path(), &DISK_FILES));
}

#[test]
#[ignore = "makes the corpora again"]
fn the_corpora_are_made_again() {
    put_sessions();
    put_control();
    put_links();
    put_captures_and_recordings();
    put_measurements();
    put_directories();
}
