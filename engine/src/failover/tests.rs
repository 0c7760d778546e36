//! The stream, byte for byte as the specification has it.

use super::*;
use std::sync::Arc;

/// A session of a machine `pc` with two blocks: `ram` of two pages, `rom` of one.
fn description(subsections: &[u8]) -> GuestDescription {
    let entries = vec![(b"ram".as_slice().into(), 8192), (b"rom".as_slice().into(), 4096)];
    let mut header = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec();
    header.extend_from_slice(subsections);
    GuestDescription {
        header,
        machine_type: "pc".into(),
        ram_section: 2,
        blocks: Arc::new(BlockTable::new(entries, 12288).unwrap()),
        vmdesc: b"{\"devices\":[]}".to_vec(),
    }
}

/// Page 0 is zero, the others are full of their number.
fn read(page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
    out.fill(u8::try_from(page.get()).unwrap());
}

const DEVICES: &[u8] = b"\x04devices\x00";

fn stream(description: &GuestDescription, form: Form) -> (Vec<u8>, StreamReport) {
    let mut bytes = Vec::new();
    let report = write_stream(description, DEVICES, read, form, &mut bytes).unwrap();
    assert_eq!(report.bytes, bytes.len() as u64);
    (bytes, report)
}

/// The expected stream, from parts.
fn parts(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn a_complete_stream_is_as_specified() {
    let (bytes, report) = stream(&description(b""), Form::Complete);
    let expected = parts(&[
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc",
        b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
        // 12288 bytes in all; ram 8192, rom 4096.
        b"\0\0\0\0\0\0\x30\x04\x03ram\0\0\0\0\0\0\x20\0\x03rom\0\0\0\0\0\0\x10\0",
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\x03\0\0\0\x02",
        // ram: page 0 is zero, page 1 follows in the same block.
        b"\0\0\0\0\0\0\0\x02\x03ram\0",
        b"\0\0\0\0\0\0\x10\x28",
        &[1; PAGE_SIZE],
        // rom: its only page names its block.
        b"\0\0\0\0\0\0\0\x08\x03rom",
        &[2; PAGE_SIZE],
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        DEVICES,
        b"\x06\0\0\0\x02{}",
    ]);
    assert_eq!(bytes, expected);
    assert_eq!((report.pages, report.zero_pages), (2, 1));
}

#[test]
fn a_stream_beside_shared_memory_is_as_specified() {
    let uuid = b"\x05\x12configuration/uuid\0\0\0\x01GGGGGGGGGGGGGGGG";
    let shared = Form::Shared(BlockId(0));
    let (bytes, report) = stream(&description(uuid), shared);
    let expected = parts(&[
        b"QEVM\0\0\0\x03\x07\0\0\0\x02pc",
        uuid,
        b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared",
        b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
        b"\0\0\0\0\0\0\x30\x04",
        b"\x03ram\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0",
        b"\x03rom\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\x03\0\0\0\x02",
        b"\0\0\0\0\0\0\0\x08\x03rom",
        &[2; PAGE_SIZE],
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        DEVICES,
        b"\x06\0\0\0\x02{}",
    ]);
    assert_eq!(bytes, expected);
    assert_eq!((report.pages, report.zero_pages), (1, 0));
    // A primary that has said that it has no capability.
    let none = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\0";
    assert_eq!(
        stream(&description(none), shared).0,
        stream(&description(b""), shared).0
    );
}

/// A writer that takes a little at a time and then has had enough.
struct Narrow {
    taken: usize,
    room: usize,
}

impl Write for Narrow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        assert!(
            bytes.len() <= BUFFER_BYTES + RECORD_MAX,
            "{} bytes at once",
            bytes.len()
        );
        let count = bytes.len().min(1000).min(self.room - self.taken);
        if count == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.taken += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest larger than the buffer is written in pieces of the buffer's size, and an end of the way is an error.
#[test]
fn memory_is_bounded_and_a_lost_reader_is_an_error() {
    let pages = 4 * BUFFER_BYTES / PAGE_SIZE;
    let bytes = (pages * PAGE_SIZE) as u64;
    let mut large = description(b"");
    large.blocks = Arc::new(BlockTable::new(vec![(b"ram".as_slice().into(), bytes)], bytes).unwrap());
    let fill =
        |page: PageIndex, out: &mut [u8; PAGE_SIZE]| out.fill(u8::try_from(page.get() % 255).unwrap() + 1);
    let mut whole = Vec::new();
    let report = write_stream(&large, DEVICES, fill, Form::Complete, &mut whole).unwrap();
    assert_eq!(report.pages, pages as u64);
    let room = whole.len();
    // Of the last 7 bytes, the vmdesc, QEMU can do without.
    for (lack, complete) in [(1, true), (7, true), (8, false), (100, false), (room / 2, false)] {
        let out = Narrow {
            taken: 0,
            room: room - lack,
        };
        let error = write_stream(&large, DEVICES, fill, Form::Complete, out).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(error.complete, complete, "without the last {lack} bytes");
    }
    let out = Narrow { taken: 0, room };
    assert_eq!(
        write_stream(&large, DEVICES, fill, Form::Complete, out).unwrap(),
        report
    );
}
