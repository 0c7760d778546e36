#![no_main]

use colo_ring::wire::codec::Method;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    colo_ring_fuzz::channel(Method::Zlib, input);
});
