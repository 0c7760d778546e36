//! The system calls that a receiver really makes, against the rules of its sandbox: none that no rule allows, and no rule that nobody needs.
//!
//! Receivers of every backend run under strace(1) while all that they are for is done with them: guests of every kind with checkpoints, disks,
//! dumps, failovers, ends in every way, hooks, and a receiver that recovers what a killed one has left.

use super::socket_address;
use colo_ring::link::PREFACE;
use colo_ring::sandbox::{Directories, ThreadKind, rules};
use colo_ring::wire::codec::Method;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::hostile::Link;
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::tls::Authority;
use colo_ring_tools::page_compression::PageCompression;
use colo_ring_tools::primary::{DiskOptions, SynthOptions, SynthPrimary};
use nix::sys::signal::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Calls that a library tries and does without: the kind of thread does not matter.
const DONE_WITHOUT: [(&str, &str); 2] = [
    // The C library, when it gives memory back for the first time.
    ("openat", "/proc/sys/vm/overcommit_memory"),
    // The same, when it has made some heaps.
    ("openat", "/sys/devices/system/cpu/online"),
];

/// What only a receiver reads that is refused its directory, and ends.
const NOT_OPENED: [&str; 1] = ["/proc/locks"];

/// Rare calls that nothing here brings about for certain.
const NOT_BROUGHT_ABOUT: [&str; 23] = [
    // A crash, or a debugger.
    "rt_sigaction",
    "tgkill",
    "getpid",
    "restart_syscall",
    // Chance: where an allocation lies, and which thread is first.
    "mremap",
    "sched_yield",
    // Another kernel, processor, user or memory than this host's.
    "capset",
    "mlock",
    "munlock",
    "mbind",
    "io_uring_register",
    // Another C library, or the form that calls have on other processors.
    "clone3",
    "rseq",
    "newfstatat",
    "fstat",
    "epoll_pwait",
    "ppoll",
    "unlinkat",
    "renameat",
    "readlinkat",
    "pwritev2",
    // Clients of disks that flush or read ahead.
    "fdatasync",
    "fadvise64",
];

/// The kind of the threads of this name.
fn kind_of(name: &str) -> Option<ThreadKind> {
    Some(
        match name.trim_end_matches(|letter: char| letter.is_ascii_digit()) {
            "stderr" => ThreadKind::Log,
            "signals" => ThreadKind::Signals,
            "on-loss" | "on-stall" => ThreadKind::Hooks,
            "colo-control" => ThreadKind::Control,
            "colo-hist" => ThreadKind::Histograms,
            "colo-core-" => ThreadKind::Core,
            "colo-channel" => ThreadKind::Channel,
            "colo-decode-" | "flush-" => ThreadKind::Worker,
            "colo-memory" => ThreadKind::Memory,
            "colo-background" | "colo-release" | "colo-dump" | "colo-restore" => ThreadKind::Background,
            "colo-nbd" => ThreadKind::DiskServer,
            "colo-tls" => ThreadKind::Handshake,
            "colo-disk" | "nbd-reader" | "disk-apply" => ThreadKind::Disk,
            "metrics" => ThreadKind::Metrics,
            "colo-starter" => ThreadKind::Starter,
            _ => return None,
        },
    )
}

/// A call of a thread that was confined then.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    kind: &'static str,
    name: String,
}

/// What strace has seen.
#[derive(Default)]
struct Seen {
    /// Each call with the line of one example.
    calls: BTreeMap<Call, String>,
    /// Paths that were opened once files were confined.
    paths: BTreeSet<String>,
}

struct Thread {
    /// Whose filter it is under: until it has its own, that of the thread which has started it.
    kind: ThreadKind,
    /// By its name.
    own: Option<ThreadKind>,
    /// Whether it is under a filter of a kind.
    is_confined: bool,
    /// A call whose end is on another line.
    begun: Option<String>,
}

impl Thread {
    fn new() -> Self {
        Self {
            kind: ThreadKind::Main,
            own: None,
            is_confined: false,
            begun: None,
        }
    }
}

fn name_of(kind: ThreadKind) -> &'static str {
    let kinds = ThreadKind::ALL.map(|kind| format!("{kind:?}"));
    let position = ThreadKind::ALL.iter().position(|other| *other == kind);
    // One of a dozen texts, for the whole test.
    Box::leak(
        kinds[position.expect("it is one of them")]
            .clone()
            .into_boxed_str(),
    )
}

