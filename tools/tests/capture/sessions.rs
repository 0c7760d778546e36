//! Whole sessions of a synthetic primary, through the recorder to a receiver.

use crate::harness::{By, capture, guest, read, receiver, run};
use colo_ring::wire::codec::Method;
use colo_ring_tests::command::{Scratch, until};
use colo_ring_tools::capture_file::EndKind;
use colo_ring_tools::net::Address;
use colo_ring_tools::page_compression::PageCompression;
use colo_ring_tools::primary::{SynthOptions, SynthPrimary};
use colo_ring_tools::streams::Streams;
use nix::sys::signal::Signal;
use std::path::Path;
use std::time::{Duration, Instant};

const CHECKPOINTS: u64 = 20;

/// What the receiver has committed is what the primary has.
fn assert_committed(scratch: &Scratch, primary: &SynthPrimary, checkpoint: u64) {
    let control = format!("unix:{}", scratch.file("control"));
    let out = scratch.file("dump");
    let dump = run(&[
        "dump",
        "--control",
        &control,
        "--session",
        "1",
        "--out",
        &out,
        "--json",
    ]);
    assert_eq!(dump.code, Some(0), "{}", dump.log);
    let dumped = dump.report();
    assert_eq!(dumped["checkpoint"], checkpoint);
    for block in dumped["blocks"].as_array().unwrap() {
        let name = block["name"].as_str().unwrap();
        let written = std::fs::read(Path::new(&out).join(block["file"].as_str().unwrap())).unwrap();
        assert!(
            *primary.image(name).unwrap() == *written,
            "{name} differs from the primary's memory"
        );
    }
    std::fs::remove_dir_all(&out).unwrap();
}

/// A primary after so many checkpoints, and the lower quartile of their pauses: a busy machine makes some longer.
fn protect(address: &Address, checkpoints: u64) -> (SynthPrimary, Duration) {
    let mut primary = SynthPrimary::connect(address, &guest()).unwrap();
    let mut pauses: Vec<_> = (0..checkpoints)
        .map(|_| primary.checkpoint().unwrap().service())
        .collect();
    pauses.sort_unstable();
    (primary, pauses[pauses.len() / 4])
}

/// The same without a recorder between them.
fn direct_pause() -> Duration {
    let scratch = Scratch::new();
    let mut secondary = receiver(&scratch);
    let (primary, pause) = protect(&secondary.address, CHECKPOINTS);
    primary.close().unwrap();
    assert_eq!(secondary.wait().code, Some(0));
    pause
}

#[test]
fn how_pages_are_compressed_is_reported() {
    let scratch = Scratch::new();
    let mut secondary = receiver(&scratch);
    let mut proxy = capture(&scratch, &secondary.address, By::Itself, &[]);
    let shape = SynthOptions {
        compression: PageCompression {
            method: Method::Zstd,
            level: Some(1),
        },
        ..guest()
    };
    let mut primary = SynthPrimary::connect(&proxy.address, &shape).unwrap();
    primary.checkpoint().unwrap();
    primary.close().unwrap();
    assert_eq!(secondary.wait().code, Some(0));
    let report = proxy.wait().report();
    assert_eq!(report["compression"], "zstd", "{report}");
    for connection in report["connections"].as_array().unwrap() {
        let expected = match connection["kind"].as_str() {
            Some("multifd") => "zstd".into(),
            _ => serde_json::Value::Null,
        };
        assert_eq!(connection["compression"], expected, "{report}");
    }
}

