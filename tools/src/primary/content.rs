//! What a page holds.

use super::Content;
use super::shape::round;
use colo_ring::units::PAGE_SIZE;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use std::io::Write;

/// Where [`Content::Compressible`] begins again.
const LINE_BYTES: usize = 64;

/// Words of [`Content::Text`]: as many as six bits choose from.
const WORDS: [&str; 64] = [
    "a",
    "after",
    "all",
    "an",
    "and",
    "are",
    "as",
    "at",
    "backup",
    "be",
    "but",
    "by",
    "checkpoint",
    "copy",
    "disk",
    "each",
    "every",
    "for",
    "from",
    "guest",
    "has",
    "host",
    "if",
    "in",
    "is",
    "it",
    "last",
    "left",
    "let",
    "memory",
    "never",
    "no",
    "not",
    "of",
    "on",
    "once",
    "one",
    "only",
    "or",
    "other",
    "out",
    "page",
    "primary",
    "ready",
    "right",
    "same",
    "second",
    "secondary",
    "so",
    "state",
    "stream",
    "that",
    "the",
    "then",
    "this",
    "time",
    "to",
    "until",
    "up",
    "was",
    "when",
    "with",
    "without",
    "write",
];

/// Fills a page. Every byte that is random follows from `stamp`; the page's number and version make it differ from
/// every other, whatever the stamp. So a page that is missing, old, in the wrong place or made of two versions does
/// not compare equal.
pub fn fill(page: &mut [u8; PAGE_SIZE], content: Content, stamp: u64, number: u64, version: u64) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(stamp);
    match content {
        Content::Random => rng.fill_bytes(page),
        Content::Compressible => {
            page.fill(0);
            for line in page.as_chunks_mut::<LINE_BYTES>().0 {
                rng.fill_bytes(&mut line[..LINE_BYTES / 4]);
            }
        }
        Content::Text => return text(page, &mut rng, number, version),
        Content::Ratio(ratio) => compressible_to(page, &mut rng, ratio),
    }
    page[..8].copy_from_slice(&number.to_le_bytes());
    page[8..16].copy_from_slice(&version.to_le_bytes());
}

/// Fills a page with what compresses to about the `ratio`th part: random bytes as many as that, less what both methods
/// need to describe the zeros between them. More random bytes stand in more places, as in memory of programs.
fn compressible_to(page: &mut [u8; PAGE_SIZE], rng: &mut Xoshiro256PlusPlus, ratio: f64) {
    let compressed = PAGE_SIZE as f64 / ratio;
    // Runs of zeros, and the bytes by which each is described.
    let (runs, described) = match ratio {
        ..=1.0 => (1, 0.0),
        ..=4.0 => (32, 2.0),
        _ => (8, 5.0),
    };
    let run = PAGE_SIZE / runs;
    let random = round(compressed / runs as f64 - described);
    let random = usize::try_from(random).unwrap_or(run).clamp(2, run);
    page.fill(0);
    for (number, part) in page.chunks_exact_mut(run).enumerate() {
        // The page's number and version stand before the first of them.
        let begin = if number == 0 && random + 16 <= run { 16 } else { 0 };
        rng.fill_bytes(&mut part[begin..begin + random]);
    }
}

fn text(page: &mut [u8; PAGE_SIZE], rng: &mut Xoshiro256PlusPlus, number: u64, version: u64) {
    let mut rest = &mut page[..];
    writeln!(rest, "page {number} version {version}").expect("a page has room for two numbers");
    let mut choices = 0;
    for position in 0.. {
        if position % 10 == 0 {
            choices = rng.next_u64();
        }
        let word = WORDS[usize::try_from(choices & 63).expect("six bits")].as_bytes();
        choices >>= 6;
        if rest.len() <= word.len() {
            break;
        }
        let (place, after) = rest.split_at_mut(word.len() + 1);
        place[..word.len()].copy_from_slice(word);
        place[word.len()] = if position % 12 == 11 { b'\n' } else { b' ' };
        rest = after;
    }
    rest.fill(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring::wire::codec::{Encoder, Method};

    fn page(content: Content, stamp: u64, number: u64, version: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0xaa; PAGE_SIZE];
        fill(&mut page, content, stamp, number, version);
        page
    }

    #[test]
    fn pages_follow_from_their_parameters_and_differ_by_each() {
        for content in [
            Content::Random,
            Content::Compressible,
            Content::Text,
            Content::Ratio(1.0),
            Content::Ratio(2.0),
            Content::Ratio(16.0),
        ] {
            let one = page(content, 1, 2, 3);
            assert_eq!(one, page(content, 1, 2, 3));
            for other in [
                page(content, 4, 2, 3),
                page(content, 1, 4, 3),
                page(content, 1, 2, 4),
            ] {
                assert_ne!(one, other, "{content:?}");
            }
            assert_ne!(one, [0; PAGE_SIZE]);
            // Another stamp changes each eighth of it: a torn page equals neither version.
            let other = page(content, 4, 2, 3);
            for (a, b) in one.chunks(PAGE_SIZE / 8).zip(other.chunks(PAGE_SIZE / 8)) {
                assert_ne!(a, b, "{content:?}");
            }
        }
    }

    /// Both methods at QEMU's level, as one stream over packets.
    #[test]
    fn a_ratio_is_about_what_comes_out() {
        for method in [Method::Zlib, Method::Zstd] {
            for ratio in [1.0, 1.3, 2.0, 3.0, 4.0, 6.0, 10.0, 16.0] {
                let mut encoder = Encoder::new(method, 1).unwrap();
                let mut payload = Vec::new();
                for packet in 0..2 {
                    let pages = (0..128)
                        .map(|number| page(Content::Ratio(ratio), number + 128 * packet, number, packet));
                    encoder.encode(&pages.collect::<Vec<_>>().concat(), &mut payload);
                }
                let seen = (2 * 128 * PAGE_SIZE) as f64 / payload.len() as f64;
                assert!(
                    (seen / ratio - 1.0).abs() < 0.2,
                    "{method:?}: {seen} instead of {ratio}"
                );
            }
        }
    }

    #[test]
    fn content_is_what_it_is_called() {
        let random = page(Content::Random, 7, 0, 0);
        let mut seen = [0u32; 256];
        random.iter().for_each(|byte| seen[usize::from(*byte)] += 1);
        // 16 of each are expected; 60 would be eleven standard deviations off.
        assert!(seen.iter().all(|&count| count < 60), "{seen:?}");
        let compressible = page(Content::Compressible, 7, 0, 0);
        let zeros = compressible.iter().filter(|&&byte| byte == 0).count();
        assert!((3000..3200).contains(&zeros), "{zeros}");
        let text = page(Content::Text, 7, 12, 3);
        assert!(text.starts_with(b"page 12 version 3\n"));
        assert!(
            text.iter()
                .all(|byte| byte.is_ascii_lowercase() || b" \n0123456789".contains(byte))
        );
        let lines = text.split(|&byte| byte == b'\n');
        let longest = lines.map(<[u8]>::len).max().unwrap();
        assert!((40..140).contains(&longest), "{longest}");
    }
}
