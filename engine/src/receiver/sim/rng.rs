//! Numbers that look random and follow from a seed.
//!
//! `rand` documents the generator as portable and reproducible: its stream stays the same in every version and on every platform.
//! How numbers in a range are drawn from the stream may change with a minor version of `rand`, which `Cargo.lock` pins.

use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng as _, RngExt, SeedableRng};

/// The generator. Every choice of a run comes from one, so that its seed is the run.
pub(super) struct Rng(Xoshiro256PlusPlus);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(Xoshiro256PlusPlus::seed_from_u64(seed))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0.random_range(..bound)
    }

    /// A number from `from` to `to`, both included.
    pub(super) fn range(&mut self, from: usize, to: usize) -> usize {
        self.0.random_range(from..=to)
    }

    /// Whether something happens that does once in `times` times.
    pub(super) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// A number from 1 to `most`, small ones as often as large ones: every power of two as often as the next.
    pub(super) fn any_size(&mut self, most: usize) -> usize {
        let bits = self.below(usize::BITS as usize - most.leading_zeros() as usize);
        self.range(1, 2 << bits).min(most)
    }

    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        *choices.choose(&mut self.0).expect("one of several")
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        items.shuffle(&mut self.0);
    }
}
