//! The synthetic primary against a real receiver, live and by way of a capture, and as a command.

use colo_ring::receiver::Receiver;
use colo_ring::ring::BackendKind;
use colo_ring::wire::codec::Method;
use colo_ring_tests::command::Scratch;
use colo_ring_tests::receiver::dump;
use colo_ring_tests::schema;
use colo_ring_tests::{HANG_LIMIT, receiver_options};
use colo_ring_tools::capture_file::{
    CaptureInfo, CaptureReader, CaptureWriter, Compression, Direction, Event, Record,
};
use colo_ring_tools::page_compression::CompressionArgs;
use colo_ring_tools::primary::{
    CheckpointReport, Content, Distribution, Pattern, SynthOptions, SynthPrimary, Version,
};
use colo_ring_tools::run_file::RunFile;
use colo_ring_tools::streams::Streams;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// A secondary in this process.
struct Secondary {
    receiver: Receiver,
    scratch: Scratch,
}

/// What is committed: every block by name, and the device state.
#[derive(PartialEq)]
struct Committed {
    checkpoint: u64,
    blocks: Vec<(String, Vec<u8>)>,
    device_state: Vec<u8>,
}

impl Secondary {
    fn start(channels: u8) -> Self {
        let options = receiver_options(BackendKind::Epoll, channels);
        Self {
            receiver: Receiver::start(options, |_| ()).unwrap(),
            scratch: Scratch::new(),
        }
    }

    fn address(&self) -> String {
        self.receiver.addresses()[0].to_string()
    }

    fn committed(&self) -> Committed {
        let dumped = dump(&self.receiver, 1, self.scratch.path()).unwrap();
        let read = |file: &str| std::fs::read(self.scratch.path().join(file)).unwrap();
        let block = |block: &colo_ring::receiver::DumpedBlock| (block.name.clone(), read(&block.file));
        Committed {
            checkpoint: dumped.checkpoint,
            blocks: dumped.blocks.iter().map(block).collect(),
            device_state: read(&dumped.device_state_file),
        }
    }

    fn end(self) {
        self.receiver.stop_handle().stop();
        self.receiver.wait().unwrap();
    }
}

/// What the secondary must have committed.
fn model(primary: &SynthPrimary, checkpoint: u64) -> Committed {
    let block = |(name, _): (String, u64)| {
        let image = primary.image(&name).unwrap().to_vec();
        (name, image)
    };
    Committed {
        checkpoint,
        blocks: primary.blocks().into_iter().map(block).collect(),
        device_state: primary.device_state().to_vec(),
    }
}

fn options(version: Version) -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        channels: 2,
        dirty_pages: Distribution::Uniform { low: 0, high: 900 },
        pattern: Pattern::HotSet {
            pages: 0.2,
            writes: 0.8,
        },
        zero_share: 0.2,
        interval: Duration::from_millis(5),
        seed: 11,
        ..SynthOptions::new(version)
    }
}

fn capture(path: &Path, options: &SynthOptions, checkpoints: u64) -> (Committed, Vec<CheckpointReport>) {
    let info = CaptureInfo {
        created_unix_ns: 0,
        ..CaptureInfo::now("synth", Value::Null)
    };
    let writer = CaptureWriter::create(path, &info, Compression::Zstd).unwrap();
    let mut primary = SynthPrimary::record(writer, options).unwrap();
    let reports = (0..checkpoints).map(|_| primary.checkpoint().unwrap()).collect();
    let model = model(&primary, checkpoints);
    primary.close().unwrap();
    (model, reports)
}

