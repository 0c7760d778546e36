//! A gate inside QEMU: its own filter objects, plugged into a running guest over QMP.
//!
//! A `filter-buffer` holds what the guest sends on a card. It lets go when its status is set to off, and holds again when it is set to on;
//! between the two, everything passes, so both are set while the guest is stopped. A `filter-mirror` behind it copies each frame to a
//! UDP socket of this process, which only counts them: so it knows that something waits. QEMU would wait for the reader of a stream; copies
//! that do not fit into the UDP socket are lost, and nothing else.

use super::gate::{Counts, GateError, OutputGate};
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

/// Removes every filter that a guard has left in that QEMU: what they hold is released. Returns how many network cards had one.
///
/// # Errors
/// If QEMU does not answer, or refuses.
pub(crate) fn remove_all(qmp: &mut Qmp) -> Result<usize, QmpError> {
    let listed = qmp.execute("qom-list", &json!({"path": "/objects"}))?;
    let names = listed.as_array().into_iter().flatten();
    let names: Vec<&str> = names.filter_map(|object| object["name"].as_str()).collect();
    for name in names.iter().filter(|name| name.starts_with(SEEN)) {
        qmp.execute("object-del", &json!({"id": name}))?;
        qmp.execute("chardev-remove", &json!({"id": name}))?;
    }
    let holds = || names.iter().filter(|name| name.starts_with(HOLD));
    for name in holds() {
        qmp.execute("object-del", &json!({"id": name}))?;
    }
    Ok(holds().count())
}

const HOLD: &str = "colo-ring-hold-";
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

/// What holds on a card, and is open.
fn hold(id: &str, netdev: &str) -> Value {
    json!({
        "qom-type": "filter-buffer", "id": id, "netdev": netdev, "queue": "rx", "interval": INTERVAL_US, "status": "off",
    })
}

/// See the module.
pub(super) struct Filter {
    nic: String,
    hold: String,
    seen: String,
    qmp: Qmp,
    mirror: UdpSocket,
    is_holding: bool,
    since_line: u64,
    sent: u64,
    /// In all epochs before this one.
    dropped: u64,
}

impl Filter {
    /// Whether QEMU takes a filter for that card. One is plugged in, open, and removed again.
    ///
    /// # Errors
    /// If QEMU refuses, as for a card with vhost or with several queues.
    pub(super) fn probe(qmp: &mut Qmp, netdev: &str) -> Result<(), QmpError> {
        let id = format!("{PROBE}{netdev}");
        qmp.execute("object-add", &hold(&id, netdev))?;
        qmp.execute("object-del", &json!({"id": id})).map(drop)
    }

    /// Plugs the filters into the running guest's card; frames pass. A filter that an earlier guard has left goes on to hold what it
    /// has, where the guest is protected, and is replaced where it is not.
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
            seen: format!("{SEEN}{netdev}"),
            qmp: qmp.clone(),
            mirror,
            is_holding: false,
            since_line: 0,
            sent: 0,
            dropped: 0,
        };
        filter.is_holding = holds && filter.is_closed();
        filter.remove_mirror();
        if !filter.is_holding {
            filter.remove_hold();
            filter.add_hold(netdev)?;
        }
        filter.add_mirror(netdev, address)?;
        Ok(filter)
    }

    /// Whether a filter is there that holds.
    fn is_closed(&mut self) -> bool {
        let arguments = json!({"path": self.object(), "property": "status"});
        let status = self.qmp.execute("qom-get", &arguments);
        status.is_ok_and(|status| status == "on")
    }

    fn object(&self) -> String {
        format!("/objects/{}", self.hold)
    }

    fn add_hold(&mut self, netdev: &str) -> Result<(), QmpError> {
        self.qmp
            .execute("object-add", &hold(&self.hold, netdev))
            .map(drop)
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

    /// What it holds is let go.
    fn remove_hold(&mut self) {
        // It may be missing.
        let _ = self
            .qmp
            .execute_within("object-del", &json!({"id": self.hold}), LIMIT);
    }

    fn set(&mut self, status: &str) -> Result<(), GateError> {
        let arguments = json!({"path": self.object(), "property": "status", "value": status});
        let done = self.qmp.execute_within("qom-set", &arguments, LIMIT);
        done.map(drop).map_err(|source| self.failed(source))
    }

    /// Counts what the mirror has copied.
    fn count_frames(&mut self) {
        let mut length = [0; LENGTH_BYTES + 1];
        for _ in 0..DATAGRAMS_AT_A_TIME {
            match self.mirror.recv(&mut length) {
                // What is longer is cut.
                Ok(LENGTH_BYTES) => {
                    self.sent += 1;
                    self.since_line += u64::from(self.is_holding);
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// Frames of this epoch that did not fit. There may be more: copies may be lost, by which they are counted.
    fn over_limit(&self) -> u64 {
        self.since_line.saturating_sub(HELD_MAX)
    }

    /// Releases what the filter holds, and holds again.
    fn release(&mut self) -> Result<(), GateError> {
        let status = self.qmp.execute_within("query-status", &json!({}), LIMIT);
        let status = status.map_err(|source| self.failed(source))?;
        if status["running"] == true {
            // The receiver has given this guard up: what the guest sends now is not committed.
            return Err(GateError::Runs(self.nic.clone()));
        }
        self.is_holding = false;
        let set = |status| json!({"path": self.object(), "property": "status", "value": status});
        let both = [("qom-set", set("off")), ("qom-set", set("on"))];
        let done = self.qmp.execute_together(&both, LIMIT);
        done.map_err(|source| self.failed(source))?;
        self.is_holding = true;
        Ok(())
    }

    fn failed(&self, source: QmpError) -> GateError {
        GateError::Qmp {
            nic: self.nic.clone(),
            source,
        }
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

    fn place(&mut self, _: CheckpointId) -> Result<(), GateError> {
        self.count_frames();
        // The guest is stopped: what the filter holds from the first line on is of this checkpoint or an earlier one.
        if !self.is_holding {
            self.set("on")?;
            self.is_holding = true;
        }
        self.dropped += self.over_limit();
        self.since_line = 0;
        Ok(())
    }

    fn committed(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        // It holds since the first line, behind which there is nothing yet.
        match checkpoint > CheckpointId(0) && self.is_holding {
            true => self.release(),
            false => Ok(()),
        }
    }

    fn forget_barriers(&mut self) {}

    fn open(&mut self) -> Result<(), GateError> {
        self.is_holding = false;
        self.dropped += self.over_limit();
        self.since_line = 0;
        self.set("off")
    }

    fn releases_in_pause(&self) -> bool {
        true
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
}

impl Drop for Filter {
    fn drop(&mut self) {
        self.remove_mirror();
        // A guard that could not end the protection leaves output held.
        if !self.is_holding {
            self.remove_hold();
        }
    }
}
