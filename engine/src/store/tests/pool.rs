//! The pool: where pages land, and what becomes of the memory.

use super::cache::extents::{EXTENT_BYTES, EXTENT_SLOTS};
use super::*;

const POOL: (CacheKind, CommitMode) = KINDS[3];

/// A guest for which one slab of the pool is not enough.
const MANY: u64 = 1500;

fn pool() -> Store {
    let store = store_of(POOL, &[("pc.ram", MANY)]);
    store.begin_colo();
    store
}

fn free_of(store: &Store) -> (u64, u64) {
    let pool = store.pool_use().unwrap();
    (pool.free_extents, pool.extents)
}

#[test]
fn a_packet_lands_in_one_piece_with_the_next_header_behind_it() {
    let store = pool();
    let mut landing = Landing::default();
    let scattered: Vec<_> = (0..PACKET_PAGES).map(|at| page((at * 7 % 1500) as u64)).collect();
    store.place(0, &scattered, &mut landing).unwrap();
    let [run] = landing.runs() else {
        panic!("{:?}", landing.runs())
    };
    assert_eq!(run.length, PACKET_PAGES * PAGE_SIZE);
    let header = landing.header().unwrap().address();
    assert_eq!(header, run.address.wrapping_add(run.length));
    let slab = store.slab(usize::from(landing.slab().unwrap().0)).unwrap();
    let offset = run.address.addr() - slab.base().addr();
    assert!(offset + run.length + PAGE_SIZE <= slab.bytes());
    // Where the header was, the next packet's pages go.
    let first = run.address;
    fill_by_kernel(landing.runs(), &vec![1; PACKET_PAGES * PAGE_SIZE]);
    store.landed(0, &mut landing);
    store.place(0, &scattered, &mut landing).unwrap();
    assert_eq!(landing.runs()[0].address, header);
    // Nothing was committed of what came first, and all of it came again: its slots are used again.
    fill_by_kernel(landing.runs(), &vec![2; PACKET_PAGES * PAGE_SIZE]);
    store.landed(0, &mut landing);
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    store.finish_flush();
    store.place(0, &scattered, &mut landing).unwrap();
    assert_eq!(landing.runs()[0].address, first, "the hottest memory first");
}

#[test]
fn it_grows_inline_and_ahead_and_loses_nothing() {
    let store = pool();
    let mut landing = Landing::default();
    let before = free_of(&store);
    for checkpoint in 0..3 {
        let pages: Vec<_> = (0..MANY).map(|at| (at, at + checkpoint * MANY + 1)).collect();
        for packet in pages.chunks(PACKET_PAGES) {
            land(&store, 0, packet, &mut landing);
        }
        assert_eq!(newest_stamp(&store, 3), 4 + checkpoint * MANY);
        store.commit(CheckpointId(checkpoint), &mut Vec::new(), &alone());
        while store.pool_task() == PoolTask::Grow {
            store.grow().unwrap();
        }
        store.finish_flush();
        assert!(pages.iter().all(|(at, stamp)| image_stamp(&store, *at) == *stamp));
    }
    let pool = store.pool_use().unwrap();
    assert!(pool.extents > before.1, "{pool:?}");
    store.release_landing(&mut landing);
    let (free, all) = free_of(&store);
    assert_eq!(free, all);
}

/// The same pages over and over, so that one page in each extent stays: memory has an end, and the committed image stays.
#[test]
fn a_primary_that_sends_the_same_pages_again_and_again_is_refused() {
    let store = pool();
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    let mut landing = Landing::default();
    let refused = (0..100_000).find_map(|round| {
        let stays = page(1 + round % (MANY - 1));
        let again = [page(0)];
        let pages = std::iter::once(std::slice::from_ref(&stays)).chain(std::iter::repeat_n(&again[..], 255));
        for packet in pages {
            if let Err(error) = store.place(0, packet, &mut landing) {
                return Some(error);
            }
            store.landed(0, &mut landing);
        }
        None
    });
    // Each page of the guest can keep one extent, so with a larger guest it would come to that.
    let pool = store.pool_use().unwrap();
    let limit = (2 * MANY.div_ceil(u64::from(EXTENT_SLOTS) - 1) + 322) * EXTENT_BYTES;
    assert!(pool.bytes <= limit, "{pool:?}");
    assert!(
        matches!(refused, Some(StoreError::PoolFull { .. })),
        "{refused:?}"
    );
    store.drop_uncommitted();
    assert!((0..MANY).all(|at| image_stamp(&store, at) == 0));
}

#[test]
fn what_is_held_is_given_back_at_the_end() {
    let store = Arc::new(pool());
    let mut landing = Landing::default();
    land(&store, 0, &[(1, 11), (2, 12)], &mut landing);
    store.write(1, page(3), &content(13)).unwrap();
    let buffer = store.pool_buffer(0).unwrap().unwrap();
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    land_more(&store, &mut landing);
    drop(buffer);
    store.release_landing(&mut landing);
    store.drop_uncommitted();
    let (free, all) = free_of(&store);
    assert_eq!(free, all);
    assert_eq!([1, 2, 3].map(|at| image_stamp(&store, at)), [11, 12, 13]);
}

