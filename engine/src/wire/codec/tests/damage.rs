//! Streams that no primary sends: every one ends in an error, and no output goes beyond its bound.

use super::{Encoder, FULL, STREAMS, content, damage, decode, decoder, encoder};
use crate::units::PAGE_SIZE;
use crate::wire::WireError;
use crate::wire::codec::{Decoder, Method, PAYLOAD_MAX, stream_bytes};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use zlib_rs::{Deflate, DeflateFlush};
use zstd_safe::{CCtx, CParameter};

#[test]
fn lengths_are_checked_before_a_byte_is_read() {
    let check = |method: Method, pages, length| method.check_payload(pages, length);
    for method in STREAMS {
        assert!(check(method, 1, 0).is_err());
        assert_eq!(check(method, 128, 1), Ok(()));
        assert_eq!(check(method, 1, PAYLOAD_MAX), Ok(()));
        let error = check(method, 128, PAYLOAD_MAX + 1).unwrap_err().to_string();
        assert!(error.contains("1048577") && error.contains("1048576"), "{error}");
        assert!(check(method, 128, u32::MAX).is_err());
    }
    for method in [Method::Qpl, Method::Uadk] {
        assert!(check(method, 2, 9).is_err());
        assert_eq!(check(method, 2, 10), Ok(()));
        assert_eq!(check(method, 2, 8 + 2 * 4096), Ok(()));
        assert!(check(method, 2, 8 + 2 * 4096 + 1).is_err());
    }
    assert_eq!(check(Method::None, 3, 3 * 4096), Ok(()));
    assert!(check(Method::None, 3, 3 * 4096 - 1).is_err());
}

#[test]
fn qatzip_is_refused_with_the_setting_to_change() {
    let refused = [
        Method::Qatzip.check_payload(1, 100).unwrap_err(),
        Decoder::open(Method::Qatzip).err().unwrap(),
    ];
    for error in refused.map(|error| error.to_string()) {
        assert!(error.contains("qatzip"), "{error}");
        assert!(
            error.contains("set its parameter multifd-compression to"),
            "{error}"
        );
    }
}

#[test]
fn a_payload_cut_at_any_byte_is_an_error() {
    for method in STREAMS {
        let mut encoder = encoder(method, 1);
        let bytes = content(2, 3);
        let payloads = [encoder.packet(&bytes), encoder.packet(&content(2, 4))];
        for cut in 0..payloads[0].len() {
            assert!(
                decode(&mut decoder(method), &payloads[0][..cut], 2).is_err(),
                "{method:?} cut at {cut}"
            );
        }
        for cut in 0..payloads[1].len() {
            let mut decoder = decoder(method);
            decode(&mut decoder, &payloads[0], 2).unwrap();
            assert!(
                decode(&mut decoder, &payloads[1][..cut], 2).is_err(),
                "{method:?} cut at {cut}"
            );
        }
    }
}

#[test]
fn a_damaged_payload_is_an_error_or_other_pages_and_never_more() {
    for method in STREAMS {
        let payload = encoder(method, 1).packet(&content(1, 5));
        for at in 0..payload.len() {
            let mut damaged = payload.clone();
            damaged[at] ^= 1 << (at % 8);
            if let Ok(pages) = decode(&mut decoder(method), &damaged, 1) {
                assert_eq!(pages.len(), PAGE_SIZE);
            }
        }
    }
}

#[test]
fn a_decoder_that_failed_stays_failed() {
    for method in STREAMS {
        let (mut encoder, mut decoder) = (encoder(method, 1), decoder(method));
        let payload = encoder.packet(&content(1, 1));
        assert!(decode(&mut decoder, &payload[..payload.len() - 1], 1).is_err());
        let (_, reason) = damage(decode(&mut decoder, &payload, 1));
        assert!(reason.contains("before"), "{reason}");
    }
}

#[test]
fn pages_that_are_one_byte_or_one_page_too_many_or_too_few_are_an_error() {
    for method in STREAMS {
        for (length, announced) in [
            (PAGE_SIZE - 1, 1),
            (PAGE_SIZE + 1, 1),
            (2 * PAGE_SIZE, 1),
            (2 * PAGE_SIZE, 3),
            (FULL * PAGE_SIZE - 1, FULL),
            (FULL * PAGE_SIZE + 1, FULL),
        ] {
            let bytes = &content(FULL + 1, 9)[..length];
            let payload = encoder(method, 1).packet(bytes);
            let (_, reason) = damage(decode(&mut decoder(method), &payload, announced));
            let expected = if length < announced * PAGE_SIZE {
                "less"
            } else {
                "more"
            };
            assert!(reason.contains(expected), "{method:?}, {length} bytes: {reason}");
        }
    }
}

