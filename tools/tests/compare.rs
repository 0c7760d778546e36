//! `colo-ring compare` as its users run it.

mod common;

use colo_ring::host::Machine;
use colo_ring::metrics::{CheckpointSample, Recorder, RunDescription};
use colo_ring::threads::Threads;
use colo_ring_tests::command::Scratch;
use colo_ring_tools::run_file::{Checkpoint, Clock, RunFile};
use common::{assert_refused, foreign_log, json, output, run};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// What a receiver leaves behind: PREFIX.json and a log for every phase.
fn receiver(prefix: &str, pause: impl Fn(u64) -> Duration) {
    let description = RunDescription {
        started: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        options: serde_json::json!({ "backend": "uring" }),
        machine: Machine::read(),
    };
    let mut recorder = Recorder::start(Some(Path::new(prefix)), description, &Threads::free(), drop).unwrap();
    for checkpoint in 1..=500 {
        let pause = pause(checkpoint);
        recorder.record(&CheckpointSample {
            session: 1,
            checkpoint,
            end: Duration::from_millis(checkpoint * 20),
            reply: pause / 100,
            transfer: pause / 2,
            vmstate: pause / 10,
            commit: pause / 4,
            pause,
            flush: pause / 5,
            pages: 10,
            zero_pages: 1,
            bytes: 41_000,
        });
        if checkpoint % 50 == 0 {
            recorder
                .write_interval(Duration::from_millis(checkpoint * 20))
                .unwrap();
        }
    }
    recorder.finish(Duration::from_secs(10)).1.unwrap();
}

fn measured(prefix: &str, name: &str, loaded: impl Fn(u64) -> u64) {
    let options = serde_json::json!({ "pace": "max" });
    let mut file = RunFile::new(name, "colo-ring replay", options, Clock::Primary, UNIX_EPOCH);
    let checkpoint = |n| Checkpoint {
        n,
        at_ns: n * 20_000_000,
        phases_ns: [("loaded".to_owned(), loaded(n))].into(),
        ..Checkpoint::default()
    };
    file.checkpoints = (1..=200).map(checkpoint).collect();
    file.write(Path::new(prefix)).unwrap();
}

fn spread(n: u64) -> u64 {
    1_000_000 + (n * 7919) % 200_000
}

