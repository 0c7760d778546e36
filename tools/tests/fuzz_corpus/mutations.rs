//! A sample of what `scripts/fuzz` does for hours: inputs of the corpora, changed at random. It knows nothing of coverage, so it finds
//! what is near to real streams. The changes are always the same ones; COLO_RING_SEED gives others, COLO_RING_FUZZ_INPUTS their number.

use crate::{fuzz, names_in};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// An input is no longer than those of `scripts/fuzz`.
const LENGTH_MAX: usize = 64 << 10;

/// Numbers at the ends of their ranges, and one beside.
const NUMBERS: [u64; 8] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("it is below a usize")
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length);
        start..start + 1 + self.below((length - start).min(256))
    }

    /// Changes a place of an input; `other` is one of the same corpus.
    fn mutate(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        if input.is_empty() {
            input.extend_from_slice(other);
            return;
        }
        let at = self.below(input.len());
        match self.below(7) {
            0 => input[at] ^= 1 << self.below(8),
            1 => input[at] = self.next().to_le_bytes()[0],
            2 => {
                let number = NUMBERS[self.below(NUMBERS.len())].to_be_bytes();
                let width = [1, 2, 4, 8][self.below(4)];
                let width = width.min(input.len() - at);
                input[at..at + width].copy_from_slice(&number[8 - width..]);
            }
            3 => drop(input.drain(self.range(input.len()))),
            4 => {
                let copy = input[self.range(input.len())].to_vec();
                drop(input.splice(at..at, copy));
            }
            5 if !other.is_empty() => {
                let part = &other[self.range(other.len())];
                let end = (at + part.len()).min(input.len());
                drop(input.splice(at..end, part.iter().copied()));
            }
            _ => input.truncate(at),
        }
        input.truncate(LENGTH_MAX);
    }
}

fn number_in(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

#[test]
fn every_target_takes_changed_inputs() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let seed = number_in("COLO_RING_SEED").unwrap_or(0);
    let count = number_in("COLO_RING_FUZZ_INPUTS").unwrap_or(1000);
    let mut valid_in_all = 0;
    for (name, target) in fuzz::TARGETS {
        let inputs = names_in(&corpora.join(name));
        let inputs: Vec<_> = inputs.iter().map(|path| fs::read(path).unwrap()).collect();
        let (mut random, mut valid) = (Random(seed), 0);
        for number in 0..count {
            let mut input = inputs[random.below(inputs.len())].clone();
            for _ in 0..=random.below(4) {
                let other = &inputs[random.below(inputs.len())];
                random.mutate(&mut input, other);
            }
            let taken = catch_unwind(AssertUnwindSafe(|| target(&input)));
            valid += taken.unwrap_or_else(|panic| {
                eprintln!("input {number} of {name}; again: COLO_RING_SEED={seed}");
                resume_unwind(panic)
            });
        }
        println!("{name}: {count} changed inputs, {valid} valid parts");
        valid_in_all += valid;
    }
    // A file with a checksum may have nothing left.
    assert!(valid_in_all > 0, "the changes leave nothing valid");
}