impl Seen {
    /// Adds what `strace -f` has written.
    fn add(&mut self, trace: &Path) {
        let trace = fs::read_to_string(trace).expect("what strace has written");
        let mut threads: BTreeMap<u32, Thread> = BTreeMap::new();
        let mut filters = 0;
        let mut are_files_confined = false;
        for line in trace.lines() {
            let (thread, line) = line.split_once(' ').expect("a thread's number");
            let (number, line) = (thread.parse().expect("a number"), line.trim_start());
            let thread = threads.entry(number).or_insert(Thread::new());
            // The end of a call: of which the beginning was written before.
            let ended = line
                .strip_prefix("<... ")
                .and_then(|rest| rest.split_once(" resumed>"));
            let whole = match (&ended, line.strip_suffix(" <unfinished ...>")) {
                (Some((_, rest)), _) => thread.begun.take().map(|begun| format!("{begun}{rest}")),
                (None, Some(begun)) => {
                    thread.begun = Some(begun.to_owned());
                    // A call that does not return is a call.
                    Some(begun.to_owned())
                }
                (None, None) => Some(line.to_owned()),
            };
            let Some(whole) = whole else { continue };
            let Some((name, rest)) = whole.split_once('(') else {
                continue;
            };
            let name = name.to_owned();
            if name.contains(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_')) {
                continue;
            }
            let is_complete = ended.is_some() || !line.ends_with("<unfinished ...>");
            if thread.is_confined && !is_done_without(&name, rest) {
                let call = Call {
                    kind: name_of(thread.kind),
                    name: name.clone(),
                };
                self.calls.entry(call).or_insert_with(|| whole.clone());
            }
            if are_files_confined && is_complete && is_opened(&name, &whole) {
                self.paths.extend(rest.split('"').nth(1).map(str::to_owned));
            }
            match name.as_str() {
                "prctl" if rest.contains("PR_SET_NAME") => {
                    let own = rest.split('"').nth(1).and_then(kind_of);
                    thread.own = Some(own.unwrap_or_else(|| panic!("a thread of no kind: {whole}")));
                }
                "seccomp" if is_complete && rest.contains("SECCOMP_SET_MODE_FILTER") => {
                    assert!(whole.ends_with("= 0"), "{whole}");
                    filters += 1;
                    // The first two are of the process.
                    thread.is_confined = filters > 2;
                    thread.kind = thread.own.unwrap_or(thread.kind);
                }
                "landlock_restrict_self" => are_files_confined = true,
                _ => {}
            }
            // What a confined thread starts is confined as it is, until it is of its own kind.
            if matches!(name.as_str(), "clone" | "clone3") && is_complete {
                let started = whole
                    .rsplit_once("= ")
                    .and_then(|(_, number)| number.trim().parse().ok());
                let (kind, is_confined) = (thread.kind, thread.is_confined);
                if let Some(started) = started {
                    // Where it has lines already, it may be under its own filter.
                    let started = threads.entry(started).or_insert(Thread::new());
                    if !started.is_confined {
                        (started.kind, started.is_confined) = (kind, is_confined);
                    }
                }
            }
        }
        assert!(filters > 10 && are_files_confined, "{filters} filters");
    }

    /// Rules of which no file of this place was opened.
    fn unopened(&self, place: &Place) -> Vec<String> {
        let directories = Directories {
            ram: Some(place.ram.path()),
            disks: Some(place.disks.path()),
            // Of each receiver another one.
            measurements: None,
            configuration: None,
        };
        let rules = directories.rules().into_iter();
        let paths = rules.map(|rule| rule.path.display().to_string());
        let is_opened = |path: &String| self.paths.iter().any(|opened| opened.starts_with(path));
        paths
            .filter(|path| !is_opened(path) && !NOT_OPENED.contains(&path.as_str()))
            .map(|path| format!("nothing is opened at or below {path}, which a rule allows"))
            .collect()
    }
}

fn is_done_without(call: &str, rest: &str) -> bool {
    DONE_WITHOUT
        .iter()
        .any(|(name, path)| *name == call && rest.contains(path))
}

fn is_opened(call: &str, line: &str) -> bool {
    let result = line.rsplit_once("= ").map(|(_, result)| result);
    call == "openat" && result.is_some_and(|result| result.starts_with(|digit: char| digit.is_ascii_digit()))
}

