//! A gate inside QEMU: its own filter objects, plugged into a running guest over QMP.
//!
//! A `filter-buffer` holds what the guest sends on a card. It lets go when its status is set to off, and holds again when it is set to on;
//! between the two, everything passes, so both are set while the guest is stopped. A `filter-mirror` behind it shows each frame to this
//! process, which only counts them: so it knows that something waits.

use super::gate::{Counts, GateError, OutputGate};
use super::relay::take_frames;
use crate::qmp::{Qmp, QmpError};
use colo_ring::units::CheckpointId;
use nix::poll::PollFlags;
use serde_json::json;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use thiserror::Error;

/// How long QEMU may take to open or close a filter. The guest is stopped meanwhile.
const LIMIT: Duration = Duration::from_secs(5);

/// Microseconds after which the filter lets go by itself: the most that it takes, 71 minutes.
const INTERVAL_US: u32 = u32::MAX;

/// Bytes that are read at a time.
const READ_BYTES: usize = 256 << 10;

/// A filter cannot be plugged in.
#[derive(Debug, Error)]
pub(super) enum FilterError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("a socket for QEMU's filter-mirror: {0}")]
    Socket(#[from] io::Error),
}

/// See the module.
pub(super) struct Filter {
    nic: String,
    hold: String,
    seen: String,
    qmp: Qmp,
    listener: UnixListener,
    _directory: TempDir,
    mirror: Option<UnixStream>,
    incoming: Vec<u8>,
    buffer: Box<[u8]>,
    is_holding: bool,
    since_line: u64,
    sent: u64,
}

impl Filter {
    /// Plugs the filters into the running guest's card; frames pass. A filter that an earlier guard has left goes on to hold what it
    /// has, where the guest is protected, and is replaced where it is not.
    ///
    /// # Errors
    /// If QEMU refuses, as for a card with vhost or with several queues.
    pub(super) fn plug(qmp: &Qmp, netdev: &str, nic: String, holds: bool) -> Result<Self, FilterError> {
        let directory = tempfile::Builder::new().prefix("colo-ring-guard-").tempdir()?;
        let path = directory.path().join("frames");
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let mut filter = Self {
            nic,
            hold: format!("colo-ring-hold-{netdev}"),
            seen: format!("colo-ring-seen-{netdev}"),
            qmp: qmp.clone(),
            listener,
            _directory: directory,
            mirror: None,
            incoming: Vec::new(),
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
            is_holding: false,
            since_line: 0,
            sent: 0,
        };
        filter.is_holding = holds && filter.is_closed();
        filter.remove_mirror();
        if !filter.is_holding {
            filter.remove_hold();
            filter.add_hold(netdev)?;
        }
        filter.add_mirror(netdev, &path)?;
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
        let hold = json!({
            "qom-type": "filter-buffer", "id": self.hold, "netdev": netdev, "queue": "rx", "interval": INTERVAL_US,
            "status": "off",
        });
        self.qmp.execute("object-add", &hold).map(drop)
    }

    fn add_mirror(&mut self, netdev: &str, path: &Path) -> Result<(), QmpError> {
        let socket = json!({"addr": {"type": "unix", "data": {"path": path}}, "server": false});
        let backend = json!({"type": "socket", "data": socket});
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
        done.map(drop).map_err(|source| GateError::Qmp {
            nic: self.nic.clone(),
            source,
        })
    }

    /// Counts what the mirror has shown.
    fn count_frames(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            if socket.set_nonblocking(true).is_ok() {
                self.mirror = Some(socket);
                self.incoming.clear();
            }
        }
        let Some(mirror) = &mut self.mirror else { return };
        let is_open = loop {
            match mirror.read(&mut self.buffer) {
                Ok(0) => break false,
                Ok(count) => self.incoming.extend_from_slice(&self.buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
            let mut frames = 0;
            let Some(taken) = take_frames(&self.incoming, |_| frames += 1) else {
                break false;
            };
            self.incoming.drain(..taken);
            self.sent += frames;
            if self.is_holding {
                self.since_line += frames;
            }
        };
        if !is_open {
            self.mirror = None;
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
        fds.push((self.listener.as_fd(), PollFlags::POLLIN));
        if let Some(mirror) = &self.mirror {
            fds.push((mirror.as_fd(), PollFlags::POLLIN));
        }
    }

    fn go_on(&mut self) {
        self.count_frames();
    }

    fn place(&mut self, _: CheckpointId) -> Result<(), GateError> {
        self.count_frames();
        // The guest is stopped: what the filter holds from the first line on is of this checkpoint or an earlier one.
        if !self.is_holding {
            self.set("on")?;
            self.is_holding = true;
        }
        self.since_line = 0;
        Ok(())
    }

    fn committed(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        // It holds since the first line, behind which there is nothing yet.
        if checkpoint > CheckpointId(0) && self.is_holding {
            self.set("off")?;
            self.set("on")?;
        }
        Ok(())
    }

    fn forget_barriers(&mut self) {}

    fn open(&mut self) -> Result<(), GateError> {
        self.set("off")?;
        self.is_holding = false;
        self.since_line = 0;
        Ok(())
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
