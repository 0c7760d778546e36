//! The first copy of the guest's disks: all of them, nothing, or what has changed since an earlier one; shown while it runs.

use super::DiskSync;
use crate::guest_disks::{MirrorError, MirrorState, Mirrors, changes};
use crate::net::Address;
use crate::output::{ProgressLine, mebibytes, tell};
use crate::qmp::Qmp;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How often QEMU is asked how far the copies are.
const POLL: Duration = Duration::from_millis(100);

/// What may be left of the changes when the guest is stopped to copy them: a fraction of a second on a link of 1 Gbit/s.
const STOPPED_BYTES: u64 = 16 << 20;

/// A first copy on its way.
pub(super) struct FirstCopy<'a> {
    pub(super) qmp: &'a mut Qmp,
    /// Where the receiver serves disks.
    pub(super) to: &'a Address,
    /// Connected to their exports.
    pub(super) mirrors: &'a Mirrors,
    /// That the operator interrupts it.
    pub(super) wished: &'a mpsc::Receiver<()>,
    /// Whether there is a line that shows how far it is.
    pub(super) shows: bool,
}

/// What a copy of the changes was.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(in crate::commands::protect) struct Changes {
    /// Bytes that had changed.
    pub(super) bytes: u64,
    /// How long the guest was stopped for the last of them.
    pub(super) stopped_ms: u64,
}

impl FirstCopy<'_> {
    /// Copies, and leaves both sides equal and every write of the guest mirrored.
    ///
    /// # Errors
    /// With QEMU's reason, or that it was interrupted.
    pub(super) fn run(&mut self, sync: DiskSync) -> Result<Option<Changes>, MirrorError> {
        match sync {
            DiskSync::Changed => self.changes().map(Some),
            DiskSync::Full | DiskSync::None => {
                changes::begin(self.qmp, self.to, self.mirrors.disks())?;
                self.mirror(sync == DiskSync::Full)?;
                changes::keep(self.qmp, self.to, self.mirrors.disks())?;
                Ok(None)
            }
        }
    }

    fn mirror(&mut self, copies_all: bool) -> Result<(), MirrorError> {
        self.mirrors.start(self.qmp, copies_all)?;
        self.wait(Mirrors::state)
    }

    /// Copies most of it while the guest runs, and stops the guest for the rest: a mirror that copies nothing must begin
    /// when both sides are equal.
    fn changes(&mut self) -> Result<Changes, MirrorError> {
        let bytes = self.left()?;
        let mut left = bytes;
        while left > STOPPED_BYTES {
            self.copy()?;
            let before = std::mem::replace(&mut left, self.left()?);
            if left > before / 2 {
                tell("the guest writes about as fast as its disks are copied: it is stopped for the rest");
                break;
            }
        }
        let running = self.ask("query-status")?["running"] == true;
        let began = Instant::now();
        if running {
            self.ask("stop")?;
        }
        let mirrored = self.copy().and_then(|()| self.mirror(false));
        if running {
            self.ask("cont")?;
        }
        let stopped_ms = match running {
            true => u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            false => 0,
        };
        mirrored.map(|()| Changes { bytes, stopped_ms })
    }

    /// Bytes that are not copied.
    fn left(&mut self) -> Result<u64, MirrorError> {
        changes::bytes(self.qmp, self.to, self.mirrors.disks())
    }

    fn copy(&mut self) -> Result<(), MirrorError> {
        self.mirrors.start_copy_of_changes(self.qmp, self.to)?;
        self.wait(Mirrors::copy_of_changes)
    }

    fn ask(&mut self, command: &str) -> Result<serde_json::Value, MirrorError> {
        Ok(self.qmp.execute(command, &json!({}))?)
    }

    /// Waits until everything is copied, showing how far it is.
    fn wait(
        &mut self,
        state_of: fn(&Mirrors, &mut Qmp) -> Result<MirrorState, MirrorError>,
    ) -> Result<(), MirrorError> {
        let began = Instant::now();
        let mut line = ProgressLine::new(self.shows);
        loop {
            let state = state_of(self.mirrors, self.qmp)?;
            if state.is_synced {
                return Ok(());
            }
            line.show(&progress(state, began.elapsed()));
            match self.wished.recv_timeout(POLL) {
                Ok(()) => return Err(MirrorError::Interrupted { bytes: state.done }),
                Err(RecvTimeoutError::Timeout) => {}
                // There is no thread that could interrupt it.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(POLL),
            }
        }
    }
}

/// How far the copies are, how fast, and how long the rest takes at that rate.
pub(super) fn progress(state: MirrorState, since: Duration) -> String {
    const WIDTH: u64 = 20;
    let MirrorState { done, all, .. } = state;
    let all = all.max(1);
    let full = usize::try_from(WIDTH * done.min(all) / all).unwrap_or(0);
    let rate = mebibytes(done) / since.as_secs_f64().max(0.1);
    let left = match done {
        0 => "?".to_owned(),
        _ => format!("{:.0} s", mebibytes(all.saturating_sub(done)) / rate),
    };
    format!(
        "disks [{:<20}] {:.0} of {:.0} MiB, {rate:.0} MiB/s, {left} left",
        "=".repeat(full),
        mebibytes(done),
        mebibytes(all),
    )
}
