//! `--on-loss`: for a protected guest it always runs.

use super::socket_address;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::hostile::{HostilePrimary, header};
use colo_ring_tools::primary::SynthPrimary;

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
         while [ -e {told} ] && ! [ -e {release} ]; do sleep 0.1; done"
    )
}

fn lost_guest(receiver: &RunningReceiver) {
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
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
    assert!(read().lines().count() <= 33, "{}", read());
    std::fs::write(&release, "").expect("a file");
    until("all hooks", || {
        (read().lines().count() == STRANGERS + 1).then_some(())
    });
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
