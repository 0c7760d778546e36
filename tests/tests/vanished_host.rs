//! A primary's host that vanishes: no FIN, no reset, nothing answers any more. In a network namespace,
//! which needs root and `ip` (iproute2).

use colo_ring_tests::command::{RunningReceiver, Scratch, until, wrapped};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Both ends of the link, link-local, so that they disturb no other network.
const HERE: &str = "169.254.77.1";
const THERE: &str = "169.254.77.2";

/// A host of its own behind a link; it goes with this value.
struct OtherHost {
    name: String,
}

fn ip(words: &str) {
    let status = Command::new("ip")
        .args(words.split(' '))
        .status()
        .expect("ip (iproute2)");
    assert!(status.success(), "ip {words}");
}

impl OtherHost {
    fn new() -> Self {
        // An interface's name has at most 15 bytes.
        let name = format!("colo{}", std::process::id());
        ip(&format!("netns add {name}"));
        let host = Self { name };
        let name = &host.name;
        ip(&format!(
            "link add {name}a type veth peer name {name}b netns {name}"
        ));
        ip(&format!("address add {HERE}/30 dev {name}a"));
        ip(&format!("link set {name}a up"));
        ip(&format!("-n {name} address add {THERE}/30 dev {name}b"));
        ip(&format!("-n {name} link set {name}b up"));
        host
    }

    fn start(&self, command: &mut Command) -> Child {
        let mut there = Command::new("ip");
        there
            .args(["netns", "exec", &self.name])
            .arg(command.get_program())
            .args(command.get_args());
        there
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("ip netns exec")
    }

    /// Its connections stay, but nothing that is sent to them arrives, and it says nothing about that.
    fn vanish(&self) {
        ip(&format!("-n {0} address flush dev {0}b", self.name));
    }
}

impl Drop for OtherHost {
    fn drop(&mut self) {
        // The link goes with the namespace.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Seconds after which unacknowledged bytes or probes end a connection.
const USER_TIMEOUT_S: u64 = 3;

/// How long it takes until the end of a session is reported whose primary was killed on a host that goes on.
fn killed_primary_is_noticed() -> Duration {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--listen", "tcp:127.0.0.1:0"]);
    let mut primary = wrapped(&[]);
    synth(&mut primary, &receiver.address().to_string());
    let mut primary = primary.stdout(Stdio::null()).spawn().expect("a primary");
    wait_until_protected(&receiver);
    let killed = Instant::now();
    primary.kill().expect("it runs");
    receiver.wait_for_log("session 1 ended");
    let took = killed.elapsed();
    primary.wait().expect("it was killed");
    took
}

/// Its next checkpoint is an hour away: the link is silent.
fn synth(command: &mut Command, address: &str) {
    command.args(["synth", "--to", address, "--channels", "2", "--ram", "8M"]);
    command.args(["--interval", "3600000"]);
}

fn wait_until_protected(receiver: &RunningReceiver) {
    until("a protected session", || {
        (receiver.status()["sessions"][0]["state"] == "protected").then_some(())
    });
}

#[test]
fn a_vanished_host_is_noticed_and_reported() {
    if !nix::unistd::geteuid().is_root() {
        colo_ring_skip::skip(
            "a_vanished_host_is_noticed_and_reported",
            "a network namespace needs root",
        );
        return;
    }
    let (host, scratch) = (OtherHost::new(), Scratch::new());
    let told = scratch.file("told");
    let hook = format!(
        "echo \"$COLO_RING_CHECKPOINT_AGE_MS $COLO_RING_REASON\" > {told}.part; mv {told}.part {told}"
    );
    let listen = format!("tcp:{HERE}:0");
    let options = [
        "--listen",
        &listen,
        "--keepalive",
        "1",
        "--user-timeout",
        &USER_TIMEOUT_S.to_string(),
        "--on-loss",
        &hook,
    ];
    let receiver = RunningReceiver::start(wrapped(&[]), &options);
    let log = receiver.log();
    let line = log.lines().find(|line| line.contains(HERE)).expect("its address");
    let address = line.trim_start_matches("listening on ");
    let mut command = wrapped(&[]);
    synth(&mut command, address);
    let mut primary = host.start(&mut command);
    wait_until_protected(&receiver);
    // Silence alone is no loss: probes are answered.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(
        receiver.status()["sessions"][0]["state"],
        "protected",
        "{}",
        receiver.log()
    );
    host.vanish();
    let vanished = Instant::now();
    receiver.wait_for_log("session 1 ended");
    let took = vanished.elapsed();
    println!("noticed after {took:?}");
    // Not by its silence alone: several probes went unanswered.
    assert!(took.as_secs() >= 1, "{took:?}");
    // Probes begin after a second, and one that goes unanswered ends it after the timeout.
    let killed = killed_primary_is_noticed();
    println!("a killed primary is noticed after {killed:?}");
    let limit = 3 * Duration::from_secs(USER_TIMEOUT_S) + 10 * killed;
    assert!(took < limit, "{took:?}, where {limit:?} are the limit");
    let log = receiver.log();
    let end = log
        .lines()
        .find(|line| line.starts_with("warning: session 1 ended"))
        .expect("it was logged");
    assert!(
        end.contains("checkpoint 0") && end.contains("s old, is kept"),
        "{end}"
    );
    let text = until("what the hook wrote", || std::fs::read_to_string(&told).ok());
    println!("{end}\n{text}");
    let age: u64 = text
        .split(' ')
        .next()
        .and_then(|age| age.parse().ok())
        .expect("an age");
    assert!(
        age >= 7000,
        "{age} ms: five seconds of silence and the time until it was noticed"
    );
    // It may have noticed by itself; either way it is reaped.
    let _ = primary.kill();
    let _ = primary.wait();
}
