//! A host that gives no thread and no process any more.

use colo_ring_skip::skip;
use colo_ring_tests::cgroup::PidsGroup;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tools::primary::SynthPrimary;
use nix::sys::signal::Signal;

/// A pids limit, as systemd's TasksMax and containers have it. What needs a thread is done without, or fails alone.
#[test]
fn without_threads_guests_stay_protected() {
    let group = match PidsGroup::new("threads") {
        Ok(group) => group,
        Err(error) => {
            return skip(
                "without_threads_guests_stay_protected",
                &format!("it needs root and a pids cgroup: {error}"),
            );
        }
    };
    let scratch = Scratch::new();
    let told = scratch.file("told");
    let hook = format!("echo $COLO_RING_SESSION >> {told}");
    for backend in ["uring", "epoll", "threads"] {
        let wrap = group.wrap();
        let wrap: Vec<_> = wrap.iter().map(String::as_str).collect();
        let args = ["--hugepages", "off", "--backend", backend, "--on-loss", &hook];
        let receiver = RunningReceiver::start(wrapped(&wrap), &args);
        let connect = || SynthPrimary::connect(receiver.address(), &guest());
        let (mut first, mut second) = (connect().expect("precopy"), connect().expect("precopy"));
        first.checkpoint().expect("a checkpoint");
        second.checkpoint().expect("a checkpoint");
        group.close();
        // A new guest has no thread for its memory, or for its channels: it alone ends.
        assert!(connect().is_err(), "{backend}");
        receiver.wait_for_log("session 3 ended");
        // A dump, a session's end, what is given up.
        receiver.check_dump(&first, &receiver.status()["sessions"][0], 1);
        drop(second);
        receiver.wait_for_log("session 2 ended");
        receiver.wait_for_log("session 2: --on-loss cannot be started, and is tried again");
        assert_eq!(
            receiver.ask(&["discard", "--json", "--session", "2"])["discarded"],
            2
        );
        first.checkpoint().expect("another checkpoint");
        // A loss is told as soon as that is possible.
        assert!(!std::path::Path::new(&told).exists());
        group.open();
        let written = || {
            std::fs::read_to_string(&told)
                .ok()
                .filter(|text| !text.is_empty())
        };
        let session = until("what the hook wrote", written);
        assert_eq!(session, "2\n");
        std::fs::remove_file(&told).expect("a file");
        first.checkpoint().expect("the last checkpoint");
        let mut third = connect().expect("precopy");
        third.checkpoint().expect("a checkpoint of a new guest");
        receiver.signal(Signal::SIGTERM);
        let ended = receiver.wait();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
        assert!(!ended.log.contains("panicked"), "{}", ended.log);
        assert!(!std::path::Path::new(&told).exists(), "the others were not lost");
    }
}
