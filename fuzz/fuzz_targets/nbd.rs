#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    colo_ring_fuzz::nbd(input);
});
