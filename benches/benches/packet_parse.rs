//! Nanoseconds per multifd packet for decoding the header and turning its offsets into pages of the guest.
//!
//! `cargo bench -p colo-ring-benches --bench packet_parse`. Each shape is timed in batches over 64 different packets
//! of random pages; the median and the fastest batch are printed.

use colo_ring::blocks::BlockTable;
use colo_ring::host::Machine;
use colo_ring::units::{PACKET_PAGES, PAGE_BYTES};
use colo_ring::wire::codec::Method;
use colo_ring::wire::multifd::{HEADER_LEN, PacketFields, PacketHeader, PageList, raw_payload_len};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::hint::black_box;
use std::time::Instant;

const PACKETS: usize = 64;
const ROUNDS_PER_BATCH: u32 = 200;
const BATCHES: usize = 41;
/// Pages of the guest's big block: 4 GiB.
const RAM_PAGES: u64 = 1 << 20;

fn main() {
    println!("{}", Machine::read());
    println!("shape            ns/packet median   fastest");
    let table = table();
    for (name, normal, zero) in [
        ("SYNC", 0, 0),
        ("n=0   z=128", 0, 128),
        ("n=64  z=64", 64, 64),
        ("n=128 z=0", 128, 0),
    ] {
        let packets = packets(normal, zero);
        let mut batches: Vec<f64> = (0..BATCHES).map(|_| batch(&packets, &table)).collect();
        batches.sort_by(f64::total_cmp);
        println!("{name:<16} {:>16.1} {:>9.1}", batches[BATCHES / 2], batches[0]);
    }
}

/// Nanoseconds per packet over one batch.
fn batch(packets: &[[u8; HEADER_LEN]], table: &BlockTable) -> f64 {
    let (mut normal, mut zero) = <(PageList, PageList)>::default();
    let start = Instant::now();
    for _ in 0..ROUNDS_PER_BATCH {
        for packet in packets {
            let header = PacketHeader::decode(black_box(packet)).expect("a valid packet");
            let block = header
                .resolve(table, &mut normal, &mut zero)
                .expect("valid pages");
            black_box((
                block,
                normal.as_slice(),
                zero.as_slice(),
                header.payload_len(),
                header.is_sync(),
            ));
        }
    }
    let per_round = start.elapsed().as_secs_f64() / f64::from(ROUNDS_PER_BATCH);
    per_round * 1e9 / packets.len() as f64
}

/// The block list of a small PC, the big block first, as QEMU sends it.
fn table() -> BlockTable {
    let others = [
        "/rom@etc/acpi/tables",
        "pc.bios",
        "pc.rom",
        "/rom@etc/table-loader",
        "/rom@etc/acpi/rsdp",
    ];
    let big: (Box<[u8]>, u64) = (b"pc.ram".as_slice().into(), RAM_PAGES * PAGE_BYTES);
    let others = others.map(|name| (name.as_bytes().into(), 32 * PAGE_BYTES));
    let entries: Vec<_> = [big].into_iter().chain(others).collect();
    let total = entries.iter().map(|(_, length)| length).sum();
    BlockTable::new(entries, total).expect("a valid list")
}

fn packets(normal: usize, zero: usize) -> Vec<[u8; HEADER_LEN]> {
    let mut numbers = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut packet = || {
        let mut pages = Vec::with_capacity(PACKET_PAGES);
        while pages.len() < normal + zero {
            let offset = numbers.random_range(0..RAM_PAGES) * PAGE_BYTES;
            if !pages.contains(&offset) {
                pages.push(offset);
            }
        }
        let mut header = [0; HEADER_LEN];
        if pages.is_empty() {
            PacketFields::sync(7).encode(&mut header);
            return header;
        }
        let (normal, zero) = pages.split_at(normal);
        PacketFields {
            sync: false,
            method: Method::None,
            pages_alloc: 128,
            payload_len: raw_payload_len(normal.len()),
            packet_num: 7,
            block: b"pc.ram",
            normal,
            zero,
        }
        .encode(&mut header);
        header
    };
    (0..PACKETS).map(|_| packet()).collect()
}
