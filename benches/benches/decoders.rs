//! The decoders of compressed pages: nanoseconds of processor time per page, and the same with the copy to the page.
//!
//! `cargo bench -p colo-ring-benches --bench decoders`. The streams are those of a real primary in `fuzz/corpus`, which
//! are short, and streams made here: pages as the synthetic primary fills them, compressed by the reference encoders, a
//! packet of 128 pages each. Each stream is decoded from its begin with a new decoder, payload by payload, as a channel
//! does it. "decoded" leaves the pages in the thread's buffer; "and copied" looks for pages of zeros and copies the
//! others, with a plain memcpy, in turn to the pages of a guest of 256 MiB, which no cache holds. The first packet of
//! a stream is not timed: it is where a decoder allocates.

use colo_ring::host::Machine;
use colo_ring::units::{PACKET_PAGES, PAGE_SIZE};
use colo_ring::wire::codec::{Decoder, Encoder, Method, PageBuffer, is_zero};
use colo_ring_benches::median;
use colo_ring_tools::primary::{Content, fill_page};
use nix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::path::Path;

const ROUNDS: usize = 21;
/// Each round decodes at least so many pages, of short streams again and again.
const ROUND_PAGES: usize = 4096;
/// Packets of a stream that is made here.
const PACKETS: u64 = 32;
/// Pages of the guest: 256 MiB.
const GUEST_PAGES: usize = 1 << 16;

fn main() {
    println!("{}", Machine::read());
    println!("nanoseconds of the thread's processor time per page, medians of {ROUNDS} rounds");
    println!(
        "{:<30} {:>6} {:>6} {:>9} {:>11}",
        "stream", "pages", "ratio", "decoded", "and copied"
    );
    let mut guest = Guest::default();
    for stream in recorded().into_iter().chain(made()) {
        let mut times = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            times[0].push(stream.round(None));
            times[1].push(stream.round(Some(&mut guest)));
        }
        let [decoded, copied] = times.map(median);
        let (pages, ratio) = (stream.pages(), stream.ratio());
        println!(
            "{:<30} {pages:>6} {ratio:>6.1} {decoded:>9.0} {copied:>11.0}",
            stream.name
        );
    }
}

/// The packets of one channel.
struct Stream {
    name: String,
    method: Method,
    packets: Vec<Packet>,
}

struct Packet {
    pages: u16,
    payload: Vec<u8>,
}

impl Stream {
    /// Pages that are timed.
    fn pages(&self) -> usize {
        let timed = self.packets.iter().skip(1);
        timed.map(|packet| usize::from(packet.pages)).sum()
    }

    fn ratio(&self) -> f64 {
        let bytes: usize = self
            .packets
            .iter()
            .skip(1)
            .map(|packet| packet.payload.len())
            .sum();
        (self.pages() * PAGE_SIZE) as f64 / bytes as f64
    }

    /// Nanoseconds per page.
    fn round(&self, mut guest: Option<&mut Guest>) -> f64 {
        let mut buffer = PageBuffer::default();
        let (mut seconds, mut pages) = (0.0, 0);
        while pages < ROUND_PAGES {
            let mut decoder = Decoder::open(self.method)
                .expect("a decoder")
                .expect("it compresses");
            for (number, packet) in self.packets.iter().enumerate() {
                let begin = processor_seconds();
                let decoded = decoder.decode(&packet.payload, packet.pages, &mut buffer);
                let decoded = black_box(decoded.expect("a valid stream"));
                if let Some(guest) = guest.as_deref_mut() {
                    guest.receive(decoded);
                }
                if number > 0 {
                    seconds += processor_seconds() - begin;
                    pages += decoded.len();
                }
            }
        }
        seconds * 1e9 / pages as f64
    }
}

/// Where the pages are copied to.
struct Guest {
    pages: Vec<[u8; PAGE_SIZE]>,
    next: usize,
}

impl Default for Guest {
    fn default() -> Self {
        // Not zeros: they would be one page of the kernel's until they are written.
        let pages = vec![[1; PAGE_SIZE]; GUEST_PAGES];
        Self { pages, next: 0 }
    }
}

impl Guest {
    fn receive(&mut self, pages: &[[u8; PAGE_SIZE]]) {
        for page in pages {
            if !black_box(is_zero(page)) {
                self.pages[self.next] = *page;
            }
            self.next = (self.next + 1) % GUEST_PAGES;
        }
    }
}

/// The streams of `fuzz/corpus` that have more than one packet.
fn recorded() -> Vec<Stream> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let files = [
        (Method::Zlib, "zlib/zlib1-c1-0"),
        (Method::Zlib, "zlib/zlib9-c4-1"),
        (Method::Zstd, "zstd/zstd1-c1-0"),
        (Method::Zstd, "zstd/zstd20-c1-0"),
    ];
    let stream = |(method, name)| {
        let bytes = std::fs::read(corpus.join(name)).expect("the corpus of the fuzz targets");
        let packets = packets(&bytes);
        let name = format!("recorded: {name}");
        Stream {
            name,
            method,
            packets,
        }
    };
    files.map(stream).into()
}

/// An input of the fuzz targets (`fuzz/src/lib.rs`): pages less one, length in three bytes, payload.
fn packets(mut rest: &[u8]) -> Vec<Packet> {
    let mut packets = Vec::new();
    while let Some(([pages, length @ ..], behind)) = rest.split_first_chunk::<4>() {
        let [low, middle, high] = *length;
        let length = u32::from_le_bytes([low, middle, high, 0]);
        let (payload, behind) = behind.split_at(length.try_into().expect("three bytes"));
        let (pages, payload) = (u16::from(*pages) + 1, payload.to_vec());
        packets.push(Packet { pages, payload });
        rest = behind;
    }
    packets
}

/// Streams of the synthetic primary's pages.
fn made() -> impl Iterator<Item = Stream> {
    let methods = [(Method::Zlib, 1), (Method::Zlib, 9), (Method::Zstd, 1)];
    let contents = [
        ("text", Content::Text),
        ("ratio 2", Content::Ratio(2.0)),
        ("ratio 4", Content::Ratio(4.0)),
    ];
    let both = methods
        .into_iter()
        .flat_map(move |method| contents.map(|content| (method, content)));
    both.map(|((method, level), (content_name, content))| Stream {
        name: format!("made: {} {level}, {content_name}", method.name()),
        method,
        packets: compress(method, level, content),
    })
}

fn compress(method: Method, level: i32, content: Content) -> Vec<Packet> {
    let mut encoder = Encoder::new(method, level).expect("it compresses");
    let packet = |number: u64| {
        let mut pages = vec![[0; PAGE_SIZE]; PACKET_PAGES];
        for (page, index) in pages.iter_mut().zip(number * PACKET_PAGES as u64..) {
            fill_page(page, content, index, index, 0);
        }
        let mut payload = Vec::new();
        encoder.encode(pages.as_flattened(), &mut payload);
        let pages = PACKET_PAGES.try_into().expect("at most 128");
        Packet { pages, payload }
    };
    (0..PACKETS).map(packet).collect()
}

fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("this thread's clock");
    time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9
}
