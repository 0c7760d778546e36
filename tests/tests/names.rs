//! Guests have names: by rules of the receiver, or their UUID. All that shows or takes a session shows and takes them.

use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::schema;
use colo_ring_tools::primary::{SynthOptions, SynthPrimary};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::process::Output;

const UUID: &str = "0c5a1f00-0000-4000-8000-0000000000ff";

/// A guest of that UUID.
fn known_guest() -> SynthOptions {
    let mut uuid = [0; 16];
    (uuid[0], uuid[1], uuid[2], uuid[6], uuid[8], uuid[15]) = (0x0c, 0x5a, 0x1f, 0x40, 0x80, 0xff);
    SynthOptions { uuid, ..guest() }
}

fn protect(receiver: &RunningReceiver, options: &SynthOptions) -> SynthPrimary {
    let mut primary = SynthPrimary::connect(receiver.address(), options).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    primary
}

/// How many files in the RAM directory are a session's.
fn files_of(ram: &SharedDirectory, session: u32) -> usize {
    let prefix = format!("session-{session}.");
    let files = std::fs::read_dir(ram.path()).expect("the directory");
    files
        .filter(|file| {
            let name = file.as_ref().expect("a file").file_name();
            name.to_string_lossy().starts_with(&prefix)
        })
        .count()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn session(receiver: &RunningReceiver, number: u64) -> Value {
    until("the session", || {
        let status = receiver.status();
        let mut found = status["sessions"].as_array().unwrap().iter();
        found.find(|session| session["session"] == number).cloned()
    })
}

fn wait_ended(receiver: &RunningReceiver, number: u64) {
    until("the end", || {
        (session(receiver, number)["state"] == "ended").then_some(())
    });
}

#[test]
fn every_command_takes_and_shows_a_guests_name() {
    let scratch = Scratch::new();
    let told = scratch.file("told");
    let hook = format!("env | grep ^COLO_RING_ | sort > {told}.part && mv {told}.part {told}");
    let receiver = RunningReceiver::start(
        wrapped(&[]),
        &[
            "--hugepages",
            "off",
            "--guest",
            "web3,peer=127.0.0.0/8",
            "--on-loss",
            &hook,
        ],
    );
    let primary = protect(&receiver, &known_guest());
    receiver.wait_for_log("session 1 (web3) began: 127.0.0.1:");
    let found = session(&receiver, 1);
    let listener = receiver.address().to_string();
    for (key, value) in [("guest", "web3"), ("uuid", UUID), ("listener", &listener)] {
        assert_eq!(found[key], value, "{found}");
    }
    let status = said(&receiver.command(&["status"]));
    for part in ["web3", UUID, &listener, "127.0.0.1:"] {
        assert!(status.contains(part), "{part} is missing in:\n{status}");
    }
    // As on a terminal of 80 columns.
    let long = status.lines().find(|line| line.chars().count() > 80);
    assert_eq!(long, None, "{status}");
    let out = scratch.file("dump");
    let dumped = said(&receiver.command(&["dump", "--guest", "web3", "--out", &out]));
    assert!(
        dumped.contains("checkpoint 1 of session 1 (web3), pc"),
        "{dumped}"
    );
    for command in ["discard", "end", "failover", "dump"] {
        let more: &[&str] = match command {
            "failover" => &["--to", "-"],
            "dump" => &["--out", &out],
            _ => &[],
        };
        let refused = said(&receiver.command(&[&[command, "--guest", "web4"], more].concat()));
        assert!(
            refused.contains("no session of a guest web4"),
            "{command}: {refused}"
        );
        let without = receiver.command(&[&[command], more].concat());
        assert_eq!(without.status.code(), Some(2), "{command}: {}", said(&without));
        let both = receiver.command(&[&[command, "--guest", "web3", "--session", "1"], more].concat());
        assert_eq!(both.status.code(), Some(2), "{command}: {}", said(&both));
    }
    let running = said(&receiver.command(&["discard", "--guest", "web3"]));
    assert!(running.contains("session 1 (web3) is running"), "{running}");
    drop(primary);
    wait_ended(&receiver, 1);
    receiver.wait_for_log("session 1 (web3) ended: ");
    let hooked = until("the hook", || std::fs::read_to_string(&told).ok());
    for line in [
        "COLO_RING_EVENT=lost".to_owned(),
        "COLO_RING_GUEST=web3".to_owned(),
        format!("COLO_RING_UUID={UUID}"),
        format!("COLO_RING_LISTENER={listener}"),
    ] {
        assert!(
            hooked.lines().any(|told| told == line),
            "{line} is missing in:\n{hooked}"
        );
    }
    let stream = format!("file:{}", scratch.file("stream"));
    let given = receiver.command(&["failover", "--guest", UUID, "--to", &stream]);
    assert!(given.status.success(), "{}", said(&given));
    assert!(
        said(&given).contains("checkpoint 1 of session 1 (web3) was written"),
        "{}",
        said(&given)
    );
    let discarded = said(&receiver.command(&["discard", "--guest", "web3"]));
    assert!(
        discarded.contains("session 1 (web3): its checkpoint"),
        "{discarded}"
    );
    // There was one; what became of it is said.
    let gone = said(&receiver.command(&["discard", "--guest", "web3"]));
    assert!(gone.contains("session 1 (web3) was discarded"), "{gone}");
    receiver.signal(Signal::SIGTERM);
    let ended = receiver.wait();
    assert!(
        ended.read("hist.pause.hlog").contains("Tag=web3,"),
        "{}",
        ended.log
    );
    let report = schema::document(ended.read("hist.json").as_bytes());
    assert_eq!(report["sessions"][0]["guest"], "web3");
}

#[test]
fn a_guest_without_a_rule_has_its_uuid_and_one_without_both_a_number() {
    let receiver = RunningReceiver::start(wrapped(&[]), &[]);
    let _known = protect(&receiver, &known_guest());
    let _unknown = protect(&receiver, &guest());
    assert_eq!(session(&receiver, 1)["guest"], UUID);
    assert_eq!(session(&receiver, 2)["guest"], Value::Null);
    let ended = said(&receiver.command(&["end", "--guest", UUID]));
    assert!(
        ended.contains("session 1 has ended; checkpoint 1 is kept"),
        "{ended}"
    );
}

/// Two guests that a rule cannot tell apart: an operator is asked, and nothing is guessed.
#[test]
fn a_name_of_two_guests_is_refused_with_both() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--guest", "lab,peer=127.0.0.1"]);
    let _one = protect(&receiver, &known_guest());
    let _other = protect(&receiver, &guest());
    let refused = said(&receiver.command(&["end", "--guest", "lab"]));
    assert!(
        refused.contains("1 (protected, checkpoint 1), 2 (protected, checkpoint 1)")
            && refused.contains("--session"),
        "{refused}"
    );
}