#[test]
fn a_session_goes_through_and_is_measured() {
    for (by, compress) in [(By::Itself, "zstd"), (By::WithoutUring, "none")] {
        let scratch = Scratch::new();
        let mut secondary = receiver(&scratch);
        let mut proxy = capture(&scratch, &secondary.address, by, &["--compress", compress]);
        let direct = direct_pause();
        let began = Instant::now();
        let (primary, pause) = protect(&proxy.address, CHECKPOINTS);
        // The primary leaves Nagle's algorithm on: where acknowledgements are delayed, every checkpoint takes 40 ms.
        println!("{direct:?} direct, {pause:?} through the recorder");
        assert!(
            pause < 20 * direct,
            "{direct:?} direct, {pause:?} through the recorder"
        );
        assert_committed(&scratch, &primary, CHECKPOINTS);
        primary.close().unwrap();
        assert_eq!(secondary.wait().code, Some(0));
        let ended = proxy.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.log);

        let session_ns = u64::try_from(began.elapsed().as_nanos()).unwrap();
        let report = ended.report();
        assert_eq!(report["schema"], "colo-ring.capture");
        assert_eq!(report["ended_early"], serde_json::Value::Null);
        assert_eq!(report["compression"], "none");
        let added = &report["added"];
        assert_eq!(added["checkpoints"], CHECKPOINTS, "{report}");
        for part in ["both", "to_secondary", "to_primary"] {
            let figure = |key: &str| added[part][key].as_u64().unwrap();
            assert!(
                0 < figure("p50_ns") && figure("p50_ns") <= figure("p99_ns"),
                "{added}"
            );
            assert!(
                figure("p99_ns") <= figure("max_ns") && figure("max_ns") < session_ns,
                "{added}"
            );
        }
        let kinds = |kind: &str| {
            let connections = report["connections"].as_array().unwrap();
            connections
                .iter()
                .filter(|connection| connection["kind"] == kind)
                .count()
        };
        assert_eq!((kinds("main"), kinds("multifd"), kinds("unknown")), (1, 2, 0));

        // The file holds the session, as the protocol sees it.
        let contents = read(&scratch);
        assert_eq!(contents.tear, None);
        assert!(
            contents
                .flows
                .values()
                .flatten()
                .all(|flow| flow.end == Some(EndKind::Eof))
        );
        let streams = Streams::load(Path::new(&scratch.file("cap"))).unwrap();
        assert_eq!(streams.checkpoints.len() as u64, CHECKPOINTS);
        assert_eq!(report["recorded"]["connections"], 3);
    }
}

/// The file can be read while the session goes on.
#[test]
fn the_file_grows_with_the_session() {
    let scratch = Scratch::new();
    let secondary = receiver(&scratch);
    let proxy = capture(&scratch, &secondary.address, By::Itself, &[]);
    let (mut primary, _) = protect(&proxy.address, 3);
    let checkpoints = |at_least: usize| {
        until(&format!("checkpoint {at_least}"), || {
            assert!(read(&scratch).tear.is_some(), "it was not finished");
            let streams = Streams::load(Path::new(&scratch.file("cap"))).ok()?;
            (streams.checkpoints.len() >= at_least).then_some(())
        });
    };
    checkpoints(3);
    primary.checkpoint().unwrap();
    checkpoints(4);
}

/// The first signal ends the recording alone, the second the connections.
#[test]
fn signals_end_the_recording_before_the_session() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let scratch = Scratch::new();
        let secondary = receiver(&scratch);
        let mut proxy = capture(&scratch, &secondary.address, By::Itself, &[]);
        let (mut primary, _) = protect(&proxy.address, 3);
        proxy.signal(signal);
        proxy.wait_for("the recording is ended");
        for _ in 0..3 {
            primary.checkpoint().unwrap();
        }
        assert_committed(&scratch, &primary, 6);
        assert!(proxy.is_running());
        proxy.signal(signal);
        let ended = proxy.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.log);
        assert!(primary.checkpoint().is_err(), "its connection is closed");
        assert_eq!(read(&scratch).tear, None);
        let streams = Streams::load(Path::new(&scratch.file("cap"))).unwrap();
        assert!(
            (3..6).contains(&streams.checkpoints.len()),
            "{}",
            streams.checkpoints.len()
        );
        assert_eq!(ended.report()["added"]["checkpoints"], 6, "measuring goes on");
    }
}

#[test]
fn without_a_primary_it_ends_at_once_and_says_so() {
    let scratch = Scratch::new();
    let mut proxy = capture(&scratch, &"tcp:127.0.0.1:1".parse().unwrap(), By::Itself, &[]);
    proxy.signal(Signal::SIGINT);
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(1));
    assert!(ended.log.contains("no primary connected"), "{}", ended.log);
    let contents = read(&scratch);
    assert!(contents.tear.is_none() && contents.flows.is_empty());
}