fn land_more(store: &Store, landing: &mut Landing) {
    store.finish_flush();
    land(store, 0, &[(1, 21), (900, 22)], landing);
}

/// Packets of a size that an extent is no multiple of.
#[test]
fn packets_that_were_decoded_leave_no_slot_unused() {
    const PACKET: u64 = 100;
    const PACKETS: u64 = 9;
    let store = Arc::new(pool());
    let (free, _) = free_of(&store);
    for packet in 0..PACKETS {
        let numbers = packet * PACKET..(packet + 1) * PACKET;
        let pages: Vec<_> = numbers.clone().map(page).collect();
        let contents: Vec<_> = numbers.map(|at| content(at + 1)).collect();
        store.write_all(0, &pages, &contents).unwrap();
    }
    let extents = (PACKET * PACKETS).div_ceil(EXTENT_SLOTS.into());
    assert_eq!(free - free_of(&store).0, extents);
    assert!(
        (0..PACKET * PACKETS).all(|at| newest_stamp(&store, at) == at + 1 && image_stamp(&store, at) == 0)
    );
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    store.finish_flush();
    assert!((0..PACKET * PACKETS).all(|at| image_stamp(&store, at) == at + 1));
    store.drop_uncommitted();
    let (free, all) = free_of(&store);
    assert_eq!(free, all);
}

/// Pages at odd addresses among other bytes, as in plain mode, over more than one extent.
#[test]
fn pages_stay_where_a_buffer_received_them() {
    let store = Arc::new(pool());
    let mut buffer = store.pool_buffer(0).unwrap().unwrap();
    let mut sent = 0;
    for at in 0..600 {
        // A record: five bytes, and the page.
        let record: Vec<u8> = [0xee; 5].into_iter().chain(content(at + 1)).collect();
        let mut rest = &record[..];
        while !rest.is_empty() {
            let count = buffer.receive(&rest[..rest.len().min(3000)]);
            rest = &rest[count..];
        }
        let bytes = buffer.bytes();
        assert_eq!(bytes.len(), record.len());
        let page_bytes = bytes[5..].first_chunk::<PAGE_SIZE>().unwrap();
        store.adopt(0, page(at), &buffer, page_bytes);
        buffer.consume(record.len());
        sent += 1;
    }
    assert_eq!(newest_stamp(&store, 77), 78);
    let report = store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    assert_eq!(report.pages, sent);
    store.finish_flush();
    assert!((0..600).all(|at| image_stamp(&store, at) == at + 1));
    drop(buffer);
    let (free, all) = free_of(&store);
    assert_eq!(free, all, "the extents of flushed pages are free again");
}

/// Two channels that carry the same pages at the same time: each page is one or the other, and no slot is lost.
#[test]
fn superseded_slots_are_released() {
    let store = Arc::new(pool());
    let channel = |shard: usize| {
        let store = store.clone();
        move || {
            let mut landing = Landing::default();
            for round in 0..200 {
                let stamp = (round * 2 + shard) as u64 + 1;
                let pages: Vec<_> = (0..40).map(|at| (at * 3, stamp)).collect();
                land(&store, shard, &pages, &mut landing);
                store.zero(shard, page(3));
            }
            store.release_landing(&mut landing);
        }
    };
    thread::scope(|scope| {
        (0..SHARDS).for_each(|shard| drop(scope.spawn(channel(shard))));
    });
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    store.finish_flush();
    assert_eq!(image_stamp(&store, 3), 0);
    assert!((0..40).all(|at| image_stamp(&store, at * 3) <= 400));
    let (free, all) = free_of(&store);
    assert_eq!(free, all);
}

/// What a large checkpoint took goes back when checkpoints are small again, and comes again when they are large.
#[test]
fn it_shrinks_when_checkpoints_are_small_again() {
    let store = pool();
    let mut landing = Landing::default();
    let mut checkpoint = 0;
    let mut take = |pages: u64| {
        let pages: Vec<_> = (0..pages).map(|at| (at, at + checkpoint + 1)).collect();
        for packet in pages.chunks(PACKET_PAGES) {
            land(&store, 0, packet, &mut landing);
        }
        store.idle_landing(&mut landing);
        store.commit(CheckpointId(checkpoint), &mut Vec::new(), &alone());
        match store.pool_task() {
            PoolTask::Grow => store.grow().unwrap(),
            PoolTask::Shrink => store.shrink(),
            PoolTask::Nothing | PoolTask::Unregister => {}
        }
        store.finish_flush();
        assert!(pages.iter().all(|(at, stamp)| image_stamp(&store, *at) == *stamp));
        checkpoint += 1;
        store.pool_use().unwrap()
    };
    let first = take(10).bytes;
    let large = (0..5).map(|_| take(MANY).bytes).max().unwrap();
    assert!(large > first);
    let small = (0..2000).map(|_| take(10)).last().unwrap();
    assert!(
        small.bytes < large && small.bytes >= first,
        "{small:?}, {first}, {large}"
    );
    let again = (0..5).map(|_| take(MANY).bytes).max().unwrap();
    assert_eq!(again, large);
}
