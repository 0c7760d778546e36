//! The disks of one session, which are cut and committed together; they outlive it with its checkpoint.

use crate::canary::{self, Canary};
use crate::disk::{Disk, DiskError, StoredDisk};
use crate::units::CheckpointId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Where a disk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// No session has taken it yet: writes go to the base.
    Copying,
    /// Its writes are committed with the RAM.
    InSync,
    /// Its connection has ended. What is committed is kept.
    Lost,
}

/// A disk of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskStatus {
    /// Its export's name.
    pub name: String,
    /// Its base, absolute.
    pub base: PathBuf,
    /// The size of the disk.
    pub size_bytes: u64,
    /// Where it stands.
    pub state: DiskState,
    /// Bytes that its log takes.
    pub log_bytes: u64,
    /// Bytes that are committed and not in the base yet.
    pub lag_bytes: u64,
    /// Epochs that are committed and not in the base yet.
    pub lag_epochs: usize,
    /// The last committed checkpoint.
    pub epoch: Option<u64>,
}

/// A disk whose base is what belongs to a restored checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoredDisk {
    /// Its export's name.
    pub name: String,
    /// Its base, absolute.
    pub path: PathBuf,
    /// The size of the disk.
    pub size_bytes: u64,
    /// The checkpoint that the base is at.
    pub epoch: u64,
    /// Always true: a checkpoint is not restored before.
    pub drained: bool,
}

/// See the module.
#[derive(Default)]
pub(in crate::receiver) struct SessionDisks {
    /// In the order of their names.
    disks: Vec<Arc<Disk>>,
    /// Whether the first one's record commits, because the RAM has none.
    has_own_record: bool,
}

impl SessionDisks {
    pub(in crate::receiver) fn new(disks: Vec<Arc<Disk>>, has_own_record: bool) -> Self {
        Self {
            disks,
            has_own_record,
        }
    }

    /// What a later receiver must know to find them.
    pub(in crate::receiver) fn stored(&self) -> Vec<StoredDisk> {
        let stored = |disk: &Arc<Disk>| StoredDisk {
            directory: disk
                .base()
                .path()
                .parent()
                .map_or_else(String::new, |directory| directory.to_string_lossy().into_owned()),
            name: disk.name().to_owned(),
            log: disk.log(),
            size: disk.base().size(),
        };
        self.disks.iter().map(stored).collect()
    }

    /// The epoch of `checkpoint` is complete on all of them.
    pub(in crate::receiver) fn cut(&self, checkpoint: CheckpointId) -> Result<(), Arc<DiskError>> {
        self.disks.iter().try_for_each(|disk| disk.cut(checkpoint.0))
    }

    /// Whether `checkpoint` may be committed.
    pub(in crate::receiver) fn check_commit(&self, checkpoint: CheckpointId) -> Result<(), Arc<DiskError>> {
        match checkpoint.0 {
            0 => Ok(()),
            number => self.disks.iter().try_for_each(|disk| disk.check_commit(number)),
        }
    }

    /// The RAM's record has committed `checkpoint`.
    pub(in crate::receiver) fn commit(&self, checkpoint: CheckpointId) {
        let count =
            self.disks.len() - usize::from(canary::is_set(Canary::ForgottenDisk) && !self.disks.is_empty());
        for (position, disk) in self.disks[..count].iter().enumerate() {
            disk.commit(checkpoint.0, position == 0 && self.has_own_record);
        }
    }

    /// The primary's guest runs again: logs are applied.
    pub(in crate::receiver) fn acknowledged(&self) {
        self.disks.iter().for_each(|disk| disk.acknowledged());
    }

    /// What is not committed is dropped, and the connections end.
    pub(in crate::receiver) fn end_session(&self) {
        self.disks.iter().for_each(|disk| disk.end_session());
    }

    /// Waits until the bases are at the last committed checkpoint. The session has ended.
    ///
    /// # Errors
    /// If a base cannot be written; the others are at it then.
    pub(in crate::receiver) fn drain(&self) -> Result<(), DiskError> {
        let drained = self.disks.iter().map(|disk| disk.wait_drained());
        drained.fold(Ok(()), Result::and)
    }

    /// The disks as they belong to the RAM of `checkpoint`; their bases are at it. Waits until their logs are applied.
    ///
    /// # Errors
    /// If a base cannot be written, or is at another checkpoint.
    pub(in crate::receiver) fn restored(
        &self,
        checkpoint: CheckpointId,
    ) -> Result<Vec<RestoredDisk>, DiskError> {
        self.drain()?;
        let restored = |disk: &Arc<Disk>| match disk.figures().epoch {
            Some(epoch) if epoch == checkpoint.0 => Ok(RestoredDisk {
                name: disk.name().to_owned(),
                path: disk.base().path().to_owned(),
                size_bytes: disk.base().size(),
                epoch,
                drained: true,
            }),
            at => Err(DiskError::OtherEpoch {
                disk: disk.name().to_owned(),
                at,
                checkpoint: checkpoint.0,
            }),
        };
        self.disks.iter().map(restored).collect()
    }

    /// Keeps their files for the next receiver.
    pub(in crate::receiver) fn keep_files(&self) {
        self.disks.iter().for_each(|disk| disk.keep_files());
    }

    /// Their checkpoint is about to be removed: once it is, nothing needs them.
    pub(in crate::receiver) fn give_up(&self) {
        self.disks.iter().for_each(|disk| disk.give_up());
    }

    /// Removes the files of disks that no checkpoint needs any more: the record that commits last.
    pub(in crate::receiver) fn remove_files(&self) {
        self.disks.iter().rev().for_each(|disk| disk.remove_files());
    }

    /// The same disks, without a part in keeping them open.
    pub(in crate::receiver) fn weak(&self) -> WeakDisks {
        WeakDisks(self.disks.iter().map(Arc::downgrade).collect())
    }

    pub(in crate::receiver) fn statuses(&self) -> Vec<DiskStatus> {
        let status = |disk: &Arc<Disk>| {
            let figures = disk.figures();
            DiskStatus {
                name: disk.name().to_owned(),
                base: disk.base().path().to_owned(),
                size_bytes: disk.base().size(),
                state: if figures.is_lost {
                    DiskState::Lost
                } else {
                    DiskState::InSync
                },
                log_bytes: figures.log_bytes,
                lag_bytes: figures.lag_bytes,
                lag_epochs: figures.lag_epochs,
                epoch: figures.epoch,
            }
        };
        self.disks.iter().map(status).collect()
    }

    pub(in crate::receiver) fn all(&self) -> &[Arc<Disk>] {
        &self.disks
    }
}

/// How long the last users of a disk that was given up are waited for: the thread of its connection, and the one that applied its log.
const CLOSING: Duration = Duration::from_secs(2);

/// Disks of a checkpoint that was given up.
pub(in crate::receiver) struct WeakDisks(Vec<Weak<Disk>>);

impl WeakDisks {
    /// Waits until they are closed, so that a client that connects them next is not refused.
    pub(in crate::receiver) fn wait_closed(&self) {
        let since = Instant::now();
        while self.0.iter().any(|disk| disk.strong_count() > 0) && since.elapsed() < CLOSING {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
