//! The command as its users run it: processes, exit codes, files and sockets.

use colo_ring::metrics::Phase;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::command::{Ended, RunningReceiver, Scratch, until};
use colo_ring_tests::schema;
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use nix::sys::signal::Signal;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_colo-ring"))
}

fn run(args: &[&str]) -> Output {
    command().args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn receiver(more: &[&str]) -> RunningReceiver {
    RunningReceiver::start(command(), &[&["--hugepages", "thp"], more].concat())
}

fn guest() -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        channels: 2,
        dirty_pages: Distribution::Fixed(50),
        interval: Duration::from_millis(5),
        ..SynthOptions::new(Version::V11_1)
    }
}

#[test]
fn a_session_is_shown_dumped_and_reported() {
    let receiver = receiver(&["--once"]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    for _ in 0..5 {
        primary.checkpoint().unwrap();
    }
    let session = &receiver.status()["sessions"][0];
    assert_eq!(session["state"], "protected");
    assert_eq!(session["checkpoint"], 5);
    let table = receiver.command(&["status"]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("protected"));

    let scratch = Scratch::new();
    let out = scratch.file("dump");
    let number = session["session"].to_string();
    let dumped = receiver.ask(&["dump", "--session", &number, "--out", &out, "--json"]);
    assert_eq!(dumped["checkpoint"], 5);
    let listed = schema::document(&std::fs::read(Path::new(&out).join("checkpoint.json")).unwrap());
    assert_eq!(listed, dumped);
    for block in dumped["blocks"].as_array().unwrap() {
        let name = block["name"].as_str().unwrap();
        let written = std::fs::read(Path::new(&out).join(block["file"].as_str().unwrap())).unwrap();
        let image = primary.image(name).unwrap();
        assert!(*image == *written, "{name} differs from the primary's memory");
    }

    primary.close().unwrap();
    let ended = receiver.wait();
    assert_eq!(ended.status.code(), Some(0));
    let end = ended.log.lines().find(|line| line.contains("session 1 ended: "));
    let end = end.expect("the end in the log");
    assert!(
        end.ends_with("checkpoint 5 was the last, and ended with this receiver"),
        "{end}"
    );
    let report = &ended.report;
    assert_eq!(report["schema"], "colo-ring.receive");
    assert_eq!(report["report"]["total"]["checkpoints"], 5);
    assert_eq!(report["report"]["options"]["channels"], 2);
    assert_eq!(ended.histograms, report["report"]);
    for phase in Phase::ALL {
        let log = ended.read(&format!("hist.{phase}.hlog"));
        assert!(log.contains("\nTag=session-1,"), "{phase}: {log}");
    }
}

#[test]
fn signals_end_it_cleanly() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let ram_dir = ["--ram-dir", directory.path().to_str().unwrap()];
    for (signal, files) in [(Signal::SIGTERM, &[][..]), (Signal::SIGINT, &ram_dir)] {
        let unix = Scratch::new();
        let listen = format!("unix:{}", unix.file("listen"));
        let receiver = receiver(&[&["--listen", &listen], files].concat());
        let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
        primary.checkpoint().unwrap();
        let control = receiver.control_path();
        receiver.signal(Signal::SIGHUP);
        receiver.wait_for_log("SIGHUP: the configuration is as before");
        assert!(Path::new(&control).exists());
        receiver.signal(signal);
        let ended = receiver.wait();
        assert_eq!(ended.status.code(), Some(0));
        let left = [&unix.file("listen"), &control].map(|path| Path::new(path).exists());
        assert_eq!(left, [false; 2], "its sockets leave no file");
        assert_eq!(ended.report["sessions"][0]["checkpoint"], 1);
        // Of what is in memory alone nothing is left.
        let is_kept = !files.is_empty();
        let kept: &[u64] = if is_kept { &[1] } else { &[] };
        assert_eq!(ended.report["kept"], serde_json::json!(kept));
        let end = ended
            .log
            .lines()
            .find(|line| line.starts_with("session 1 ended: "));
        let end = end.expect("it is logged, and no loss");
        assert_eq!(end.ends_with("is kept"), is_kept, "{end}");
        assert_eq!(end.ends_with("ended with this receiver"), !is_kept, "{end}");
        assert!(ended.histograms.is_object());
        assert!(
            primary.checkpoint().is_err(),
            "the primary must see that its secondary is gone"
        );
    }
}

