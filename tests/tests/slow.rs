//! `colo-ring slow` against a receiver whose checkpoints are delayed by different causes: the right one is blamed. And what is left
//! of the flight recorder after a kill.

use colo_ring::host::{allowed_cores, pin};
use colo_ring::wire::colo::Message;
use colo_ring_tests::command::{RunningReceiver, run, until, wrapped};
use colo_ring_tests::schema;
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Checkpoints that nothing delays, and those that something does.
const USUAL: u64 = 30;
const DELAYED: u64 = 8;

fn guest(pages: u64) -> SynthOptions {
    SynthOptions {
        ram_bytes: 64 << 20,
        channels: 2,
        dirty_pages: Distribution::Fixed(pages),
        interval: Duration::from_millis(10),
        ..SynthOptions::new(Version::V11_1)
    }
}

/// On the first core alone, so that the others are the primary's.
fn receiver(args: &[&str]) -> RunningReceiver {
    let core = allowed_cores().unwrap()[0].to_string();
    RunningReceiver::start(wrapped(&[]), &[&["--cores", &core], args].concat())
}

fn slow(receiver: &RunningReceiver, args: &[&str]) -> Value {
    let top = DELAYED.to_string();
    let report = receiver.ask(&[&["slow", "--json", "--top", &top], args].concat());
    assert_eq!(report["schema"], "colo-ring.slow");
    assert_eq!(report["damaged"], 0);
    report
}

/// Most of the slowest are blamed on this one, and most of the time that they took longer than usual.
fn is_blamed(report: &Value, whose: &str) {
    let slowest = report["slowest"].as_array().unwrap();
    let blamed: Vec<_> = slowest.iter().filter(|slow| slow["whose"] == whose).collect();
    let excess = |slow: &&Value| slow["excess_ns"].as_u64().unwrap();
    let all: u64 = slowest.iter().map(|slow| excess(&slow)).sum();
    let of_blamed: u64 = blamed.iter().map(excess).sum();
    assert!(
        blamed.len() * 2 > slowest.len() && of_blamed * 2 > all,
        "{whose}: {} of {}, {of_blamed} of {all} ns: {report:#}",
        blamed.len(),
        slowest.len()
    );
}

/// Between primary and receiver: passes everything on, and holds what the primary says after CHECKPOINT_REPLY if it is to.
struct Relay {
    address: Address,
    holds: Arc<AtomicBool>,
}

