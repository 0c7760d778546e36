//! Compressed pages.

use colo_ring::units::{PACKET_PAGES, PAGE_SIZE};
use colo_ring::wire::codec::{Decoder, Method, PageBuffer, stream_bytes};
use colo_ring::wire::xbzrle;
use std::cell::RefCell;

/// Pages of a packet, at most.
const PAGES_MAX: u16 = 128;
const _: () = assert!(PAGES_MAX as usize == PACKET_PAGES);

thread_local!(static BUFFER: RefCell<PageBuffer> = RefCell::default());

/// A stream for each page, raw or with a header.
pub fn page_deflate(input: &[u8]) -> usize {
    channel(Method::Qpl, input) + channel(Method::Uadk, input)
}

/// A delta that is refused leaves the page as it was; one that is taken gives what its runs say, within the page.
pub fn delta(delta: &[u8]) -> usize {
    let before = [0x5a; PAGE_SIZE];
    let mut page = before;
    if xbzrle::apply(delta, &mut page).is_err() {
        assert_eq!(page, before);
        return 0;
    }
    let mut again = before;
    for run in xbzrle::runs(delta) {
        let run = run.expect("it was applied");
        again[run.at..run.at + run.bytes.len()].copy_from_slice(run.bytes);
    }
    assert_eq!(page, again);
    let mut encoded = Vec::new();
    xbzrle::encode(&before, &page, &mut encoded);
    if !encoded.is_empty() {
        let mut decoded = before;
        xbzrle::apply(&encoded, &mut decoded).expect("an own delta");
        assert_eq!(decoded, page);
    }
    1
}

/// zlib's stream of a channel.
pub fn zlib(input: &[u8]) -> usize {
    channel(Method::Zlib, input)
}

/// zstd's stream of a channel.
pub fn zstd(input: &[u8]) -> usize {
    channel(Method::Zstd, input)
}

/// Decodes the packets of a channel: for each pages less one (one byte), payload length (three bytes, little-endian),
/// payload.
fn channel(method: Method, mut input: &[u8]) -> usize {
    let mut decoder = Decoder::open(method).expect("a decoder").expect("it compresses");
    let (mut failed, mut decoded) = (false, 0);
    while let Some(([pages, length @ ..], rest)) = input.split_first_chunk::<4>() {
        let [low, middle, high] = *length;
        let length = u32::from_le_bytes([low, middle, high, 0]) as usize;
        let (payload, rest) = rest.split_at(length.min(rest.len()));
        input = rest;
        let normal = u16::from(*pages) % PAGES_MAX + 1;
        let announced = u32::try_from(payload.len()).expect("three bytes");
        if method.check_payload(normal, announced).is_err() {
            return decoded;
        }
        let _ = stream_bytes(method, payload);
        BUFFER.with_borrow_mut(|buffer| match decoder.decode(payload, normal, buffer) {
            Ok(pages) => {
                assert!(!failed, "a decoder that failed stays failed");
                assert_eq!(pages.as_flattened().len(), usize::from(normal) * PAGE_SIZE);
                decoded += pages.len();
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                failed = true;
            }
        });
    }
    decoded
}
