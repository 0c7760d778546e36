//! Which pages are dirty: a sharded two-level bitmap, and the flat set of pages that were ever received.
//!
//! * A **shard** belongs to one receiving thread, and only that thread marks in it: on the way of a packet no
//!   two cores write one cache line. [`DirtyBitmap::take`] reads the shards or-ed together.
//! * Two **levels**: one bit per page, and one summary bit per 64-bit word of those. A scan reads the summary
//!   whole and of the words only those that are dirty: 1 TiB of guest is 512 KiB of summary per shard.
//! * Memory is touched by marking alone (a scan only reads), so what was never marked costs no memory.
//!
//! # Markers and takers
//! [`DirtyBitmap::mark`] publishes with release and [`DirtyBitmap::take`] reads with acquire: the taker of a bit
//! sees the page's content as its marker wrote it. A mark that has returned before a take begins (by whatever
//! hand-over: a lock, a channel's SYNC) is in that take; one that runs beside a take is in that take or in the
//! next, never lost. That last sentence is what the loom tests below check.

use crate::store::StoreError;
use crate::store::cache::plan::{FlushPlan, WORD_PAGES};
use crate::store::memory::index;
use crate::store::memory::words::zeroed_words;
use crate::sync::{AtomicU64, Ordering};
use crate::units::PageIndex;

/// Words that one word of the summary stands for.
const SUMMARY_WORDS: usize = 64;

/// Words of the summary that a scan reads from one shard before it turns to the next.
const SCAN_WORDS: usize = 64;

/// Words of padding behind each shard's words, so that no cache line (nor pair of lines, which some processors
/// fetch together) holds words of two shards.
const PADDING_WORDS: usize = 16;

/// Where a page's bit is: word and mask.
fn bit(page: PageIndex) -> (u64, u64) {
    (page.get() / WORD_PAGES, 1 << (page.get() % WORD_PAGES))
}

/// Calls `each` with the word index and the bits of every word that `pages` touch; neighbours in the same word
/// come as one.
fn for_each_word(pages: &[PageIndex], mut each: impl FnMut(u64, u64)) {
    let mut pages = pages.iter();
    let Some((mut word, mut bits)) = pages.next().map(|page| bit(*page)) else {
        return;
    };
    for page in pages {
        let (next_word, mask) = bit(*page);
        if next_word == word {
            bits |= mask;
        } else {
            each(word, bits);
            (word, bits) = (next_word, mask);
        }
    }
    each(word, bits);
}

/// The opposite of [`index`].
fn position(index: usize) -> u64 {
    u64::try_from(index).expect("a pointer has at most 64 bits")
}

/// The bits of `value`, lowest first.
fn set_bits(mut value: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = (value != 0).then(|| index(u64::from(value.trailing_zeros())))?;
        value &= value - 1;
        Some(lowest)
    })
}

/// One thread's part of a [`DirtyBitmap`].
struct Shard {
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
}

impl Shard {
    fn mark(&self, word: u64, bits: u64) {
        let before = self.words[index(word)].fetch_or(bits, Ordering::Release);
        // A word that was not empty has its summary bit: from the mark that filled it, or a taker is on its
        // way to this word.
        if before == 0 {
            let (summary, mask) = (word / WORD_PAGES, 1 << (word % WORD_PAGES));
            self.summary[index(summary)].fetch_or(mask, Ordering::Release);
        }
    }
}

/// Takes all bits of a word. A word that reads zero is not written, so that memory which no mark has touched
/// stays untouched.
fn take_word(word: &AtomicU64) -> u64 {
    match word.load(Ordering::Relaxed) {
        0 => 0,
        _ => word.swap(0, Ordering::Acquire),
    }
}

/// The dirty pages of a guest. See the module.
pub struct DirtyBitmap {
    shards: Box<[Shard]>,
    summary_words: u64,
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let marked = self.count();
        f.debug_struct("DirtyBitmap")
            .field("marked", &marked)
            .finish_non_exhaustive()
    }
}

impl DirtyBitmap {
    /// An empty bitmap for a guest of `pages` pages, marked in by `shards` threads.
    ///
    /// # Errors
    /// If there is no memory for it.
    ///
    /// # Panics
    /// Without a shard.
    pub fn new(pages: u64, shards: usize) -> Result<Self, StoreError> {
        assert!(shards > 0, "a bitmap needs a shard to mark in");
        let words = pages.div_ceil(WORD_PAGES);
        let summary_words = words.div_ceil(WORD_PAGES);
        let shard = |_| {
            Ok(Shard {
                words: zeroed_words(index(words) + PADDING_WORDS)?,
                summary: zeroed_words(index(summary_words) + PADDING_WORDS)?,
            })
        };
        Ok(Self {
            shards: (0..shards).map(shard).collect::<Result<_, StoreError>>()?,
            summary_words,
        })
    }

    /// Memory that such a bitmap takes.
    pub(crate) fn bytes(pages: u64, shards: usize) -> u64 {
        let words = pages.div_ceil(WORD_PAGES);
        let of_shard = words + words.div_ceil(WORD_PAGES) + 2 * position(PADDING_WORDS);
        of_shard * 8 * position(shards)
    }

