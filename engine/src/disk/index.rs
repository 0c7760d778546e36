//! What an epoch holds of its disk: extents that do not overlap, in order.
//!
//! A log of small writes has millions of them, so an extent takes [`EXTENT_BYTES`], and lies in a run: a vector of at most
//! [`RUN_MAX`] extents that grows by a few. A tree has the runs by the lowest offset that belongs to them.

use super::epoch::{Content, Part};
use std::collections::BTreeMap;

/// Most extents of a run: what an insertion moves at most.
const RUN_MAX: usize = 128;

/// By how many extents a run grows.
const RUN_STEP: usize = 8;

/// Bytes of an extent.
const EXTENT_BYTES: usize = 20;

/// Bytes that a run takes in addition to its extents: its vector in a node of the tree that is half full, and the allocator's own.
const RUN_OVERHEAD_BYTES: usize = 96;

/// Numbers in the place of a segment's.
const ZERO: u32 = u32::MAX;
const PUNCH: u32 = u32::MAX - 1;

/// A part of the disk, packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    /// The low and the high half of its offset: as one number it would be aligned to 8 bytes.
    offset: [u32; 2],
    length: u32,
    segment: u32,
    place: u32,
}

const _: () = assert!(size_of::<Extent>() == EXTENT_BYTES);

impl Extent {
    /// The first extent of a part: all of it, unless it is zeros that are longer than an extent can be.
    #[expect(clippy::cast_possible_truncation, reason = "the halves of a number")]
    fn first_of(part: Part) -> Self {
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (segment, place) = match part.content {
            // A segment is smaller than 4 GiB, and its number is bounded by the log's limit.
            Content::Data { segment, place } => (small(segment), small(place)),
            Content::Zero { may_punch: false } => (ZERO, 0),
            Content::Zero { may_punch: true } => (PUNCH, 0),
        };
        Self {
            offset: [part.offset as u32, (part.offset >> 32) as u32],
            length: u32::try_from(part.length).unwrap_or(u32::MAX),
            segment,
            place,
        }
    }

    fn offset(&self) -> u64 {
        u64::from(self.offset[0]) | u64::from(self.offset[1]) << 32
    }

    fn end(&self) -> u64 {
        self.offset() + u64::from(self.length)
    }

    fn content(&self) -> Content {
        match self.segment {
            ZERO => Content::Zero { may_punch: false },
            PUNCH => Content::Zero { may_punch: true },
            segment => Content::Data {
                segment: segment as usize,
                place: self.place as usize,
            },
        }
    }

