//! `colo-ring replay` as its users run it: a session of the synthetic primary is recorded on its way to a receiver, and
//! played to others.

use colo_ring_tests::command::{RunningReceiver, Scratch, until};
use colo_ring_tests::schema;
use colo_ring_tools::capture_file::{
    CaptureInfo, CaptureWriter, Compression, ConnectionId, Direction, Event,
};
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use colo_ring_tools::run_file::RunFile;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const CHECKPOINTS: u64 = 6;

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_colo-ring"))
}

fn run(args: &[&str]) -> Output {
    command().args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    schema::parse(&output.stdout).unwrap_or_else(|wrong| panic!("{wrong}: {}", said(output)))
}

/// `colo-ring sink` in a process of its own, killed when dropped.
struct Sink {
    process: Child,
    address: String,
}

impl Sink {
    fn start(args: &[&str]) -> Self {
        let mut process = command()
            .args(["sink", "--listen", "tcp:127.0.0.1:0"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("listening on ") {
            line.clear();
            assert!(
                stderr.read_line(&mut line).unwrap() > 0,
                "it ended: {:?}",
                process.wait()
            );
        }
        std::thread::spawn(move || stderr.read_to_end(&mut Vec::new()));
        let address = line.trim_start_matches("listening on ").trim().to_owned();
        Self { process, address }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn receiver(channels: u8) -> RunningReceiver {
    RunningReceiver::with_channels(command(), channels, &["--hugepages", "off"])
}

/// What is committed of its newest session: the blocks' content by name, the device state, the checkpoint's number.
fn dump(receiver: &RunningReceiver) -> (BTreeMap<String, Vec<u8>>, Vec<u8>, u64) {
    let status = receiver.status();
    let newest = status["sessions"].as_array().unwrap().last().unwrap();
    let (dumped, read) = receiver.dump(newest["session"].as_u64().unwrap());
    let read = |file: &Value| read(file.as_str().unwrap());
    let blocks = dumped["blocks"].as_array().unwrap().iter();
    let blocks = blocks.map(|block| (block["name"].as_str().unwrap().to_owned(), read(&block["file"])));
    (
        blocks.collect(),
        read(&dumped["device_state_file"]),
        dumped["checkpoint"].as_u64().unwrap(),
    )
}

type Recorder = Arc<Mutex<(CaptureWriter<File>, Instant)>>;

fn record(recorder: &Recorder, event: Event<'_>) {
    let mut locked = recorder.lock().unwrap();
    let at = locked.1.elapsed();
    locked.0.write(at, event).unwrap();
}

/// Copies one direction and records it, before the other side can answer.
fn relay(
    mut from: TcpStream,
    mut to: TcpStream,
    connection: ConnectionId,
    direction: Direction,
    recorder: &Recorder,
) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..count];
        let data = Event::Data {
            connection,
            direction,
            bytes,
        };
        record(recorder, data);
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// What the secondary holds at the end of a session.
type Held = (BTreeMap<String, Vec<u8>>, Vec<u8>);

/// Records a session to `path`, and returns what the primary had at its end.
fn recorded(options: &SynthOptions, path: &str) -> Held {
    let live = receiver(options.channels);
    let info = CaptureInfo::now("test", Value::Null);
    let writer = CaptureWriter::create(path.as_ref(), &info, Compression::Zstd).unwrap();
    let recorder = Arc::new(Mutex::new((writer, Instant::now())));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front: Address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let held = std::thread::scope(|scope| {
        let primary = scope.spawn(|| {
            let mut primary = SynthPrimary::connect(&front, options).unwrap();
            for _ in 0..CHECKPOINTS {
                primary.checkpoint().unwrap();
            }
            let block = |(name, _): (String, u64)| {
                let image = primary.image(&name).unwrap().to_vec();
                (name, image)
            };
            let blocks = primary.blocks().into_iter().map(block).collect();
            let held = (blocks, primary.device_state().to_vec());
            primary.close().unwrap();
            held
        });
        for number in 0..=u16::from(options.channels) {
            let near = listener.accept().unwrap().0;
            let far = TcpStream::connect(live.address().to_string().trim_start_matches("tcp:")).unwrap();
            let connection = ConnectionId(number);
            record(
                &recorder,
                Event::Open {
                    connection,
                    label: "synth",
                },
            );
            let clones = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let recorder = &recorder;
            scope.spawn(move || relay(near, far, connection, Direction::ToSecondary, recorder));
            scope.spawn(move || relay(clones.1, clones.0, connection, Direction::ToPrimary, recorder));
        }
        primary.join().unwrap()
    });
    let (writer, _) = Arc::into_inner(recorder).unwrap().into_inner().unwrap();
    writer.finish().unwrap();
    let (blocks, device_state, checkpoint) = dump(&live);
    assert_eq!(checkpoint, CHECKPOINTS);
    assert!(
        (&blocks, &device_state) == (&held.0, &held.1),
        "the live session differs already"
    );
    held
}

fn guest(version: Version, channels: u8) -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        channels,
        dirty_pages: Distribution::Fixed(200),
        interval: Duration::from_millis(10),
        zero_share: 0.2,
        ..SynthOptions::new(version)
    }
}

#[test]
fn a_replay_leaves_what_the_session_left() {
    for (version, channels) in [
        (Version::V11_1, 2),
        (Version::V11_1, 0),
        (Version::V10_0, 1),
        (Version::V7_2, 2),
    ] {
        let scratch = Scratch::new();
        let file = scratch.file("session.cap");
        let held = recorded(&guest(version, channels), &file);
        let receiver = receiver(channels);
        let pid = receiver.pid().to_string();
        let paces: [(&[&str], u64); 4] = [
            (&[], CHECKPOINTS),
            (&["--pace", "max", "--loop", "3"], 3 * CHECKPOINTS),
            (&["--interval", "3", "--checkpoints", "2"], 2),
            (&["--pace", "max", "--checkpoints", "18", "--cores", "0"], 18),
        ];
        for (number, (pace, checkpoints)) in paces.iter().enumerate() {
            let out = scratch.file(&format!("run-{number}"));
            let args = [
                "replay",
                &file,
                "--to",
                &receiver.address().to_string(),
                "--json",
                "--pid",
                &pid,
                "--out",
                &out,
            ];
            let output = run(&[&args, *pace].concat());
            assert!(output.status.success(), "{version:?} {pace:?}: {}", said(&output));
            let report = json(&output);
            assert_eq!(report["checkpoints"], *checkpoints);
            assert!(report["secondary"]["cpu_ns"].as_u64().unwrap() > 0);
            assert!(report["secondary"]["rss_bytes_max"].as_u64().unwrap() > 8 << 20);
            let share = report["replay_share"]["share"].as_f64().unwrap();
            assert!(0.0 < share && share <= 1.0, "{share}");
            let (blocks, device_state, checkpoint) = dump(&receiver);
            assert_eq!(checkpoint, *checkpoints);
            if checkpoints % CHECKPOINTS == 0 {
                assert!(
                    blocks == held.0 && device_state == held.1,
                    "{version:?} {channels} {pace:?} differs"
                );
            }
            let measured = RunFile::read(Path::new(&format!("{out}.run.json"))).unwrap();
            assert_eq!(measured.checkpoints.len() as u64, *checkpoints);
            for (checkpoint, n) in measured.checkpoints.iter().zip(1..) {
                let phase = |name: &str| checkpoint.phases_ns[name];
                assert_eq!(checkpoint.n, n);
                assert!(
                    0 < phase("replied") && 0 < phase("received") && phase("received") <= phase("loaded")
                );
                let pages = checkpoint.pages + checkpoint.zero_pages;
                assert!((200..204).contains(&pages), "{pages}");
            }
            for phase in ["replied", "received", "loaded"] {
                let log = std::fs::read_to_string(format!("{out}.{phase}.hlog")).unwrap();
                assert!(log.contains("#[Histogram log format version 1.3]"), "{log}");
            }
        }
    }
}

#[test]
fn sessions_in_a_row_and_a_sink() {
    let scratch = Scratch::new();
    let file = scratch.file("session.cap");
    let out = scratch.file("measured");
    let held = recorded(&guest(Version::V11_1, 2), &file);
    let receiver = receiver(2);
    let output = run(&[
        "replay",
        &file,
        "--to",
        &receiver.address().to_string(),
        "--pace",
        "max",
        "--repeat",
        "3",
        "--out",
        &out,
        "--json",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let report = json(&output);
    // Whoever shows a figure of a run shows the same.
    let compared = run(&["compare", &format!("{out}.run.json"), "--json"]);
    let compared = json(&compared);
    for phase in compared["phases"].as_array().unwrap() {
        let (name, row) = (phase["phase"].as_str().unwrap(), &phase["rows"][0]);
        for figure in ["p50_ns", "p90_ns", "p99_ns", "max_ns"] {
            assert_eq!(row[figure], report["phases"][name][figure], "{name} {figure}");
        }
    }
    assert_eq!(compared["phases"].as_array().unwrap().len(), 3);
    assert_eq!(
        (&report["sessions"], &report["checkpoints"]),
        (&3.into(), &(3 * CHECKPOINTS).into())
    );
    let (blocks, device_state, _) = dump(&receiver);
    assert!(blocks == held.0 && device_state == held.1);

    let output = run(&["replay", &file, "--sink", "--pace", "max", "--checkpoints", "50"]);
    assert!(output.status.success(), "{}", said(&output));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("sink: pc-i440fx-11.1, 2 channels"), "{table}");
    assert!(
        table.contains("loaded") && table.contains("the replay's own share"),
        "{table}"
    );

    let sink = Sink::start(&["--channels", "2", "--cores", "0-1"]);
    let output = run(&[
        "replay",
        &file,
        "--to",
        &sink.address,
        "--interval",
        "2",
        "--loop",
        "2",
        "--json",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(json(&output)["phases"]["replied"]["count"], 2 * CHECKPOINTS);
}

#[test]
fn a_secondary_that_fails_is_reported_and_what_was_measured_is_kept() {
    let scratch = Scratch::new();
    let file = scratch.file("session.cap");
    recorded(&guest(Version::V11_1, 2), &file);
    let out = scratch.file("run");

    // It dies after a while. The replay asks for its second checkpoint only when it has measured the first.
    let dying = receiver(2);
    let replay = command()
        .args([
            "replay",
            &file,
            "--to",
            &dying.address().to_string(),
            "--interval",
            "20",
            "--checkpoints",
            "100000",
            "--out",
            &out,
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("two checkpoints", || {
        let status = dying.status();
        (status["sessions"][0]["checkpoint"].as_u64()? >= 2).then_some(())
    });
    drop(dying);
    let output = replay.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("closed the main channel") || said(&output).contains("Broken pipe"),
        "{}",
        said(&output)
    );
    let measured = RunFile::read(Path::new(&format!("{out}.run.json"))).unwrap();
    assert!(!measured.checkpoints.is_empty());
    assert!(
        measured
            .notes
            .iter()
            .any(|note| note.starts_with("it ended early")),
        "{:?}",
        measured.notes
    );

    // It answers wrongly, from a receiver that expects another number of channels to one that is none.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let browser = std::thread::spawn(move || {
        let connections: Vec<_> = (0..3).map(|_| listener.accept().unwrap().0).collect();
        (&connections[0])
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .unwrap();
        for mut connection in connections {
            let _ = connection.read_to_end(&mut Vec::new());
        }
    });
    let output = run(&["replay", &file, "--to", &address]);
    browser.join().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("where Pong(1) was expected"),
        "{}",
        said(&output)
    );

    let other = ["--hugepages", "off", "--accept-timeout", "1"];
    let receiver = RunningReceiver::with_channels(command(), 1, &other);
    let output = run(&[
        "replay",
        &file,
        "--to",
        &receiver.address().to_string(),
        "--patience",
        "20",
    ]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));

    let output = run(&["replay", &file, "--to", "tcp:127.0.0.1:1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("is the secondary listening there?"),
        "{}",
        said(&output)
    );
}

/// 16 MiB a checkpoint take longer than the interval of a millisecond, even into a sink.
#[test]
fn checkpoints_that_are_too_slow_wait_or_move_the_others() {
    let scratch = Scratch::new();
    let capture = scratch.file("capture");
    let shape = [
        "--ram",
        "32M",
        "--channels",
        "0",
        "--pages",
        "4000",
        "--checkpoints",
        "2",
    ];
    let made = run(&[&["synth", "--out", &capture][..], &shape].concat());
    assert!(made.status.success(), "{}", said(&made));
    let waited = |more: &[&str]| {
        let args = [
            "replay",
            &capture,
            "--sink",
            "--json",
            "--checkpoints",
            "8",
            "--interval",
            "1",
        ];
        let output = run(&[&args[..], more].concat());
        assert!(output.status.success(), "{}", said(&output));
        let report = json(&output);
        assert_eq!(report["checkpoints"], 8);
        report["notes"].to_string().contains("count their waiting")
    };
    assert!(waited(&[]));
    assert!(!waited(&["--closed-loop"]));
}

#[test]
fn what_cannot_be_played_is_refused() {
    let scratch = Scratch::new();
    let nothing = scratch.file("nothing");
    std::fs::write(&nothing, b"nothing").unwrap();
    let refused = |args: &[&str], code: i32, reason: &str| {
        let output = run(&[&["replay"], args].concat());
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", said(&output));
        assert!(said(&output).contains(reason), "{args:?}: {}", said(&output));
    };
    refused(&[&nothing, "--sink"], 1, "this is not a capture");
    refused(&[&scratch.file("missing"), "--sink"], 1, "No such file");
    refused(&[&nothing], 2, "--to");
    refused(&[&nothing, "--to", "4444"], 2, "invalid address");
    refused(&[&nothing, "--sink", "--interval", "0"], 2, "0");
    refused(&[&nothing, "--sink", "--closed-loop"], 2, "--interval");
    refused(&[&nothing, "--sink", "--cores", ""], 2, "no core");
    refused(&[&nothing, "--sink", "--name", ""], 2, "cannot be a run's name");
}