/// Its memory is not held twice; and nothing is given up before there is something newer.
#[test]
fn a_guest_that_is_protected_again_replaces_its_own_recovered_checkpoint() {
    let ram = SharedDirectory::new().expect("a directory");
    let directory = ram.path().display().to_string();
    let args = ["--ram-dir", &directory];
    let first = RunningReceiver::start(wrapped(&[]), &args);
    let (known, other) = (protect(&first, &known_guest()), protect(&first, &guest()));
    // It is killed.
    drop(first);
    drop((known, other));
    let next = RunningReceiver::start(wrapped(&[]), &args);
    let recovered = session(&next, 1);
    assert_eq!(
        (&recovered["state"], &recovered["guest"]),
        (&"recovered".into(), &UUID.into())
    );
    // The initial state is not certain before the guest has gone on.
    let options = known_guest();
    let mut primary = SynthPrimary::connect(next.address(), &options).expect("precopy");
    assert_eq!(session(&next, 1)["state"], "recovered");
    primary.checkpoint().expect("a checkpoint");
    next.wait_for_log(
        "session 1: its checkpoint is given up, because its guest has a newer one, of session 3",
    );
    until("the memory", || {
        let status = next.status();
        let sessions = status["sessions"].as_array().unwrap();
        let numbers: Vec<_> = sessions
            .iter()
            .map(|session| session["session"].as_u64().unwrap())
            .collect();
        // That of the other guest stays.
        (numbers == [2, 3] && files_of(&ram, 1) == 0 && files_of(&ram, 2) > 0).then_some(())
    });
    // One that ends and comes back without the receiver's end, too.
    drop(primary);
    wait_ended(&next, 3);
    let _again = protect(&next, &options);
    next.wait_for_log(
        "session 3: its checkpoint is given up, because its guest has a newer one, of session 4",
    );
    let gone = said(&next.command(&["dump", "--session", "3", "--out", &directory]));
    assert!(gone.contains("session 3 was discarded"), "{gone}");
}

