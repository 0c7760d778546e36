//! What the targets have in common: an input is a channel's packets, each a count of pages, a length and a payload.

use colo_ring::units::{PACKET_PAGES, PAGE_SIZE};
use colo_ring::wire::codec::{Decoder, Method, PageBuffer, stream_bytes};
use std::cell::RefCell;

thread_local!(static BUFFER: RefCell<PageBuffer> = RefCell::default());

/// Decodes the packets of `input`: pages less one (one byte), payload length (three bytes, little-endian), payload.
pub fn channel(method: Method, mut input: &[u8]) {
    let mut decoder = Decoder::open(method).expect("a decoder").expect("it compresses");
    let mut failed = false;
    while let Some(([pages, length @ ..], rest)) = input.split_first_chunk::<4>() {
        let [low, middle, high] = *length;
        let length = u32::from_le_bytes([low, middle, high, 0]) as usize;
        let (payload, rest) = rest.split_at(length.min(rest.len()));
        input = rest;
        let normal = u16::from(*pages) % PACKET_PAGES as u16 + 1;
        let announced = u32::try_from(payload.len()).expect("three bytes");
        if method.check_payload(normal, announced).is_err() {
            return;
        }
        let _ = stream_bytes(method, payload);
        BUFFER.with_borrow_mut(|buffer| match decoder.decode(payload, normal, buffer) {
            Ok(pages) => {
                assert!(!failed, "a decoder that failed stays failed");
                assert_eq!(pages.as_flattened().len(), usize::from(normal) * PAGE_SIZE);
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                failed = true;
            }
        });
    }
}