#[test]
fn bytes_behind_the_last_page_are_an_error() {
    for method in STREAMS {
        let mut encoder = encoder(method, 1);
        let mut payload = encoder.packet(&content(1, 1));
        payload.extend(encoder.packet(&content(1, 2)));
        damage(decode(&mut decoder(method), &payload, 1));
    }
}

/// Less than a block, a block that is not whole, and whole blocks without content: of a zlib stream, bits that begin a block.
#[test]
fn a_few_bytes_behind_the_last_page_are_an_error() {
    for method in STREAMS {
        let payload = encoder(method, 1).packet(&content(1, 1));
        for stray in [
            &[0][..],
            &[0, 0],
            &[0, 0, 0],
            &[8, 0, 0],
            &[2, 0, 0],
            &[2, 0, 0, 7],
        ] {
            let longer = [&payload, stray].concat();
            let (at, reason) = damage(decode(&mut decoder(method), &longer, 1));
            let expected = match method {
                Method::Zstd => payload.len(),
                _ => longer.len(),
            };
            assert_eq!(at, expected as u64, "{method:?} and {stray:?}: {reason}");
        }
    }
}

#[test]
fn damage_of_a_zstd_payload_is_said_to_be_where_its_block_is() {
    let mut random = vec![0; FULL * PAGE_SIZE];
    Xoshiro256PlusPlus::seed_from_u64(3).fill_bytes(&mut random);
    let halves = random.iter().map(|byte| byte & 0x0f).collect();
    for (kind, bytes) in [("compressed", halves), ("raw", random)] {
        let mut encoder = encoder(Method::Zstd, 1);
        let first = encoder.packet(&content(2, 7));
        let payload = encoder.packet(&bytes);
        let third = third_block(&payload);
        let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut decoder = decoder(Method::Zstd);
            decode(&mut decoder, &first, 2).unwrap();
            let mut payload = payload.clone();
            change(&mut payload);
            let (at, reason) = damage(decode(&mut decoder, &payload, FULL));
            assert_eq!(at, third as u64, "{kind}: {reason}");
            reason
        };
        let reserved = damaged(&|payload| payload[third] |= 0x06);
        assert!(reserved.contains("reserved type"), "{reserved}");
        let oversized = damaged(&|payload| payload[third + 2] = 0xff);
        assert!(oversized.contains("larger"), "{oversized}");
        let last = damaged(&|payload| payload[third] |= 1);
        assert!(last.contains("ends"), "{last}");
        for kept in [1, 2, 3, 100] {
            let cut = damaged(&|payload| payload.truncate(third + kept));
            assert!(cut.contains("it ends in a block"), "{cut}");
        }
        if kind == "compressed" {
            assert_eq!(payload[third] & 0x06, 4);
            damaged(&|payload| payload[third + 3..third + 40].fill(0xff));
        }
    }
}

/// Where the third block of a payload without the frame's header begins.
fn third_block(payload: &[u8]) -> usize {
    let mut at = 0;
    for _ in 0..2 {
        let header = u32::from_le_bytes([payload[at], payload[at + 1], payload[at + 2], 0]);
        assert_ne!(header >> 1 & 3, 1, "no block of one repeated byte");
        at += 3 + (header >> 3) as usize;
    }
    at
}

#[test]
fn a_bomb_stops_at_the_packet_s_pages() {
    let zeros = vec![0; 64 << 20];
    for method in STREAMS {
        let mut encoder = encoder(method, 9);
        let mut bomb = encoder.packet(&zeros);
        while bomb.len() < 64 << 10 && bomb.len() + (96 << 10) < 1 << 20 {
            bomb.extend(encoder.packet(&zeros));
            if method == Method::Zstd && bomb.len() > 16 << 10 {
                break;
            }
        }
        let (at, reason) = damage(decode(&mut decoder(method), &bomb, FULL));
        assert!(reason.contains("more"), "{reason}");
        // No more of it was looked at than those pages need.
        assert!(at < bomb.len() as u64 / 8, "{method:?}: {at} of {}", bomb.len());
    }
}

