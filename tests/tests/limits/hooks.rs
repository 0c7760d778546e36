//! `--on-loss`: for a protected guest it always runs.

use super::socket_address;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::hostile::{Destination, HostilePrimary, header};
use colo_ring_tools::primary::{SynthOptions, SynthPrimary};
use std::net::Ipv4Addr;

/// More than run at a time.
const STRANGERS: usize = 70;

fn sessions_without_checkpoint(receiver: &RunningReceiver) {
    for session in 1..=STRANGERS {
        let mut primary = HostilePrimary::connect(socket_address(receiver), 2);
        primary.main.send(&header());
        receiver.wait_for_log(&format!("session {session} began"));
        drop(primary);
        receiver.wait_for_log(&format!("session {session} ended"));
    }
}

/// A command that says for which session it runs, and waits for a file; not longer than there is the other one.
fn waiting_hook(told: &str, release: &str) -> String {
    format!(
        "echo $COLO_RING_SESSION:$COLO_RING_CHECKPOINT >> {told}; \
         while [ -e {told} ] && ! [ -e {release} ]; do sleep 0.3; done"
    )
}

fn lost_guest(receiver: &RunningReceiver) {
    lost(receiver, &guest());
}

fn lost(receiver: &RunningReceiver, guest: &SynthOptions) {
    let mut primary = SynthPrimary::connect(receiver.address(), guest).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
}

#[test]
fn strangers_run_no_hook_and_a_guest_always_one() {
    let scratch = Scratch::new();
    let (told, release) = (scratch.file("told"), scratch.file("release"));
    // It does not return before the test ends, as a fence that hangs.
    let hook = waiting_hook(&told, &release);
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off", "--on-loss", &hook]);
    sessions_without_checkpoint(&receiver);
    lost_guest(&receiver);
    let lines = until("the hook", || {
        std::fs::read_to_string(&told)
            .ok()
            .filter(|text| text.ends_with('\n'))
    });
    assert_eq!(lines, format!("{}:1\n", STRANGERS + 1));
    std::fs::write(&release, "").expect("a file");
}

/// Asked for, they are run for strangers too; and then those of a host wait for each other.
#[test]
fn hooks_of_strangers_wait_for_each_other() {
    let scratch = Scratch::new();
    let (told, release) = (scratch.file("told"), scratch.file("release"));
    let hook = waiting_hook(&told, &release);
    let listen = format!("unix:{}", scratch.file("listen"));
    let args = [
        "--hugepages",
        "off",
        "--on-loss",
        &hook,
        "--on-loss-unprotected",
        "--listen",
        &listen,
    ];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    sessions_without_checkpoint(&receiver);
    // Of another origin: a process of this host.
    let address = listen.parse().expect("an address");
    let mut primary = SynthPrimary::connect(&address, &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    drop(primary);
    let own = format!("{}:1", STRANGERS + 1);
    let read = || std::fs::read_to_string(&told).unwrap_or_default();
    until("the guest's hook", || {
        read().lines().any(|line| line == own).then_some(())
    });
    // 32 and the first of the host, and the guest's.
    assert!(read().lines().count() <= 34, "{}", read());
    std::fs::write(&release, "").expect("a file");
    until("all hooks", || {
        (read().lines().count() == STRANGERS + 1).then_some(())
    });
}

/// Their guests are protected, and their hooks hang: as many as there are places for any.
#[test]
fn hostile_hosts_leave_a_place_for_each_other_host_and_each_known_guest() {
    let scratch = Scratch::new();
    let (told, release) = (scratch.file("told"), scratch.file("release"));
    let hook = waiting_hook(&told, &release);
    let known = "known,uuid=05050505-0505-0505-0505-050505050505";
    let args = ["--hugepages", "off", "--on-loss", &hook, "--guest", known];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    for host in [2, 3] {
        let from = Ipv4Addr::new(127, 0, 0, host);
        let address = socket_address(&receiver);
        for _ in 0..33 {
            drop(HostilePrimary::protected(Destination { address, from }, 2));
        }
    }
    let told = || std::fs::read_to_string(&told).unwrap_or_default();
    let runs = |session: u32| told().lines().any(|line| line == format!("{session}:1"));
    until("hooks in all places", || {
        (told().lines().count() == 66).then_some(())
    });
    lost_guest(&receiver);
    until("the hook of another host", || runs(67).then_some(()));
    // That host's place is taken as well; its guest that the operator knows has another.
    lost_guest(&receiver);
    receiver.wait_for_log("session 68 ended");
    let guest = SynthOptions {
        uuid: [5; 16],
        ..guest()
    };
    lost(&receiver, &guest);
    until("the hook of a known guest", || runs(69).then_some(()));
    assert!(!runs(68), "{}", told());
    std::fs::write(&release, "").expect("a file");
    until("all hooks", || runs(68).then_some(()));
}

#[test]
fn the_end_of_a_receiver_waits_for_the_start_of_hooks() {
    let scratch = Scratch::new();
    for run in 0..5 {
        let told = scratch.file(&format!("told-{run}"));
        let hook = format!("echo $COLO_RING_SESSION > {told}");
        let receiver = RunningReceiver::start(
            wrapped(&[]),
            &["--hugepages", "off", "--once", "--on-loss", &hook],
        );
        lost_guest(&receiver);
        assert!(receiver.wait().status.success());
        let text = until("the hook", || {
            std::fs::read_to_string(&told)
                .ok()
                .filter(|text| !text.is_empty())
        });
        assert_eq!(text, "1\n");
    }
}
