//! Runs in a guest: writes a counter to disk blocks and to memory in a known order, and checks one against the other.
//!
//!     disk-counter FILE THREADS SLOTS PAUSE_US
//!
//! Each thread has SLOTS blocks of 4 KiB of FILE, written past the page cache, and a table in memory with the value that
//! each of them must have. It writes value n to slot n × 7 mod SLOTS, and enters n in the table once the disk has answered.
//! Before each write it reads the slot, and after SLOTS writes all slots: a value that is not the table's means that disk and
//! memory are not of the same instant. SLOTS is a power of two, so that the order visits all slots.
//!
//! Lines: "tick N writes W sweeps S" ten times a second, S counting threads' passes over all their slots; "error …".

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: usize = 4096;
const MAGIC: u64 = 0x636f_6c6f_2d72_696e;
const STEP: u64 = 7;
/// O_DIRECT of Linux on x86.
const DIRECT: i32 = 0o40000;

#[repr(align(4096))]
struct Block([u8; BLOCK]);

#[derive(Default)]
struct Counts {
    writes: AtomicU64,
    sweeps: AtomicU64,
}

/// What a slot holds after value `n` was written to it; zeroes before the first.
fn fill(block: &mut Block, thread: u64, slot: u64, n: u64) {
    block.0.fill(0);
    if n == 0 {
        return;
    }
    for (index, word) in (0_u64..).zip(block.0.chunks_exact_mut(8)) {
        let value = match index {
            0 => MAGIC,
            1 => thread,
            2 => slot,
            3 => n,
            _ => (n ^ (slot << 32) ^ (thread << 48))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(index),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

struct Writer {
    file: File,
    thread: u64,
    slots: u64,
    table: Vec<u64>,
    found: Block,
    expected: Block,
}

impl Writer {
    fn offset(&self, slot: u64) -> u64 {
        (self.thread * self.slots + slot) * BLOCK as u64
    }

    fn check(&mut self, slot: u64) {
        let value = self.table[slot as usize];
        let at = self.offset(slot);
        if let Err(error) = self.file.read_exact_at(&mut self.found.0, at) {
            println!("error: slot {slot} cannot be read: {error}");
            return;
        }
        fill(&mut self.expected, self.thread, slot, value);
        if self.found.0 != self.expected.0 {
            let word = |index: usize| {
                let bytes = &self.found.0[index * 8..index * 8 + 8];
                u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
            };
            println!(
                "error: thread {} slot {slot}: memory has {value}, disk has {} (magic {:x}, slot {})",
                self.thread,
                word(3),
                word(0),
                word(2)
            );
        }
    }

    fn write(&mut self, slot: u64, n: u64) {
        fill(&mut self.expected, self.thread, slot, n);
        match self.file.write_all_at(&self.expected.0, self.offset(slot)) {
            Ok(()) => self.table[slot as usize] = n,
            Err(error) => println!("error: slot {slot} cannot be written: {error}"),
        }
    }

    fn run(mut self, counts: &Counts, pause: Duration) -> ! {
        let mut n = 0_u64;
        loop {
            n += 1;
            let slot = n.wrapping_mul(STEP) % self.slots;
            self.check(slot);
            self.write(slot, n);
            counts.writes.fetch_add(1, Ordering::Relaxed);
            if n % self.slots == 0 {
                (0..self.slots).for_each(|slot| self.check(slot));
                counts.sweeps.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(pause);
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |index: usize| -> u64 { words[index].parse().expect("a number") };
    let (threads, slots, pause) = (number(2), number(3), Duration::from_micros(number(4)));
    assert!(slots.is_power_of_two());
    let counts = Arc::new(Counts::default());
    for thread in 0..threads {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(DIRECT)
            .open(&words[1]);
        let writer = Writer {
            file: opened.expect("the disk"),
            thread,
            slots,
            table: vec![0; slots as usize],
            found: Block([0; BLOCK]),
            expected: Block([0; BLOCK]),
        };
        let counts = counts.clone();
        std::thread::spawn(move || writer.run(&counts, pause));
    }
    for tick in 1_u64.. {
        std::thread::sleep(Duration::from_millis(100));
        let [writes, sweeps] = [&counts.writes, &counts.sweeps].map(|count| count.load(Ordering::Relaxed));
        println!("tick {tick} writes {writes} sweeps {sweeps}");
    }
}