/// What a receiver is started with, and where its traces are.
struct Place {
    scratch: Scratch,
    ram: SharedDirectory,
    disks: Scratch,
    authority: Authority,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            scratch: Scratch::new(),
            ram: SharedDirectory::new().expect("a directory"),
            disks: Scratch::new(),
            authority: Authority::new(),
        };
        let base = File::create(place.disks.file("synth-0.raw")).expect("a file");
        base.set_len(8 << 20).expect("its length");
        place
    }

    /// With everything in directories.
    fn with_directories(&self, run: &str, more: &[&str]) -> RunningReceiver {
        let ram = self.ram.path().display().to_string();
        self.traced(run, 2, &[&["--ram-dir", &ram], more].concat())
    }

    fn traced(&self, run: &str, channels: u8, more: &[&str]) -> RunningReceiver {
        let trace = self.scratch.file(run);
        let wrap = ["strace", "-D", "-f", "-qq", "-s", "256", "-o", &trace];
        let listen = format!("unix:{}", self.scratch.file("listen"));
        let metrics = format!("unix:{}", self.scratch.file("metrics"));
        let args = [
            "--disks",
            &self.disks.path().display().to_string(),
            "--nbd",
            "tcp:127.0.0.1:0",
            "--listen",
            &listen,
            "--metrics",
            &metrics,
            "--on-loss",
            "exit 1",
            "--hugepages",
            "thp",
            "--ram-limit",
            "1G",
        ];
        RunningReceiver::with_channels(wrapped(&wrap), channels, &[&args[..], more].concat())
    }
}

fn connect(receiver: &RunningReceiver, options: &SynthOptions) -> SynthPrimary {
    SynthPrimary::connect(receiver.address(), options).expect("precopy")
}

fn with_disk(receiver: &RunningReceiver) -> SynthOptions {
    SynthOptions {
        disks: Some(DiskOptions {
            to: receiver.disk_address().parse().expect("an address"),
            name: "synth".to_owned(),
            count: 1,
            writes: 40,
        }),
        ..guest()
    }
}

fn ended(receiver: &RunningReceiver, session: u64) {
    receiver.wait_for_log(&format!("session {session} ended"));
}