/// Calls `each` with every record; the capture must be whole.
fn records(path: &Path, mut each: impl FnMut(Record<'_>)) {
    let mut reader = CaptureReader::open(path).unwrap();
    while let Some(record) = reader.next().unwrap() {
        each(record);
    }
    assert!(reader.is_torn().is_none());
}

#[test]
fn what_is_committed_is_the_primary_s_memory_whatever_it_holds() {
    for (version, content, pattern) in [
        (Version::V11_1, Content::Random, Pattern::Random),
        (Version::V10_0, Content::Text, Pattern::Sequential),
        (Version::V7_2, Content::Compressible, Pattern::Runs(40)),
        (Version::V11_1, Content::Text, options(Version::V11_1).pattern),
    ] {
        let options = SynthOptions {
            content,
            pattern,
            ..options(version)
        };
        let secondary = Secondary::start(2);
        let address = secondary.address().parse().unwrap();
        let mut primary = SynthPrimary::connect(&address, &options).unwrap();
        for _ in 0..6 {
            primary.checkpoint().unwrap();
        }
        assert!(
            secondary.committed() == model(&primary, 6),
            "{version} {content} {pattern}"
        );
        primary.close().unwrap();
        secondary.end();
    }
}

/// The shortest player there is: every byte of the primary is sent in the order of the capture, every byte of the
/// secondary must come.
fn play(path: &Path, address: &str) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    records(path, |record| match record.event {
        Event::Open { .. } => {
            let stream = TcpStream::connect(address.trim_start_matches("tcp:")).unwrap();
            stream.set_read_timeout(Some(HANG_LIMIT)).unwrap();
            streams.push(stream);
        }
        Event::Data {
            connection,
            direction,
            bytes,
        } => {
            let stream: &mut TcpStream = &mut streams[usize::from(connection.0)];
            match direction {
                Direction::ToSecondary => stream.write_all(bytes).unwrap(),
                Direction::ToPrimary => {
                    let mut answer = vec![0; bytes.len()];
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(answer, bytes);
                }
            }
        }
        Event::End { .. } | Event::Note(_) | Event::Finish(_) => {}
    });
    streams
}

#[test]
fn a_capture_that_is_played_leaves_what_the_live_session_of_that_seed_leaves() {
    for (version, channels) in [
        (Version::V11_1, 2),
        (Version::V11_1, 0),
        (Version::V10_0, 3),
        (Version::V7_2, 2),
    ] {
        let options = SynthOptions {
            channels,
            ..options(version)
        };
        let secondary = Secondary::start(channels);
        let path = secondary.scratch.path().join("session.cap");
        let (model_of_capture, _) = capture(&path, &options, 5);
        let streams = play(&path, &secondary.address());
        let played = secondary.committed();
        assert!(played == model_of_capture, "{version}, {channels} channels");
        drop(streams);
        secondary.end();

        let secondary = Secondary::start(channels);
        let mut primary = SynthPrimary::connect(&secondary.address().parse().unwrap(), &options).unwrap();
        for _ in 0..5 {
            primary.checkpoint().unwrap();
        }
        assert!(secondary.committed() == played, "{version}, {channels} channels");
        primary.close().unwrap();
        secondary.end();
    }
}

/// The same by the command that is made for it, which takes its waits from the capture instead of its order.
#[test]
fn a_capture_that_is_replayed_leaves_the_primary_s_memory() {
    for (version, channels, pace) in [
        (Version::V11_1, 2, ["--pace", "max"]),
        (Version::V10_0, 0, ["--interval", "20"]),
        (Version::V7_2, 3, ["--pace", "max"]),
    ] {
        let secondary = Secondary::start(channels);
        let path = secondary.scratch.path().join("session.cap");
        let options = SynthOptions {
            channels,
            ..options(version)
        };
        let (model_of_capture, _) = capture(&path, &options, 5);
        let replay = Command::new(env!("CARGO_BIN_EXE_colo-ring"))
            .args(["replay", path.to_str().unwrap(), "--to", &secondary.address()])
            .args(pace)
            .output()
            .unwrap();
        assert!(replay.status.success(), "{}", said(&replay));
        assert!(
            secondary.committed() == model_of_capture,
            "{version}, {channels} channels"
        );
        secondary.end();
    }
}

