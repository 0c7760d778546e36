//! What the client of a disk asks for: writes, to the base while it is copied and to the log of the open epoch afterwards, and
//! reads of the newest content.

use super::{Disk, Phase, State};
use crate::disk::DiskError;
use crate::disk::epoch::{Content, Epoch, Part, Placed};
use crate::disk::io::Stretch;
use crate::disk::pool::NoSegment;
use crate::disk::segment::Segment;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use thiserror::Error;

/// Most pieces that are looked up in one epoch at a time.
const LAYER_PIECES_MAX: usize = if cfg!(test) { 5 } else { 1024 };

/// And in all of them, but for one in each.
const PIECES_MAX: usize = 4 * LAYER_PIECES_MAX;

/// Where the data of a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteTarget {
    /// To the base.
    Base,
    /// To the places of the [`Wanted`].
    Log,
}

/// A write that has begun. Used again for the next one.
#[derive(Default)]
pub(crate) struct Wanted {
    checkpoint: u64,
    placed: Vec<Placed>,
    segments: Vec<Arc<Segment>>,
}

impl Wanted {
    /// The places, in order.
    pub(crate) fn stretches(&self) -> impl Iterator<Item = Stretch<'_>> {
        self.placed.iter().zip(&self.segments).map(|(placed, segment)| {
            let Content::Data { place, .. } = placed.part.content else {
                unreachable!("only data is placed");
            };
            Stretch {
                segment,
                place,
                // At most a segment's.
                length: usize::try_from(placed.part.length).unwrap_or(0),
            }
        })
    }

    /// Releases the places.
    pub(crate) fn clear(&mut self) {
        self.placed.clear();
        self.segments.clear();
    }
}

/// Why a client's request fails. The client's protocol has a number for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum RequestFailure {
    /// The disk is lost, or its session has ended.
    #[error("the disk takes no writes any more")]
    Ended,
    #[error("there is no room for the data")]
    NoSpace,
    #[error("the base cannot do that")]
    Unsupported,
    #[error("reading or writing the base has failed")]
    Io,
    /// Outside of the disk, or with flags that do not exist.
    #[error("the request is not valid")]
    Invalid,
}

impl From<&io::Error> for RequestFailure {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::Unsupported => Self::Unsupported,
            _ => Self::Io,
        }
    }
}

/// A piece of a range that is read.
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) source: Source,
}

/// Where its content is.
pub(crate) enum Source {
    Segment(Arc<Segment>, usize),
    Zero,
    Base,
}

impl Disk {
    /// Begins a write. Waits for room in the log.
    ///
    /// # Errors
    /// What to answer; the session is ended.
    pub(crate) fn begin_write(
        &self,
        part: (u64, u64),
        wanted: &mut Wanted,
    ) -> Result<WriteTarget, RequestFailure> {
        let (offset, length) = part;
        wanted.clear();
        self.written.fetch_add(length, Ordering::Relaxed);
        let mut state = self.writable()?;
        state.is_writing = true;
        if state.phase == Phase::Copying {
            return Ok(WriteTarget::Base);
        }
        wanted.checkpoint = state.open.checkpoint;
        while !state.open.place(offset, length, &mut wanted.placed) {
            drop(state);
            state = self.add_segment(wanted.checkpoint)?;
        }
        for placed in &wanted.placed {
            if let Content::Data { segment, .. } = placed.part.content {
                wanted.segments.push(state.open.segments[segment].clone());
            }
        }
        Ok(WriteTarget::Log)
    }

