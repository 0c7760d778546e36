//! The end of the initial device state (spec §11).

use crate::wire::limits::{INITIAL_STATE_MAX, VMDESC_DEPTH_MAX, VMDESC_MAX};
use crate::wire::stream::{Section, encode_footer};
use crate::wire::vmdesc::{EndFinder, Evidence, InitialState, Mismatch, MismatchKind};
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

/// Pushes all chunks, of which the last ends the state.
fn feed<'a>(
    finder: &mut EndFinder,
    chunks: impl IntoIterator<Item = &'a [u8]>,
) -> Option<(Evidence, InitialState)> {
    let mut evidence = None;
    for chunk in chunks {
        evidence = finder.push(chunk).unwrap();
        assert_eq!(finder.looks_ended(), evidence.is_some());
    }
    let initial = finder.finish().unwrap();
    assert_eq!(initial.is_some(), evidence.is_some());
    evidence.zip(initial)
}

fn undescribed(device: u64, at: u64, kind: MismatchKind) -> Evidence {
    Evidence::Undescribed(Mismatch { device, at, kind })
}

#[test]
fn the_end_is_found() {
    let (state, text) = example();
    let bytes = with_vmdesc(&state, &text);
    for chunk in [1, 2, 3, 5, 7, 64, bytes.len()] {
        let mut finder = EndFinder::default();
        let (evidence, found) = feed(&mut finder, bytes.chunks(chunk)).expect("found");
        assert_eq!(evidence, Evidence::Described);
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
        let mut finder = EndFinder::default();
        assert_eq!(finder.push(&bytes), Ok(None), "{off_by}");
        assert_eq!(finder.finish(), Ok(None));
    }
}

/// What looks like the end inside a body is the end only where nothing follows it.
#[test]
fn what_looks_like_the_end_is_none_where_more_follows() {
    let (state, text) = example();
    // The end of a whole state, as one that knows it all could put it into the buffer of a device.
    let inner = with_vmdesc(&state, &text);
    let outer = [section(7, "nic", 0, &inner), vec![0]].concat();
    let outer_text = format!(
        r#"{{"devices":[{{"name":"nic","instance_id":0,"size":{}}}]}}"#,
        inner.len()
    );
    let bytes = with_vmdesc(&outer, &outer_text);
    let cut = section(7, "nic", 0, &[]).len() - 5 + inner.len();
    let mut finder = EndFinder::default();
    // The sections are not those of that text.
    assert_eq!(
        finder.push(&bytes[..cut]),
        Ok(Some(undescribed(0, 0, MismatchKind::Head)))
    );
    let rest = feed(&mut finder, [&bytes[cut..]]).expect("found");
    assert_eq!((rest.0, rest.1.device_state), (Evidence::Described, outer));
}

/// A guest that knows its machine can describe its device as one that ends in the middle. Only the silence tells that from the end.
#[test]
fn a_forged_end_looks_like_one_until_more_follows() {
    let forged = r#"{"devices":[{"name":"nic","instance_id":0,"size":3}]}"#;
    let body = [
        &b"abc\x7e\x00\x00\x00\x07"[..],
        &with_vmdesc(&[0], forged),
        b"more",
    ]
    .concat();
    let state = [section(7, "nic", 0, &body), vec![0]].concat();
    let text = format!(
        r#"{{"devices":[{{"name":"nic","instance_id":0,"size":{}}}]}}"#,
        body.len()
    );
    let bytes = with_vmdesc(&state, &text);
    let cut = bytes
        .windows(4)
        .position(|four| four == b"more")
        .expect("it is there");
    let mut finder = EndFinder::default();
    assert_eq!(finder.push(&bytes[..cut]), Ok(Some(Evidence::Described)));
    assert_eq!(finder.push(b"m"), Ok(None));
    assert!(!finder.looks_ended());
    let (evidence, found) = feed(&mut finder, [&bytes[cut + 1..]]).expect("found");
    assert_eq!((evidence, found.device_state), (Evidence::Described, state));
}