/// One stream per channel, live and in a capture: what is committed is the primary's memory, by each way.
#[test]
fn compressed_sessions_leave_the_primary_s_memory() {
    for (version, compression, level, channels) in [
        (Version::V11_1, Method::Zstd, 1, 2),
        (Version::V11_1, Method::Zlib, 6, 1),
        (Version::V10_0, Method::Zlib, 1, 3),
        (Version::V7_2, Method::Zstd, 3, 2),
    ] {
        let args = CompressionArgs {
            compression,
            compression_level: Some(level),
        };
        let options = SynthOptions {
            channels,
            content: Content::Ratio(3.0),
            compression: args.check(channels).unwrap(),
            ..options(version)
        };
        let what = format!("{version}, {}, {channels} channels", options.compression);
        let secondary = Secondary::start(channels);
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("session.cap");
        let (model_of_capture, reports) = capture(&path, &options, 5);
        let page_bytes: u64 = reports
            .iter()
            .map(|report| 4096 * (report.pages - report.zero_pages))
            .sum();
        let payload_bytes: u64 = reports.iter().map(|report| report.payload_bytes).sum();
        // 7.2 sends some pages twice.
        let ratio = page_bytes as f64 / payload_bytes as f64;
        assert!((2.4..3.6).contains(&ratio), "{what}: {ratio}");
        let streams = Streams::load(&path).unwrap();
        assert_eq!(streams.notes, Vec::<String>::new(), "{what}");
        assert_eq!(streams.compression(), compression.name());
        for (seen, report) in streams.checkpoints.iter().zip(&reports) {
            assert_eq!(seen.payload_bytes, report.payload_bytes, "{what}");
            assert!(
                seen.bytes.abs_diff(report.bytes) <= 5,
                "{what}: {seen:?} {report:?}"
            );
        }
        let again = streams.again().unwrap_err().to_string();
        assert!(again.contains("compressed"), "{again}");
        let played = play(&path, &secondary.address());
        assert!(secondary.committed() == model_of_capture, "{what}");
        drop(played);
        secondary.end();

        let secondary = Secondary::start(channels);
        let replay = Command::new(env!("CARGO_BIN_EXE_colo-ring"))
            .args(["replay", "--pace", "max", "--json", "--to", &secondary.address()])
            .arg(&path)
            .output()
            .unwrap();
        assert!(replay.status.success(), "{what}: {}", said(&replay));
        let replayed = schema::document(&replay.stdout);
        assert_eq!(replayed["capture"]["compression"], compression.name());
        assert!(secondary.committed() == model_of_capture, "{what}");
        secondary.end();

        let secondary = Secondary::start(channels);
        let mut primary = SynthPrimary::connect(&secondary.address().parse().unwrap(), &options).unwrap();
        let live: Vec<_> = (0..5).map(|_| primary.checkpoint().unwrap()).collect();
        assert!(secondary.committed() == model_of_capture, "{what}");
        for (live, recorded) in live.iter().zip(&reports) {
            assert_eq!(live.payload_bytes, recorded.payload_bytes, "{what}");
        }
        primary.close().unwrap();
        secondary.end();
    }
}