    /// The state, if writes may come now.
    fn writable(&self) -> Result<MutexGuard<'_, State>, RequestFailure> {
        let mut state = self.state();
        match state.phase {
            _ if state.loss.is_some() => Err(RequestFailure::Ended),
            Phase::Copying => {
                state.is_changed = true;
                Ok(state)
            }
            Phase::Open => Ok(state),
            Phase::Over => Err(RequestFailure::Ended),
            Phase::Cut => {
                let checkpoint = state.open.checkpoint;
                drop(state);
                self.lose(DiskError::LateWrite {
                    disk: self.name.clone(),
                    checkpoint,
                });
                Err(RequestFailure::Ended)
            }
        }
    }

    /// Gives the open epoch another segment, when there is room for one.
    fn add_segment(&self, checkpoint: u64) -> Result<MutexGuard<'_, State>, RequestFailure> {
        loop {
            // Not under the lock: a new one takes milliseconds.
            let no_segment = match self.pool.take() {
                Ok(segment) => {
                    let mut state = self.writable()?;
                    if state.open.checkpoint != checkpoint {
                        return Err(RequestFailure::Ended);
                    }
                    if state.lease_index(self.pool.segment_bytes()) {
                        state.open.add(segment);
                        return Ok(state);
                    }
                    self.pool.put(vec![segment]);
                    NoSegment::NoIndex
                }
                Err(no_segment) => no_segment,
            };
            let mut state = self.writable()?;
            // Applying may have made room meanwhile.
            let has_room = match no_segment {
                NoSegment::Full => self.pool.has_room(),
                NoSegment::NoRoom(_) => self.pool.has_free(),
                NoSegment::NoIndex => state.lease_index(self.pool.segment_bytes()),
            };
            if has_room {
                continue;
            }
            if state.committed.is_empty() || state.has_apply_failed {
                drop(state);
                let disk = self.name.clone();
                self.lose(match no_segment {
                    NoSegment::Full => DiskError::LogFull {
                        disk,
                        limit: self.pool.limit(),
                    },
                    NoSegment::NoRoom(source) => DiskError::NoRoom {
                        disk,
                        source: Box::new(source),
                    },
                    NoSegment::NoIndex => DiskError::NoRoom {
                        disk,
                        source: Box::new(DiskError::NoIndex),
                    },
                });
                return Err(RequestFailure::NoSpace);
            }
            let warning = (!std::mem::replace(&mut state.has_warned, true)).then(|| state.binding.clone());
            if let Some(Some(binding)) = warning {
                drop(state);
                (binding.on_full)(self.name.clone());
                state = self.state();
            }
            if !state.committed.is_empty() {
                drop(self.changed.wait(state));
            }
        }
    }

    /// The data of a write has arrived.
    ///
    /// # Errors
    /// If it came too late; the session is ended.
    pub(crate) fn end_write(&self, target: WriteTarget, wanted: &Wanted) -> Result<(), RequestFailure> {
        let mut state = self.writable()?;
        state.is_writing = false;
        if target == WriteTarget::Log {
            if state.open.checkpoint != wanted.checkpoint {
                return Err(RequestFailure::Ended);
            }
            state.open.written(&wanted.placed);
        }
        Ok(())
    }

    /// Makes a range zero.
    ///
    /// # Errors
    /// What to answer.
    pub(crate) fn zero(
        &self,
        offset: u64,
        length: u64,
        may_punch: bool,
        fast: bool,
    ) -> Result<(), RequestFailure> {
        let mut state = self.writable()?;
        state.is_writing = true;
        if state.phase == Phase::Copying {
            drop(state);
            return self.end_change(self.base.zero(offset, length, may_punch, fast));
        }
        let checkpoint = state.open.checkpoint;
        while !state.open.zero(offset, length, may_punch) {
            drop(state);
            state = self.add_segment(checkpoint)?;
        }
        state.is_writing = false;
        Ok(())
    }

    /// A change of the base has ended. No session can have taken the disk meanwhile.
    fn end_change(&self, result: io::Result<()>) -> Result<(), RequestFailure> {
        let done = result.map_err(|error| RequestFailure::from(&error));
        let mut state = self.state();
        state.is_writing = false;
        // One that is not possible fast is asked for again in another way.
        if let Some(failure) = done
            .err()
            .filter(|failure| *failure != RequestFailure::Unsupported)
        {
            state.copy_failure.get_or_insert(failure);
        }
        done
    }

    /// A change of the disk is answered with an error, so the client's disk is another one from now on: no session can take it
    /// any more, and the one that has it ends.
    pub(crate) fn change_failed(&self, failure: RequestFailure) {
        let mut state = self.state();
        match state.phase {
            Phase::Copying => {
                state.copy_failure.get_or_insert(failure);
            }
            Phase::Open | Phase::Cut => {
                drop(state);
                self.lose(DiskError::WriteFailed {
                    disk: self.name.clone(),
                    reason: failure.to_string(),
                });
            }
            Phase::Over => {}
        }
    }

    /// Frees a range.
    ///
    /// # Errors
    /// What to answer.
    pub(crate) fn trim(&self, offset: u64, length: u64) -> Result<(), RequestFailure> {
        let mut state = self.writable()?;
        if state.phase != Phase::Copying {
            drop(state);
            return self.zero(offset, length, true, true);
        }
        state.is_writing = true;
        drop(state);
        self.end_change(self.base.trim(offset, length))
    }

    /// Makes earlier writes durable. Those of a session's disk are with their commit.
    ///
    /// # Errors
    /// What to answer.
    pub(crate) fn flush(&self) -> Result<(), RequestFailure> {
        match self.is_copying() {
            true => self.base.sync().map_err(|error| {
                let failure = RequestFailure::from(&error);
                self.change_failed(failure);
                failure
            }),
            false => Ok(()),
        }
    }

    /// The first pieces of a range, in order: the newest content of each. Returns where they end, before the end of the range
    /// if they are many: the lock is not held for longer.
    pub(crate) fn pieces(&self, offset: u64, length: u64, pieces: &mut Vec<Piece>) -> u64 {
        self.pieces_of(offset, length, true, pieces)
    }

    fn pieces_of(&self, offset: u64, length: u64, with_open: bool, pieces: &mut Vec<Piece>) -> u64 {
        pieces.clear();
        let state = self.state();
        let mut end = offset + length;
        let mut open = vec![(offset, end)];
        let newest = std::iter::once(&state.open).filter(|_| with_open);
        let layers = newest.chain(state.committed.iter().rev().map(|epoch| &**epoch));
        let of_layer = PIECES_MAX / (state.committed.len() + 1);
        for layer in layers.filter(|layer| !layer.is_empty()) {
            let mut unknown = Vec::new();
            let mut left = of_layer.clamp(1, LAYER_PIECES_MAX);
            for (from, to) in open {
                let known = |part| pieces.push(piece(layer, part));
                let reached = layer.resolve(from, to, &mut left, known, |from, to| unknown.push((from, to)));
                if reached < to {
                    end = reached;
                    break;
                }
            }
            open = unknown;
        }
        drop(state);
        pieces.extend(open.iter().map(|(from, to)| Piece {
            offset: *from,
            length: to - from,
            source: Source::Base,
        }));
        // Those of newer epochs may lie beyond the end that an older one has set.
        pieces.retain(|piece| piece.offset < end);
        pieces.sort_unstable_by_key(|piece| piece.offset);
        if let Some(last) = pieces.last_mut() {
            last.length = last.length.min(end - last.offset);
        }
        end
    }

    /// All of what is committed.
    #[cfg(test)]
    pub(crate) fn read_committed(&self) -> Vec<u8> {
        let (mut pieces, mut out, mut at) = (Vec::new(), Vec::new(), 0);
        while at < self.base.size() {
            at = self.pieces_of(at, self.base.size() - at, false, &mut pieces);
            for piece in &pieces {
                let start = out.len();
                out.resize(start + usize::try_from(piece.length).expect("a small disk"), 0);
                match &piece.source {
                    Source::Segment(segment, place) => segment.read(*place, &mut out[start..]),
                    Source::Zero => {}
                    Source::Base => self.base.read(&mut out[start..], piece.offset).expect("a base"),
                }
            }
        }
        out
    }

    /// Whether the log may take so many segments more.
    #[cfg(test)]
    pub(crate) fn has_room_for(&self, segments: u64) -> bool {
        self.pool.has_room_for(segments)
    }
}

fn piece(epoch: &Epoch, part: Part) -> Piece {
    Piece {
        offset: part.offset,
        length: part.length,
        source: match part.content {
            Content::Data { segment, place } => Source::Segment(epoch.segments[segment].clone(), place),
            Content::Zero { .. } => Source::Zero,
        },
    }
}