    /// Marks one page in `shard`, whose only marker the caller is.
    ///
    /// # Panics
    /// If there is no such shard; with a page of another guest, if that lies beyond the bitmap's memory.
    pub fn mark(&self, shard: usize, page: PageIndex) {
        let (word, mask) = bit(page);
        self.shards[shard].mark(word, mask);
    }

    /// Marks all pages of a packet in `shard`, neighbours together.
    ///
    /// # Panics
    /// As [`DirtyBitmap::mark`].
    pub fn mark_all(&self, shard: usize, pages: &[PageIndex]) {
        let shard = &self.shards[shard];
        for_each_word(pages, |word, bits| shard.mark(word, bits));
    }

    /// Marks every page of `plan` in `shard`.
    pub(crate) fn mark_plan(&self, shard: usize, plan: &FlushPlan) {
        let shard = &self.shards[shard];
        for word in plan.words() {
            shard.mark(word.index, word.bits);
        }
    }

    /// Moves all marks into `plan`, in address order; what `plan` held before is dropped.
    pub fn take(&self, plan: &mut FlushPlan) {
        plan.clear();
        for at in self.marked_summaries() {
            self.merge(at, take_word, |word, bits| plan.push(word, bits));
        }
    }

    /// How many pages are marked now. Marks made meanwhile may be counted or not.
    pub fn count(&self) -> u64 {
        let mut pages = 0;
        for at in self.marked_summaries() {
            let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
            self.merge(at, read, |_, bits| pages += u64::from(bits.count_ones()));
        }
        pages
    }

    /// Positions of the summary words that are not empty in all shards.
    fn marked_summaries(&self) -> impl Iterator<Item = usize> {
        let chunks = (0..index(self.summary_words)).step_by(SCAN_WORDS);
        chunks.flat_map(|start| {
            let mut any = [0; SCAN_WORDS];
            for shard in &self.shards {
                for (any, word) in any.iter_mut().zip(&shard.summary[start..]) {
                    *any |= word.load(Ordering::Relaxed);
                }
            }
            let marked = any.into_iter().enumerate().filter(|(_, summary)| *summary != 0);
            marked.map(move |(offset, _)| start + offset)
        })
    }

    /// Calls `each` with index and bits of the words below summary word `at`, all shards or-ed together. Of a shard it
    /// gets (by `get`) only the words that its summary names: others would cost a cache miss each.
    fn merge(&self, at: usize, get: impl Fn(&AtomicU64) -> u64, mut each: impl FnMut(u64, u64)) {
        let first = at * SUMMARY_WORDS;
        let mut words = [0; SUMMARY_WORDS];
        let mut any = 0;
        for shard in &self.shards {
            let summary = get(&shard.summary[at]);
            any |= summary;
            for bit in set_bits(summary) {
                words[bit] |= get(&shard.words[first + bit]);
            }
        }
        for bit in set_bits(any) {
            each(position(first + bit), words[bit]);
        }
    }
}

/// A flat set of pages that only grows: the pages that were received at least once (spec §7.3).
///
/// All threads insert into the one set. After the first round of precopy every insert finds its bit set and
/// writes nothing, so that the cores then share its lines for reading.
pub(crate) struct PageSet {
    words: Box<[AtomicU64]>,
}

impl PageSet {
    pub(crate) fn new(pages: u64) -> Result<Self, StoreError> {
        let words = index(pages.div_ceil(WORD_PAGES));
        Ok(Self {
            words: zeroed_words(words)?,
        })
    }

    /// Memory that such a set takes.
    pub(crate) fn bytes(pages: u64) -> u64 {
        pages.div_ceil(WORD_PAGES) * 8
    }