#[test]
fn a_capture_is_read_as_the_session_that_it_is() {
    let scratch = Scratch::new();
    for (version, channels) in [(Version::V11_1, 2), (Version::V10_0, 0), (Version::V7_2, 4)] {
        let path = scratch.path().join(format!("{version}-{channels}.cap"));
        let options = SynthOptions {
            channels,
            interval: Duration::from_millis(600),
            ..options(version)
        };
        let (_, reports) = capture(&path, &options, 4);
        let streams = Streams::load(&path).unwrap();
        assert_eq!(streams.channels.len(), usize::from(channels));
        assert_eq!(streams.notes, Vec::<String>::new());
        assert_eq!(streams.return_path, version == Version::V11_1);
        assert_eq!(streams.checkpoints.len(), 4);
        for (position, (seen, report)) in (1..).zip(streams.checkpoints.iter().zip(&reports)) {
            // 7.2 sends some pages twice.
            let twice = if version == Version::V7_2 { 3 } else { 0 };
            let sent = report.pages - report.zero_pages;
            assert!((sent..=sent + twice).contains(&seen.pages), "{seen:?} {report:?}");
            assert_eq!(seen.zero_pages, report.zero_pages);
            // The last section's footer is written with the request that follows it, as QEMU's is.
            assert!(seen.bytes.abs_diff(report.bytes) <= 5, "{seen:?} {report:?}");
            assert_eq!(seen.at, Duration::from_millis(600) * position);
            assert_eq!(
                (report.loaded, report.own_delay),
                (Duration::ZERO, Duration::ZERO)
            );
        }
        assert_eq!(streams.answers.ready, Some(Duration::ZERO));
        assert_eq!(streams.answers.checkpoints.len(), 4);
        assert!(
            streams
                .answers
                .checkpoints
                .iter()
                .all(|answers| answers.loaded.is_some())
        );
        assert_eq!(streams.answers.wrong_at, None);
    }
}

#[test]
fn one_seed_makes_one_capture() {
    let scratch = Scratch::new();
    let written = |name: &str, seed| {
        let path = scratch.path().join(name);
        let options = SynthOptions {
            seed,
            ..options(Version::V11_1)
        };
        capture(&path, &options, 3);
        std::fs::read(&path).unwrap()
    };
    let first = written("first", 1);
    assert!(first == written("again", 1));
    assert!(first != written("other", 2));
}

