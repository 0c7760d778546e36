//! The log of one epoch: an index over segments that says what each range of the disk holds.
//!
//! A write that lies within one of the epoch's earlier ones goes to the same place, so a block that is written again and again takes its
//! room once. Others are appended, and hide what they overlap. Replaying the entries in their order leads to the same: what was
//! written in place is what was visible, so no later entry hides it.

use super::segment::{Entry, EntryKind, Room, Segment, SegmentHeader};
use std::collections::BTreeMap;
use std::sync::Arc;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    end: u64,
    content: Content,
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
    index: BTreeMap<u64, Extent>,
    pub(crate) segments: Vec<Arc<Segment>>,
    room: Room,
    /// Bytes of the disk that it changes, those without data included.
    bytes: u64,
}

impl Epoch {
    /// An empty one.
    pub(crate) fn new(log: u64, checkpoint: u64) -> Self {
        Self {
            log,
            checkpoint,
            index: BTreeMap::new(),
            segments: Vec::new(),
            room: Room::NONE,
            bytes: 0,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
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
        if at == offset
            && let Some(content) = self.data_of(offset, end)
        {
            placed.push(Placed {
                part: Part {
                    offset,
                    length,
                    content,
                },
                entry: None,
            });
            return true;
        }
        while at < end {
            let Some((entry, place, taken)) = self.room.take(end - at) else {
                return false;
            };
            let length = u64::try_from(taken).unwrap_or(0);
            let content = Content::Data {
                segment: self.segments.len() - 1,
                place,
            };
            placed.push(Placed {
                part: Part {
                    offset: at,
                    length,
                    content,
                },
                entry: Some(entry),
            });
            at += length;
        }
        true
    }

    /// Where the data of a range lies, if it lies in one piece.
    fn data_of(&self, offset: u64, end: u64) -> Option<Content> {
        let (start, extent) = self.index.range(..=offset).next_back()?;
        let is_data = matches!(extent.content, Content::Data { .. });
        (is_data && extent.end >= end).then(|| extent.content.skip(offset - start))
    }

    /// The data has arrived in its places.
    pub(crate) fn written(&mut self, placed: &[Placed]) {
        for Placed { part, entry } in placed {
            let (Some(number), Content::Data { segment, place }) = (entry, part.content) else {
                continue;
            };
            let entry = Entry {
                offset: part.offset,
                length: part.length,
                kind: EntryKind::Data(place),
            };
            self.segments[segment].append(*number, entry, self.checkpoint);
            self.insert(*part);
        }
    }

    /// A range holds zeros from now on. False if another segment is needed first.
    pub(crate) fn zero(&mut self, offset: u64, length: u64, may_punch: bool) -> bool {
        let Some((number, segment)) = self.room.take_entry().zip(self.segments.last()) else {
            return false;
        };
        let entry = Entry {
            offset,
            length,
            kind: EntryKind::Zero { may_punch },
        };
        segment.append(number, entry, self.checkpoint);
        self.insert(Part {
            offset,
            length,
            content: Content::Zero { may_punch },
        });
        true
    }

    /// Puts a part into the index, over what was there.
    pub(crate) fn insert(&mut self, part: Part) {
        let (offset, end) = (part.offset, part.end());
        self.cut_out(offset, end);
        self.bytes += part.length;
        // Data that continues the extent before it makes that longer: a sequential write is one extent.
        if let Some((start, before)) = self.index.range_mut(..offset).next_back()
            && before.end == offset
            && before.content.skip(offset - start) == part.content
        {
            before.end = end;
            return;
        }
        let content = part.content;
        self.index.insert(offset, Extent { end, content });
    }

    /// Removes a range from the index.
    fn cut_out(&mut self, offset: u64, end: u64) {
        let before = self.index.range_mut(..offset).next_back();
        if let Some((start, before)) = before
            && before.end > offset
        {
            let whole = *before;
            before.end = offset;
            self.bytes -= whole.end.min(end) - offset;
            if whole.end > end {
                let content = whole.content.skip(end - start);
                let extent = Extent {
                    end: whole.end,
                    content,
                };
                self.index.insert(end, extent);
                return;
            }
        }
        while let Some((&start, &extent)) = self.index.range(offset..end).next() {
            self.index.remove(&start);
            self.bytes -= extent.end.min(end) - start;
            if extent.end > end {
                let content = extent.content.skip(end - start);
                let extent = Extent {
                    end: extent.end,
                    content,
                };
                self.index.insert(end, extent);
            }
        }
    }

    /// Goes through a range in order: what the epoch holds of it, and what it does not.
    pub(crate) fn resolve(
        &self,
        offset: u64,
        end: u64,
        mut known: impl FnMut(Part),
        mut unknown: impl FnMut(u64, u64),
    ) {
        if offset >= end {
            return;
        }
        let mut at = offset;
        let first = self.index.range(..=offset).next_back();
        let first = first
            .filter(|(_, extent)| extent.end > offset)
            .map(|(start, extent)| (*start, *extent));
        let others = self.index.range(offset + 1..end);
        for (start, extent) in first
            .into_iter()
            .chain(others.map(|(start, extent)| (*start, *extent)))
        {
            if start >= end {
                break;
            }
            if start > at {
                unknown(at, start);
                at = start;
            }
            let to = extent.end.min(end);
            known(Part {
                offset: at,
                length: to - at,
                content: extent.content.skip(at - start),
            });
            at = to;
        }
        if at < end {
            unknown(at, end);
        }
    }

    /// All parts in order of their offsets, from an offset on.
    pub(crate) fn parts_from(&self, offset: u64) -> impl Iterator<Item = Part> {
        self.index.range(offset..).map(|(start, extent)| Part {
            offset: *start,
            length: extent.end - start,
            content: extent.content,
        })
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
            for part in epoch.parts_from(0) {
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
            epoch.resolve(from, to, |part| known.borrow_mut().push(part), |from, to| ranges.push((from, to)));
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
                    let out = &mut replayed[at..at + usize::try_from(entry.length).unwrap()];
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
