//! A gate inside QEMU: its own filter objects, plugged into a running guest over QMP.
//!
//! ```text
//!  guest ──► filter-mirror ──► filter-buffer "next" ──► filter-buffer "hold" ──► network
//!                 │             since the last line        before the last line
//!                 └──► UDP socket of this process, which counts the copies
//! ```
//!
//! A `filter-buffer` passes what it has to the filter behind it when its status is set to off, and holds again when it is set to on; between
//! the two, everything passes. A line is drawn by both on the first buffer while the guest is stopped: the second one gets what was sent before
//! the line. A commit is both on the second: only what is before the line leaves, whatever the guest sends meanwhile and however late the
//! two are carried out. At every instant one of the buffers holds, so a guard that dies between two commands leaves nothing open.
//!
//! QEMU would wait for the reader of a stream; copies that do not fit into the UDP socket are lost, and nothing else.

use super::gate::{Counts, GateError, HoldTimes, OutputGate};
use crate::qmp::{Qmp, QmpError};
use colo_ring::units::CheckpointId;
use nix::poll::PollFlags;
use serde_json::{Value, json};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;
use thiserror::Error;

/// How long QEMU may take to open or close a filter. The guest is stopped meanwhile.
const LIMIT: Duration = Duration::from_secs(5);

/// Microseconds after which the filter lets go by itself: the most that it takes, 71 minutes.
const INTERVAL_US: u32 = u32::MAX;

/// Frames that the filter holds: it drops what comes after.
const HELD_MAX: u64 = 10_000;

/// Bytes before each frame: its length. QEMU sends them as a datagram of their own.
const LENGTH_BYTES: usize = 4;

/// Datagrams that are read before others have their turn.
const DATAGRAMS_AT_A_TIME: usize = 1024;

/// Removes every filter that a guard has left in that QEMU: what they hold is released, in order. Returns how many network cards had one.
///
/// # Errors
/// If QEMU does not answer, or refuses.
pub(crate) fn remove_all(qmp: &mut Qmp) -> Result<usize, QmpError> {
    remove_those_of(qmp, |_| true)
}

/// Removes the filters that a guard has left on one card, in the same way. Whether there were any.
///
/// # Errors
/// As of [`remove_all`].
pub(super) fn remove_left(qmp: &mut Qmp, netdev: &str) -> Result<bool, QmpError> {
    remove_those_of(qmp, |of| of == netdev).map(|count| count > 0)
}

fn remove_those_of(qmp: &mut Qmp, is_meant: impl Fn(&str) -> bool) -> Result<usize, QmpError> {
    let names = qmp.objects()?;
    let named = |prefix: &'static str| {
        let of_one = |name: &&String| name.strip_prefix(prefix).is_some_and(&is_meant);
        names.iter().filter(of_one).collect::<Vec<_>>()
    };
    for name in named(SEEN) {
        qmp.execute("object-del", &json!({"id": name}))?;
        qmp.execute("chardev-remove", &json!({"id": name}))?;
    }
    let (next, hold) = (named(NEXT), named(HOLD));
    for name in next.iter().chain(&hold) {
        qmp.execute("object-del", &json!({"id": name}))?;
    }
    Ok(next.len().max(hold.len()))
}

const HOLD: &str = "colo-ring-hold-";
const NEXT: &str = "colo-ring-next-";
const SEEN: &str = "colo-ring-seen-";
const PROBE: &str = "colo-ring-try-";

/// A filter cannot be plugged in.
#[derive(Debug, Error)]
pub(super) enum FilterError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("a UDP socket for QEMU's filter-mirror: {0}")]
    Socket(#[from] io::Error),
}

/// A buffer on a card.
fn buffer(id: &str, netdev: &str, status: &str) -> Value {
    json!({
        "qom-type": "filter-buffer", "id": id, "netdev": netdev, "queue": "rx", "interval": INTERVAL_US, "status": status,
    })
}

fn set(id: &str, status: &str) -> (&'static str, Value) {
    let path = format!("/objects/{id}");
    (
        "qom-set",
        json!({"path": path, "property": "status", "value": status}),
    )
}

/// See the module.
pub(super) struct Filter {
    nic: String,
    /// What was sent before the last line.
    hold: String,
    /// What was sent since.
    next: String,
    seen: String,
    qmp: Qmp,
    mirror: UdpSocket,
    is_holding: bool,
    /// The last line that was drawn on the link.
    line: Option<CheckpointId>,
    /// Frames in each of the buffers, as far as copies were counted.
    since_line: u64,
    before_line: u64,
    sent: u64,
    dropped: u64,
    times: HoldTimes,
}