    fn part(&self) -> Part {
        Part {
            offset: self.offset(),
            length: u64::from(self.length),
            content: self.content(),
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Index {
    /// A run's extents begin at its key or later, and before the next run's key. Only the first one, whose key is 0, may be empty.
    runs: BTreeMap<u64, Vec<Extent>>,
    /// How many extents the runs have room for.
    capacity: usize,
    bytes: u64,
}

impl Index {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes of the disk that are in it.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Memory that it takes.
    pub(super) fn memory_bytes(&self) -> u64 {
        let bytes = self.capacity * EXTENT_BYTES + self.runs.len() * RUN_OVERHEAD_BYTES;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// Its parts in order, beginning with the one that reaches beyond `offset`.
    pub(super) fn parts_from(&self, offset: u64) -> impl Iterator<Item = Part> {
        let runs = self.runs.range(self.key_of_last(offset).unwrap_or(0)..);
        runs.flat_map(move |(_, run)| {
            let first = run.partition_point(|extent| extent.end() <= offset);
            run[first..].iter().map(Extent::part)
        })
    }

    /// Puts a part in the place of what is there.
    pub(super) fn insert(&mut self, part: Part) {
        self.remove(part.offset, part.end());
        let mut rest = part;
        while rest.length > 0 {
            let extent = Extent::first_of(rest);
            let length = u64::from(extent.length);
            self.bytes += length;
            if !self.lengthen(&extent) {
                self.add(extent);
            }
            rest = rest.skip(length);
        }
    }

    /// The key of the run with the last extent that begins at `offset` or before.
    fn key_of_last(&self, offset: u64) -> Option<u64> {
        let mut runs = self.runs.range(..=offset).rev();
        let begins =
            |(_, run): &(&u64, &Vec<Extent>)| run.first().is_some_and(|extent| extent.offset() <= offset);
        // Those of the run that `offset` belongs to may all begin behind it.
        let found = runs.next().filter(begins).or_else(|| runs.next().filter(begins));
        found.map(|(key, _)| *key)
    }

    /// The last extent that begins before `offset`.
    fn last_before(&mut self, offset: u64) -> Option<&mut Extent> {
        let key = self.key_of_last(offset.checked_sub(1)?)?;
        let run = self.runs.get_mut(&key)?;
        let position = run.partition_point(|extent| extent.offset() < offset);
        run.get_mut(position.checked_sub(1)?)
    }

    /// Makes the extent before `next` longer by it, if its content goes on there: a sequential write is one extent.
    fn lengthen(&mut self, next: &Extent) -> bool {
        let Some(before) = self
            .last_before(next.offset())
            .filter(|before| before.end() == next.offset())
        else {
            return false;
        };
        let continues = before.content().skip(u64::from(before.length)) == next.content();
        let length = before.length.checked_add(next.length).filter(|_| continues);
        if let Some(length) = length {
            before.length = length;
        }
        length.is_some()
    }

    /// Adds an extent where there is none.
    fn add(&mut self, extent: Extent) {
        let offset = extent.offset();
        let run = match self.runs.range_mut(..=offset).next_back() {
            Some((_, run)) => run,
            None => self.runs.entry(0).or_default(),
        };
        let capacity = run.capacity();
        if run.len() == capacity {
            run.reserve_exact(RUN_STEP);
        }
        let position = run.partition_point(|other| other.offset() < offset);
        run.insert(position, extent);
        let mut other = Vec::new();
        if run.len() > RUN_MAX {
            // What is written in order leaves full runs behind.
            let at = if position == RUN_MAX { RUN_MAX } else { RUN_MAX / 2 };
            other = run.split_off(at);
            run.shrink_to_fit();
            other.shrink_to_fit();
        }
        self.capacity = self.capacity - capacity + run.capacity() + other.capacity();
        if let Some(first) = other.first() {
            self.runs.insert(first.offset(), other);
        }
    }

    /// Removes a range of the disk.
    fn remove(&mut self, offset: u64, end: u64) {
        if let Some(before) = self.last_before(offset).filter(|before| before.end() > offset) {
            let whole = before.part();
            // Less than it was.
            before.length = u32::try_from(offset - whole.offset).unwrap_or(before.length);
            self.bytes -= whole.end().min(end) - offset;
            if whole.end() > end {
                self.add(Extent::first_of(whole.skip(end - whole.offset)));
                return;
            }
        }
        while let Some(last) = self.remove_of_a_run(offset, end) {
            if last.end() > end {
                self.bytes += last.end() - end;
                self.add(Extent::first_of(last.skip(end - last.offset)));
            }
        }
    }

    /// Removes the extents of one run that begin in a range. Returns the last of them; none if there is none in any run.
    fn remove_of_a_run(&mut self, offset: u64, end: u64) -> Option<Part> {
        let begins = |run: &[Extent]| run.partition_point(|extent| extent.offset() < offset);
        // The first run with such an extent: the one that `offset` belongs to, or one behind it.
        let first = self.runs.range(..=offset).next_back().map(|(key, _)| *key)?;
        let (key, run) = (self.runs.range_mut(first..end)).find(|(_, run)| begins(run) < run.len())?;
        let (key, from) = (*key, begins(run));
        let to = run.partition_point(|extent| extent.offset() < end);
        let last = run.get(from..to)?.last()?.part();
        let (capacity, removed) = (run.capacity(), run.drain(from..to));
        self.bytes -= removed.map(|extent| u64::from(extent.length)).sum::<u64>();
        if run.len() + 2 * RUN_STEP < capacity {
            run.shrink_to_fit();
        }
        let is_needed = !run.is_empty() || key == 0;
        self.capacity -= capacity;
        match is_needed {
            true => self.capacity += run.capacity(),
            false => drop(self.runs.remove(&key)),
        }
        Some(last)
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::Xoshiro256PlusPlus;
    use rand::{RngExt, SeedableRng};

    const SECTORS: usize = 6000;

    /// Against an array with a number for every sector, with enough extents for many runs.
    fn compare(index: &Index, model: &[Option<usize>]) {
        let mut found = vec![None; SECTORS];
        let (mut end, mut bytes) = (0, 0);
        for part in index.parts_from(0) {
            assert!(part.offset >= end && part.length > 0, "{part:?} after {end}");
            (end, bytes) = (part.end(), bytes + part.length);
            let Content::Data { place, .. } = part.content else {
                panic!("{part:?}");
            };
            for sector in 0..usize::try_from(part.length).unwrap() {
                found[usize::try_from(part.offset).unwrap() + sector] = Some(place + sector);
            }
        }
        assert!(found == model);
        assert_eq!(index.bytes(), bytes);
        let capacity: usize = index.runs.values().map(Vec::capacity).sum();
        assert_eq!(index.capacity, capacity);
        for (key, run) in &index.runs {
            assert!(run.len() <= RUN_MAX && (*key == 0 || !run.is_empty()));
            assert!(run.first().is_none_or(|first| first.offset() >= *key));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn an_index_is_what_was_inserted(seed: u64, longest in prop_oneof![Just(1u64), Just(9), Just(3000)], from: u16) {
            let (mut index, mut model) = (Index::default(), vec![None; SECTORS]);
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
            let mut random = |below: u64| rng.random_range(0..below);
            for step in 0..4000 {
                let offset = random(SECTORS as u64);
                let length = (1 + random(longest)).min(SECTORS as u64 - offset);
                // Places far from each other do not continue one another.
                let place = step * 10_000;
                let content = Content::Data { segment: 0, place };
                index.insert(Part { offset, length, content });
                for sector in 0..usize::try_from(length).unwrap() {
                    model[usize::try_from(offset).unwrap() + sector] = Some(place + sector);
                }
                if step % 500 == 0 {
                    compare(&index, &model);
                }
            }
            compare(&index, &model);
            let from = u64::from(from) % SECTORS as u64;
            let expected: Vec<Part> = index.parts_from(0).filter(|part| part.end() > from).collect();
            prop_assert_eq!(index.parts_from(from).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn zeros_longer_than_an_extent_are_several() {
        let mut index = Index::default();
        let whole = Part {
            offset: 5,
            length: 3 << 32,
            content: Content::Zero { may_punch: true },
        };
        index.insert(whole);
        assert_eq!(index.bytes(), whole.length);
        assert!(index.parts_from(0).all(|part| part.content == whole.content));
        assert_eq!(index.parts_from(0).last().unwrap().end(), whole.end());
    }

    #[test]
    fn an_extent_of_a_small_write_takes_little() {
        const WRITES: u64 = 50_000;
        let orders: [fn(u64) -> u64; 3] = [
            |number| number,
            |number| WRITES - number,
            |number| number * 7919 % 100_003,
        ];
        for order in orders {
            let mut index = Index::default();
            for number in 0..WRITES {
                let content = Content::Data { segment: 0, place: 0 };
                index.insert(Part {
                    offset: order(number) * 1024,
                    length: 512,
                    content,
                });
            }
            assert_eq!(index.bytes(), WRITES * 512);
            // 10 % of a sector, without the entry in the log.
            let most = WRITES * (51 - u64::try_from(crate::disk::segment::ENTRY_BYTES).unwrap());
            assert!(index.memory_bytes() <= most, "{} of {most}", index.memory_bytes());
        }
    }
}
