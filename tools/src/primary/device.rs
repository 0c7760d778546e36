//! Device state that no QEMU could load, but that has the form of the real one: sections of a few kinds, and a
//! vmdesc that describes them exactly (spec §11.2).

use colo_ring::wire::stream::{SECTION_EOF, Section, encode_footer};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use std::fmt::Write;

/// Sections with their instances and body lengths: the total is near that of a PC without devices, 13 KB.
const DEVICES: [(&str, u32, usize); 6] = [
    ("timer", 0, 24),
    ("cpu", 0, 9100),
    ("apic", 0, 181),
    ("0000:00:01.3/piix4_pm", 0, 1102),
    ("dma", 0, 1240),
    ("dma", 1, 1240),
];

const SUBSECTION: &str = "cpu/exception_info";
const SUBSECTION_LEN: usize = 11;

/// Id of the first device section; that of RAM is below.
const FIRST_ID: u32 = 5;
const VERSION: u32 = 3;

/// The state as of one moment, with its EOF byte. `moment` is the checkpoint's number and decides the content, so that no two
/// are equal.
pub fn state(moment: u64) -> Vec<u8> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(moment);
    let mut out = Vec::new();
    for (id, (name, instance, length)) in (FIRST_ID..).zip(DEVICES) {
        let (idstr, version) = (name.as_bytes(), VERSION);
        let head = Section::Full {
            id,
            idstr,
            instance,
            version,
        };
        head.encode(&mut out);
        let end = out.len() + length;
        out.extend_from_slice(&moment.to_be_bytes());
        while out.len() < end {
            // Bytes of all values, and runs of zeros as real devices have them.
            let word = rng.next_u64();
            out.extend_from_slice(&if word.is_multiple_of(4) { word } else { 0 }.to_be_bytes());
        }
        out.truncate(end);
        if name == "cpu" {
            subsection(&mut out);
        }
        encode_footer(&mut out, id);
    }
    out.push(SECTION_EOF);
    out
}

fn subsection(out: &mut Vec<u8>) {
    out.push(5);
    out.push(u8::try_from(SUBSECTION.len()).expect("a short name"));
    out.extend_from_slice(SUBSECTION.as_bytes());
    out.extend_from_slice(&1u32.to_be_bytes());
    out.extend_from_slice(&[0x7b; SUBSECTION_LEN]);
}

/// The description of [`state`], as a text.
pub(super) fn vmdesc() -> String {
    let mut devices = String::new();
    for (name, instance, length) in DEVICES {
        let subsections = if name == "cpu" {
            format!(
                r#", "subsections": [{{"vmsd_name": "{SUBSECTION}", "version": 1, "fields": [
                {{"name": "bytes", "array_len": {SUBSECTION_LEN}, "type": "uint8", "size": 1}}]}}]"#
            )
        } else {
            String::new()
        };
        let comma = if devices.is_empty() { "" } else { ", " };
        write!(
            devices,
            r#"{comma}{{"name": "{name}", "instance_id": {instance}, "vmsd_name": "{name}", "version": {VERSION},
            "fields": [{{"name": "state", "type": "buffer", "size": {length}}}]{subsections}}}"#
        )
        .expect("writing to a string does not fail");
    }
    format!(r#"{{"configuration": {{}}, "page_size": 4096, "devices": [{devices}]}}"#)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::tests::layout::Layout;

    #[test]
    fn the_description_fits() {
        let layout = Layout::parse(vmdesc().as_bytes());
        assert_eq!(layout.sections(), DEVICES.len());
        for moment in [0, 1, u64::MAX] {
            layout.check(&state(moment));
        }
        assert_ne!(state(1), state(2));
    }
}
