//! The end of the initial device state (spec §11).

use crate::wire::limits::{INITIAL_STATE_MAX, VMDESC_DEPTH_MAX};
use crate::wire::stream::{Section, encode_footer};
use crate::wire::vmdesc::{EndFinder, InitialState};
use proptest::collection::vec;
use proptest::prelude::*;

/// A section with a footer, as on the wire.
fn section(id: u32, name: &str, instance: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let (idstr, version) = (name.as_bytes(), 3);
    let head = Section::Full {
        id,
        idstr,
        instance,
        version,
    };
    head.encode(&mut out);
    out.extend_from_slice(body);
    encode_footer(&mut out, id);
    out
}

fn with_vmdesc(state: &[u8], text: &str) -> Vec<u8> {
    let mut bytes = state.to_vec();
    let length = u32::try_from(text.len()).unwrap();
    Section::VmDescription { length }.encode(&mut bytes);
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Two devices whose bodies hold what the search looks for, and their vmdesc.
fn example() -> (Vec<u8>, String) {
    let mut bait = b"\0\x06\0\0\0\x10{\"devices\":[]}}}".to_vec();
    bait.extend_from_slice(&[0; 4]);
    let mut sub = vec![5, 9];
    sub.extend_from_slice(b"timer/sub\0\0\0\x01");
    sub.extend_from_slice(&[9, 8, 7]);
    let state = [
        section(7, "timer", 0, &[&bait[..], &sub[..]].concat()),
        section(9, "apic", u32::MAX, &[0x7b; 24]),
        vec![0],
    ]
    .concat();
    let text = format!(
        r#"{{"configuration":{{}},"page_size":4096,"devices":[
        {{"name":"timer","instance_id":0,"vmsd_name":"timer","version":3,
          "fields":[{{"name":"a","size":99,"size":{},"struct":{{"fields":[{{"size":1}}]}}}}],
          "subsections":[{{"vmsd_name":"timer/sub","version":1,"fields":[{{"name":"b","array_len":3,"size":1}}]}}]}},
        {{"name":"apic","instance_id":-1,"size":24}}]}}"#,
        bait.len()
    );
    (state, text)
}

fn feed<'a>(finder: &mut EndFinder, chunks: impl IntoIterator<Item = &'a [u8]>) -> Option<InitialState> {
    let mut chunks = chunks.into_iter();
    let found = chunks.by_ref().find_map(|chunk| finder.push(chunk).unwrap());
    assert_eq!(chunks.next(), None, "found before the end");
    found
}

#[test]
fn the_end_is_found() {
    let (state, text) = example();
    let bytes = with_vmdesc(&state, &text);
    for chunk in [1, 2, 3, 5, 7, 64, bytes.len()] {
        let mut finder = EndFinder::default();
        let found = feed(&mut finder, bytes.chunks(chunk)).expect("found");
        assert_eq!(found.device_state, state);
        assert_eq!(found.vmdesc, text.as_bytes());
        assert_eq!(finder.buffered(), 0);
    }
}

/// The zero bytes of a length lie between the EOF byte and the text.
#[test]
fn texts_of_any_length_are_found() {
    for length in [255, 256, 257, 65_535, 65_536] {
        let text = format!("{{{}\"devices\":[]}}", " ".repeat(length - 14));
        assert_eq!(text.len(), length);
        assert!(is_end(&text), "{length}");
    }
}

fn is_end(text: &str) -> bool {
    let bytes = with_vmdesc(&[4, 1, 0], text);
    feed(&mut EndFinder::default(), [&bytes[..]]).is_some()
}

