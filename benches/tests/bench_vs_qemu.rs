//! `scripts/bench-vs-qemu` on its smallest scale: that it measures, what it leaves, and that nothing stays behind.

use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::command::Scratch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const SETTINGS: [&str; 3] = [
    "/proc/sys/net/ipv4/tcp_congestion_control",
    "/proc/sys/net/ipv4/tcp_slow_start_after_idle",
    "/sys/class/net/lo/queues/rx-0/rps_cpus",
];

/// The host's settings are looked at by one test at a time.
static TURN: Mutex<()> = Mutex::new(());

fn bench(scratch: &Scratch, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench-vs-qemu"));
    command
        .args([
            "--captures-dir",
            &scratch.file("captures"),
            "--out",
            &scratch.file("out"),
        ])
        .args(args)
        .stdin(Stdio::null());
    command
}

fn settings() -> Vec<String> {
    SETTINGS
        .map(|file| fs::read_to_string(file).unwrap_or_default())
        .to_vec()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).expect("a file")).expect("JSON")
}

/// Every file of a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn it_measures_and_leaves_tables_pages_and_runs() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new();
    let before = settings();
    let args = "--captures idle-multifd-4 --spacings 0 --secondaries qemu,uring,sink --n 24 --rounds 2 --keep-disturbed";
    let args: Vec<_> = args.split(' ').collect();
    let output = bench(&scratch, &args).output().expect("the program");
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(settings(), before, "the host is as it was");

    let out = PathBuf::from(scratch.file("out"));
    let results = json(&out.join("results.json"));
    let cell = &results["cells"][0];
    assert_eq!(cell["capture"], "idle, multifd-4");
    let table = fs::read_to_string(out.join("table.txt")).expect("a table");
    let printed = String::from_utf8_lossy(&output.stdout);
    let cell_table = printed.split("\n\n").next().expect("the first table");
    assert!(table.contains(cell_table), "{cell_table} in {table}");
    let secondaries = cell["secondaries"].as_array().expect("a list");
    for secondary in secondaries {
        check_secondary(secondary);
        let name = secondary["name"].as_str().expect("a name");
        assert!(table.contains(name), "{name} in {table}");
        let file = format!("{}.run.json", secondary["secondary"].as_str().expect("a name"));
        let run = json(&out.join("idle-multifd-4-every-0ms").join(file));
        let checkpoints = run["checkpoints"].as_array().expect("a list").len();
        assert_eq!(secondary["checkpoints"], checkpoints);
    }
    let p50 = |name: &str| {
        let secondary = secondaries
            .iter()
            .find(|one| one["secondary"] == name)
            .expect("measured");
        secondary["phases"][0]["p50_ns"].as_u64().expect("a number")
    };
    assert!(
        p50("sink") < p50("qemu"),
        "the sink is faster, because it keeps nothing: {table}"
    );
    let sessions = files(&out.join("idle-multifd-4-every-0ms/sessions"));
    assert!(
        sessions
            .iter()
            .any(|file| file.extension().is_some_and(|extension| extension == "hlog"))
    );
    let published = fs::read_to_string(out.join("published.md")).expect("a section");
    assert!(
        published.contains("| idle, multifd-4, back to back"),
        "{published}"
    );
    let page = fs::read_to_string(out.join("index.html")).expect("a page");
    assert!(page.contains("srcdoc="), "the comparisons are in the page");
}

/// Figures as they must be, whatever the machine does meanwhile.
fn check_secondary(secondary: &Value) {
    assert_eq!(secondary["failed"], Value::Null, "{secondary}");
    let number = |value: &Value| {
        value
            .as_f64()
            .unwrap_or_else(|| panic!("no number in {secondary}"))
    };
    assert_eq!(
        (&secondary["checkpoints"], &secondary["dropped"]),
        (&Value::from(24), &Value::from(0))
    );
    let [loaded, received] = [0, 1].map(|phase| secondary["phases"][phase].clone());
    assert!(number(&received["p50_ns"]) > 10_000.0, "{secondary}");
    assert!(
        number(&received["p50_ns"]) <= number(&loaded["p50_ns"]),
        "{secondary}"
    );
    assert!(number(&loaded["p99_ns"]) < 5e9, "{secondary}");
    assert!(number(&secondary["pages_per_checkpoint"]) > 1.0, "{secondary}");
    assert!(number(&secondary["cpu_s_per_gib"]) > 0.0, "{secondary}");
    assert!(number(&secondary["rss_bytes_max"]) > 1e6, "{secondary}");
}

