//! What a primary sends: one stream per channel, at every level.

use super::{FULL, STREAMS, content, count, decode, decoder, encoder};
use crate::units::PAGE_SIZE;
use crate::wire::codec::{Decoder, Method, PageBuffer, fixed_bytes, is_zero, stream_bytes, zstd};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};

#[test]
fn a_stream_is_decoded_packet_by_packet() {
    for (method, level) in [
        (Method::Zlib, 0),
        (Method::Zlib, 1),
        (Method::Zlib, 9),
        (Method::Zstd, 1),
        (Method::Zstd, 3),
        (Method::Zstd, 20),
    ] {
        let (mut encoder, mut decoder) = (encoder(method, level), decoder(method));
        for (seed, pages) in (1..).zip([10, FULL, 1, 1, FULL, 3, 77, FULL]) {
            let bytes = content(pages, seed);
            let payload = encoder.packet(&bytes);
            let decoded = decode(&mut decoder, &payload, pages).unwrap();
            assert!(decoded == bytes, "{method:?}, level {level}, packet {seed}");
        }
    }
}

#[test]
fn pages_that_do_not_compress_and_pages_of_zeros_are_decoded() {
    let mut random = vec![0; FULL * PAGE_SIZE];
    Xoshiro256PlusPlus::seed_from_u64(1).fill_bytes(&mut random);
    for method in STREAMS {
        let (mut encoder, mut decoder) = (encoder(method, 1), decoder(method));
        for bytes in [&random[..], &[0; 2 * PAGE_SIZE], &random] {
            let payload = encoder.packet(bytes);
            let pages = bytes.len() / PAGE_SIZE;
            method
                .check_payload(count(pages), u32::try_from(payload.len()).unwrap())
                .unwrap();
            assert!(decode(&mut decoder, &payload, pages).unwrap() == bytes);
        }
    }
}

#[test]
fn a_packet_that_was_left_out_is_noticed() {
    for method in STREAMS {
        let (mut encoder, mut decoder) = (encoder(method, 9), decoder(method));
        let bytes = content(4, 7);
        let payloads: Vec<_> = (0..3).map(|_| encoder.packet(&bytes)).collect();
        assert!(decode(&mut decoder, &payloads[0], 4).unwrap() == bytes);
        // The same content again is a reference to what came before it, and much shorter.
        assert!(payloads[1].len() * 4 < payloads[0].len());
        assert!(decode(&mut decoder, &payloads[1], 4).unwrap() == bytes);
        // Without the packets before it, there is nothing to refer to.
        let mut late = super::decoder(method);
        assert!(decode(&mut late, &payloads[2], 4).is_err());
    }
}

#[test]
fn a_decoder_takes_no_more_memory_than_it_says() {
    for (level, packets) in [(1, 40), (3, 40), (20, 3)] {
        let mut encoder = encoder(Method::Zstd, level);
        let mut frame = zstd::Frame::new().unwrap();
        assert!(frame.allocated() <= fixed_bytes(Method::Zstd));
        let mut room = vec![0; (FULL + 1) * PAGE_SIZE];
        let mut limit = 0;
        for seed in 1..=packets {
            let payload = encoder.packet(&content(FULL, seed));
            if seed == 1 {
                limit = fixed_bytes(Method::Zstd) + stream_bytes(Method::Zstd, &payload).unwrap();
            }
            frame.decode(&payload, &mut room).unwrap();
            assert!(
                frame.allocated() <= limit,
                "level {level}: {} > {limit}",
                frame.allocated()
            );
        }
    }
}

#[test]
fn the_buffer_is_used_again() {
    let (mut encoder, mut decoder) = (encoder(Method::Zstd, 1), decoder(Method::Zstd));
    let mut buffer = PageBuffer::default();
    for seed in 1..5 {
        let bytes = content(3, seed);
        let pages = decoder.decode(&encoder.packet(&bytes), 3, &mut buffer).unwrap();
        assert_eq!(pages.as_flattened(), bytes);
    }
}

#[test]
fn without_compression_there_is_no_decoder() {
    assert!(Decoder::open(Method::None).unwrap().is_none());
}

#[test]
fn a_page_of_zeros_is_recognised() {
    let mut page = [0; PAGE_SIZE];
    assert!(is_zero(&page));
    for at in [0, 63, 64, 4095] {
        page[at] = 1;
        assert!(!is_zero(&page));
        page[at] = 0;
    }
}
