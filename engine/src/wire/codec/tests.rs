//! The decoders against real encoders, flushed as QEMU flushes them, and against everything that is not a primary's.

mod damage;
mod pages;
mod streams;

use super::{Decoder, Encoder, Method, PageBuffer};
use crate::units::{PACKET_PAGES, PAGE_SIZE};
use crate::wire::WireError;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::cell::RefCell;

fn encoder(method: Method, level: i32) -> Encoder {
    Encoder::new(method, level).unwrap()
}

impl Encoder {
    /// The payload of a packet of these pages.
    fn packet(&mut self, pages: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        self.encode(pages, &mut payload);
        payload
    }

    /// The same, and the end of the stream.
    fn last_packet(&mut self, pages: &[u8]) -> Vec<u8> {
        let mut payload = Vec::new();
        self.finish(pages, &mut payload);
        payload
    }
}

/// Pages that compress a little: words of a small set, as `seed` has it.
fn content(pages: usize, seed: u64) -> Vec<u8> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(pages * PAGE_SIZE);
    while bytes.len() < pages * PAGE_SIZE {
        let word = random.random_range(0..1021_u64);
        bytes.extend_from_slice(&word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[..4]);
    }
    bytes
}

fn count(pages: usize) -> u16 {
    u16::try_from(pages).unwrap()
}

fn decoder(method: Method) -> Decoder {
    Decoder::open(method).unwrap().unwrap()
}

/// Decodes a payload of `pages` pages.
fn decode(decoder: &mut Decoder, payload: &[u8], pages: usize) -> Result<Vec<u8>, WireError> {
    thread_local!(static BUFFER: RefCell<PageBuffer> = RefCell::default());
    BUFFER.with_borrow_mut(|buffer| {
        let decoded = decoder.decode(payload, count(pages), buffer)?;
        Ok(decoded.as_flattened().to_vec())
    })
}

/// Where and why a payload is said to be damaged.
#[track_caller]
fn damage<T: std::fmt::Debug>(result: Result<T, WireError>) -> (u64, &'static str) {
    match result {
        Err(WireError::Payload { at, reason, .. }) => (at, reason),
        other => panic!("expected a damaged payload: {other:?}"),
    }
}

const STREAMS: [Method; 2] = [Method::Zlib, Method::Zstd];

const FULL: usize = PACKET_PAGES;