impl Filter {
    /// Whether QEMU takes a filter for that card. One is plugged in, open, and removed again.
    ///
    /// # Errors
    /// If QEMU refuses, as for a card with vhost or with several queues.
    pub(super) fn probe(qmp: &mut Qmp, netdev: &str) -> Result<(), QmpError> {
        let id = format!("{PROBE}{netdev}");
        qmp.execute("object-add", &buffer(&id, netdev, "off"))?;
        qmp.execute("object-del", &json!({"id": id})).map(drop)
    }

    /// Plugs the filters into the running guest's card; frames pass. Filters that an earlier guard has left go on to hold what they
    /// have, where the guest is protected, and are replaced where it is not.
    ///
    /// # Errors
    /// If QEMU refuses, as for a card with vhost or with several queues.
    pub(super) fn plug(qmp: &Qmp, netdev: &str, nic: String, holds: bool) -> Result<Self, FilterError> {
        let mirror = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        mirror.set_nonblocking(true)?;
        let address = mirror.local_addr()?;
        let mut filter = Self {
            nic,
            hold: format!("{HOLD}{netdev}"),
            next: format!("{NEXT}{netdev}"),
            seen: format!("{SEEN}{netdev}"),
            qmp: qmp.clone(),
            mirror,
            is_holding: false,
            line: None,
            since_line: 0,
            before_line: 0,
            sent: 0,
            dropped: 0,
            times: HoldTimes::default(),
        };
        filter.remove_mirror();
        filter.is_holding = holds && filter.take_over(netdev)?;
        if !filter.is_holding {
            filter.remove_buffers();
            // What the guest sends passes the last one first.
            for id in [&filter.hold, &filter.next] {
                qmp.clone().execute("object-add", &buffer(id, netdev, "off"))?;
            }
        }
        filter.add_mirror(netdev, address)?;
        Ok(filter)
    }

