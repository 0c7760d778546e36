//! `colo-ring inspect` as its users run it.

mod common;

use colo_ring_tests::command::Scratch;
use common::{assert_refused, command, foreign_log, json, output, run};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

const CHECKPOINTS: u64 = 5;

/// A capture of a synthetic session, as `colo-ring synth` writes it.
fn capture(scratch: &Scratch, channels: &str, pages: &str, version: &str) -> String {
    let path = scratch.file(&format!("{channels}.cap"));
    let checkpoints = CHECKPOINTS.to_string();
    let args = [
        "synth",
        "--out",
        &path,
        "--ram",
        "4M",
        "--checkpoints",
        &checkpoints,
    ];
    let shape = ["--pages", pages, "--channels", channels, "--version", version];
    assert_eq!(run(&[&args[..], &shape].concat()).0, Some(0));
    path
}

fn list<'a>(value: &'a Value, key: &str) -> &'a Vec<Value> {
    value[key]
        .as_array()
        .unwrap_or_else(|| panic!("{key} is missing in {value}"))
}

fn sum(items: &[Value], key: &str) -> u64 {
    items.iter().map(|item| item[key].as_u64().unwrap()).sum()
}

#[test]
fn everything_in_a_capture_is_listed_once() {
    let scratch = Scratch::new();
    for version in ["11.1", "10.0", "7.2"] {
        let path = capture(&scratch, "2", "100", version);
        let overview = json(&["inspect", &path]);
        assert_eq!(
            (&overview["schema"], &overview["schema_version"]),
            (&"colo-ring.inspect".into(), &1.into())
        );
        assert_eq!(overview["session"]["checkpoints"], CHECKPOINTS);
        assert!(overview["capture"]["torn"].is_null() && overview["capture"]["finished"] == true);
        let connections = list(&overview["capture"], "connections");
        let sent = |index: usize| connections[index]["to_secondary"]["bytes"].as_u64().unwrap();

        let packets = json(&["inspect", &path, "--kind", "packets"]);
        let packets = list(&packets, "packets");
        for channel in 0..2 {
            let of_channel = packets.iter().filter(|packet| packet["channel"] == channel);
            let mut end = 64;
            for packet in of_channel {
                assert_eq!(packet["offset"], end, "{packet}");
                end += packet["bytes"].as_u64().unwrap();
            }
            // The init packet and all others are the whole connection.
            assert_eq!(end, sent(channel + 1));
        }
        let sections = json(&["inspect", &path, "--kind", "sections"]);
        let pages = json(&["inspect", &path, "--kind", "packets", "--channel", "main"]);
        let mut elements = [&list(&sections, "sections")[..], list(&pages, "packets")].concat();
        elements.sort_by_key(|element| element["offset"].as_u64());
        let mut end = 0;
        for element in elements {
            assert_eq!(element["offset"], end, "{element}");
            assert_ne!(element["what"], "not named", "{element}");
            end += element["bytes"].as_u64().unwrap();
        }
        assert_eq!(end, sent(0));

        let checkpoints = json(&["inspect", &path, "--kind", "checkpoints"]);
        let checkpoints = list(&checkpoints, "checkpoints");
        let in_checkpoints = |items: &[Value]| {
            let items = items.iter().filter(|item| item["checkpoint"] != 0);
            items.cloned().collect::<Vec<_>>()
        };
        let packets = in_checkpoints(packets);
        // Older versions send zero pages on the main channel.
        let on_main = in_checkpoints(list(&pages, "packets")).len() as u64;
        assert_eq!(
            sum(checkpoints, "pages") + sum(checkpoints, "zero_pages"),
            sum(&packets, "pages") + sum(&packets, "zero_pages") + on_main
        );
        assert_eq!(overview["session"]["pages"], sum(checkpoints, "pages"));
        assert!(checkpoints[0]["gap_ns"].is_null() && checkpoints[1]["gap_ns"].as_u64() > Some(0));
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn compression_is_shown_for_each_channel_and_checkpoint() {
    let scratch = Scratch::new();
    let path = scratch.file("zstd.cap");
    let shape = "--ram 4M --checkpoints 3 --pages 200 --channels 2 --zero 0.5 --ratio 4 --compression zstd";
    let args: Vec<_> = ["synth", "--out", &path]
        .into_iter()
        .chain(shape.split(' '))
        .collect();
    assert_eq!(run(&args).0, Some(0));
    let is_about_4 = |item: &Value| {
        let ratio = item["ratio"].as_f64().unwrap();
        assert!((3.4..4.6).contains(&ratio), "{item}");
    };
    let session = &json(&["inspect", &path])["session"];
    assert_eq!(session["compression"], "zstd");
    is_about_4(session);
    for channel in list(session, "channels") {
        assert_eq!(channel["method"], "zstd");
        is_about_4(channel);
    }
    let checkpoints = json(&["inspect", &path, "--kind", "checkpoints"]);
    let checkpoints = list(&checkpoints, "checkpoints");
    checkpoints.iter().for_each(is_about_4);
    assert_eq!(
        sum(checkpoints, "payload_bytes"),
        session["payload_bytes"].as_u64().unwrap()
    );
    let text = output(&["inspect", &path]);
    assert!(
        text.contains("pages by zstd") && text.contains("; zstd: "),
        "{text}"
    );

    let plain = capture(&scratch, "0", "100", "11.1");
    let session = &json(&["inspect", &plain])["session"];
    assert_eq!(
        (&session["compression"], &session["ratio"]),
        (&"none".into(), &1.0.into())
    );
    assert!(!output(&["inspect", &plain]).contains("pages by"));
}

#[test]
fn filters_leave_what_was_asked_for() {
    let scratch = Scratch::new();
    let path = capture(&scratch, "2", "100", "11.1");
    let args = [
        "inspect",
        &path,
        "--kind",
        "packets",
        "--channel",
        "1",
        "--checkpoint",
        "2..3",
    ];
    let packets = json(&args);
    let packets = list(&packets, "packets");
    assert!(!packets.is_empty());
    for packet in packets {
        assert_eq!(packet["channel"], 1);
        assert!(packet["checkpoint"] == 2 || packet["checkpoint"] == 3, "{packet}");
    }
    assert_eq!(output(&args).lines().count(), packets.len() + 1);
    let one = json(&["inspect", &path, "--kind", "checkpoints", "--checkpoint", "5"]);
    assert_eq!(list(&one, "checkpoints").len(), 1);
    let none = json(&["inspect", &path, "--kind", "checkpoints", "--checkpoint", "6..9"]);
    assert!(list(&none, "checkpoints").is_empty());
    for (args, says) in [
        (
            vec!["--kind", "packets", "--channel", "2"],
            "there is no channel 2",
        ),
        (
            vec!["--kind", "sections", "--channel", "0"],
            "on the main channel",
        ),
        (vec!["--kind", "intervals"], "is a capture"),
        (vec!["--checkpoint", "3..1"], "3 comes after 1"),
    ] {
        let (code, _, said) = run(&[vec!["inspect", path.as_str()], args].concat());
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(says), "{says}: {said}");
    }
}

#[test]
fn pages_of_a_plain_session_are_on_its_main_channel() {
    let scratch = Scratch::new();
    let path = capture(&scratch, "0", "100", "11.1");
    let pages = json(&["inspect", &path, "--kind", "packets", "--checkpoint", "1..5"]);
    let checkpoints = json(&["inspect", &path, "--kind", "checkpoints"]);
    let checkpoints = list(&checkpoints, "checkpoints");
    let expected = sum(checkpoints, "pages") + sum(checkpoints, "zero_pages");
    assert_eq!(list(&pages, "packets").len() as u64, expected);
}

#[test]
fn a_torn_capture_is_shown_up_to_the_tear_and_a_damaged_one_is_not() {
    let scratch = Scratch::new();
    let path = capture(&scratch, "1", "900", "11.1");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() * 3 / 4]).unwrap();
    let (code, shown, _) = run(&["inspect", &path]);
    assert_eq!(code, Some(0));
    assert!(shown.contains("it ends early, at byte"), "{shown}");
    let (code, listed, said) = run(&["inspect", &path, "--kind", "packets"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("the file ends early") && listed.lines().count() > 5,
        "{said}"
    );

    let mut damaged = whole.clone();
    let at = damaged.len() / 8;
    damaged[at] ^= 0x10;
    std::fs::write(&path, &damaged).unwrap();
    for kind in [&[][..], &["--kind", "connections"], &["--kind", "packets"]] {
        let (code, _, said) = run(&[&["inspect", path.as_str()], kind].concat());
        assert_eq!(code, Some(1));
        assert!(said.contains("damaged") && said.contains("byte"), "{said}");
    }
}

