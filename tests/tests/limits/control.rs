//! Clients of the control socket that say nothing, and sessions that stand still.

use super::socket_address;
use colo_ring_tests::command::{RunningReceiver, Scratch, until, wrapped};
use colo_ring_tests::hostile::{HostilePrimary, sync_packet};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(receiver: &RunningReceiver) -> Self {
        let stream = UnixStream::connect(receiver.control_path()).expect("the control socket");
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.0.get_mut(), "{request}").expect("the receiver listens");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).expect("JSON")
    }
}

/// As a monitor that leaks its connections; and one that reads no answers. A claim is never taken away.
#[test]
fn silent_clients_keep_no_operator_out() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
    assert_eq!(receiver.protect()["checkpoint"], 5);
    let mut failover = Client::connect(&receiver);
    let claim = json!({"command": "claim", "session": 1, "force": false, "retry": false});
    assert_eq!(failover.ask(&claim)["ok"], true);
    let silent: Vec<_> = (0..40).map(|_| Client::connect(&receiver)).collect();
    let mut deaf: Vec<_> = (0..20).map(|_| Client::connect(&receiver)).collect();
    for client in &mut deaf {
        // It may be closed meanwhile, in favour of the next.
        let _ = client.0.get_mut().write_all(b"{\"command\":\"status\"}\n");
    }
    assert_eq!(receiver.status()["sessions"].as_array().map(Vec::len), Some(1));
    let second = receiver.command(&["discard", "--session", "1"]);
    assert!(String::from_utf8_lossy(&second.stderr).contains("a failover of it is under way"));
    let release = json!({"command": "release", "session": 1, "may_have_run": false});
    assert_eq!(failover.ask(&release)["answer"]["released"], 1);
    assert_eq!(
        receiver.ask(&["discard", "--json", "--session", "1"])["discarded"],
        1
    );
    drop(silent);
}

#[test]
fn a_session_that_stands_still_is_reported() {
    let scratch = Scratch::new();
    let told = scratch.file("told");
    let hook = format!(
        "echo $COLO_RING_EVENT $COLO_RING_SESSION $COLO_RING_CHECKPOINT: $COLO_RING_REASON >> {told}"
    );
    let args = ["--hugepages", "off", "--on-stall", &hook];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let mut primary = HostilePrimary::protected(socket_address(&receiver), 2);
    assert_eq!(receiver.protected()["stalled_ms"], Value::Null);
    let mut first_copy = HostilePrimary::connect(socket_address(&receiver), 2);
    // Up to its list of RAM blocks: it has memory.
    for (_, bytes) in &first_copy.precopy_parts()[..3] {
        first_copy.main.send(bytes);
    }
    primary.request();
    let bytes = primary.checkpoint_bytes(2, &[]);
    let (sent, mut rest) = bytes.split_at(bytes.len() / 2);
    primary.main.send(sent);
    // A byte now and then is no progress.
    for _ in 0..20 {
        if receiver.log().contains("session 1 is stalled") {
            break;
        }
        let (byte, left) = rest.split_at(1);
        primary.main.send(byte);
        rest = left;
        std::thread::sleep(Duration::from_secs(1));
    }
    receiver.wait_for_log("session 1 is stalled: next to nothing has come for");
    let stalled = receiver.protected()["stalled_ms"].as_u64();
    assert!(stalled.is_some_and(|ms| ms >= 10_000), "{stalled:?}");
    let status = receiver.command(&["status"]).stdout;
    let status = String::from_utf8_lossy(&status);
    assert!(status.contains("session 1 is stalled"), "{status}");
    // Where the eye looks for it.
    let row = status
        .lines()
        .find(|line| line.starts_with("1 "))
        .unwrap_or_default();
    assert!(row.contains("stalled") && !row.contains("protected"), "{status}");
    // It is in the log alone: a hook for it would be a stranger's.
    receiver.wait_for_log("session 2 is stalled: next to nothing has come for");
    primary.main.send(rest);
    primary
        .channels
        .iter_mut()
        .for_each(|channel| channel.send_packet(&sync_packet()));
    receiver.wait_for_log("session 1 goes on after");
    let hooked = until("the hook", || {
        let text = std::fs::read_to_string(&told).ok()?;
        text.contains("resumed").then_some(text)
    });
    let lines: Vec<_> = hooked.lines().collect();
    assert!(
        lines[0].starts_with("stalled 1 1: next to nothing has come for"),
        "{hooked}"
    );
    assert!(
        lines[1].starts_with("resumed 1 ") && lines[1].contains(": it goes on after"),
        "{hooked}"
    );
    until("progress", || {
        receiver.protected()["stalled_ms"].is_null().then_some(())
    });
    until("the checkpoint", || {
        (receiver.protected()["checkpoint"] == 2).then_some(())
    });
}
