//! The log of one epoch: an index over segments that says what each range of the disk holds.
//!
//! What a write overlaps of the epoch's earlier ones goes to the same places, so a block that is written again and again takes its
//! room once. The rest is appended. Replaying the entries in their order leads to the same: what was written in place is what was visible,
//! so no later entry hides it.

use super::index::Index;
use super::pool::RamShare;
use super::segment::{Entry, EntryKind, Room, Segment, SegmentHeader};
use std::sync::Arc;

/// Most places of one write: one that overlaps more is appended behind them, and what it hides is lost room.
const PLACES_MAX: usize = 64;

/// What a range of the disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Data in that segment of the epoch, at that place.
    Data { segment: usize, place: usize },
    /// Zeros; a hole will do if `may_punch`.
    Zero { may_punch: bool },
}

impl Content {
    /// The same, from so many bytes on.
    pub(crate) fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Data { segment, place } => Self::Data {
                segment,
                // Within a segment: the extent that it was cut from had more bytes than that.
                place: place + usize::try_from(bytes).unwrap_or(0),
            },
            zero @ Self::Zero { .. } => zero,
        }
    }
}

/// A part of a disk's range whose content is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) content: Content,
}

impl Part {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// The same without its first `bytes`.
    pub(crate) fn skip(self, bytes: u64) -> Self {
        Self {
            offset: self.offset + bytes,
            length: self.length - bytes,
            content: self.content.skip(bytes),
        }
    }

    /// What of it lies in a range that it overlaps.
    fn within(self, offset: u64, end: u64) -> Self {
        let skipped = self.skip(offset.saturating_sub(self.offset));
        Self {
            length: skipped.length.min(end - skipped.offset),
            ..skipped
        }
    }
}

/// A place for data that is about to arrive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) part: Part,
    /// The number of its entry; none if it is in the index already.
    entry: Option<usize>,
}

/// See the module.
pub(crate) struct Epoch {
    log: u64,
    /// The checkpoint with which it commits.
    pub(crate) checkpoint: u64,
    index: Index,
    pub(crate) segments: Vec<Arc<Segment>>,
    room: Room,
    /// What the disk has taken of the host's memory for the index.
    leases: Vec<Box<dyn Send + Sync>>,
    leased_bytes: u64,
    /// The same for what the newest segment's entries will need.
    ahead: Option<Box<dyn Send + Sync>>,
}

/// What the index needs for all entries of a segment of so many bytes: each may be a part between two others that it divides.
pub(super) const fn index_bytes_max(segment_bytes: u64) -> u64 {
    segment_bytes / 2
}

impl Epoch {
    /// An empty one.
    pub(crate) fn new(log: u64, checkpoint: u64) -> Self {
        Self {
            log,
            checkpoint,
            index: Index::default(),
            segments: Vec::new(),
            room: Room::NONE,
            leases: Vec::new(),
            leased_bytes: 0,
            ahead: None,
        }
    }

    /// Takes the memory of the index that is not taken yet, and what the entries of another segment can need. False if there is
    /// none.
    pub(super) fn lease_index(&mut self, memory: &dyn RamShare, segment_bytes: u64) -> bool {
        if !self.lease_used(memory) {
            return false;
        }
        if self.ahead.is_none() {
            self.ahead = memory.take(index_bytes_max(segment_bytes));
        }
        self.ahead.is_some()
    }

    /// Nothing will be added any more: takes what the index has, and gives back what was for more.
    pub(super) fn lease_whole_index(&mut self, memory: &dyn RamShare) {
        if self.lease_used(memory) {
            self.ahead = None;
        }
    }

    fn lease_used(&mut self, memory: &dyn RamShare) -> bool {
        let more = self.index_bytes().saturating_sub(self.leased_bytes);
        if more == 0 {
            return true;
        }
        let lease = memory.take(more);
        let is_taken = lease.is_some();
        if is_taken {
            self.leased_bytes += more;
            self.leases.extend(lease);
        }
        is_taken
    }

    /// Gives the memory of the index back, which is freed next.
    pub(super) fn release_index(&mut self) {
        self.leases.clear();
        self.ahead = None;
    }

    /// Bytes of the disk that it changes, those without data included.
    pub(crate) fn bytes(&self) -> u64 {
        self.index.bytes()
    }