#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let scratch = Scratch::new();
    let path = capture(&scratch, "0", "900", "11.1");
    for json in [&[][..], &["--json"]] {
        let args = [&["inspect", path.as_str(), "--kind", "packets"], json].concat();
        // More than a pipe holds, so that the command meets its end.
        assert!(output(&args).len() > 200_000);
        let process = command()
            .args(&args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut process = process.unwrap();
        let mut line = String::new();
        let mut pipe = BufReader::with_capacity(16, process.stdout.take().unwrap());
        pipe.read_line(&mut line).unwrap();
        drop(pipe);
        let ended = process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!((ended.status.code(), said.as_ref()), (Some(0), ""));
        assert!(!line.is_empty());
    }
}

#[test]
fn logs_of_any_language_are_shown() {
    for language in ["python", "javascript", "java"] {
        let path = foreign_log(language);
        let log = json(&["inspect", &path]);
        assert_eq!(
            (&log["intervals"], &log["total"]["count"]),
            (&3.into(), &1100.into()),
            "{language}"
        );
        assert_eq!(log["total"]["p50_ns"], 550_399, "{language}");
        let intervals = json(&["inspect", &path, "--kind", "intervals"]);
        let intervals = list(&intervals, "intervals");
        let counts: Vec<_> = intervals.iter().map(|interval| &interval["count"]).collect();
        assert_eq!(counts, [1000, 100, 0], "{language}");
        assert_eq!(intervals[1]["start_s"], 2.0, "{language}");
        let tagged = language != "python";
        assert_eq!(
            intervals[1]["tag"],
            if tagged { "second".into() } else { Value::Null },
            "{language}"
        );
        assert_eq!(list(&log, "tags").len(), usize::from(tagged), "{language}");
        assert!(output(&["inspect", &path]).contains("1100"));
    }
}

