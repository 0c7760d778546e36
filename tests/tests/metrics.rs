//! `receive --metrics`: what is shown is what the status says, and nobody who asks for it is felt.

use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::openmetrics::Page;
use colo_ring_tools::primary::SynthPrimary;
use nix::sys::signal::Signal;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// Asks for the page over a connection.
fn scrape(mut connection: impl Read + Write) -> Page {
    connection
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
        .expect("it is read");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    Page::read(body).unwrap_or_else(|rule| panic!("{rule} in\n{body}"))
}

fn address(receiver: &RunningReceiver) -> String {
    until("its metrics", || {
        let log = receiver.log();
        let address = log
            .lines()
            .find_map(|line| line.strip_prefix("serving metrics on tcp:"));
        address.map(str::to_owned)
    })
}

#[test]
fn the_page_shows_what_the_status_says() {
    let name = "web3,peer=127.0.0.1";
    let receiver = RunningReceiver::start(
        wrapped(&[]),
        &[
            "--hugepages",
            "off",
            "--metrics",
            "tcp:127.0.0.1:0",
            "--guest",
            name,
        ],
    );
    let address = address(&receiver);
    let page = || scrape(TcpStream::connect(&address).expect("it listens"));
    let empty = page();
    assert_eq!(
        empty.value("colo_ring_sessions", &[("state", "protected")]),
        Some(0.0)
    );
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    for _ in 0..5 {
        primary.checkpoint().expect("a checkpoint");
    }
    let of = [("guest", "web3"), ("session", "1")];
    let shown = until("five checkpoints", || {
        let page = page();
        (page.value("colo_ring_checkpoints_total", &of) == Some(5.0)).then_some(page)
    });
    let status = receiver.protected();
    for (name, key) in [
        ("colo_ring_received_bytes_total", "bytes"),
        ("colo_ring_pages_total", "pages"),
        ("colo_ring_zero_pages_total", "zero_pages"),
        ("colo_ring_guest_memory_bytes", "ram_bytes"),
        ("colo_ring_pool_bytes", "pool_bytes"),
    ] {
        assert_eq!(shown.value(name, &of), status[key].as_f64(), "{name}");
    }
    for phase in ["pause", "transfer", "commit"] {
        let name = format!("colo_ring_{phase}_seconds");
        assert_eq!(shown.value(&format!("{name}_count"), &of), Some(5.0), "{name}");
        // The histogram's sum is the mean of the summary, times five.
        let phases = status["summary"]["phases"].as_array().expect("a list");
        let summary = phases.iter().find(|summary| summary["phase"] == phase);
        let mean_ns = summary.expect("the phase")["mean_ns"].as_f64().expect("a number");
        let sum = shown.value(&format!("{name}_sum"), &of).expect("a sum");
        assert!(
            (sum - 5.0 * mean_ns / 1e9).abs() < 1e-7,
            "{name}: {sum}, {mean_ns}"
        );
    }
    let state = |page: &Page, state| {
        let labels = [&of[..], &[("state", state)]].concat();
        page.value("colo_ring_guest_state", &labels)
    };
    assert_eq!(
        [state(&shown, "protected"), state(&shown, "ended")],
        [Some(1.0), Some(0.0)]
    );
    assert!(shown.value("colo_ring_checkpoint_age_seconds", &of).is_some());
    // Pages of the last checkpoint are copied out of the pool meanwhile.
    until("the use of the pool", || {
        let used = receiver.protected()["pool_used_bytes"].as_f64();
        let is_part = used.is_some() && used < status["pool_bytes"].as_f64();
        (is_part && page().value("colo_ring_pool_used_bytes", &of) == used).then_some(())
    });
    let about = ["machine", "uuid", "peer", "listener"];
    let about = about.map(|name| (name, status[name].as_str().unwrap_or_default()));
    let info = [&of[..], &about].concat();
    assert_eq!(shown.value("colo_ring_guest_info", &info), Some(1.0), "{info:?}");
    drop(primary);
    let lost = until("its end", || {
        let page = page();
        (state(&page, "ended") == Some(1.0)).then_some(page)
    });
    assert_eq!(lost.value("colo_ring_guest_lost", &of), Some(1.0));
    assert_eq!(lost.value("colo_ring_pause_seconds_count", &of), Some(5.0));
    let _ = receiver.ask(&["discard", "--json", "--session", "1"]);
    until("it is gone", || {
        let page = page();
        let left = page.samples.keys().any(|name| name.contains("web3"));
        (!left).then_some(())
    });
}

/// With the receiver's own sockets, although it is confined.
#[test]
fn a_unix_socket_is_served_and_removed() {
    let scratch = Scratch::new();
    let path = scratch.file("metrics");
    let args = ["--hugepages", "off", "--metrics", &format!("unix:{path}")];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let connect = || UnixStream::connect(&path).ok();
    let page = scrape(until("it listens", connect));
    assert!(page.families.contains_key("colo_ring_build"));
    receiver.signal(Signal::SIGTERM);
    assert!(receiver.wait().status.success());
    assert!(!std::path::Path::new(&path).exists());
}

/// Descriptors and threads of the receiver are bounded, and its guests and operators are served.
#[test]
fn hostile_scrapers_harm_nobody() {
    let receiver = RunningReceiver::start(
        wrapped(&[]),
        &["--hugepages", "off", "--metrics", "tcp:127.0.0.1:0"],
    );
    let address = address(&receiver);
    let open = || std::fs::read_dir(format!("/proc/{}/fd", receiver.pid())).map_or(0, Iterator::count);
    let before = open();
    let mut hostile: Vec<_> = (0..200)
        .map(|_| TcpStream::connect(&address).expect("it listens"))
        .collect();
    for (n, connection) in hostile.iter_mut().enumerate() {
        let nonsense: &[u8] = match n % 4 {
            0 => b"",
            1 => b"GET /metrics HTTP/1.1\r\nX: ",
            2 => b"GET /metrics HTTP/1.1\r\n\r\n",
            _ => &[0xff; 600],
        };
        // It may be closed already.
        let _ = connection.write_all(nonsense);
    }
    let session = receiver.protect();
    assert_eq!(session["checkpoint"], 5);
    let after = open();
    // Sixteen, two that wait for their turn, and what a session and commands need.
    assert!(after < before + 60, "{before} descriptors have become {after}");
    let page = scrape(TcpStream::connect(&address).expect("it listens"));
    assert!(page.families.contains_key("colo_ring_build"));
}