    /// Memory that its index takes.
    pub(crate) fn index_bytes(&self) -> u64 {
        self.index.memory_bytes()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Takes a segment, empty or that of an earlier receiver.
    pub(crate) fn add(&mut self, segment: Arc<Segment>) {
        segment.begin(SegmentHeader {
            log: self.log,
            checkpoint: self.checkpoint,
            sequence: u64::try_from(self.segments.len()).unwrap_or(u64::MAX),
        });
        self.room = Room::of(&segment);
        self.segments.push(segment);
    }

    /// Places for data of that range, appended to `placed` in order. False if another segment is needed first; `placed` then has a part
    /// of the range, and is to be continued behind it.
    pub(crate) fn place(&mut self, offset: u64, length: u64, placed: &mut Vec<Placed>) -> bool {
        let end = offset + length;
        let mut at = placed.last().map_or(offset, |last| last.part.end());
        while at < end {
            let known = self.next_data(at, end).filter(|_| placed.len() < PLACES_MAX);
            let gap_end = known.map_or(end, |part| part.offset);
            while at < gap_end {
                let Some(new) = self.append(at, gap_end) else {
                    return false;
                };
                at = new.part.end();
                placed.push(new);
            }
            if let Some(part) = known {
                at = part.end();
                placed.push(Placed { part, entry: None });
            }
        }
        true
    }

    /// The first data in a range.
    fn next_data(&self, offset: u64, end: u64) -> Option<Part> {
        let mut parts = self.index.parts_from(offset).take_while(|part| part.offset < end);
        let data = parts.find(|part| matches!(part.content, Content::Data { .. }));
        data.map(|part| part.within(offset, end))
    }

    /// Room for data from `offset` to at most `end`. None if another segment is needed first.
    fn append(&mut self, offset: u64, end: u64) -> Option<Placed> {
        let (entry, place, length) = self.room.take(end - offset)?;
        let segment = self.segments.len() - 1;
        let part = Part {
            offset,
            length: u64::try_from(length).unwrap_or(0),
            content: Content::Data { segment, place },
        };
        Some(Placed {
            part,
            entry: Some(entry),
        })
    }

    /// The data has arrived in its places.
    pub(crate) fn written(&mut self, placed: &[Placed]) {
        for Placed { part, entry } in placed {
            let (Some(number), Content::Data { segment, place }) = (entry, part.content) else {
                continue;
            };
            let entry = Entry {
                offset: part.offset,
                // At most a segment's.
                length: u32::try_from(part.length).unwrap_or(u32::MAX),
                kind: EntryKind::Data(place),
            };
            self.segments[segment].append(*number, entry, self.checkpoint);
            self.index.insert(*part);
        }
    }

    /// A range holds zeros from now on. False if another segment is needed first; then it is to be done again.
    pub(crate) fn zero(&mut self, offset: u64, length: u64, may_punch: bool) -> bool {
        let mut done = 0;
        while done < length {
            let Some((number, segment)) = self.room.take_entry().zip(self.segments.last()) else {
                return false;
            };
            let entry = Entry {
                offset: offset + done,
                length: u32::try_from(length - done).unwrap_or(u32::MAX),
                kind: EntryKind::Zero { may_punch },
            };
            segment.append(number, entry, self.checkpoint);
            self.index.insert(Part {
                offset: entry.offset,
                length: u64::from(entry.length),
                content: Content::Zero { may_punch },
            });
            done += u64::from(entry.length);
        }
        true
    }

    /// Puts a part into the index, over what was there.
    pub(crate) fn insert(&mut self, part: Part) {
        self.index.insert(part);
    }

    /// Goes through a range in order: what the epoch holds of it, and what it does not. Stops before another part once it has
    /// gone through `left` of them, which it counts down. Returns where it has stopped.
    pub(crate) fn resolve(
        &self,
        offset: u64,
        end: u64,
        left: &mut usize,
        mut known: impl FnMut(Part),
        mut unknown: impl FnMut(u64, u64),
    ) -> u64 {
        let mut at = offset;
        if offset < end {
            for part in self.index.parts_from(offset).take_while(|part| part.offset < end) {
                let part = part.within(at, end);
                if part.offset > at {
                    unknown(at, part.offset);
                }
                at = part.offset;
                if *left == 0 {
                    return at;
                }
                *left -= 1;
                at = part.end();
                known(part);
            }
        }
        if at < end {
            unknown(at, end);
        }
        end
    }

    /// All parts in order of their offsets.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Part> {
        self.index.parts_from(0)
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::store::memory::mapping::Mapping;
    use proptest::prelude::*;
    use std::path::PathBuf;

    const SIZE: usize = 40_000;
    const SEGMENT: u64 = 16 << 10;

    fn segment() -> Arc<Segment> {
        let memory = Mapping::anonymous(SEGMENT).unwrap();
        Arc::new(Segment::new(memory, PathBuf::new(), 0, true))
    }

    #[derive(Clone, Debug)]
    struct Step {
        offset: usize,
        length: usize,
        value: Option<u8>,
    }

    fn step() -> impl Strategy<Value = Step> {
        let length = prop_oneof![Just(512usize), Just(4096), 1..9000usize];
        (0..SIZE, length, proptest::option::of(1u8..)).prop_map(|(offset, length, value)| {
            let offset = if offset % 3 == 0 {
                offset
            } else {
                offset / 512 * 512
            };
            Step {
                offset,
                length: length.min(SIZE - offset),
                value,
            }
        })
    }

    fn write(epoch: &mut Epoch, step: &Step) {
        let (offset, length) = (step.offset as u64, step.length as u64);
        let Some(value) = step.value else {
            while !epoch.zero(offset, length, true) {
                epoch.add(segment());
            }
            return;
        };
        let mut placed = Vec::new();
        while !epoch.place(offset, length, &mut placed) {
            epoch.add(segment());
        }
        for placed in &placed {
            let Content::Data { segment, place } = placed.part.content else {
                panic!("data has a place");
            };
            let bytes = vec![value; usize::try_from(placed.part.length).unwrap()];
            epoch.segments[segment].write(place, &bytes);
        }
        epoch.written(&placed);
    }

    fn content(epoch: &Epoch, out: &mut [u8], part: Part) {
        let at = usize::try_from(part.offset).unwrap();
        let out = &mut out[at..at + usize::try_from(part.length).unwrap()];
        match part.content {
            Content::Data { segment, place } => epoch.segments[segment].read(place, out),
            Content::Zero { .. } => out.fill(0),
        }
    }

    proptest! {
        /// Against an array of bytes: what a read sees, what applying writes, and what a replay of the entries leads to.
        #[test]
        fn an_epoch_is_what_was_written(steps in proptest::collection::vec(step(), 1..40), probe: (u16, u16)) {
            let mut model = vec![0xee; SIZE];
            let mut epoch = Epoch::new(7, 3);
            for step in &steps {
                model[step.offset..step.offset + step.length].fill(step.value.unwrap_or(0));
                write(&mut epoch, step);
            }
            // Applying.
            let mut applied = vec![0xee; SIZE];
            let (mut end, mut bytes) = (0, 0);
            for part in epoch.parts() {
                prop_assert!(part.offset >= end && part.length > 0);
                end = part.end();
                bytes += part.length;
                content(&epoch, &mut applied, part);
            }
            prop_assert!(applied == model);
            prop_assert_eq!(bytes, epoch.bytes());
            // A read of any range.
            let probe = (u64::from(probe.0) % SIZE as u64, u64::from(probe.1) % SIZE as u64);
            let (from, to) = (probe.0.min(probe.1), probe.0.max(probe.1));
            let mut read = vec![0xee; SIZE];
            let mut ranges = Vec::new();
            let known = std::cell::RefCell::new(Vec::new());
            let mut at = from;
            while at < to {
                let mut left = 3;
                let reached = epoch.resolve(at, to, &mut left, |part| known.borrow_mut().push(part), |from, to| ranges.push((from, to)));
                prop_assert!(reached > at && (reached == to || left == 0));
                at = reached;
            }
            let known = known.into_inner();
            known.iter().for_each(|part| content(&epoch, &mut read, *part));
            for at in from..to {
                prop_assert_eq!(read[usize::try_from(at).unwrap()], model[usize::try_from(at).unwrap()]);
            }
            let covered: u64 = known.iter().map(|part| part.length).sum();
            let open: u64 = ranges.iter().map(|(from, to)| to - from).sum();
            prop_assert_eq!(covered + open, to.saturating_sub(from));
            // A replay.
            let mut replayed = vec![0xee; SIZE];
            for segment in &epoch.segments {
                let header = segment.header().unwrap();
                prop_assert_eq!((header.log, header.checkpoint), (7, 3));
                for number in 0..segment.entries() {
                    let entry = segment.entry(usize::try_from(number).unwrap(), header).unwrap();
                    let at = usize::try_from(entry.offset).unwrap();
                    let out = &mut replayed[at..at + entry.length as usize];
                    match entry.kind {
                        EntryKind::Data(place) => segment.read(place, out),
                        EntryKind::Zero { .. } => out.fill(0),
                    }
                }
            }
            prop_assert!(replayed == model);
        }
    }

    #[test]
    fn a_block_written_again_takes_its_room_once() {
        let mut epoch = Epoch::new(1, 1);
        for value in 1..200 {
            let block = Step {
                offset: 8192,
                length: 4096,
                value: Some(value),
            };
            write(&mut epoch, &block);
        }
        assert_eq!((epoch.segments.len(), epoch.bytes()), (1, 4096));
        assert_eq!(epoch.segments[0].entries(), 1);
    }

    #[test]
    fn a_damaged_entry_is_noticed() {
        let mut epoch = Epoch::new(1, 1);
        let block = Step {
            offset: 0,
            length: 512,
            value: Some(1),
        };
        write(&mut epoch, &block);
        let segment = &epoch.segments[0];
        let header = segment.header().unwrap();
        assert!(segment.entry(0, header).is_ok());
        assert!(segment.entry(1, header).is_err());
        let at = segment.bytes() - ENTRY;
        segment.write(at, &[1]);
        assert!(segment.entry(0, header).is_err());
        segment.free();
        assert_eq!(segment.header(), None);
    }

    const ENTRY: usize = crate::disk::segment::ENTRY_BYTES;
}
