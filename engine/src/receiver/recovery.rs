//! Recovers the checkpoints of earlier receivers from the RAM directory.

use super::budget::BudgetError;
use super::disks::SessionDisks;
use super::guest_memory::{Budgets, GuestNeeds};
use super::kept_checkpoint::KeptCheckpoint;
use super::session_codec::{DecodeError, StoredSession, decode};
use super::{Event, Events};
use crate::disk::{self, DiskError, OrphanOutcome, StoredDisk};
use crate::store::{CommittedImage, Recoverable, RecoverableCheckpoint, StoreError, labels_in};
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
    /// This receiver's limits do not allow it.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// What became of the files of a session.
enum Recovered {
    Checkpoint(KeptCheckpoint),
    /// They belong to another receiver, which is running.
    InUse,
    /// The session has ended in precopy; they were removed.
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
        peer,
        description,
        disks,
    } = decode(found.session())?;
    let leases = budgets.take(GuestNeeds {
        ram_bytes: description.blocks.total_bytes(),
        device_state_bytes: found.device_state_bytes() as u64 * 2,
        mappings: CommittedImage::mappings_max(&description.blocks),
    })?;
    let (age, is_given) = (found.age(), found.is_given());
    let uptime = started.elapsed();
    let image = found.recover(description.blocks.clone())?;
    let disks = recover_disks(&disks, &image, is_given);
    if disks.is_err() {
        image.keep_files();
    }
    let disks = disks?;
    let (image, description) = (Arc::new(image), Arc::new(description));
    let kept = KeptCheckpoint::new(session, peer, image, Arc::new(disks), description, leases, uptime);
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
    let recover = |disk: &StoredDisk| disk::recover(disk, files, checkpoint, is_given).map(Arc::new);
    let disks = stored.iter().map(recover).collect::<Result<_, DiskError>>()?;
    Ok(SessionDisks::new(disks, false))
}

/// Recovers the disks that no recovered checkpoint needs, where that is possible, and reports on each.
pub(super) fn recover_orphaned_disks(directory: &Path, events: &Events) {
    let outcomes = match disk::recover_orphans(directory) {
        Ok(outcomes) => outcomes,
        Err(error) => return events(Event::Warning(error.to_string())),
    };
    for (name, outcome) in outcomes {
        events(match outcome {
            OrphanOutcome::At(checkpoint) => Event::Note(format!(
                "disk {name} was left at checkpoint {checkpoint} of an earlier receiver, whose memory is lost: a guest finds it as \
                 after a power failure"
            )),
            OrphanOutcome::Unfinished => Event::Note(format!(
                "disk {name}: its receiver ended before a checkpoint was committed; its content is incomplete until it is copied again"
            )),
            OrphanOutcome::Kept(error) => Event::Warning(format!("disk {name} is not served: {error}")),
        });
    }
}

/// Recovers the checkpoints of all sessions in the RAM directory, and reports on each. Returns also the first number that no
/// session's files have.
pub(super) fn recover_all(
    directory: &Path,
    started: Instant,
    budgets: &Budgets,
    events: &Events,
) -> (Vec<KeptCheckpoint>, u32) {
    let labels = match labels_in(directory) {
        Ok(labels) => labels,
        Err(error) => {
            events(Event::Warning(error.to_string()));
            return (Vec::new(), 1);
        }
    };
    let mut sessions: Vec<u32> = labels.iter().filter_map(|label| session_of(label)).collect();
    sessions.sort_unstable();
    let mut recovered = Vec::new();
    for session in &sessions {
        let files = directory.join(format!("{}.*", label(*session)));
        let files = files.display();
        match recover(directory, *session, started, budgets) {
            Ok(Recovered::Checkpoint(kept)) => {
                events(Event::Note(format!(
                    "session {session} of {} was recovered from {files}: checkpoint {} is whole",
                    kept.peer,
                    kept.number().map_or(0, |id| id.0)
                )));
                recovered.push(kept);
            }
            Ok(Recovered::InUse) => events(Event::Note(format!(
                "{files}: it belongs to another receiver, which is running"
            ))),
            Ok(Recovered::Nothing) => events(Event::Note(format!(
                "{files}: its receiver ended in precopy, so there is nothing to resume; its files were removed"
            ))),
            Err(error) => events(Event::Warning(format!(
                "{files} cannot be used and stay as they are: {error}; remove them if no virtual machine runs on them"
            ))),
        }
    }
    (
        recovered,
        sessions.last().map_or(1, |last| last.saturating_add(1)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

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