    pub(crate) fn insert_all(&self, pages: &[PageIndex]) {
        for_each_word(pages, |word, bits| {
            let word = &self.words[index(word)];
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::Relaxed);
            }
        });
    }

    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        let (word, mask) = bit(page);
        self.words[index(word)].load(Ordering::Relaxed) & mask != 0
    }

    pub(crate) fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words.iter().map(ones).sum()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::units::PageRun;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pages(of: &[u64]) -> Vec<PageIndex> {
        of.iter().map(|page| PageIndex::new(*page)).collect()
    }

    /// The pages of a plan, after a check that its runs ascend and do not touch each other.
    fn content(plan: &FlushPlan) -> Vec<u64> {
        let runs: Vec<PageRun> = plan.runs(0..plan.len()).collect();
        for pair in runs.windows(2) {
            assert!(
                pair[0].end() < pair[1].first.get(),
                "{pair:?} should be one run or ascend"
            );
        }
        runs.iter().flat_map(|run| run.first.get()..run.end()).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mark(usize, Vec<u64>),
        Take,
    }

    const PAGES: u64 = 3 * 64 * 64 + 17;
    const SHARDS: usize = 3;

    fn packet() -> impl Strategy<Value = Vec<u64>> {
        let scattered = prop::collection::vec(0..PAGES, 0..20);
        let run =
            (0..PAGES, 1..200u64).prop_map(|(first, count)| (first..PAGES.min(first + count)).collect());
        prop_oneof![scattered, run]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..SHARDS, packet()).prop_map(|(shard, pages)| Step::Mark(shard, pages)),
            2 => Just(Step::Take),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(steps in prop::collection::vec(step(), 1..40)) {
            let bitmap = DirtyBitmap::new(PAGES, SHARDS).unwrap();
            let received = PageSet::new(PAGES).unwrap();
            let (mut model, mut ever) = (BTreeSet::new(), BTreeSet::new());
            let mut plan = FlushPlan::default();
            for step in steps {
                match step {
                    Step::Mark(shard, marked) => {
                        match &pages(&marked)[..] {
                            [only] => bitmap.mark(shard, *only),
                            packet => bitmap.mark_all(shard, packet),
                        }
                        received.insert_all(&pages(&marked));
                        model.extend(marked.iter().copied());
                        ever.extend(marked);
                    }
                    Step::Take => {
                        bitmap.take(&mut plan);
                        prop_assert_eq!(content(&plan), model.iter().copied().collect::<Vec<_>>());
                        prop_assert_eq!(plan.pages(), u64::try_from(model.len()).unwrap());
                        model.clear();
                    }
                }
                prop_assert_eq!(bitmap.count(), u64::try_from(model.len()).unwrap());
                prop_assert_eq!(received.count(), u64::try_from(ever.len()).unwrap());
            }
            for page in 0..PAGES {
                prop_assert_eq!(received.contains(PageIndex::new(page)), ever.contains(&page));
            }
        }
    }

    #[test]
    fn a_plan_can_be_marked_again() {
        let bitmap = DirtyBitmap::new(1000, 2).unwrap();
        bitmap.mark_all(0, &pages(&[1, 2, 700]));
        bitmap.mark_all(1, &pages(&[2, 3, 999]));
        let mut plan = FlushPlan::default();
        bitmap.take(&mut plan);
        let again = DirtyBitmap::new(1000, 1).unwrap();
        again.mark_plan(0, &plan);
        again.take(&mut plan);
        assert_eq!(content(&plan), [1, 2, 3, 700, 999]);
        assert_eq!(bitmap.count(), 0);
    }

    #[test]
    #[should_panic(expected = "index out of bounds")]
    fn a_page_outside_is_a_panic() {
        let beyond = u64::try_from(PADDING_WORDS).unwrap() * WORD_PAGES;
        DirtyBitmap::new(64, 1)
            .unwrap()
            .mark(0, PageIndex::new(64 + beyond));
    }
}

/// Run with `scripts/test loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    fn count(plan: &FlushPlan) -> u64 {
        plan.pages()
    }

    /// Takes beside a marker: each mark is in exactly one take, and what a take holds it may copy.
    #[test]
    fn loom_marks_beside_takes_are_never_lost() {
        loom::model(|| {
            let bitmap = Arc::new(DirtyBitmap::new(128, 1).unwrap());
            let content = Arc::new(AtomicU64::new(0));
            let marker = {
                let (bitmap, content) = (bitmap.clone(), content.clone());
                thread::spawn(move || {
                    content.store(7, Ordering::Relaxed);
                    bitmap.mark(0, PageIndex::new(3));
                    bitmap.mark(0, PageIndex::new(4));
                })
            };
            let mut plan = FlushPlan::default();
            bitmap.take(&mut plan);
            let early = count(&plan);
            if early > 0 {
                assert_eq!(
                    content.load(Ordering::Relaxed),
                    7,
                    "taken without the page's content"
                );
            }
            marker.join().unwrap();
            bitmap.take(&mut plan);
            assert_eq!(early + count(&plan), 2);
            bitmap.take(&mut plan);
            assert_eq!(count(&plan), 0);
        });
    }

    /// Two markers, each in its shard, the same page among theirs; the taker sees a flag after the last mark, as
    /// a channel's SYNC would set it.
    #[test]
    fn loom_marks_before_the_hand_over_are_in_the_take() {
        loom::model(|| {
            let bitmap = Arc::new(DirtyBitmap::new(64, 2).unwrap());
            let synced: Vec<_> = (0..2).map(|_| Arc::new(AtomicBool::new(false))).collect();
            let markers: Vec<_> = (0..2usize)
                .map(|shard| {
                    let (bitmap, synced) = (bitmap.clone(), synced[shard].clone());
                    thread::spawn(move || {
                        bitmap.mark(shard, PageIndex::new(9));
                        synced.store(true, Ordering::Release);
                    })
                })
                .collect();
            let mut plan = FlushPlan::default();
            if synced.iter().all(|flag| flag.load(Ordering::Acquire)) {
                bitmap.take(&mut plan);
                assert_eq!(count(&plan), 1);
                bitmap.take(&mut plan);
                assert_eq!(count(&plan), 0, "a page of two shards is taken from both at once");
            }
            for marker in markers {
                marker.join().unwrap();
            }
        });
    }
}
