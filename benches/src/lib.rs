//! What the micro-benchmarks beside `src/` share, and the comparison with QEMU's own secondary.

pub mod versus;

use colo_ring::blocks::BlockTable;
use colo_ring::units::{BlockId, PAGE_BYTES, PageIndex};
use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;

/// A guest with one block of `pages` pages.
pub fn guest(pages: u64) -> BlockTable {
    let block = (b"pc.ram".as_slice().into(), pages * PAGE_BYTES);
    BlockTable::new(vec![block], pages * PAGE_BYTES).expect("a valid list")
}

/// `count` different pages of the guest, at random.
pub fn random_pages(table: &BlockTable, count: usize, numbers: &mut Xoshiro256PlusPlus) -> Vec<PageIndex> {
    let mut seen = std::collections::HashSet::with_capacity(count);
    let mut pages = Vec::with_capacity(count);
    while pages.len() < count {
        let offset = numbers.random_range(0..table.total_pages()) * PAGE_BYTES;
        let page = table.page(BlockId(0), offset).expect("below the block's end");
        if seen.insert(page) {
            pages.push(page);
        }
    }
    pages
}

/// The middle one of some measurements.
///
/// # Panics
/// Without any.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
