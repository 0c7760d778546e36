//! Pages that are compressed each on its own: streams made to the format's description.

use super::{content, damage, decode, decoder};
use crate::units::PAGE_SIZE;
use crate::wire::WireError;
use crate::wire::codec::Method;
use zlib_rs::{Deflate, DeflateFlush};

const EACH: [Method; 2] = [Method::Qpl, Method::Uadk];

/// A page compressed on its own, as one of these methods does.
fn compress(method: Method, page: &[u8]) -> Vec<u8> {
    let mut deflate = Deflate::new(1, method == Method::Uadk, 15);
    let mut bytes = vec![0; 2 * PAGE_SIZE];
    deflate.compress(page, &mut bytes, DeflateFlush::Finish).unwrap();
    bytes.truncate(usize::try_from(deflate.total_out()).unwrap());
    bytes
}

fn payload(pages: &[Vec<u8>]) -> Vec<u8> {
    let lengths = pages
        .iter()
        .flat_map(|page| u32::try_from(page.len()).unwrap().to_be_bytes());
    lengths.chain(pages.iter().flatten().copied()).collect()
}

#[test]
fn pages_are_decoded_each_on_its_own() {
    for method in EACH {
        let mut decoder = decoder(method);
        for seed in 1..4 {
            let bytes = content(128, seed);
            let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
            let payload = payload(
                &pages
                    .iter()
                    .map(|page| compress(method, page))
                    .collect::<Vec<_>>(),
            );
            assert!(decode(&mut decoder, &payload, 128).unwrap() == bytes);
        }
    }
}

#[test]
fn a_page_as_long_as_a_page_is_stored_as_it_is() {
    for method in EACH {
        let bytes = content(3, 1);
        let page = |at: usize| bytes[at * PAGE_SIZE..][..PAGE_SIZE].to_vec();
        let payload = payload(&[page(0), compress(method, &page(1)), page(2)]);
        assert_eq!(decode(&mut decoder(method), &payload, 3).unwrap(), bytes);
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    for method in EACH {
        let compressed = compress(method, &content(1, 1));
        let good = payload(&[compressed.clone(), compressed.clone()]);
        for cut in 0..good.len() {
            assert!(
                decode(&mut decoder(method), &good[..cut], 2).is_err(),
                "cut at {cut}"
            );
        }
        let longer = [&good[..], &[0]].concat();
        let (at, reason) = damage(decode(&mut decoder(method), &longer, 2));
        assert_eq!(at, good.len() as u64);
        assert!(reason.contains("left over"), "{reason}");
        for length in [0, 4097, u32::MAX] {
            let mut bad = good.clone();
            bad[4..8].copy_from_slice(&length.to_be_bytes());
            let error = decode(&mut decoder(method), &bad, 2).unwrap_err();
            assert!(
                matches!(error, WireError::Value { .. } | WireError::Limit { .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn pages_that_are_too_long_or_too_short_are_errors() {
    for method in EACH {
        for length in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 2 * PAGE_SIZE, 64 * PAGE_SIZE] {
            let page = vec![7; length];
            let payload = payload(&[compress(method, &page)]);
            let (at, _) = damage(decode(&mut decoder(method), &payload, 1));
            assert!(at >= 4, "{at}");
        }
    }
}

#[test]
fn a_page_without_its_end_is_an_error() {
    for method in EACH {
        let compressed = compress(method, &content(1, 1));
        for cut in 1..compressed.len() {
            let payload = payload(&[compressed[..cut].to_vec()]);
            assert!(decode(&mut decoder(method), &payload, 1).is_err(), "cut at {cut}");
        }
        let mut longer = compressed.clone();
        longer.push(0);
        damage(decode(&mut decoder(method), &payload(&[longer]), 1));
    }
}