/// All that a receiver is for.
fn use_it(place: &Place, backend: &str) {
    println!("{backend}");
    let receiver = place.with_directories(&format!("{backend}-1"), &["--backend", backend]);
    // A guest with a disk: dumped live, lost, dumped, given to a file and given up.
    let mut primary = connect(&receiver, &with_disk(&receiver));
    for _ in 0..3 {
        primary.checkpoint().expect("a checkpoint");
    }
    receiver.check_dump(&primary, &receiver.protected(), 3);
    drop(primary);
    ended(&receiver, 1);
    receiver.wait_for_log("--on-loss failed");
    drop(receiver.dump(1));
    let (stream, kept) = (place.scratch.file("stream"), place.scratch.file("kept"));
    let to = format!("file:{stream}");
    let _ = receiver.ask(&[
        "failover",
        "--json",
        "--session",
        "1",
        "--to",
        &to,
        "--keep",
        &kept,
    ]);
    let _ = receiver.ask(&["discard", "--json", "--session", "1"]);
    // One that compresses, and whose checkpoints make the pool grow.
    let shape = SynthOptions {
        ram_bytes: 128 << 20,
        compression: PageCompression {
            method: Method::Zstd,
            level: Some(1),
        },
        dirty_pages: colo_ring_tools::primary::Distribution::Fixed(24_000),
        ..guest()
    };
    let mut primary = connect(&receiver, &shape);
    for _ in 0..2 {
        primary.checkpoint().expect("a checkpoint");
    }
    let _ = receiver.ask(&["end", "--json", "--session", "2"]);
    // One over a UNIX socket, which is given over a socket; and one that is refused.
    let unix = format!("unix:{}", place.scratch.file("listen"))
        .parse()
        .expect("an address");
    let mut primary = SynthPrimary::connect(&unix, &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    drop(primary);
    ended(&receiver, 3);
    let mut scraper = UnixStream::connect(place.scratch.file("metrics")).expect("it listens");
    scraper
        .write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
        .expect("it is read");
    scraper.read_to_end(&mut Vec::new()).expect("a page");
    let given = receiver.command(&["failover", "--session", "3", "--to", "-"]);
    assert!(
        given.status.success(),
        "{}",
        String::from_utf8_lossy(&given.stderr)
    );
    let mut stranger = Link::connect(socket_address(&receiver));
    stranger.send(b"GET / HTTP/1.1\r\n\r\n");
    assert!(stranger.is_closed());
    let too_large = SynthOptions {
        ram_bytes: 2 << 30,
        ..guest()
    };
    assert!(SynthPrimary::connect(receiver.address(), &too_large).is_err());
    // A guest that a killed receiver leaves, which the next one recovers, with its disk, and gives up.
    let mut primary = connect(&receiver, &with_disk(&receiver));
    primary.checkpoint().expect("a checkpoint");
    drop(receiver);
    drop(primary);
    let receiver = place.with_directories(
        &format!("{backend}-2"),
        &["--backend", backend, "--commit", "sync"],
    );
    let recovered = receiver.status()["sessions"].clone();
    for session in recovered.as_array().expect("a list") {
        assert_eq!(session["state"], "recovered", "{session}");
        let session = session["session"].to_string();
        let _ = receiver.ask(&["discard", "--json", "--session", &session]);
    }
    // A commit for which helpers are woken.
    let shape = SynthOptions {
        compression: PageCompression::default(),
        ..shape
    };
    let mut primary = connect(&receiver, &shape);
    primary.checkpoint().expect("a checkpoint");
    primary.checkpoint().expect("a checkpoint");
    receiver.signal(Signal::SIGTERM);
    assert!(receiver.wait().status.success());
    drop(primary);
    // Plain mode over TLS, with memory that has no name; and the link of a guard.
    let tls = place.authority.directory("receiver").display().to_string();
    let run = format!("{backend}-3");
    let receiver = place.traced(&run, 0, &["--backend", backend, "--tls", &tls]);
    let front = place.authority.front("primary", socket_address(&receiver));
    let shape = SynthOptions {
        channels: 0,
        ..guest()
    };
    let mut primary = SynthPrimary::connect(front.address(), &shape).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    let mut link = Link::connect(front.socket_address().expect("TCP"));
    link.send(&PREFACE);
    link.send(b"nothing\n");
    assert!(link.is_closed());
    receiver.signal(Signal::SIGHUP);
    receiver.wait_for_log("SIGHUP: new connections have the certificates");
    primary.close().expect("its end");
    until("its end", || receiver.log().contains("ended").then_some(()));
    receiver.signal(Signal::SIGTERM);
    assert!(receiver.wait().status.success());
}

#[test]
fn every_call_has_a_rule_and_every_rule_a_call() {
    let mut seen = Seen::default();
    let mut faults = Vec::new();
    for backend in ["uring", "epoll", "threads"] {
        let place = Place::new();
        use_it(&place, backend);
        for run in 1..=3 {
            seen.add(Path::new(&place.scratch.file(&format!("{backend}-{run}"))));
        }
        faults.append(&mut seen.unopened(&place));
    }
    for (call, example) in &seen.calls {
        let kind = ThreadKind::ALL
            .into_iter()
            .find(|kind| name_of(*kind) == call.kind)
            .expect("a kind");
        if !rules()
            .iter()
            .any(|rule| rule.name() == call.name && rule.allows(kind))
        {
            faults.push(format!(
                "{} makes {}, which no rule allows it: {example}",
                call.kind, call.name
            ));
        }
    }
    for rule in rules().iter().filter(|rule| rule.rare().is_none()) {
        for kind in ThreadKind::ALL.into_iter().filter(|kind| rule.is_for(*kind)) {
            let call = Call {
                kind: name_of(kind),
                name: rule.name().to_owned(),
            };
            if !seen.calls.contains_key(&call) {
                faults.push(format!(
                    "{} never makes {}, which a rule allows it",
                    call.kind, call.name
                ));
            }
        }
    }
    // What is rare need not be made by every kind of thread.
    for rule in rules() {
        let Some(why) = rule.rare().filter(|_| !NOT_BROUGHT_ABOUT.contains(&rule.name())) else {
            continue;
        };
        let is_made = |kind: ThreadKind| {
            let name = rule.name().to_owned();
            let kind = name_of(kind);
            seen.calls.contains_key(&Call { kind, name })
        };
        let mut kinds = ThreadKind::ALL.into_iter().filter(|kind| rule.is_for(*kind));
        if !kinds.any(is_made) {
            faults.push(format!(
                "no thread makes {}, which a rule allows: {why}",
                rule.name()
            ));
        }
    }
    for (call, example) in &seen.calls {
        println!("{:<10} {:<18} {example}", call.kind, call.name);
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