/// Also by a confined receiver, and when an editor has put another file in the place of the first.
#[test]
fn a_configuration_is_read_and_read_again() {
    let scratch = Scratch::new();
    let file = scratch.file("receive.toml");
    let write = |text: &str| {
        std::fs::write(scratch.file("new"), text).unwrap();
        std::fs::rename(scratch.file("new"), &file).unwrap();
    };
    write("channels = 7\nbackend = \"epoll\"\nsessions-per-origin = 1\n");
    let receiver = receiver(&["--config", &file]);
    // Two channels are asked for on the command line, which wins.
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    assert_eq!(receiver.status()["backend"], "epoll");
    assert!(SynthPrimary::connect(receiver.address(), &guest()).is_err());
    write("channels = 7\nbackend = \"uring\"\nsessions-per-origin = 2\n");
    receiver.signal(Signal::SIGHUP);
    receiver.wait_for_log("2 sessions of one origin");
    receiver.wait_for_log("--backend has changed, which takes effect when the receiver is started again");
    let mut second = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    second.checkpoint().unwrap();
    write("sessions-per-origin = 0\n");
    receiver.signal(Signal::SIGHUP);
    receiver.wait_for_log("warning: SIGHUP: everything stays as it is: ");
    receiver.wait_for_log("receive.toml:1:23: sessions-per-origin: invalid value '0'");
    primary.checkpoint().unwrap();
}

#[test]
fn a_wrong_configuration_is_wrong_usage_and_check_says_why() {
    let scratch = Scratch::new();
    let file = scratch.file("receive.toml");
    std::fs::write(
        &file,
        "listen = \"unix:/x\"\nchanels = 4\n\nram-limit = \"much\"\n",
    )
    .unwrap();
    let refused = run(&["receive", "--config", &file]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains(&format!(
            "{file}:2:1: unknown option \"chanels\"; there is \"channels\""
        )),
        "{said}"
    );
    assert!(said.contains(&format!("{file}:4:13: ram-limit: ")), "{said}");
    let help = run(&["receive", "--config", &file, "--help"]);
    assert!(help.status.success());
    let checked = run(&["check", "--config", &file, "--json"]);
    assert_eq!(checked.status.code(), Some(1));
    let checked = schema::document(&checked.stdout);
    assert_eq!(checked["faults"][0]["line"], 2);
    assert_eq!(checked["faults"][1]["column"], 13);
    // Right one by one, and wrong together.
    std::fs::write(&file, "listen = \"unix:/x\"\ndisk-log-max = \"1G\"\n").unwrap();
    let checked = run(&["check", "--config", &file]);
    assert_eq!(checked.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&checked.stdout).contains("--disks"));
    std::fs::write(&file, "listen = \"unix:/x\"\n").unwrap();
    assert!(run(&["check", "--config", &file]).status.success());
}

#[test]
fn once_fails_if_nothing_was_protected() {
    let receiver = receiver(&["--once"]);
    receiver.signal(Signal::SIGTERM);
    assert_eq!(receiver.wait().status.code(), Some(1));
}

#[test]
fn strangers_cost_nothing() {
    let receiver = receiver(&["--once", "--accept-timeout", "1"]);
    let Address::Tcp(address) = receiver.address().clone() else {
        panic!("it listens on TCP")
    };
    let mut browser = TcpStream::connect(&address).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let silent = TcpStream::connect(&address).unwrap();
    for mut stranger in [browser, silent] {
        stranger.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        // It goes on after an interruption, as `read` does not.
        let closed = stranger.read_to_end(&mut Vec::new());
        let kind = closed.as_ref().err().map(std::io::Error::kind);
        assert!(
            matches!(closed, Ok(0)) || kind == Some(std::io::ErrorKind::ConnectionReset),
            "{closed:?}"
        );
    }
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    primary.close().unwrap();
    let Ended { status, log, .. } = receiver.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("HTTP"), "{log}");
}

#[test]
fn a_guest_over_the_limit_is_refused_and_the_next_one_taken() {
    let receiver = receiver(&["--ram-limit", "64M"]);
    let big = SynthOptions {
        ram_bytes: 64 << 20,
        ..guest()
    };
    assert!(SynthPrimary::connect(receiver.address(), &big).is_err());
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    primary.checkpoint().unwrap();
}

