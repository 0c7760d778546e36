//! What a flush copies: a list of bitmap words in address order, read as runs of consecutive pages.

use crate::store::StoreError;
use crate::store::memory::index;
use crate::units::{PageIndex, PageRun};
use std::ops::Range;

/// Pages that one word of a bitmap stands for.
pub(crate) const WORD_PAGES: u64 = 64;

/// The dirty pages of one word of the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyWord {
    /// Which word: its first page is 64 times this.
    pub(crate) index: u64,
    pub(crate) bits: u64,
}

/// A set of pages taken from a [`crate::store::DirtyBitmap`], in address order. It is made once, with room for all pages of its
/// guest, and filled again for each checkpoint.
#[derive(Default)]
pub struct FlushPlan {
    words: Vec<DirtyWord>,
    pages: u64,
}

impl FlushPlan {
    /// With room for a guest of so many pages.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn with_room(pages: u64) -> Result<Self, StoreError> {
        let count = index(pages.div_ceil(WORD_PAGES));
        let mut words = Vec::new();
        let reserved = words.try_reserve_exact(count);
        reserved.map_err(|_| StoreError::no_tables::<DirtyWord>(count))?;
        Ok(Self { words, pages: 0 })
    }

    /// Memory that a plan for a guest of so many pages takes at most.
    pub(crate) fn bytes_max(pages: u64) -> u64 {
        pages.div_ceil(WORD_PAGES) * size_of::<DirtyWord>() as u64
    }

    pub(crate) fn clear(&mut self) {
        self.words.clear();
        self.pages = 0;
    }

    /// Appends a word after all words so far.
    pub(crate) fn push(&mut self, index: u64, bits: u64) {
        debug_assert!(self.words.last().is_none_or(|last| last.index < index));
        if bits != 0 {
            self.words.push(DirtyWord { index, bits });
            self.pages += u64::from(bits.count_ones());
        }
    }

    /// How many pages are in it.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Its length in words: the unit in which threads share a plan out.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    pub(crate) fn words(&self) -> &[DirtyWord] {
        &self.words
    }

    /// The pages of some of its words as runs, each as long as these words allow.
    pub(crate) fn runs(&self, words: Range<usize>) -> Runs<'_> {
        Runs {
            words: &self.words[words],
            first_page: 0,
            bits: 0,
        }
    }
}

/// See [`FlushPlan::runs`].
pub(crate) struct Runs<'a> {
    words: &'a [DirtyWord],
    /// First page of the current word, and what is left of its bits.
    first_page: u64,
    bits: u64,
}

impl Runs<'_> {
    /// Makes the next word the current one.
    fn advance(&mut self) -> Option<()> {
        let (word, rest) = self.words.split_first()?;
        (self.first_page, self.bits) = (word.index * WORD_PAGES, word.bits);
        self.words = rest;
        Some(())
    }

    /// The lowest run of the current word, which is not empty.
    fn next_in_word(&mut self) -> PageRun {
        let skip = self.bits.trailing_zeros();
        let length = (self.bits >> skip).trailing_ones();
        // Shifted twice: a run of all 64 pages would shift by the word's whole width.
        self.bits &= u64::MAX.wrapping_shl(skip + length - 1) << 1;
        PageRun {
            first: PageIndex::new(self.first_page + u64::from(skip)),
            pages: u64::from(length),
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        if self.bits == 0 {
            self.advance()?;
        }
        let mut run = self.next_in_word();
        // A run that fills its word to the end goes on where the next word begins with a page.
        while let Some(word) = self.words.first() {
            if run.end() != word.index * WORD_PAGES || word.bits & 1 == 0 {
                break;
            }
            self.advance()?;
            run.pages += self.next_in_word().pages;
        }
        Some(run)
    }
}
