//! Where and what a guest writes, over many checkpoints of one seed.

use super::small;
use crate::primary::guest::{GuestRam, Page};
use crate::primary::{Content, Distribution, Pattern, SynthOptions, Version};
use colo_ring::units::PAGE_BYTES;

/// The guest's pages: 2048 of its main RAM and those of the small blocks.
const PAGES: u64 = 2048 + (0x2_0000 + 0x4_0000 + 0x2_0000 + 0x1000 + 0x1000) / PAGE_BYTES;
const RUNS: usize = 60;

fn guest() -> GuestRam {
    GuestRam::new(&small(Version::V11_1))
}

/// Position of a page among all pages.
fn number(guest: &GuestRam, page: &Page) -> u64 {
    let before = guest
        .table()
        .iter()
        .take(page.block)
        .map(|(_, block)| block.pages());
    before.sum::<u64>() + page.offset / PAGE_BYTES
}

/// The pages of [`RUNS`] checkpoints of 100 pages each.
fn runs(pattern: Pattern) -> Vec<Vec<u64>> {
    let mut guest = guest();
    let one = |_| {
        let pages = guest.run(Distribution::Fixed(100), pattern, 0.1);
        pages.iter().map(|page| number(&guest, page)).collect::<Vec<_>>()
    };
    let runs: Vec<_> = (0..RUNS).map(one).collect();
    for run in &runs {
        assert!(
            run.is_sorted_by(|a, b| a < b),
            "distinct, in the order of their addresses"
        );
        assert_eq!(run.len(), 100);
        assert!(run.iter().all(|&page| page < PAGES));
    }
    runs
}

/// Stretches of neighbouring pages in all checkpoints.
fn stretches(runs: &[Vec<u64>]) -> usize {
    let breaks = |run: &Vec<u64>| run.windows(2).filter(|pair| pair[1] != pair[0] + 1).count() + 1;
    runs.iter().map(breaks).sum()
}

#[test]
fn random_pages_are_everywhere() {
    let runs = runs(Pattern::Random);
    for eighth in 0..8 {
        let low = PAGES * eighth / 8;
        let inside = |page: &&u64| (low..low + PAGES / 8).contains(page);
        let count = runs.iter().flatten().filter(inside).count();
        // 750 are expected, with a deviation of 26.
        assert!((620..880).contains(&count), "{count} in eighth {eighth}");
    }
    // Of 100 pages in 2180 some 4 or 5 are neighbours.
    assert!(stretches(&runs) > RUNS * 90, "{}", stretches(&runs));
}

#[test]
fn sequential_pages_follow_each_other() {
    let runs = runs(Pattern::Sequential);
    let mut next = 0;
    for run in &runs {
        let mut expected: Vec<_> = (next..next + 100).map(|page| page % PAGES).collect();
        expected.sort_unstable();
        assert_eq!(*run, expected);
        next = (next + 100) % PAGES;
    }
}

#[test]
fn runs_are_as_long_as_asked() {
    let stretches = stretches(&runs(Pattern::Runs(20)));
    // Five in each checkpoint, fewer where two touch or one goes over the end, more where one is broken by another.
    assert!((RUNS * 4..RUNS * 6).contains(&stretches), "{stretches}");
}

#[test]
fn a_hot_set_takes_its_share_and_is_scattered() {
    let (pages, writes) = (0.1, 0.8);
    let runs = runs(Pattern::HotSet { pages, writes });
    let mut seen = vec![0; usize::try_from(PAGES).unwrap()];
    for &page in runs.iter().flatten() {
        seen[usize::try_from(page).unwrap()] += 1;
    }
    // A hot page is dirtied 22 times in 60 checkpoints, any other 0.6 times.
    let hot: Vec<_> = seen.iter().enumerate().filter(|(_, count)| **count > 8).collect();
    assert_eq!(hot.len(), 218);
    assert!(
        hot.windows(2)
            .all(|pair| (9..=11).contains(&(pair[1].0 - pair[0].0)))
    );
    let taken = hot.iter().map(|(_, count)| **count).sum::<u32>();
    // 4800 of 6000, and a tenth of the others.
    assert!((4750..5100).contains(&taken), "{taken}");
}

#[test]
fn a_hot_set_that_is_too_small_leaves_the_rest_to_the_others() {
    let mut guest = guest();
    let pattern = Pattern::HotSet {
        pages: 0.01,
        writes: 1.0,
    };
    for _ in 0..5 {
        assert_eq!(guest.run(Distribution::Fixed(2000), pattern, 0.0).len(), 2000);
    }
}

#[test]
fn the_number_of_pages_follows_its_distribution_and_ends_with_the_guest() {
    let mut guest = guest();
    let uniform = Distribution::Uniform { low: 10, high: 20 };
    let counts: Vec<_> = (0..200)
        .map(|_| guest.run(uniform, Pattern::Random, 0.0).len())
        .collect();
    assert_eq!((counts.iter().min(), counts.iter().max()), (Some(&10), Some(&20)));
    let tail = Distribution::LogNormal {
        median: 1000,
        sigma: 2.0,
    };
    let counts: Vec<_> = (0..50)
        .map(|_| guest.run(tail, Pattern::Random, 0.0).len())
        .collect();
    assert!(
        counts.contains(&2048) && counts.iter().all(|&count| count <= 2048),
        "{counts:?}"
    );
}

#[test]
fn zero_pages_have_their_share_and_are_zero() {
    for content in [Content::Random, Content::Compressible, Content::Text] {
        let mut guest = GuestRam::new(&SynthOptions {
            content,
            ..small(Version::V11_1)
        });
        let mut zeros = 0;
        for _ in 0..RUNS {
            for page in guest.run(Distribution::Fixed(100), Pattern::Random, 0.25) {
                assert_eq!(guest.page(page.block, page.offset) == &[0; 4096], page.zero);
                zeros += u32::from(page.zero);
            }
        }
        // 1500 of 6000, with a deviation of 34.
        assert!((1330..1670).contains(&zeros), "{zeros}");
    }
}