#[test]
fn only_json_with_devices_ends_it() {
    assert!(is_end(r#"{"devices":[]}"#));
    assert!(is_end(r#"{"devices":[],"devices":[]}"#));
    assert!(!is_end("{}"));
    assert!(!is_end(r#"{"x":{"devices":[]}}"#));
    assert!(!is_end(r#"{"devices":[]}}"#));
    assert!(!is_end(r#"{"devices":[}"#));
    assert!(!is_end("{\"devices\":[\"\u{1}\"]}"));
    let nested = |depth: usize| {
        format!(
            r#"{{"devices":{}{}}}"#,
            "[".repeat(depth - 1),
            "]".repeat(depth - 1)
        )
    };
    assert!(is_end(&nested(VMDESC_DEPTH_MAX)));
    assert!(!is_end(&nested(VMDESC_DEPTH_MAX + 1)));
    assert!(!is_end(&nested(1_000_000)));
    // Brackets inside a string are text.
    assert!(is_end(&format!(
        r#"{{"devices":["{}\"{}"]}}"#,
        "[".repeat(99),
        "{".repeat(99)
    )));
}

#[test]
fn a_length_that_ends_elsewhere_is_no_end() {
    let text = r#"{"devices":[]}"#;
    for off_by in [-1, 1, 1 << 24] {
        let mut bytes = with_vmdesc(&[4, 1, 0], text);
        let length = i32::try_from(text.len()).unwrap() + off_by;
        bytes[4..8].copy_from_slice(&length.to_be_bytes());
        assert_eq!(EndFinder::default().push(&bytes), Ok(None), "{off_by}");
    }
}

#[test]
fn a_state_without_vmdesc_is_noticed() {
    let (state, text) = example();
    let mut finder = EndFinder::default();
    for (at, byte) in state.iter().enumerate() {
        assert_eq!(finder.push(&[*byte]), Ok(None));
        assert_eq!(finder.looks_suppressed(), at == state.len() - 1, "byte {at}");
    }
    let rest = &with_vmdesc(&state, &text)[state.len()..];
    assert!(feed(&mut finder, [rest]).is_some());
    assert!(EndFinder::suppressed().to_string().contains("suppress-vmdesc"));
}

#[test]
fn the_buffer_is_bounded_and_the_search_is_linear() {
    let mut finder = EndFinder::default();
    // Every piece ends in '}' and holds bait whose length never fits.
    let piece = b"\0\x06\xff\xff\xff\xff{}\0\x06\0\0\0\x02{}".repeat(1 << 12);
    let mut fed = 0;
    let start = std::time::Instant::now();
    while fed + piece.len() <= INITIAL_STATE_MAX / 8 {
        // The second bait of each piece is a whole end but for "devices".
        assert_eq!(finder.push(&piece), Ok(None));
        fed += piece.len();
    }
    assert_eq!(finder.buffered(), fed);
    let took = start.elapsed();
    // A search from the start for every piece would read all of it half as many times as there are pieces.
    let all = vec![b'}'; fed];
    let start = std::time::Instant::now();
    let found = std::hint::black_box(&all)
        .iter()
        .filter(|byte| **byte == b'}')
        .count();
    let once = start.elapsed();
    assert_eq!(found, fed);
    let pieces = u32::try_from(fed / piece.len()).unwrap();
    assert!(
        took < once * (pieces / 8),
        "{took:?} for {pieces} pieces, {once:?} to read all"
    );
    let too_much = vec![0; INITIAL_STATE_MAX - fed + 1];
    let error = finder.push(&too_much).unwrap_err().to_string();
    assert!(error.contains("at most 268435456"), "{error}");
}

proptest! {
    /// Whatever the devices' bodies hold and however the bytes arrive, the end is where it is.
    #[test]
    fn found_in_any_fragmentation(
        body in vec(prop_oneof![any::<u8>(), Just(0), Just(6), Just(b'{'), Just(b'}')], 0..300),
        cuts in vec(any::<prop::sample::Index>(), 0..10),
    ) {
        let state = [section(1, "device", 0, &body), vec![0]].concat();
        let text = format!(r#"{{"devices":[{{"name":"device","instance_id":0,"size":{}}}]}}"#, body.len());
        let bytes = with_vmdesc(&state, &text);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.sort_unstable();
        let mut finder = EndFinder::default();
        let mut found = None;
        let mut from = 0;
        for to in cuts.into_iter().chain([bytes.len()]) {
            prop_assert!(found.is_none());
            found = finder.push(&bytes[from..to]).unwrap();
            from = to;
        }
        let found = found.expect("found");
        prop_assert_eq!(&found.device_state, &state);
        prop_assert_eq!(found.vmdesc, text.as_bytes());
    }
}
