//! The time per multifd packet of decoding the header and turning its offsets into pages of the guest.
//!
//! `cargo bench -p colo-ring-benches --bench packet_parse`. Each shape is timed over 64 different packets of random
//! pages.

use colo_ring::blocks::BlockTable;
use colo_ring::host::Machine;
use colo_ring::units::{PACKET_PAGES, PAGE_BYTES};
use colo_ring::wire::codec::Method;
use colo_ring::wire::multifd::{HEADER_LEN, PacketFields, PacketHeader, PageList, raw_payload_len};
use divan::{Bencher, black_box};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

const PACKETS: usize = 64;
/// Pages of the guest's big block: 4 GiB.
const RAM_PAGES: u64 = 1 << 20;

fn main() {
    println!("{}", Machine::read());
    divan::main();
}

/// A SYNC.
#[divan::bench]
fn sync(bencher: Bencher<'_, '_>) {
    resolve(bencher, 0, 0);
}

/// Packets by how many of their 128 pages are zero.
#[divan::bench(args = [0, 64, 128])]
fn pages(bencher: Bencher<'_, '_>, zero: usize) {
    resolve(bencher, PACKET_PAGES - zero, zero);
}

fn resolve(bencher: Bencher<'_, '_>, normal: usize, zero: usize) {
    let (table, packets) = (table(), packets(normal, zero));
    let (mut normal, mut zero) = <(PageList, PageList)>::default();
    let mut turn = packets.iter().cycle();
    bencher.bench_local(|| {
        let packet = turn.next().expect("64 packets, again and again");
        let header = PacketHeader::decode(black_box(packet)).expect("a valid packet");
        let block = header
            .resolve(&table, &mut normal, &mut zero)
            .expect("valid pages");
        black_box((
            block,
            normal.as_slice(),
            zero.as_slice(),
            header.payload_len(),
            header.is_sync(),
        ));
    });
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
