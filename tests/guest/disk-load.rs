//! Runs in a guest: writes to its disk past the page cache at a rate that does not depend on how fast the disk is, unless that is slower.
//!
//!     disk-load FILE random|sequential PAUSE_US
//!
//! "random": four threads write 4 KiB to random places; "sequential": one thread writes 1 MiB behind the other. Each writes
//! again PAUSE_US after it has begun to write, or when that is answered.
//!
//! Lines: "tick N writes W sweeps W" ten times a second; "error …".

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// O_DIRECT of Linux on x86.
const DIRECT: i32 = 0o40000;
const LENGTH_MAX: usize = 1 << 20;

#[repr(align(4096))]
struct Buffer([u8; LENGTH_MAX]);

fn run(file: &File, blocks: u64, mut block: u64, length: usize, is_random: bool, pause: Duration, writes: &AtomicU64) -> ! {
    let mut buffer = Box::new(Buffer([0; LENGTH_MAX]));
    loop {
        let began = Instant::now();
        block = match is_random {
            true => block.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407),
            false => block + 1,
        };
        let place = (block >> if is_random { 33 } else { 0 }) % blocks;
        buffer.0[..8].copy_from_slice(&block.to_le_bytes());
        if let Err(error) = file.write_all_at(&buffer.0[..length], place * length as u64) {
            println!("error: block {place} cannot be written: {error}");
        }
        writes.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(pause.saturating_sub(began.elapsed()));
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let is_random = words[2] == "random";
    let pause = Duration::from_micros(words[3].parse().expect("a number"));
    let (threads, length) = if is_random { (4, 4096) } else { (1, LENGTH_MAX) };
    let opened = OpenOptions::new().read(true).write(true).custom_flags(DIRECT).open(&words[1]);
    let mut file = opened.expect("the disk");
    let blocks = file.seek(SeekFrom::End(0)).expect("its size") / length as u64;
    let (file, writes) = (Arc::new(file), Arc::new(AtomicU64::new(0)));
    for thread in 0..threads {
        let (file, writes) = (file.clone(), writes.clone());
        std::thread::spawn(move || run(&file, blocks, thread, length, is_random, pause, &writes));
    }
    for tick in 1_u64.. {
        std::thread::sleep(Duration::from_millis(100));
        let count = writes.load(Ordering::Relaxed);
        println!("tick {tick} writes {count} sweeps {count}");
    }
}
