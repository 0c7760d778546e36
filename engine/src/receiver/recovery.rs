//! Recovers the checkpoints of earlier receivers from the RAM directory.

use super::device_state;
use super::disks::SessionDisks;
use super::guest::{GuestIdentity, StoredGuest};
use super::guest_memory::Budgets;
use super::kept_checkpoint::KeptCheckpoint;
use super::names::GuestUuid;
use super::remark::Remark;
use super::session_codec::{DecodeError, StoredSession, decode};
use super::{Event, Events};
use crate::budget::BudgetError;
use crate::disk::{self, DiskError, OrphanOutcome, StoredDisk};
use crate::store::{CommittedImage, Recoverable, RecoverableCheckpoint, StoreError, labels_in};
use crate::wire::stream::StreamHeader;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use thiserror::Error;

/// The label of a session's files.
pub(super) fn label(session: u32) -> String {
    format!("session-{session}")
}

fn session_of(label_found: &str) -> Option<u32> {
    let number: u32 = label_found.strip_prefix("session-")?.parse().ok()?;
    // Only the canonical form of a number.
    (label(number) == label_found).then_some(number)
}

/// Why a checkpoint cannot be recovered. Its files stay as they are.
#[derive(Debug, Error)]
pub enum RecoveryError {
    /// Files without a record.
    #[error("there is no commit record")]
    NoRecord,
    /// The files are damaged, or cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The description of the session is damaged.
    #[error("the description of its session: {0}")]
    Session(#[from] DecodeError),
    /// A disk is not what the checkpoint needs.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk is where this receiver may not look.
    #[error("{source}; its guest's disks are in {directory}: start the receiver with --disks {directory}")]
    DiskElsewhere {
        /// The directory of its base.
        directory: String,
        /// The error.
        source: DiskError,
    },
    /// This receiver's limits do not allow it.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// What became of the files of a session.
enum Recovered {
    Checkpoint(KeptCheckpoint),
    /// They belong to another receiver, which is running.
    InUse,
    /// The session ended in precopy, or was given up, or its checkpoints were to end with its receiver. The files were removed.
    Nothing,
}

fn recover(
    directory: &Path,
    session: u32,
    started: Instant,
    budgets: &Budgets,
) -> Result<Recovered, RecoveryError> {
    let found = match RecoverableCheckpoint::find(directory, &label(session))? {
        Recoverable::Checkpoint(found) => found,
        Recoverable::InUse => return Ok(Recovered::InUse),
        Recoverable::Nothing => return Ok(Recovered::Nothing),
        Recoverable::Unknown => return Err(RecoveryError::NoRecord),
    };
    let StoredSession {
        guest,
        description,
        disks,
    } = decode(found.session())?;
    let in_stream = StreamHeader::parse_whole(&description.header).and_then(|header| header.uuid);
    let guest = StoredGuest {
        // A receiver of before has left it there alone.
        uuid: guest.uuid.or(in_stream.and_then(GuestUuid::new)),
        ..guest
    };
    let guest = GuestIdentity::recovered(session, guest);
    let leases = budgets.take(CommittedImage::mappings_max(&description.blocks))?;
    // Its files are counted with the image.
    leases.keep_device_state(device_state::kept(found.device_state_bytes() as u64, false))?;
    let (age, is_given) = (found.age(), found.is_given());
    let uptime = started.elapsed();
    let image = found.recover(description.blocks.clone(), &budgets.memory)?;
    // Until it is discarded: a disk that cannot be recovered, or a receiver that does not start, must not cost the checkpoint.
    image.keep_files();
    let disks = recover_disks(&disks, &image, is_given)?;
    let (image, description) = (Arc::new(image), Arc::new(description));
    let kept = KeptCheckpoint::new(
        session,
        Arc::new(guest),
        image,
        Arc::new(disks),
        description,
        leases,
        uptime,
    );
    kept.committed_at(uptime, age);
    if is_given {
        kept.promotion()
            .was_given("a QEMU by the receiver before this one");
    }
    Ok(Recovered::Checkpoint(kept))
}

/// Brings a guest's disks to the checkpoint of its image.
fn recover_disks(
    stored: &[StoredDisk],
    image: &CommittedImage,
    is_given: bool,
) -> Result<SessionDisks, RecoveryError> {
    let checkpoint = image.checkpoint().map_or(0, |checkpoint| checkpoint.0);
    let files = image.files().ok_or(RecoveryError::NoRecord)?;
    let recover = |stored: &StoredDisk| {
        let disk = disk::recover(stored, files, checkpoint, is_given);
        disk.map(Arc::new).map_err(|source| match source.is_denied() {
            true => RecoveryError::DiskElsewhere {
                directory: stored.directory.clone(),
                source,
            },
            false => RecoveryError::Disk(source),
        })
    };
    let disks = stored.iter().map(recover).collect::<Result<_, RecoveryError>>()?;
    Ok(SessionDisks::new(disks, false))
}

/// Recovers the disks that no recovered checkpoint needs, where that is possible, and reports on each.
pub(super) fn recover_orphaned_disks(directory: &Path, events: &Events) {
    let outcomes = match disk::recover_orphans(directory) {
        Ok(outcomes) => outcomes,
        Err(error) => return events(Event::warning(error.to_string())),
    };
    for (name, outcome) in outcomes {
        events(match outcome {
            OrphanOutcome::At(checkpoint) => Event::note(format!(
                "disk {name} was left at checkpoint {checkpoint} of an earlier receiver, whose memory is lost: a guest finds it as \
                 after a power failure"
            )),
            OrphanOutcome::Unfinished => Event::note(format!(
                "disk {name}: its receiver ended before a checkpoint was committed; its content is incomplete until it is copied again"
            )),
            OrphanOutcome::Discarded => Event::note(format!(
                "disk {name}: its checkpoint was discarded by an earlier receiver, which was killed before it had removed all of it"
            )),
            OrphanOutcome::Kept(error) => Event::warning(format!("disk {name} is not served: {error}")),
        });
    }
}

/// Recovers the checkpoints of all sessions in the RAM directory, and reports on each. Returns also the numbers of all sessions
/// that had files there.
pub(super) fn recover_all(
    directory: &Path,
    started: Instant,
    budgets: &Budgets,
    events: &Events,
) -> (Vec<KeptCheckpoint>, BTreeSet<u32>) {
    let labels = match labels_in(directory) {
        Ok(labels) => labels,
        Err(error) => {
            events(Event::warning(error.to_string()));
            return (Vec::new(), BTreeSet::new());
        }
    };
    let sessions: BTreeSet<u32> = labels.iter().filter_map(|label| session_of(label)).collect();
    let mut recovered = Vec::new();
    for session in &sessions {
        let files = directory.join(format!("{}.*", label(*session)));
        let files = files.display();
        match recover(directory, *session, started, budgets) {
            Ok(Recovered::Checkpoint(kept)) => {
                let title = kept.guest.title();
                let text = format!(
                    "session {title} of {} was recovered from {files}: checkpoint {} is whole",
                    kept.guest.peer,
                    kept.number().map_or(0, |id| id.0)
                );
                events(Event::note(Remark::of(&title, text)));
                recovered.push(kept);
            }
            Ok(Recovered::InUse) => events(Event::note(format!(
                "{files}: it belongs to another receiver, which is running"
            ))),
            Ok(Recovered::Nothing) => events(Event::note(format!(
                "{files}: no checkpoint in them outlives its receiver, so there is nothing to resume; they were removed"
            ))),
            Err(error) => events(Event::warning(format!(
                "{files} cannot be used and stay as they are: {error}; remove them if no virtual machine runs on them"
            ))),
        }
    }
    (recovered, sessions)
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::blocks::BlockTable;
    use crate::budget::Budget;
    use crate::receiver::session_codec::encode;
    use crate::session::GuestDescription;
    use crate::store::{CopyMethod, Flusher, HugePages, KeptFiles, Store, StoreOptions};
    use crate::units::CheckpointId;
    use crate::wire::stream::StreamHeader;

    fn description() -> GuestDescription {
        let machine_type = "pc-q35-11.1".to_owned();
        let header = StreamHeader {
            machine_type: machine_type.clone(),
            target_page_bits: false,
            capabilities: false,
            uuid: None,
        };
        let mut encoded = Vec::new();
        header.encode(&mut encoded);
        let blocks = vec![(b"pc.ram".as_slice().into(), 8 * 4096)];
        GuestDescription {
            header: encoded,
            machine_type,
            ram_section: 2,
            blocks: Arc::new(BlockTable::new(blocks, 8 * 4096).unwrap()),
            vmdesc: b"{}".to_vec(),
        }
    }

    /// Leaves a checkpoint of session 3.
    fn leave_checkpoint(directory: &Path) {
        let (description, options) = (
            description(),
            StoreOptions {
                hugepages: HugePages::Off,
                ram_dir: Some(directory.to_owned()),
                ..StoreOptions::default()
            },
        );
        let (store, _) = Store::create(description.blocks.clone(), &label(3), &options).unwrap();
        store.begin_colo();
        let guest = StoredGuest {
            peer: "192.0.2.1:5".into(),
            ..StoredGuest::default()
        };
        store.record_session(|| encode(&guest, &description, &[]));
        let flusher = Flusher::new(CopyMethod::Memcpy, 0, &[]).unwrap();
        store.commit(CheckpointId(0), &mut vec![1; 100], &flusher);
        store.drop_uncommitted();
        assert_eq!(store.committed().keep_files(), KeptFiles::Kept);
    }

    /// Something else fails at the start of the receiver that has recovered it: a thread, or a core that it may not use.
    #[test]
    fn a_receiver_that_does_not_start_loses_no_checkpoint() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        leave_checkpoint(directory.path());
        let budgets = Budgets {
            memory: Budget::unlimited(),
            mappings: Arc::new(Budget::of_mappings(65_530)),
        };
        let recovered = || recover_all(directory.path(), Instant::now(), &budgets, &|_| {}).0;
        for _ in 0..2 {
            let kept = recovered();
            assert_eq!(kept.len(), 1);
            drop(kept);
        }
        // What is discarded is gone.
        let kept = recovered();
        kept[0].image.remove_files();
        drop(kept);
        assert!(recovered().is_empty());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_our_own_names_are_sessions() {
        assert_eq!(session_of("session-7"), Some(7));
        for name in [
            "session-07",
            "session-",
            "session-+7",
            "session-4294967296",
            "guest",
        ] {
            assert_eq!(session_of(name), None, "{name}");
        }
    }
}