/// A directory with an empty receive.toml, and this file of a guest.
fn configuration(web: &str) -> Scratch {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.file("guests.d")).expect("a directory");
    std::fs::write(scratch.file("guests.d/web.toml"), web).expect("a file");
    std::fs::write(scratch.file("receive.toml"), "").expect("a file");
    scratch
}

#[test]
fn a_guest_has_a_file_with_a_name_and_hooks_of_its_own() {
    let told = Scratch::new();
    let hook = |name: &str| {
        let file = told.file(name);
        format!("echo $COLO_RING_SESSION $COLO_RING_GUEST > {file}.part && mv {file}.part {file}")
    };
    let web = |name: &str| format!("name = '{name}'\nuuid = '{UUID}'\non-loss = '{}'\n", hook("own"));
    let scratch = configuration(&web("web3"));
    let config = scratch.file("receive.toml");
    let receiver = RunningReceiver::start(wrapped(&[]), &["--config", &config, "--on-loss", "false"]);
    // The command line wins.
    receiver.wait_for_log("configuration: the guest web3 of ");
    drop(protect(&receiver, &known_guest()));
    receiver.wait_for_log("session 1 (web3): --on-loss failed");
    drop(receiver);

    let general = hook("general");
    std::fs::write(&config, format!("on-loss = \"{general}\"\n")).expect("a file");
    let receiver = RunningReceiver::start(wrapped(&[]), &["--config", &config]);
    let (known, other) = (protect(&receiver, &known_guest()), protect(&receiver, &guest()));
    assert_eq!(session(&receiver, 1)["guest"], "web3");
    drop((known, other));
    let read = |name: &str| until(name, || std::fs::read_to_string(told.file(name)).ok());
    assert_eq!(
        (read("own"), read("general")),
        ("1 web3\n".to_owned(), "2\n".to_owned())
    );

    // Another name: for sessions that begin from now on.
    let running = protect(&receiver, &known_guest());
    std::fs::write(scratch.file("guests.d/web.toml"), web("web9")).expect("a file");
    receiver.signal(Signal::SIGHUP);
    receiver.wait_for_log("SIGHUP: the guest web9 is new, of ");
    receiver.wait_for_log("SIGHUP: the guest web3 has no file any more");
    receiver.wait_for_log("SIGHUP: on-loss or on-stall of a guest has changed, which takes effect");
    receiver.wait_for_log("SIGHUP: 1 rules for guests in force");
    let _next = protect(&receiver, &known_guest());
    assert_eq!(session(&receiver, 4)["guest"], "web9");
    assert_eq!(session(&receiver, 3)["guest"], "web3");
    drop(running);
    // A file with a fault changes nothing.
    std::fs::write(scratch.file("guests.d/web.toml"), "name = 'web3'\nmac = 1\n").expect("a file");
    receiver.signal(Signal::SIGHUP);
    receiver.wait_for_log("web.toml:2:1: unknown field `mac`");
    receiver.signal(Signal::SIGTERM);
    assert!(receiver.wait().status.success());
}

#[test]
fn identities_of_a_guest_take_tls() {
    let file = format!("name = 'web3'\nuuid = '{UUID}'\ntls-allow = ['CN=host1']\n");
    let scratch = configuration(&file);
    let mut command = wrapped(&["timeout", "60"]);
    command.args(["receive", "--listen", "tcp:127.0.0.1:0", "--config"]);
    let refused = command
        .arg(scratch.file("receive.toml"))
        .output()
        .expect("the command");
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(
        said(&refused).contains("web.toml:3:13: tls-allow names identities"),
        "{}",
        said(&refused)
    );
}

#[test]
fn rules_that_cannot_be_meant_are_usage_errors() {
    for (rule, reason) in [
        ("web3", "no condition"),
        ("7,peer=192.0.2.7", "not a number"),
        ("web3,listener=tcp:127.0.0.1:1", "nothing listens on"),
        ("web3,uuid=0", "36 characters"),
    ] {
        let mut command = wrapped(&["timeout", "60"]);
        command.args(["receive", "--listen", "tcp:127.0.0.1:0", "--guest", rule]);
        let refused = command.output().expect("the command");
        assert_eq!(refused.status.code(), Some(2), "{rule}: {}", said(&refused));
        assert!(said(&refused).contains(reason), "{rule}: {}", said(&refused));
    }
}