fn synth(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_colo-ring"));
    command.arg("synth").args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn report(args: &[&str]) -> Value {
    let output = synth(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", said(&output));
    let report = schema::document(&output.stdout);
    assert_eq!(report["schema"], "colo-ring.synth");
    report
}

#[test]
fn the_command_measures_a_session_and_writes_its_run() {
    let secondary = Secondary::start(2);
    let prefix = secondary.scratch.path().join("run");
    let prefix = prefix.to_str().unwrap();
    let shape = "--ram 8M --channels 2 --pages 200 --interval 2 --checkpoints 30 --name epoll";
    let args: Vec<_> = shape.split(' ').collect();
    let address = secondary.address();
    let report = report(&[&args[..], &["--to", &address, "--run", prefix]].concat());
    assert_eq!(report["options"]["schedule"], "open-loop");
    assert_eq!(report["options"]["pages"], "200");
    assert_eq!(
        report["pages"].as_u64().unwrap() + report["zero_pages"].as_u64().unwrap(),
        30 * 200
    );
    let names: Vec<_> = report["phases"].as_array().unwrap().iter().collect();
    let run = RunFile::read(Path::new(&format!("{prefix}.run.json"))).unwrap();
    assert_eq!((run.name.as_str(), run.checkpoints.len()), ("epoll", 30));
    assert_eq!(run.phases().len(), names.len());
    for phase in names {
        let name = phase["phase"].as_str().unwrap();
        assert_eq!(phase["max_ns"], run.histogram(name).max(), "{name}");
        assert!(Path::new(&format!("{prefix}.{name}.hlog")).exists());
    }
    for checkpoint in &run.checkpoints {
        let phase = |name: &str| checkpoint.phases_ns[name];
        assert_eq!(phase("loaded"), phase("waited") + phase("service"));
        assert!(phase("received") <= phase("loaded") && phase("service") > 0);
    }
    secondary.end();
}

#[test]
fn without_a_schedule_nothing_is_called_waiting() {
    let secondary = Secondary::start(0);
    let address = secondary.address();
    for pace in [["--pace", "max"], ["--interval", "0"]] {
        let shape = "--ram 8M --channels 0 --pages 10 --checkpoints 5 --version 10.0";
        let args: Vec<_> = shape.split(' ').chain(pace).chain(["--to", &address]).collect();
        let report = report(&args);
        assert_eq!(report["options"]["schedule"], "none");
        let phases = report["phases"].as_array().unwrap().iter();
        let names: Vec<_> = phases.map(|phase| phase["phase"].as_str().unwrap()).collect();
        assert_eq!(names, ["replied", "received", "loaded"]);
    }
    secondary.end();
}

#[test]
fn a_preset_is_a_beginning_that_options_override() {
    let scratch = Scratch::new();
    let path = scratch.path().join("upload.cap");
    let path = path.to_str().unwrap();
    let upload = [
        "--preset",
        "file-upload",
        "--ram",
        "64M",
        "--checkpoints",
        "2",
        "--out",
        path,
    ];
    let report = report(&upload);
    let options = &report["options"];
    assert_eq!(options["preset"], "file-upload");
    assert_eq!(options["ram_bytes"], 64 << 20);
    assert_eq!(options["pages"], "lognormal:3500,0.5");
    assert_eq!(options["interval_ms"], 600);
    let streams = Streams::load(Path::new(path)).unwrap();
    assert_eq!(streams.checkpoints.len(), 2);
    assert_eq!(streams.info.unwrap().options["pattern"], "runs:32");
    let again = synth(&upload);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("--force"), "{}", said(&again));
    let length = std::fs::metadata(path).unwrap().len();
    assert_eq!(
        synth(&[&upload[..], &["--force"]].concat()).status.code(),
        Some(0)
    );
    assert_eq!(std::fs::metadata(path).unwrap().len(), length);
}

#[test]
fn wrong_options_are_refused_with_what_would_do() {
    for (args, part) in [
        ("", "--to <ADDRESS>|--out <FILE>"),
        ("--to tcp:1:1 --out x", "cannot be used"),
        ("--out x --run y", "cannot be used"),
        ("--to host", "use tcp:HOST:PORT or unix:PATH"),
        ("--to tcp:127.0.0.1:1 --pages many", "lognormal:MEDIAN,SIGMA"),
        ("--to tcp:127.0.0.1:1 --pattern hotset:2,2", "shares from 0 to 1"),
        ("--to tcp:127.0.0.1:1 --pages 1G", "invalid number of pages"),
        (
            "--to tcp:127.0.0.1:1 --ram 1M --pages 257",
            "not more than the guest's RAM",
        ),
        ("--to tcp:127.0.0.1:1 --ram 4097", "multiple of 4096"),
        ("--to tcp:127.0.0.1:1 --ram 15T", "memory of this machine"),
        ("--to tcp:127.0.0.1:1 --zero 1.5", "between 0 and 1"),
        ("--to tcp:127.0.0.1:1 --zero NaN", "between 0 and 1"),
        ("--to tcp:127.0.0.1:1 --pace max --closed-loop", "cannot be used"),
        ("--to tcp:127.0.0.1:1 --ratio 17", "between 1 and 16"),
        ("--to tcp:127.0.0.1:1 --ratio 2 --content text", "cannot be used"),
        (
            "--to tcp:127.0.0.1:1 --channels 0 --compression zstd",
            "--channels is 0",
        ),
        (
            "--to tcp:127.0.0.1:1 --compression zlib --compression-level 10",
            "0 to 9",
        ),
        (
            "--to tcp:127.0.0.1:1 --compression zstd --compression-level 256",
            "level 256: zstd has the levels 0 to 20",
        ),
        ("--to tcp:127.0.0.1:1 --force", "cannot be used"),
        ("--to tcp:127.0.0.1:1 --compress zstd", "cannot be used"),
    ] {
        let output = synth(&args.split_ascii_whitespace().collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(2), "{args}: {}", said(&output));
        assert!(said(&output).contains(part), "{args}: {}", said(&output));
    }
    let absent = synth(&["--to", "unix:/nonexistent/socket", "--ram", "1M", "--pages", "1"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(said(&absent).contains("is the secondary listening there?"));
}