#[test]
fn runs_are_shown_and_their_checkpoints_listed() {
    use colo_ring_tools::run_file::{Checkpoint, Clock, RunFile};
    let scratch = Scratch::new();
    let mut file = RunFile::new(
        "a run",
        "colo-ring replay",
        Value::Null,
        Clock::Primary,
        std::time::UNIX_EPOCH,
    );
    file.checkpoints = (1..=30)
        .map(|n| Checkpoint {
            n,
            phases_ns: [("loaded".to_owned(), n * 1_000_000)].into(),
            disturbed: (n == 7).then(|| "\u{1b}[2J".to_owned()),
            ..Checkpoint::default()
        })
        .collect();
    file.write(scratch.file("x").as_ref()).unwrap();
    let path = scratch.file("x.run.json");
    let shown = output(&["inspect", &path]);
    assert!(
        shown.contains("a measured run: a run") && shown.contains("loaded"),
        "{shown}"
    );
    let listed = output(&["inspect", &path, "--kind", "checkpoints", "--checkpoint", "6..8"]);
    assert_eq!(listed.lines().count(), 4);
    assert!(!listed.contains('\u{1b}'), "{listed}");
    assert!(
        listed.contains("disturbed") && !listed.contains("round"),
        "{listed}"
    );
    file.checkpoints
        .iter_mut()
        .for_each(|checkpoint| checkpoint.disturbed = None);
    file.checkpoints[29].round = 1;
    file.write(scratch.file("x").as_ref()).unwrap();
    let listed = output(&["inspect", &path, "--kind", "checkpoints"]);
    assert!(
        listed.contains("round") && !listed.contains("disturbed"),
        "{listed}"
    );
    let listed = json(&["inspect", &path, "--kind", "checkpoints"]);
    assert_eq!(list(&listed, "checkpoints").len(), 30);
}

