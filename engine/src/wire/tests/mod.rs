//! Tests of the wire format as a whole: the spec's worked examples, round trips with every cut, hostile input.

mod device_state;
mod examples;
mod hostile;
mod roundtrip;

use super::Parsed;
use std::fmt::Debug;

/// Bytes from hexadecimal text; blanks are ignored.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks_exact(2).map(pair).collect()
}

/// The value at the start of `input`, which is moved behind it.
fn next<'a, T>(input: &mut &'a [u8], parse: impl FnOnce(&'a [u8]) -> Parsed<T>) -> T {
    let (value, consumed) = parse(input).expect("valid").expect("complete");
    *input = &input[consumed..];
    value
}

/// Checks that every proper prefix of `element` asks for more.
fn every_cut_is_incomplete<'a, T: Debug>(element: &'a [u8], parse: impl Fn(&'a [u8]) -> Parsed<T>) {
    for cut in 0..element.len() {
        let parsed = parse(&element[..cut]);
        assert!(
            matches!(parsed, Ok(None)),
            "cut at {cut} of {}: {parsed:?}",
            element.len()
        );
    }
}