/// Where a description and the sections differ.
#[test]
fn a_mismatch_is_named() {
    let two = [section(7, "a", 0, b"xyz"), section(9, "b", 1, b""), vec![0]].concat();
    let first = section(7, "a", 0, b"xyz").len() as u64;
    let check = |state: &[u8], devices: &str| {
        let text = format!(r#"{{"devices":[{devices}]}}"#);
        EndFinder::default()
            .push(&with_vmdesc(state, &text))
            .unwrap()
            .expect("JSON with devices")
    };
    let (a, b) = (
        r#"{"name":"a","instance_id":0,"size":3}"#,
        r#"{"name":"b","instance_id":1,"size":0}"#,
    );
    assert_eq!(check(&two, &format!("{a},{b}")), Evidence::Described);
    for (devices, device, at, kind) in [
        (String::new(), 0, 0, MismatchKind::Eof),
        (a.to_owned(), 1, first, MismatchKind::Eof),
        (format!("{b},{a}"), 0, 0, MismatchKind::Head),
        (format!("{a},{a}"), 1, first, MismatchKind::Head),
        (
            format!("{a},{b},{b}"),
            2,
            two.len() as u64 - 1,
            MismatchKind::Head,
        ),
        (a.replace('3', "2"), 0, first - 6, MismatchKind::Footer),
        (
            a.replace('3', "18446744073709551615"),
            0,
            u64::MAX,
            MismatchKind::Footer,
        ),
        (a.replace(r#","size":3"#, ""), 0, 0, MismatchKind::Length),
        (
            a.replace('3', r#"3,"fields":[{"size":1,"array_len":4},{}]"#),
            0,
            0,
            MismatchKind::Length,
        ),
        (
            a.replace('3', r#"3,"subsections":[{"vmsd_name":"a/s"}]"#),
            0,
            0,
            MismatchKind::Length,
        ),
        (a.replace(":0", ":1"), 0, 0, MismatchKind::Head),
        (a.replace('3', "-3"), 0, 0, MismatchKind::Text),
        (format!("{a},7"), 1, first, MismatchKind::Text),
    ] {
        assert_eq!(check(&two, &devices), undescribed(device, at, kind), "{devices}");
    }
    let odd = EndFinder::default().push(&with_vmdesc(&two, r#"{"devices":3}"#));
    assert_eq!(odd, Ok(Some(undescribed(0, 0, MismatchKind::Text))));
}

/// It is read by a thread that other guests wait for.
#[test]
fn a_long_vmdesc_is_refused_unread() {
    let text = |bytes: usize| {
        let (before, after) = (r#"{"devices":[],"x":""#, r#""}"#);
        let fill = "x".repeat(bytes - before.len() - after.len());
        [before, &fill, after].concat()
    };
    let push = |bytes| EndFinder::default().push(&with_vmdesc(&[4, 1, 0], &text(bytes)));
    assert!(push(VMDESC_MAX).unwrap().is_some());
    let error = push(VMDESC_MAX + 1).unwrap_err().to_string();
    assert!(
        error.contains("vmdesc") && error.contains("at most 4194304"),
        "{error}"
    );
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

/// A device whose body may hold anything, above all what looks like the end.
#[derive(Clone, Debug)]
struct AnyDevice {
    name: String,
    instance: u32,
    body: Vec<u8>,
}

/// Pieces of a body: bytes, and whatever could mislead.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let some_bytes = vec(
        prop_oneof![any::<u8>(), Just(0), Just(6), Just(0x7e), Just(b'{'), Just(b'}')],
        0..40,
    );
    let text = prop_oneof![
        Just("{}".to_owned()),
        Just(r#"{"devices":[]}"#.to_owned()),
        Just(r#"{"devices":[{"name":"d0","instance_id":0,"size":0}]}"#.to_owned()),
        Just(
            r#"{"devices":[{"name":"d0","instance_id":0,"size":4},{"name":"d1","instance_id":1,"size":9}]}"#
                .to_owned()
        ),
        // A text inside a text.
        Just("{\"x\":\"\",\"devices\":[[[[[[]]]]]]}".to_owned()),
    ];
    let bait = (any::<bool>(), 0..3u32, 0..12u32, text).prop_map(|(has_footer, off_by, id, text)| {
        let mut out = Vec::new();
        if has_footer {
            encode_footer(&mut out, id);
        }
        out.push(0);
        let length = u32::try_from(text.len()).unwrap() + off_by / 2;
        Section::VmDescription { length }.encode(&mut out);
        out.extend_from_slice(text.as_bytes());
        out
    });
    let head = (0..12u32, 0..3u32).prop_map(|(id, n)| {
        let mut whole = section(id, &format!("d{n}"), n, b"");
        whole.truncate(whole.len() - 5);
        whole
    });
    vec(prop_oneof![some_bytes, bait, head], 0..6).prop_map(|pieces| pieces.concat())
}

fn any_devices() -> impl Strategy<Value = Vec<AnyDevice>> {
    let device = (0..3u32, 0..2u32, body()).prop_map(|(n, instance, body)| AnyDevice {
        name: format!("d{n}"),
        instance,
        body,
    });
    vec(device, 1..5)
}

proptest! {
    /// Whatever the devices' bodies hold and however the bytes arrive, the end is where it is, and it is described. Whatever looked like
    /// it before is withdrawn by the byte that follows.
    #[test]
    fn found_in_any_fragmentation(
        devices in any_devices(),
        cuts in vec(any::<prop::sample::Index>(), 0..30),
        at_baits in any::<bool>(),
    ) {
        let sections = (1..).zip(&devices);
        let mut state: Vec<u8> = sections
            .flat_map(|(id, device)| section(id, &device.name, device.instance, &device.body))
            .collect();
        state.push(0);
        let texts: Vec<String> = devices
            .iter()
            .map(|AnyDevice { name, instance, body }| {
                format!(r#"{{"name":"{name}","instance_id":{instance},"size":{}}}"#, body.len())
            })
            .collect();
        let text = format!(r#"{{"devices":[{}]}}"#, texts.join(","));
        let bytes = with_vmdesc(&state, &text);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        if at_baits {
            // Behind each byte that could be the last.
            cuts.extend((1..bytes.len()).filter(|at| bytes[at - 1] == b'}'));
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut finder = EndFinder::default();
        let mut from = 0;
        for to in cuts.into_iter().filter(|to| *to > 0) {
            finder.push(&bytes[from..to]).unwrap();
            prop_assert_eq!(finder.buffered(), to);
            from = to;
        }
        let evidence = finder.push(&bytes[from..]).unwrap();
        prop_assert_eq!(evidence, Some(Evidence::Described));
        let found = finder.finish().unwrap().expect("found");
        prop_assert_eq!(&found.device_state, &state);
        prop_assert_eq!(found.vmdesc, text.as_bytes());
    }

    /// A text that describes other sections than there are is never taken for one that describes them.
    #[test]
    fn another_description_is_noticed(devices in any_devices(), at in any::<prop::sample::Index>(), by in 1..9usize) {
        let mut state: Vec<u8> = (1..).zip(&devices)
            .flat_map(|(id, device)| section(id, &device.name, device.instance, &device.body))
            .collect();
        state.push(0);
        let wrong = at.index(devices.len());
        let texts: Vec<String> = devices
            .iter()
            .enumerate()
            .map(|(position, AnyDevice { name, instance, body })| {
                let size = body.len() + if position == wrong { by } else { 0 };
                format!(r#"{{"name":"{name}","instance_id":{instance},"size":{size}}}"#)
            })
            .collect();
        let bytes = with_vmdesc(&state, &format!(r#"{{"devices":[{}]}}"#, texts.join(",")));
        let evidence = EndFinder::default().push(&bytes).unwrap();
        // Unless the body holds a section of the next device where its footer would be.
        let is_misled = devices[wrong].body.len() + by > 9 && evidence == Some(Evidence::Described);
        prop_assert!(is_misled || matches!(evidence, Some(Evidence::Undescribed(_))));
    }
}