#[test]
fn foreign_files_are_refused() {
    assert_refused(
        "inspect",
        &[
            ("none", None, "No such file"),
            ("empty", Some(b""), "has no interval"),
            (
                "elf",
                Some(b"\x7fELF\x02\x01\x01\n\n"),
                "is this an HdrHistogram log?",
            ),
            ("a.json", Some(b"{\"schema\": \"x\"}"), "has the schema \"x\""),
            ("b.json", Some(b"{"), "is not a file of colo-ring"),
            ("a.cap", Some(b"\x89CLR\n\x1a\n"), "as binary"),
            ("b.cap", Some(b"\xd4\xc3\xb2\xa1 pcap"), "pcap recording"),
        ],
    );
}

fn is_narrow<'a>(lines: impl Iterator<Item = &'a str>) {
    let mut count = 0;
    for line in lines {
        let columns = line.chars().count();
        assert!(columns <= 80, "{columns} columns: {line}");
        count += 1;
    }
    assert!(count > 1, "no table");
}

fn narrow(args: &[&str]) -> String {
    let listed = output(args);
    is_narrow(listed.lines());
    listed
}

#[test]
fn listings_fit_80_columns() {
    let scratch = Scratch::new();
    let (path, prefix) = (scratch.file("zstd.cap"), scratch.file("run"));
    let shape = "--ram 64M --checkpoints 3 --pages 9000 --channels 4 --ratio 4 --compression zstd";
    let shape: Vec<_> = shape.split(' ').collect();
    assert_eq!(run(&[&["synth", "--out", &path], &shape[..]].concat()).0, Some(0));
    let overview = output(&["inspect", &path]);
    is_narrow(
        overview
            .lines()
            .skip_while(|line| !line.starts_with("connection "))
            .take(6),
    );
    let checkpoints = narrow(&["inspect", &path, "--kind", "checkpoints"]);
    for column in [
        "ckpt", "gap", "pages", "zero", "MiB", "ratio", "received", "loaded",
    ] {
        assert!(
            checkpoints.lines().next().unwrap().contains(column),
            "{column}: {checkpoints}"
        );
    }
    let packets = output(&["inspect", &path, "--kind", "packets"]);
    // The last column has a block's name, which the guest chooses.
    let in_ram = |line: &&str| line.ends_with("what") || line.ends_with("pc.ram") || line.ends_with("SYNC");
    is_narrow(packets.lines().filter(in_ram));
    assert!(
        packets.contains("zstd pc.ram") && packets.contains(" SYNC"),
        "{packets}"
    );

    let (code, _, said) = run(&["replay", &path, "--sink", "--out", &prefix, "--repeat", "2"]);
    assert_eq!(code, Some(0), "{said}");
    let listed = output(&["inspect", &format!("{prefix}.run.json"), "--kind", "checkpoints"]);
    // Why a checkpoint was disturbed is a sentence, and on a busy machine there is one.
    is_narrow(
        listed
            .lines()
            .filter_map(|line| line.split("  other processes").next()),
    );
    assert!(
        listed.contains("round") && listed.contains("received"),
        "{listed}"
    );
    narrow(&["inspect", &format!("{prefix}.loaded.hlog"), "--kind", "intervals"]);
}
