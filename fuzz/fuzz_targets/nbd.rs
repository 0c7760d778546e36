#![no_main]

// What a client of a disk sends: the handshake, and requests behind it.
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    colo_ring::nbd::fuzz(input);
});