    /// Holds with the buffers of an earlier guard. Whether there are any that hold.
    fn take_over(&mut self, netdev: &str) -> Result<bool, QmpError> {
        match (self.is_on(&self.hold), self.is_on(&self.next)) {
            (Some(holds), Some(collects)) if holds || collects => {
                self.qmp
                    .execute_together(&[set(&self.hold, "on"), set(&self.next, "on")], LIMIT)?;
            }
            // A guard of an earlier version has only that one.
            (Some(true), None) => drop(
                self.qmp
                    .execute("object-add", &buffer(&self.next, netdev, "on"))?,
            ),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether that buffer holds, if it is there.
    fn is_on(&self, id: &str) -> Option<bool> {
        let arguments = json!({"path": format!("/objects/{id}"), "property": "status"});
        let status = self.qmp.clone().execute("qom-get", &arguments);
        status.ok().map(|status| status == "on")
    }

    fn add_mirror(&mut self, netdev: &str, to: SocketAddr) -> Result<(), QmpError> {
        let inet = json!({"host": to.ip(), "port": to.port().to_string()});
        let remote = json!({"type": "inet", "data": inet});
        let backend = json!({"type": "udp", "data": {"remote": remote}});
        let qmp = &mut self.qmp;
        qmp.execute("chardev-add", &json!({"id": self.seen, "backend": backend}))?;
        let seen = json!({
            "qom-type": "filter-mirror", "id": self.seen, "netdev": netdev, "queue": "rx", "outdev": self.seen,
        });
        qmp.execute("object-add", &seen).map(drop)
    }

    fn remove_mirror(&mut self) {
        // Either may be missing.
        for command in ["object-del", "chardev-remove"] {
            let _ = self.qmp.execute_within(command, &json!({"id": self.seen}), LIMIT);
        }
    }

    /// What they hold is let go, in order.
    fn remove_buffers(&mut self) {
        // Any may be missing.
        for id in [&self.next, &self.hold] {
            let _ = self.qmp.execute_within("object-del", &json!({"id": id}), LIMIT);
        }
    }

    fn set_both(&mut self, both: &[(&str, Value)]) -> Result<(), GateError> {
        let done = self.qmp.execute_together(both, LIMIT);
        done.map_err(|source| GateError::Qmp {
            nic: self.nic.clone(),
            source,
        })
    }

    /// Counts what the mirror has copied.
    fn count_frames(&mut self) {
        let mut length = [0; LENGTH_BYTES + 1];
        let mut count = 0;
        for _ in 0..DATAGRAMS_AT_A_TIME {
            match self.mirror.recv(&mut length) {
                // What is longer is cut.
                Ok(LENGTH_BYTES) => count += 1,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.sent += count;
        if self.is_holding {
            self.since_line += count;
            self.times.came(count);
        }
    }

    /// Frames since the line that did not fit. There may be more: copies may be lost, by which they are counted.
    fn over_limit(&self) -> u64 {
        self.since_line.saturating_sub(HELD_MAX)
    }

    /// The second buffer has got what the first one had.
    fn count_line(&mut self) {
        let held = self.before_line + self.since_line.min(HELD_MAX);
        self.dropped += self.over_limit() + held.saturating_sub(HELD_MAX);
        (self.before_line, self.since_line) = (held.min(HELD_MAX), 0);
    }
}

impl OutputGate for Filter {
    fn nic(&self) -> &str {
        &self.nic
    }

    fn kind(&self) -> &'static str {
        "filter"
    }

    fn wait_for<'a>(&'a self, fds: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        fds.push((self.mirror.as_fd(), PollFlags::POLLIN));
    }

    fn go_on(&mut self) -> Result<(), GateError> {
        self.count_frames();
        Ok(())
    }

    fn place(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        self.count_frames();
        // The guest is stopped: from the first line on, the first buffer has what was sent since the line before.
        let first = if self.is_holding {
            set(&self.next, "off")
        } else {
            set(&self.hold, "on")
        };
        self.set_both(&[first, set(&self.next, "on")])?;
        (self.is_holding, self.line) = (true, Some(checkpoint));
        self.count_line();
        self.times.line();
        Ok(())
    }

    fn committed(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        if self.line != Some(checkpoint) {
            return Ok(());
        }
        self.set_both(&[set(&self.hold, "off"), set(&self.hold, "on")])?;
        (self.line, self.before_line) = (None, 0);
        self.times.left();
        Ok(())
    }

    fn forget_barriers(&mut self) {
        self.line = None;
    }

    fn open(&mut self) -> Result<(), GateError> {
        self.count_line();
        self.times.forget();
        (self.is_holding, self.line, self.before_line) = (false, None, 0);
        self.set_both(&[set(&self.next, "off"), set(&self.hold, "off")])
    }

    fn waiting(&self) -> u64 {
        self.since_line
    }

    fn counts(&self) -> Counts {
        Counts {
            sent: self.sent,
            dropped: self.dropped + self.over_limit(),
            ..Counts::default()
        }
    }

    fn take_hold_times_us(&mut self, into: &mut Vec<u64>) {
        self.times.take_us(into);
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        self.remove_mirror();
        // A guard that could not end the protection leaves output held.
        if !self.is_holding {
            self.remove_buffers();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::tests::{Responder, SocketPath, monitor};
    use std::sync::{Arc, Mutex};

    const FIRST: CheckpointId = CheckpointId(0);
    const SECOND: CheckpointId = CheckpointId(1);
    const THIRD: CheckpointId = CheckpointId(2);

    /// A filter-buffer of a card.
    struct Buffer {
        id: String,
        is_on: bool,
        frames: Vec<u32>,
    }

    /// The filters of a card as QEMU has them, and what has passed them.
    #[derive(Default)]
    struct Card {
        buffers: Vec<Buffer>,
        network: Vec<u32>,
        sent: u32,
        /// The guest sends a frame before and after each change of a filter.
        guest_runs: bool,
    }

    impl Card {
        fn guest_sends(&mut self) {
            self.sent += 1;
            let (frame, end) = (self.sent, self.buffers.len());
            self.pass(frame, end);
        }

        /// Filters that were added last come first.
        fn pass(&mut self, frame: u32, before: usize) {
            match self.buffers[..before].iter_mut().rfind(|buffer| buffer.is_on) {
                Some(buffer) => buffer.frames.push(frame),
                None => self.network.push(frame),
            }
        }

        fn set(&mut self, position: usize, is_on: bool) {
            self.buffers[position].is_on = is_on;
            if !is_on {
                for frame in std::mem::take(&mut self.buffers[position].frames) {
                    self.pass(frame, position);
                }
            }
        }

        fn run(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
            let path = arguments["path"].as_str().unwrap_or_default();
            let id = arguments["id"].as_str().unwrap_or(path);
            let id = id.strip_prefix("/objects/").unwrap_or(id);
            let found = self.buffers.iter().position(|buffer| buffer.id == id);
            match (command, found) {
                ("qom-list", _) => {
                    let names = self.buffers.iter().map(|buffer| json!({"name": buffer.id}));
                    return Ok(names.collect());
                }
                ("object-add", None) if arguments["qom-type"] == "filter-buffer" => {
                    self.buffers.push(Buffer {
                        id: id.to_owned(),
                        is_on: arguments["status"] == "on",
                        frames: Vec::new(),
                    })
                }
                ("object-del", Some(position)) => {
                    self.set(position, false);
                    self.buffers.remove(position);
                }
                ("qom-get", Some(position)) => {
                    let is_on = self.buffers[position].is_on;
                    return Ok(json!(if is_on { "on" } else { "off" }));
                }
                ("qom-set", Some(position)) => self.set(position, arguments["value"] == "on"),
                ("object-add" | "chardev-add", None) => {}
                _ => return Err(format!("no {id}")),
            }
            Ok(json!({}))
        }
    }

    fn qemu() -> (Arc<Mutex<Card>>, SocketPath) {
        let card: Arc<Mutex<Card>> = Arc::default();
        let of_monitor = card.clone();
        let respond: Responder = Box::new(move |command, arguments| {
            let mut card = of_monitor.lock().unwrap();
            let guest_runs = card.guest_runs;
            (0..u32::from(guest_runs)).for_each(|_| card.guest_sends());
            let answer = card.run(command, arguments);
            (0..u32::from(guest_runs)).for_each(|_| card.guest_sends());
            answer
        });
        (card, monitor((11, 1, 3), respond))
    }

    fn send(card: &Mutex<Card>, frames: u32) {
        let mut card = card.lock().unwrap();
        (0..frames).for_each(|_| card.guest_sends());
    }

    fn out(card: &Mutex<Card>) -> Vec<u32> {
        card.lock().unwrap().network.clone()
    }

    fn filter(path: &SocketPath, holds: bool) -> (Qmp, Filter) {
        let qmp = Qmp::connect(&path.0, LIMIT).unwrap();
        let filter = Filter::plug(&qmp, "net0", "net0".to_owned(), holds).unwrap();
        (qmp, filter)
    }

    #[test]
    fn frames_leave_by_the_commit_of_their_line() {
        let (card, path) = qemu();
        let (mut qmp, mut filter) = filter(&path, false);
        send(&card, 1);
        filter.place(FIRST).unwrap();
        send(&card, 1);
        filter.committed(FIRST).unwrap();
        assert_eq!(out(&card), [1]);
        filter.place(SECOND).unwrap();
        send(&card, 1);
        filter.committed(FIRST).unwrap();
        assert_eq!(out(&card), [1], "that commit is not of the last line");
        filter.committed(SECOND).unwrap();
        assert_eq!(out(&card), [1, 2]);
        // A line of a lost link lets nothing go; the next one takes along what is before it.
        filter.place(SECOND).unwrap();
        filter.forget_barriers();
        filter.committed(SECOND).unwrap();
        send(&card, 1);
        filter.place(THIRD).unwrap();
        send(&card, 1);
        assert_eq!(out(&card), [1, 2]);
        filter.committed(THIRD).unwrap();
        assert_eq!(out(&card), [1, 2, 3, 4]);
        send(&card, 1);
        drop(filter);
        assert_eq!(out(&card), [1, 2, 3, 4], "a guard that ends leaves output held");
        assert_eq!(remove_all(&mut qmp).unwrap(), 1);
        assert_eq!(out(&card), [1, 2, 3, 4, 5, 6]);
    }

    /// The next guard gives the card another gate, or none.
    #[test]
    fn what_is_left_on_a_card_is_removed_and_on_no_other() {
        let (card, path) = qemu();
        let (mut qmp, mut filter) = filter(&path, false);
        filter.place(FIRST).unwrap();
        send(&card, 2);
        drop(filter);
        assert_eq!(
            (remove_left(&mut qmp, "net").unwrap(), out(&card)),
            (false, vec![])
        );
        assert_eq!(
            (remove_left(&mut qmp, "net0").unwrap(), out(&card)),
            (true, vec![1, 2])
        );
        assert!(!remove_left(&mut qmp, "net0").unwrap());
        assert!(card.lock().unwrap().buffers.is_empty());
    }

    /// A guard that is late, or whose QEMU is: the receiver has given it up, and the guest runs.
    #[test]
    fn a_late_release_lets_nothing_go_that_is_behind_the_line() {
        let (card, path) = qemu();
        let (_qmp, mut filter) = filter(&path, false);
        filter.place(FIRST).unwrap();
        filter.committed(FIRST).unwrap();
        send(&card, 2);
        filter.place(SECOND).unwrap();
        card.lock().unwrap().guest_runs = true;
        filter.committed(SECOND).unwrap();
        assert_eq!(out(&card), [1, 2]);
    }

    #[test]
    fn a_guard_that_dies_between_two_commands_leaves_nothing_open() {
        for left in [[true, false], [false, true]] {
            let (card, path) = qemu();
            for (name, is_on) in [HOLD, NEXT].into_iter().zip(left) {
                card.lock().unwrap().buffers.push(Buffer {
                    id: format!("{name}net0"),
                    is_on,
                    frames: Vec::new(),
                });
            }
            send(&card, 1);
            let (_qmp, mut filter) = filter(&path, true);
            send(&card, 1);
            filter.place(FIRST).unwrap();
            send(&card, 1);
            assert_eq!(out(&card), [0; 0], "{left:?}");
            filter.committed(FIRST).unwrap();
            assert_eq!(out(&card), [1, 2], "{left:?}");
            filter.open().unwrap();
            assert_eq!(out(&card), [1, 2, 3], "{left:?}");
        }
    }
}
