//! Applying: bringing committed epochs to the base, in order, behind the acknowledgement.
//!
//! Steps are small, and none begins while the primary's guest stands still for a checkpoint. What is applied twice leads to the
//! same base, so a kill at any time is made good by applying again.

use super::base::Base;
use super::epoch::{Content, Epoch};
use super::guest_disk::Disk;
use super::io::{SLICES_MAX, Stretch};
use crate::canary::{self, Canary};
use crate::failpoint;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Most bytes in one step.
const STEP_BYTES: u64 = 1 << 20;

/// Most bytes made zero in one step: more, because a hole costs little, and few enough where zeros must be written.
const ZERO_STEP_BYTES: u64 = 4 << 20;

/// How long a checkpoint is waited for at most, so that logs that fill up are applied in spite of it.
const YIELD: Duration = Duration::from_micros(500);
const YIELDS_MAX: u32 = 40;

/// Applies epochs until the disk is over and drained.
pub(crate) fn run(disk: &Disk) {
    while let Some(epoch) = disk.wait_for_epoch() {
        let Err(error) = apply_epoch(disk, epoch, || yield_to_checkpoint(disk)) else {
            continue;
        };
        if !is_full(&error) || !disk.wait_for_room(&error) {
            disk.apply_failed(error);
        }
    }
    disk.pool.trim_all();
}

/// Whether the base can be written once an operator has made room.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn yield_to_checkpoint(disk: &Disk) {
    let mut yields = 0;
    while disk.is_cut() && yields < YIELDS_MAX {
        std::thread::sleep(YIELD);
        yields += 1;
    }
}

/// Applies the oldest epoch, if there is one.
#[cfg(test)]
pub(crate) fn step(disk: &Disk) -> bool {
    let Some(epoch) = disk.oldest() else {
        return false;
    };
    if let Err(error) = apply_epoch(disk, epoch, || {}) {
        disk.apply_failed(error);
    }
    true
}

/// Brings the oldest epoch to the base, and frees its log. It can be tried again after an error.
pub(super) fn apply_epoch(disk: &Disk, epoch: Arc<Epoch>, between: impl Fn()) -> io::Result<()> {
    if canary::is_set(Canary::FreedEarly) {
        release(&epoch);
    }
    bring_to_base(disk.base(), &epoch, between)?;
    release(&epoch);
    disk.applied(epoch);
    disk.pool.trim();
    Ok(())
}

/// The epoch's segments belong to it no more. In order: what is left of them can still be replayed.
pub(super) fn release(epoch: &Epoch) {
    epoch.segments.iter().for_each(|segment| segment.free());
}

/// Writes an epoch to the base. Where its log is in files, the base is on its medium afterwards.
pub(super) fn bring_to_base(base: &Base, epoch: &Epoch, between: impl Fn()) -> io::Result<()> {
    let mut batch: Vec<Stretch<'_>> = Vec::new();
    let (mut begin, mut end) = (0, 0);
    for part in epoch.parts() {
        let is_next = part.offset == end && end - begin < STEP_BYTES && batch.len() < SLICES_MAX;
        if !is_next {
            flush(base, &mut batch, begin, &between)?;
            begin = part.offset;
        }
        end = part.end();
        match part.content {
            Content::Data { segment, place } => batch.push(Stretch {
                segment: &epoch.segments[segment],
                place,
                // At most a segment's.
                length: usize::try_from(part.length).unwrap_or(0),
            }),
            Content::Zero { may_punch } => {
                flush(base, &mut batch, begin, &between)?;
                zero(base, part.offset, end, may_punch, &between)?;
                begin = end;
            }
        }
    }
    flush(base, &mut batch, begin, &between)?;
    if epoch.segments.iter().any(|segment| !segment.is_ram) {
        base.sync()?;
    }
    Ok(())
}

fn zero(base: &Base, mut at: u64, end: u64, may_punch: bool, between: &impl Fn()) -> io::Result<()> {
    while at < end {
        // Up to a whole multiple, so that no hole ends within a block.
        let to = (at / ZERO_STEP_BYTES + 1)
            .saturating_mul(ZERO_STEP_BYTES)
            .min(end);
        between();
        base.zero(at, to - at, may_punch, false)?;
        failpoint::may_be_killed();
        at = to;
    }
    Ok(())
}

fn flush(base: &Base, batch: &mut Vec<Stretch<'_>>, begin: u64, between: &impl Fn()) -> io::Result<()> {
    if !batch.is_empty() {
        between();
        if canary::is_set(Canary::SkippedBlock) {
            batch.pop();
        }
        base.write_stretches(batch, begin)?;
        failpoint::may_be_killed();
        batch.clear();
    }
    Ok(())
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn long_zeros_are_made_in_steps() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, vec![7; 9 << 20]).unwrap();
        let (base, steps) = (Base::open(&path).unwrap(), Cell::new(0));
        let between = || steps.set(steps.get() + 1);
        zero(&base, 1, (9 << 20) - 1, true, &between).unwrap();
        assert_eq!(steps.get(), 3);
        let content = std::fs::read(&path).unwrap();
        let (last, first) = (content.len() - 1, 0);
        assert!(
            content
                .iter()
                .enumerate()
                .all(|(at, byte)| *byte == if [first, last].contains(&at) { 7 } else { 0 })
        );
    }
}
