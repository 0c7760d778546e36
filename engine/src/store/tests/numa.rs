//! Extents of several nodes. Whether the kernel puts their slabs on other nodes is for the laboratory to show.

use crate::budget::{Account, Budget};
use crate::store::cache::cursor::Cursor;
use crate::store::cache::extent_refs::ExtentId;
use crate::store::cache::extents::{EXTENT_SLOTS, Extents, PoolTask, Slot};
use crate::store::cache::pool_layout::PoolLayout;
use crate::store::memory::huge::HugePages;
use crate::store::memory::numa::{NodeIndex, NumaNodes};
use crate::store::slab::SlabMemory;

const SLAB_EXTENTS: u32 = 4;

/// A slab of four extents for each of two nodes, and room for more.
fn on_two_nodes() -> Extents {
    let shape = PoolLayout {
        reserved: 0,
        slab_extents: SLAB_EXTENTS,
        first: 2,
        keep: 8,
        limit: 8,
    };
    let memory = SlabMemory::new(
        HugePages::Off,
        NumaNodes::of(&[0, 1]),
        Account::of(Budget::unlimited().take(0).unwrap()),
    );
    // On a host with one node the second node's wish is refused, with a note; its extents are its own nevertheless.
    Extents::map(shape, memory, &mut Vec::new()).unwrap()
}

fn node_of(extents: &Extents, extent: ExtentId) -> usize {
    extents.locate(extent).1.node().0
}

#[test]
fn extents_are_taken_near_first_and_return_to_their_node() {
    let extents = on_two_nodes();
    for node in [0, 1, 1, 0] {
        let taken: Vec<_> = (0..SLAB_EXTENTS)
            .map(|_| extents.take(NodeIndex(node)).unwrap())
            .collect();
        assert!(taken.iter().all(|extent| node_of(&extents, *extent) == node));
        // Any thread may release them.
        taken
            .into_iter()
            .for_each(|extent| extents.refs().release(extent, 1));
    }
    assert_eq!(extents.used().free_extents, 2 * u64::from(SLAB_EXTENTS));
    assert_eq!(extents.used().inline_growth, 0);
}

#[test]
fn who_borrows_grows_next() {
    let extents = on_two_nodes();
    let taken: Vec<_> = (0..2 * SLAB_EXTENTS)
        .map(|_| extents.take(NodeIndex(1)).unwrap())
        .collect();
    let borrowed = taken.iter().filter(|extent| node_of(&extents, **extent) == 0);
    assert_eq!(borrowed.count(), 4);
    assert_eq!(
        extents.used().inline_growth,
        0,
        "what is free elsewhere is taken first"
    );
    taken
        .into_iter()
        .for_each(|extent| extents.refs().release(extent, 1));
    assert_eq!(extents.task(), PoolTask::Grow);
    extents.grow().unwrap();
    assert_eq!(extents.slab(2).unwrap().node(), NodeIndex(1));
    // Now it has what it needs without borrowing.
    let taken: Vec<_> = (0..2 * SLAB_EXTENTS)
        .map(|_| extents.take(NodeIndex(1)).unwrap())
        .collect();
    assert!(taken.iter().all(|extent| node_of(&extents, *extent) == 1));
}

#[test]
fn inline_growth_is_near() {
    let extents = on_two_nodes();
    for _ in 0..2 * SLAB_EXTENTS {
        extents.take(NodeIndex(0)).unwrap();
    }
    let inline_growth = extents.take(NodeIndex(1)).unwrap();
    assert_eq!(
        (node_of(&extents, inline_growth), extents.used().inline_growth),
        (1, 1)
    );
}

#[test]
fn a_cursor_that_moved_begins_again_near() {
    let extents = on_two_nodes();
    let mut cursor = Cursor::default();
    let first = cursor.reserve(&extents, NodeIndex(0), 4).unwrap();
    cursor.advance(&extents, first, 4);
    // Pages live in it: it goes on where it is.
    let same = cursor.reserve(&extents, NodeIndex(1), 4).unwrap();
    assert_eq!(same, Slot { number: 4, ..first });
    extents.refs().release(first.extent, 4);
    let moved = cursor.reserve(&extents, NodeIndex(1), EXTENT_SLOTS).unwrap();
    assert_eq!((node_of(&extents, moved.extent), moved.number), (1, 0));
    assert_eq!(extents.used().free_extents, 2 * u64::from(SLAB_EXTENTS) - 1);
}

#[test]
fn a_small_limit_is_shared() {
    let shape = PoolLayout {
        reserved: 0,
        slab_extents: SLAB_EXTENTS,
        first: 1,
        keep: 1,
        limit: 2,
    };
    let memory = SlabMemory::new(
        HugePages::Off,
        NumaNodes::of(&[0, 1]),
        Account::of(Budget::unlimited().take(0).unwrap()),
    );
    let extents = Extents::map(shape, memory, &mut Vec::new()).unwrap();
    let borrowed = extents.take(NodeIndex(1)).unwrap();
    assert_eq!(node_of(&extents, borrowed), 0);
    assert_eq!(extents.task(), PoolTask::Nothing, "the limit is the operator's");
}