#[test]
fn an_ended_session_is_kept_until_it_is_discarded() {
    let receiver = receiver(&[]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    let refused = receiver.command(&["discard", "--session", "1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("running"), "{}", said(&refused));
    assert_eq!(receiver.status()["sessions"][0]["checkpoint"], 1);
    primary.close().unwrap();
    // Refused until the last of its connections has left.
    until("the discard", || {
        let output = receiver.command(&["discard", "--session", "1"]);
        output.status.success().then_some(())
    });
    assert_eq!(receiver.status()["sessions"], serde_json::json!([]));
    assert_eq!(receiver.status()["ram_held_bytes"], 0);
}

#[test]
fn a_port_in_use_is_reported() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("tcp:{}", taken.local_addr().unwrap());
    let output = run(&["receive", "--listen", &listen]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("ss -lntpx") && said(&output).contains(&listen),
        "{}",
        said(&output)
    );
}

#[test]
fn without_a_receiver_the_control_commands_say_so() {
    let scratch = Scratch::new();
    let control = format!("unix:{}", scratch.file("control"));
    let out = scratch.file("dump");
    for args in [
        vec!["status", "--control", &control],
        vec!["discard", "--control", &control, "--session", "1"],
        vec!["dump", "--control", &control, "--session", "1", "--out", &out],
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(
            said(&output).contains("is a receiver running"),
            "{}",
            said(&output)
        );
    }
    assert!(
        !Path::new(&out).exists(),
        "a dump that failed leaves nothing behind"
    );
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in [
        vec!["receive"],
        vec!["receive", "--listen", "4444"],
        vec!["receive", "--listen", "unix:/tmp/x", "--ram-limit", "0"],
        vec!["nonsense"],
        vec![],
    ] {
        assert_eq!(run(&args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn the_doctor_reports_for_machines() {
    let output = run(&["doctor", "--json"]);
    let report = schema::document(&output.stdout);
    assert_eq!(report["schema"], "colo-ring.doctor");
    assert_eq!(
        output.status.code(),
        Some(if report["usable"] == true { 0 } else { 1 })
    );
    for check in report["checks"].as_array().unwrap() {
        assert!(
            ["ok", "warn", "missing"].contains(&check["state"].as_str().unwrap()),
            "{check}"
        );
    }
}

#[test]
fn the_demo_measures_every_variant_or_says_why_not() {
    const MAIN: [&str; 4] = ["colo-ring", "with epoll", "QEMU's way", "sink"];
    let scratch = Scratch::new();
    let page = scratch.file("page.html");
    let small = "--ram 8M --pages 50 --checkpoints 12 --interval 1 --rounds 2";
    let small: Vec<_> = small.split(' ').chain(["--html", &page]).collect();
    let output = run(&[&["demo", "--json", "--all"], &small[..]].concat());
    assert!(output.status.success(), "{}", said(&output));
    let report = schema::document(&output.stdout);
    assert_eq!(report["options"]["ram_bytes"], 8 << 20);
    let variants = report["variants"].as_array().unwrap();
    for variant in variants {
        match variant["secondary"].as_str() {
            Some("sink") => assert!(variant["receiver"].is_null()),
            _ => {
                assert_eq!(variant["receiver"]["checkpoints"], 24);
                assert!(variant["memory_bytes"].as_u64().unwrap() > 8 << 20);
            }
        }
        assert!(variant["cpu_ns_per_checkpoint"].as_u64().unwrap() > 0);
        let mut primary = variant["primary"].as_array().unwrap().iter();
        let loaded = primary.find(|figures| figures["phase"] == "loaded").unwrap();
        assert_eq!(loaded["count"], 24);
    }
    let warnings = report["warnings"].to_string();
    for name in ["uring", "epoll", "threads"] {
        let measured = variants.iter().any(|variant| variant["backend"] == name);
        assert!(
            measured || warnings.contains(&format!("{name} is not available")),
            "{name}: {warnings}"
        );
    }
    let compared = report["comparison"]["runs"].as_array().unwrap();
    assert_eq!(compared.len(), variants.len());
    let text = std::fs::read_to_string(&page).unwrap();
    for variant in variants {
        let name = variant["name"].as_str().unwrap().replace('\'', "&#39;");
        assert!(
            text.contains(&name) || text.contains(variant["name"].as_str().unwrap()),
            "{name}"
        );
    }
    for (name, mark) in [
        ("QEMU's way", "baseline"),
        ("sink", "floor"),
        ("colo-ring", "default"),
    ] {
        let is_there = variants.iter().any(|variant| variant["name"] == name);
        let marked = format!("{name} <span class=\"tag\">{mark}</span>");
        assert_eq!(text.contains(&marked), is_there, "{marked}");
    }
    let message = report["message"].as_str().unwrap();
    assert!(
        message.contains("the guest stands still for") && message.contains("95 %"),
        "{message}"
    );

    // For people, and where the page cannot be written: the figures are printed all the same.
    let nowhere: Vec<_> = small
        .iter()
        .map(|arg| {
            if *arg == page {
                "/nonexistent/page.html"
            } else {
                arg
            }
        })
        .collect();
    for options in [&["demo"][..], &["demo", "--all"]] {
        let output = run(&[options, &nowhere[..]].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(
            said(&output).contains("cannot write the page /nonexistent/page.html"),
            "{}",
            said(&output)
        );
        let table = String::from_utf8_lossy(&output.stdout);
        // Without io_uring there is no first one.
        let has = |name: &&str| table.lines().any(|line| line.starts_with(*name));
        assert!(MAIN[1..].iter().all(has), "{table}");
        let is_whole = table.lines().any(|line| line.starts_with("epoll mirror sync"));
        assert_eq!(is_whole, options.len() > 1, "{table}");
        assert!(table.contains("the guest stands still for"), "{table}");
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    }
}