#[test]
fn a_receiver_of_another_build_takes_turns_beside_it() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new();
    let this_build = Path::new(env!("CARGO_BIN_EXE_bench-vs-qemu")).with_file_name("colo-ring");
    let this_build = this_build.to_str().expect("a name in UTF-8");
    let args = "--synth --captures idle-multifd-4 --spacings 0 --secondaries epoll-pool-deferred,sink --n 16 --rounds 2 \
                --keep-disturbed --other-build";
    let args: Vec<_> = args.split_whitespace().chain([this_build]).collect();
    let output = bench(&scratch, &args).output().expect("the program");
    assert!(output.status.success(), "{}", said(&output));
    let out = PathBuf::from(scratch.file("out"));
    let results = json(&out.join("results.json"));
    let secondaries = results["cells"][0]["secondaries"].as_array().expect("a list");
    let names: Vec<_> = secondaries.iter().map(|one| &one["secondary"]).collect();
    assert_eq!(
        names,
        ["epoll-pool-deferred", "epoll-pool-deferred@other", "sink"]
    );
    let ratio = &secondaries[0]["to_other_build"][0]["p50"]["ratio"];
    assert!(ratio.as_f64().expect("a number") > 0.0, "{results}");
    let table = fs::read_to_string(out.join("table.txt")).expect("a table");
    assert!(table.contains("loaded to the other build: p50 "), "{table}");
}

#[test]
fn compressed_sessions_are_measured_beside_the_decoders_alone() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new();
    let args = "--synth --captures 5M-zstd,5M-zlib --spacings 0 --secondaries uring --n 16 --rounds 2 --keep-disturbed";
    let args: Vec<_> = args.split_whitespace().collect();
    let output = bench(&scratch, &args).output().expect("the program");
    assert!(output.status.success(), "{}", said(&output));
    let out = PathBuf::from(scratch.file("out"));
    let results = json(&out.join("results.json"));
    for (cell, method) in results["cells"]
        .as_array()
        .expect("a list")
        .iter()
        .zip(["zstd", "zlib"])
    {
        assert_eq!(cell["capture"], format!("5 MiB, {method} level 1"));
        let secondaries = cell["secondaries"].as_array().expect("a list");
        let decoders = secondaries.last().expect("some");
        assert_eq!(decoders["secondary"], "decoders");
        assert!(
            decoders["cpu_s_per_gib"].as_f64().expect("a number") > 0.0,
            "{decoders}"
        );
        for secondary in secondaries {
            assert_eq!(secondary["checkpoints"], 16, "{secondary}");
            assert!(secondary["phases"][0]["p50_ns"].as_u64().expect("a number") > 0);
        }
        let run = json(&out.join(format!("5M-{method}-every-0ms/decoders.run.json")));
        assert_eq!(run["compression"], method);
    }
    let table = fs::read_to_string(out.join("table.txt")).expect("a table");
    assert!(
        table.contains("loaded p50 to the decoders alone: colo-ring "),
        "{table}"
    );
}

#[test]
fn what_it_would_do_is_reported_and_nonsense_is_refused() {
    let scratch = Scratch::new();
    let output = bench(&scratch, &["--dry-run"]).output().expect("the program");
    assert!(
        output.status.success() && said(&output).contains("about "),
        "{}",
        said(&output)
    );
    let output = bench(&scratch, &["--captures", "31M"])
        .output()
        .expect("the program");
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("30M-plain"), "{}", said(&output));
    assert!(!Path::new(&scratch.file("out")).exists());
}

#[test]
fn a_signal_ends_it_and_everything_that_it_started() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new();
    let before = settings();
    let args = [
        "--synth",
        "--captures",
        "5M-plain",
        "--spacings",
        "100",
        "--secondaries",
        "uring",
        "--n",
        "1000",
    ];
    let log = fs::File::create(scratch.file("log")).expect("a file");
    let mut running = bench(&scratch, &args)
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("it");
    let group = running.id();
    let sessions = PathBuf::from(scratch.file("out")).join("5M-plain-every-100ms/sessions");
    wait_until("its first session", || sessions.exists());
    wait_until("a secondary and a replay", || processes_of(group).len() > 2);
    let pid = i32::try_from(group).expect("a process id");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it runs");
    let code = wait_for_end(&mut running);
    let log = fs::read_to_string(scratch.file("log")).expect("what it said");
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("interrupted"), "{log}");
    assert_eq!(
        processes_of(group),
        Vec::<u32>::new(),
        "nothing that it started is left"
    );
    assert_eq!(settings(), before, "the host is as it was");
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < HANG_LIMIT, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_for_end(process: &mut Child) -> Option<i32> {
    let mut status = None;
    wait_until("its end", || {
        status = process.try_wait().expect("its state");
        status.is_some()
    });
    status.and_then(|status| status.code())
}

/// The processes of a process group, by /proc.
fn processes_of(group: u32) -> Vec<u32> {
    let numbers = files(Path::new("/proc")).into_iter().filter_map(|path| {
        let pid: u32 = path.file_name()?.to_str()?.parse().ok()?;
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        // Behind the name in brackets: state, parent, group.
        let own_group = stat.rsplit_once(") ")?.1.split(' ').nth(2)?.parse::<u32>().ok()?;
        (own_group == group).then_some(pid)
    });
    numbers.collect()
}