impl Relay {
    fn start(to: &Address) -> Self {
        let Address::Tcp(to) = to.clone() else {
            panic!("a TCP address is expected");
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let holds: Arc<AtomicBool> = Arc::default();
        let replies: Arc<AtomicU64> = Arc::default();
        let held = holds.clone();
        thread::spawn(move || {
            for primary in listener.incoming().map_while(Result::ok) {
                let receiver = TcpStream::connect(&to).unwrap();
                primary.set_nodelay(true).unwrap();
                receiver.set_nodelay(true).unwrap();
                let (from, into) = (receiver.try_clone().unwrap(), primary.try_clone().unwrap());
                let (own, seen) = (replies.clone(), replies.clone());
                thread::spawn(move || pass(from, into, |bytes| count_reply(bytes, &own)));
                let held = held.clone();
                let mut before = 0;
                thread::spawn(move || {
                    pass(primary, receiver, |_| {
                        let replies = seen.load(Ordering::Acquire);
                        if std::mem::replace(&mut before, replies) != replies && held.load(Ordering::Relaxed)
                        {
                            thread::sleep(Duration::from_millis(100));
                        }
                    });
                });
            }
        });
        Self {
            address: address.parse().unwrap(),
            holds,
        }
    }
}

fn count_reply(bytes: &[u8], replies: &AtomicU64) {
    let mut reply = Vec::new();
    Message::CheckpointReply.encode(&mut reply);
    if bytes == reply {
        replies.fetch_add(1, Ordering::Release);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut seen: impl FnMut(&[u8])) {
    let mut bytes = vec![0; 1 << 18];
    let mut step = || -> io::Result<usize> {
        let read = from.read(&mut bytes)?;
        seen(&bytes[..read]);
        to.write_all(&bytes[..read])?;
        Ok(read)
    };
    while step().is_ok_and(|read| read > 0) {}
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn a_slow_primary_is_blamed() {
    let receiver = receiver(&[]);
    let relay = Relay::start(receiver.address());
    let mut primary = SynthPrimary::connect(&relay.address, &guest(500)).unwrap();
    (0..USUAL).for_each(|_| _ = primary.checkpoint().unwrap());
    relay.holds.store(true, Ordering::Relaxed);
    (0..DELAYED).for_each(|_| _ = primary.checkpoint().unwrap());
    let report = slow(&receiver, &[]);
    is_blamed(&report, "primary");
    let stopping = report["slowest"].as_array().unwrap().iter();
    let stopping = stopping.filter(|slow| slow["what"] == "stopping").count();
    assert!(stopping * 2 > usize::try_from(DELAYED).unwrap(), "{report:#}");
    // For people, too.
    let table = receiver.command(&["slow"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("slower than usual by: "), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
}

/// Threads that always want to run on the receiver's core leave it a part of it.
#[test]
fn a_core_that_is_kept_off_is_blamed_on_the_host() {
    const OTHERS: usize = 6;
    let cores = allowed_cores().unwrap();
    if cores.len() < 2 {
        let name = "a_core_that_is_kept_off_is_blamed_on_the_host";
        return colo_ring_skip::skip(name, "the primary needs a core of its own");
    }
    let receiver = receiver(&[]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let ended = scope.spawn(|| {
            // With the threads that it starts.
            pin(&cores[1..]).unwrap();
            let mut primary = SynthPrimary::connect(receiver.address(), &guest(4000)).unwrap();
            (0..USUAL).for_each(|_| _ = primary.checkpoint().unwrap());
            thread::scope(|scope| {
                for _ in 0..OTHERS {
                    scope.spawn(|| {
                        pin(&cores[..1]).unwrap();
                        while !stop.load(Ordering::Relaxed) {
                            std::hint::spin_loop();
                        }
                    });
                }
                let taken = (0..DELAYED).try_for_each(|_| primary.checkpoint().map(drop));
                stop.store(true, Ordering::Relaxed);
                taken.unwrap();
            });
            is_blamed(&slow(&receiver, &[]), "host");
        });
        let ended = ended.join();
        stop.store(true, Ordering::Relaxed);
        ended.unwrap();
    });
}

/// Pages of zero cost their primary nothing, and the flush as much as others; with `--commit sync` the guest waits for it.
#[test]
fn a_slow_flush_is_blamed_on_the_receiver() {
    let receiver = receiver(&["--commit", "sync"]);
    let shape = SynthOptions {
        dirty_pages: Distribution::Uniform { low: 1, high: 16_000 },
        zero_share: 1.0,
        ..guest(1)
    };
    let mut primary = SynthPrimary::connect(receiver.address(), &shape).unwrap();
    let is_blamed = (1..=10).any(|round: u64| {
        (0..USUAL).for_each(|_| _ = primary.checkpoint().unwrap());
        let top = (round * USUAL).to_string();
        let report = receiver.ask(&["slow", "--json", "--top", &top]);
        let all = report["slowest"].as_array().unwrap();
        // Other work of the machine may be blamed for as much as it delays: what is ours of it is not more for that.
        let (few, many) = (ours(all, |pages| pages < 4000), ours(all, |pages| pages > 12_000));
        assert!(many > 2 * few, "{few} ns, {many} ns: {report:#}");
        // Small ones are received for as long as they are flushed; and where all are delayed by other work, few are blamed on the receiver.
        let blamed = all.iter().filter(|slow| slow["whose"] == "ours");
        let (flushes, others): (Vec<_>, Vec<_>) = blamed.partition(|slow| slow["what"] == "flush");
        println!("{} flushes, {} others", flushes.len(), others.len());
        flushes.len() > others.len()
    });
    assert!(is_blamed);
}

/// The receiver's own time of those whose zero pages are meant, on average, in nanoseconds.
fn ours(checkpoints: &[Value], is_meant: fn(u64) -> bool) -> u64 {
    let meant = checkpoints
        .iter()
        .filter(|slow| is_meant(slow["record"]["zero_pages"].as_u64().unwrap()));
    let parts: Vec<_> = meant
        .map(|slow| {
            let part = |key: &str| slow["split"][key].as_u64().unwrap();
            part("working_ns") + part("waiting_ns")
        })
        .collect();
    parts.iter().sum::<u64>() / (parts.len() as u64).max(1)
}

fn kill(receiver: &RunningReceiver) {
    receiver.signal(Signal::SIGKILL);
    until("its end", || receiver.has_ended().then_some(()));
}

#[test]
fn the_recorder_outlives_a_killed_receiver_and_damage_is_seen() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().to_str().unwrap();
    let killed = receiver(&["--ram-dir", path]);
    let mut primary = SynthPrimary::connect(killed.address(), &guest(100)).unwrap();
    (0..USUAL).for_each(|_| _ = primary.checkpoint().unwrap());
    // The record is written just after the answer.
    until("the last record", || {
        (slow(&killed, &[])["checkpoints"] == USUAL).then_some(())
    });
    kill(&killed);
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let file = names
        .into_iter()
        .find(|path| path.to_str().unwrap().ends_with(".~flight"));
    let file = file.unwrap();
    let inspect = |args: &[&str]| {
        let output = run(&[&["inspect", file.to_str().unwrap(), "--json"], args].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        schema::document(&output.stdout)
    };
    let seen = inspect(&[]);
    assert_eq!(
        (&seen["file_kind"], &seen["recorder"]["checkpoints"]),
        (&"flight recorder".into(), &USUAL.into())
    );
    let all = inspect(&["--kind", "checkpoints"]);
    let last = all["checkpoints"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(last["checkpoint"], USUAL);
    assert_eq!(
        last["pages"].as_u64().unwrap() + last["zero_pages"].as_u64().unwrap(),
        100
    );
    // The next receiver has it, too.
    let next = receiver(&["--ram-dir", path]);
    assert_eq!(slow(&next, &[])["checkpoints"], USUAL);
    kill(&next);
    let mut bytes = fs::read(&file).unwrap();
    bytes[4096 + 3 * 128 + 50] ^= 4;
    fs::write(&file, &bytes).unwrap();
    let damaged = inspect(&[]);
    assert_eq!(
        (
            &damaged["recorder"]["checkpoints"],
            &damaged["recorder"]["damaged"]
        ),
        (&(USUAL - 1).into(), &1.into())
    );
    bytes[16] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let refused = run(&["inspect", file.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("its head is damaged"),
        "{said}"
    );
    // A checkpoint does without.
    let next = receiver(&["--ram-dir", path]);
    let refused = next.command(&["slow"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("an earlier receiver left is damaged"), "{said}");
    assert_eq!(next.status()["sessions"][0]["state"], "recovered");
}

/// Of a guest that is called by its name; the recorder that `slow` saves is read by `compare`.
#[test]
fn a_saved_recorder_is_compared() {
    let receiver = receiver(&["--guest", "web3,peer=127.0.0.1"]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest(100)).unwrap();
    (0..USUAL).for_each(|_| _ = primary.checkpoint().unwrap());
    until("the last record", || {
        (slow(&receiver, &["--guest", "web3"])["checkpoints"] == USUAL).then_some(())
    });
    let refused = receiver.command(&["slow", "--guest", "web4"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("web4"), "{said}");

    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (saved, page) = (file("web3.flight"), file("page.html"));
    assert_eq!(slow(&receiver, &["--save", &saved])["checkpoints"], USUAL);
    let compared = run(&["compare", &saved, "--html", &page]);
    assert!(
        compared.status.success(),
        "{}",
        String::from_utf8_lossy(&compared.stderr)
    );
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("<title>Checkpoint latency</title>"), "{page}");
    let (_, section) = page.split_once("<h2>Slow checkpoints").expect("the section");
    let timeline = section.split_once("</section>").unwrap().0;
    assert!(timeline.contains("<svg"), "{timeline}");
}