#[test]
fn the_end_of_a_stream_is_an_error() {
    for method in STREAMS {
        let mut encoder = encoder(method, 1);
        let mut decoder = decoder(method);
        decode(&mut decoder, &encoder.packet(&content(1, 1)), 1).unwrap();
        let mut payload = encoder.last_packet(&content(1, 2));
        if method == Method::Zlib {
            // So that it is the end that is noticed.
            payload.extend([0, 0, 0, 0xff, 0xff]);
        }
        let (_, reason) = damage(decode(&mut decoder, &payload, 1));
        assert!(reason.contains("ends"), "{reason}");
    }
}

#[test]
fn a_stream_in_the_middle_of_another_is_an_error() {
    for method in STREAMS {
        let mut decoder = decoder(method);
        decode(&mut decoder, &encoder(method, 1).packet(&content(1, 1)), 1).unwrap();
        let second = encoder(method, 1).packet(&content(1, 2));
        damage(decode(&mut decoder, &second, 1));
    }
}

#[test]
fn a_preset_dictionary_is_an_error() {
    let mut deflate = Deflate::new(6, true, 15);
    deflate.set_dictionary(&content(1, 1)).unwrap();
    let mut payload = vec![0; 8192];
    deflate
        .compress(&content(1, 1), &mut payload, DeflateFlush::SyncFlush)
        .unwrap();
    payload.truncate(usize::try_from(deflate.total_out()).unwrap());
    let (_, reason) = damage(decode(&mut decoder(Method::Zlib), &payload, 1));
    assert!(reason.contains("dictionary"), "{reason}");
}

#[test]
fn a_zstd_frame_with_anything_in_its_header_is_an_error() {
    let good = encoder(Method::Zstd, 1).packet(&content(1, 1));
    assert_eq!(good[..6], [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x48]);
    // A dictionary, a checksum, a content size, the reserved bit.
    for descriptor in [0x01, 0x02, 0x03, 0x04, 0x08, 0x20, 0x40, 0xff] {
        let mut payload = good.clone();
        payload[4] = descriptor;
        let error = decode(&mut decoder(Method::Zstd), &payload, 1).unwrap_err();
        assert!(matches!(error, WireError::Value { .. }), "{error}");
    }
    // A skippable frame before it, which a decoder would pass over.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0][..], &good].concat();
    let (at, reason) = damage(decode(&mut decoder(Method::Zstd), &skippable, 1));
    assert_eq!((at, reason), (0, "no zstd frame begins there"));
}

#[test]
fn a_second_zstd_frame_is_an_error() {
    let mut first = encoder(Method::Zstd, 1);
    let mut decoder = decoder(Method::Zstd);
    let payload = [
        first.last_packet(&content(1, 1)),
        encoder(Method::Zstd, 1).packet(&content(1, 2)),
    ];
    let error = decode(&mut decoder, &payload.concat(), 2);
    assert!(error.is_err());
}

#[test]
fn a_zstd_window_beyond_the_limit_is_refused_before_memory_is_taken() {
    let mut payload = encoder(Method::Zstd, 1).packet(&content(1, 1));
    for (window, allowed) in [
        (0x88, true),  // 2^27
        (0x89, false), // 2^27 and an eighth
        (0x90, false), // 2^28
        (0xff, false), // 3.75 TiB
    ] {
        payload[5] = window;
        let memory = stream_bytes(Method::Zstd, &payload);
        assert_eq!(memory.is_ok(), allowed, "{window:#x}: {memory:?}");
        assert_eq!(decode(&mut decoder(Method::Zstd), &payload, 1).is_ok(), allowed);
    }
    let mut context = CCtx::create();
    context.set_parameter(CParameter::WindowLog(28)).unwrap();
    let payload = Encoder::of_zstd(context).packet(&content(1, 1));
    let error = decode(&mut decoder(Method::Zstd), &payload, 1).unwrap_err();
    assert!(
        matches!(
            error,
            WireError::Limit {
                limit: 0x800_0000,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_zlib_stream_without_its_header_is_an_error() {
    for first in [[0x78, 0x02], [0x79, 0x01], [0x00, 0x00], [0x1f, 0x8b]] {
        let mut payload = encoder(Method::Zlib, 1).packet(&content(1, 1));
        payload[..2].copy_from_slice(&first);
        damage(decode(&mut decoder(Method::Zlib), &payload, 1));
    }
}