#[test]
fn receivers_are_compared_by_the_logs_beside_their_reports() {
    let scratch = Scratch::new();
    let (slow, fast) = (scratch.file("slow"), scratch.file("fast"));
    receiver(&slow, |n| Duration::from_nanos(spread(n) * 3));
    receiver(&fast, |n| Duration::from_nanos(spread(n)));
    let (slow, fast) = (slow + ".json", fast + ".json");
    let compared = json(&["compare", &slow, &fast]);
    assert_eq!(compared["baseline"], "slow");
    let phases: Vec<_> = compared["phases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|phase| &phase["phase"])
        .collect();
    assert_eq!(
        phases,
        ["reply", "transfer", "vmstate", "commit", "pause", "flush"]
    );
    let pause = &compared["phases"][4]["rows"][1];
    assert_eq!(
        (&pause["count"], &pause["resampled"]),
        (&500.into(), &"counts".into())
    );
    let ratio = pause["ratios"]["p50"]["ratio"].as_f64().unwrap();
    assert!((ratio - 1.0 / 3.0).abs() < 0.01, "{ratio}");
    assert_eq!(pause["ratios"]["p50"]["interval"]["difference_shown"], true);
    assert_eq!(compared["runs"][0]["clock"], "receiver");

    let page = scratch.file("page.html");
    let table = output(&["compare", &slow, &fast, "--phase", "pause", "--html", &page]);
    assert!(table.starts_with("pause "), "{table}");
    assert!(table.contains("lower") && !table.contains("commit"), "{table}");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(
        page.contains("Where the time goes") && page.contains("until it sends"),
        "{page}"
    );

    std::fs::remove_file(scratch.file("fast.vmstate.hlog")).unwrap();
    let (code, _, said) = run(&["compare", &slow, &fast]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("fast.vmstate.hlog") && said.contains("No such file"),
        "{said}"
    );
}

#[test]
fn logs_of_other_languages_are_compared() {
    let named = |language: &str| format!("{language}={}", foreign_log(language));
    let compared = json(&["compare", &named("python"), &named("javascript"), &named("java")]);
    let phase = &compared["phases"][0];
    assert_eq!(phase["phase"], "latency");
    for row in phase["rows"].as_array().unwrap() {
        assert_eq!(
            (&row["count"], &row["p50_ns"]),
            (&1100.into(), &550_399.into()),
            "{row}"
        );
        assert_eq!(row["max_ns"], 5_001_215, "{row}");
        if row["run"] != "python" {
            assert_eq!(row["ratios"]["p99"]["interval"]["difference_shown"], false);
        }
    }
    let microseconds = json(&["compare", "--unit", "us", &foreign_log("java")]);
    assert_eq!(microseconds["phases"][0]["rows"][0]["count"], 1100);
    let p50 = microseconds["phases"][0]["rows"][0]["p50_ns"].as_u64().unwrap();
    assert!(p50.abs_diff(550_399_000) < 550_000, "{p50}");
}

#[test]
fn runs_are_named_merged_and_chosen() {
    let scratch = Scratch::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| scratch.file(name));
    measured(&a, "QEMU", |n| spread(n) * 2);
    measured(&b, "ring", spread);
    measured(&c, "ring", |n| spread(n + 7));
    let [a, b, c] = [a, b, c].map(|prefix| prefix + ".run.json");
    let (code, _, said) = run(&["compare", &a, &b, &c]);
    assert_eq!(code, Some(2));
    assert!(said.contains("\"ring\"") && said.contains("--merge"), "{said}");
    let merged = json(&["compare", &a, &b, &c, "--merge", "--baseline", "ring"]);
    let rows = &merged["phases"][0]["rows"];
    assert_eq!((&rows[0]["count"], &rows[1]["count"]), (&200.into(), &400.into()));
    assert!(rows[1]["ratios"].is_null() && rows[0]["ratios"]["mean"]["ratio"].as_f64().unwrap() > 1.9);
    let named = json(&["compare", &format!("x={b}"), &c]);
    assert_eq!(named["runs"][0]["name"], "x");

    for (args, says) in [
        (vec!["--baseline", "none"], "there are QEMU, ring"),
        (vec!["--phase", "pause"], "there are loaded"),
    ] {
        let (code, _, said) = run(&[vec!["compare", a.as_str(), b.as_str()], args].concat());
        assert_eq!(code, Some(2));
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn the_logs_of_one_run_can_be_given_one_by_one() {
    let scratch = Scratch::new();
    receiver(&scratch.file("x"), |n| Duration::from_nanos(spread(n)));
    let (pause, commit) = (scratch.file("x.pause.hlog"), scratch.file("x.commit.hlog"));
    let compared = json(&["compare", &pause, &commit]);
    assert_eq!(compared["runs"].as_array().unwrap().len(), 1);
    assert_eq!(compared["phases"].as_array().unwrap().len(), 2);
    // Cut in the middle of its last line: what is whole is used, with a warning.
    let log = std::fs::read(&pause).unwrap();
    std::fs::write(&pause, &log[..log.len() - 10]).unwrap();
    let (code, table, said) = run(&["compare", &pause]);
    assert_eq!(code, Some(0));
    assert!(
        said.contains("cut in line") && table.starts_with("pause"),
        "{said}"
    );
}

#[test]
fn what_cannot_be_compared_is_reported_with_its_reason() {
    let scratch = Scratch::new();
    assert_refused(
        "compare",
        &[
            ("none.json", None, "No such file"),
            (
                "a.json",
                Some(b"{\"schema\": \"colo-ring.demo\"}"),
                "has the schema \"colo-ring.demo\"",
            ),
            ("b.json", Some(b"[1]"), "is no run file"),
            ("c.json", Some(b"\xff\xfe"), "is no run file"),
            ("d.hlog", Some(b"# nothing\n"), "has no interval"),
            ("e.hlog", Some(b"<html>\n"), "line 1 (byte 0)"),
            ("f.hlog", Some(b""), "has no interval"),
        ],
    );
    measured(&scratch.file("good"), "good", spread);
    let good = scratch.file("good.run.json");
    let (code, _, said) = run(&["compare", &good, "--html", "/nonexistent/page.html"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("/nonexistent/page.html"), "{said}");
    let (code, _, said) = run(&["compare", &format!("\u{1b}[2J={good}")]);
    assert_eq!(code, Some(2));
    assert!(
        said.contains("control character") && !said.contains('\u{1b}'),
        "{said}"
    );
    assert_eq!(run(&["compare"]).0, Some(2));
}
