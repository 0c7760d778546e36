use super::block::{self, Chain, Header, Kind};
use super::*;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::fs::OpenOptions;
use std::io::Write;

/// Cut at every byte, a file reads up to its last whole block and says where it is torn.
#[test]
fn torn_at_every_byte() {
    for (compression, each) in [
        (Compression::None, true),
        (Compression::Zstd, true),
        (Compression::None, false),
    ] {
        let file = write(&session(), compression, each);
        let whole = read(&file).unwrap().events();
        let begins = blocks(&file);
        for length in 0..file.len() {
            let cut = &file[..length];
            if length < begins[0] {
                let error = read(cut).err().expect("a header is cut").to_string();
                let expected = if length == 0 { "it is empty" } else { "cut short" };
                assert!(error.contains(expected), "{length}: {error}");
                continue;
            }
            let back = read(cut).unwrap();
            assert!(back.error.is_none(), "{length}: {:?}", back.error);
            let last = begins.iter().rposition(|begin| *begin <= length).unwrap();
            // The last block has Finish alone where each record has one, else it has all.
            let expected = if each { last } else { 0 };
            assert_eq!(back.events(), whole[..expected], "{length}");
            let reason = match length - begins[last] {
                0 => TearReason::Unfinished,
                present => TearReason::Incomplete {
                    present: present as u64,
                },
            };
            let tear = Tear {
                offset: begins[last] as u64,
                reason,
            };
            assert_eq!(back.tear, Some(tear), "{length}");
        }
        assert_eq!(read(&file).unwrap().tear, None);
    }
}

/// Any bit that is changed anywhere is noticed: as damage of the block that has it, or as a torn tail in the last one.
#[test]
fn damaged_at_every_byte() {
    for compression in [Compression::None, Compression::Zstd] {
        let file = write(&session(), compression, true);
        let whole = read(&file).unwrap().events();
        let begins = blocks(&file);
        let last_block = begins.len() - 2;
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 1 << (at % 8);
            if at < begins[0] {
                read(&damaged).err().expect("a damaged header");
                continue;
            }
            let back = read(&damaged).unwrap();
            let hit = begins.iter().rposition(|begin| *begin <= at).unwrap();
            assert_eq!(back.events(), whole[..hit], "{at}");
            let offset = begins[hit] as u64;
            let in_header = at < begins[hit] + block::HEADER_LEN;
            if hit == last_block && !in_header {
                let tear = Tear {
                    offset,
                    reason: TearReason::Checksum,
                };
                assert_eq!((back.tear, back.error.is_none()), (Some(tear), true), "{at}");
            } else {
                let error = back.error.expect("damage").to_string();
                assert!(
                    error.contains(&format!("the block at byte {offset}:")),
                    "{at}: {error}"
                );
            }
        }
    }
}

/// After a loss of power a file may be longer than what was written to it.
#[test]
fn zeros_at_the_end_are_a_tear() {
    let file = write(&session(), Compression::None, true);
    let begins = blocks(&file);
    let events = read(&file).unwrap().events();
    for (kept, zeros, expected) in [
        (begins[3], 1 << 16, TearReason::Zeros),
        (begins[3] + 10, 1 << 16, TearReason::Checksum),
        (begins[4] - 3, 1 << 16, TearReason::Checksum),
    ] {
        let mut torn = file[..kept].to_vec();
        torn.resize(kept + zeros, 0);
        let back = read(&torn).unwrap();
        assert_eq!(back.events(), events[..3]);
        let tear = Tear {
            offset: begins[3] as u64,
            reason: expected,
        };
        assert_eq!(back.tear, Some(tear));
    }
}

#[test]
fn nothing_may_follow_the_end() {
    for more in [vec![0; 7], write(&session(), Compression::None, false)] {
        let mut file = write(&session(), Compression::None, false);
        let end = file.len();
        file.extend_from_slice(&more);
        let error = read(&file).unwrap().error.expect("something follows").to_string();
        assert!(
            error.contains(&format!("byte {end}: it follows the end")),
            "{error}"
        );
    }
}

#[test]
fn other_files_are_named() {
    let transferred =
        |file: &[u8]| -> Vec<u8> { file.iter().copied().filter(|byte| *byte != b'\r').collect() };
    let capture = write(&session(), Compression::None, false);
    let stripped: Vec<u8> = capture.iter().map(|byte| byte & 0x7f).collect();
    for (file, hint) in [
        (transferred(&capture), "copy it again"),
        (stripped, "copy it again"),
        (b"\x0a\x0d\x0d\x0a\x1c\x00\x00\x00".to_vec(), "pcapng"),
        (b"\xd4\xc3\xb2\xa1\x02\x00".to_vec(), "pcap"),
        (b"\x28\xb5\x2f\xfd\x00".to_vec(), "zstd -d"),
        (b"#[StartTime: 1".to_vec(), "histograms"),
        (b"QEVM\x00\x00\x00\x03".to_vec(), "migration stream"),
        (b"hello".to_vec(), "otherwise"),
    ] {
        let error = read(&file).err().expect("a foreign file").to_string();
        assert!(
            error.starts_with("this is not a capture") && error.contains(hint),
            "{error}"
        );
    }
}

#[test]
fn a_later_version_is_reported() {
    let mut file = write(&session(), Compression::None, false);
    file[8] = 3;
    let error = read(&file).err().expect("a later version").to_string();
    assert!(error.contains("format version 3"), "{error}");
}

/// A file with one block, whose header has these fields and the right checksum.
fn with_fields(fields: &[u8; 16], content: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    CaptureWriter::new(&mut file, &info(), Compression::None).unwrap();
    let checksum = crc32c::crc32c_append(end_of_header(&file), fields);
    file.extend_from_slice(fields);
    file.extend_from_slice(&checksum.to_le_bytes());
    file.extend_from_slice(content);
    file
}

/// A file with one block, of this content.
fn with_block(kind: Kind, content: &[u8], raw_len: usize) -> Vec<u8> {
    let mut any = Chain::Unlinked;
    let header = Header::new(kind, content, raw_len).encode(&mut any);
    with_fields(header.first_chunk().unwrap(), content)
}

/// The checksum of a file's header, which is all of the file.
fn end_of_header(file: &[u8]) -> u32 {
    u32::from_le_bytes(*file.last_chunk().unwrap())
}

/// Lengths with right checksums that no writer of ours makes: refused, and no memory taken for them.
#[test]
fn hostile_lengths_are_refused() {
    let fields = |kind, stored: u32, raw: u32| {
        let mut bytes = [0; 16];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&stored.to_le_bytes());
        bytes[8..12].copy_from_slice(&raw.to_le_bytes());
        bytes
    };
    for (kind, stored, raw) in [
        (0, u32::MAX, u32::MAX),
        (0, 0, 0),
        (0, 19, 19),
        (0, 100, 101),
        (0, (4 << 20) + 1, (4 << 20) + 1),
        (1, 100, 100),
        (1, 100, u32::MAX),
        (1, u32::MAX, 100),
        (2, 100, 100),
        (255, 100, 100),
    ] {
        let file = with_fields(&fields(kind, stored, raw), b"behind it");
        let back = read(&file).unwrap();
        let error = back.error.expect("a hostile header").to_string();
        assert!(!error.contains("checksum"), "{kind} {stored} {raw}: {error}");
    }
    // A length within the limit takes no more memory than the file has bytes.
    let file = with_fields(&fields(0, 4 << 20, 4 << 20), b"short");
    let mut reader = CaptureReader::new(Cursor::new(&file)).unwrap();
    assert!(reader.next().unwrap().is_none());
    let present = (block::HEADER_LEN + 5) as u64;
    assert_eq!(
        reader.is_torn().unwrap().reason,
        TearReason::Incomplete { present }
    );
    assert!(reader.memory() < 1 << 16, "{} bytes", reader.memory());
    // The header's own text.
    let mut file = write(&session(), Compression::None, false);
    file[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(
        read(&file)
            .err()
            .unwrap()
            .to_string()
            .contains("longer than a header can be")
    );
}

/// A frame that would become far larger than it announces ends at the limit.
#[test]
fn a_bomb_does_not_go_off() {
    let bomb = zstd::bulk::compress(&vec![0; 256 << 20], 1).unwrap();
    assert!(bomb.len() < BLOCK_MAX);
    let file = with_block(Kind::Zstd, &bomb, BLOCK_MAX);
    let mut reader = CaptureReader::new(Cursor::new(&file)).unwrap();
    let error = reader.next().unwrap_err().to_string();
    assert!(error.contains("cannot be decompressed"), "{error}");
    assert!(reader.memory() <= 3 * BLOCK_MAX, "{} bytes", reader.memory());
    // One that announces too little, and one that is no frame.
    for (content, raw_len) in [
        (zstd::bulk::compress(&[7; 5000], 1).unwrap(), 4000),
        (vec![1; 50], 100),
    ] {
        let back = read(&with_block(Kind::Zstd, &content, raw_len)).unwrap();
        assert!(back.error.is_some() && back.records.is_empty());
    }
}

/// Records that are wrong although every checksum is right.
#[test]
fn wrong_records_are_refused() {
    let record = |kind: u8, direction: u8, content: &[u8]| {
        let mut bytes = vec![kind, direction, 0, 0];
        bytes.extend_from_slice(&u32::try_from(content.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes), content);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(content);
        bytes
    };
    let open = record(1, 0, b"peer");
    for (name, content) in [
        ("unknown kind", record(9, 0, b"")),
        ("direction", [open.clone(), record(2, 2, b"x")].concat()),
        ("not UTF-8", record(4, 0, b"\xff\xfe")),
        ("text has", record(4, 0, &vec![b'x'; TEXT_MAX + 1])),
        (
            "bytes of data",
            [open.clone(), record(2, 0, &vec![0; DATA_MAX + 1])].concat(),
        ),
        ("an end", [open.clone(), record(3, 0, b"\x02")].concat()),
        ("totals", record(5, 0, b"short")),
        ("announced", record(5, 0, &[1; 32])),
        ("not opened", record(2, 0, b"x")),
        ("finished", [record(5, 0, &[0; 32]), record(4, 0, b"")].concat()),
        ("inside a record", [open.clone(), vec![2; 19]].concat()),
        ("inside a record", open[..open.len() - 1].to_vec()),
    ] {
        let back = read(&with_block(Kind::Stored, &content, content.len())).unwrap();
        let error = back.error.expect(name).to_string();
        assert!(error.contains(name), "{name}: {error}");
    }
}

/// A reader sees a record as soon as it is flushed, and half a block not before its other half.
#[test]
fn a_growing_file_is_followed() {
    let file = write(&session(), Compression::Zstd, true);
    let whole = read(&file).unwrap().events();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session.cap");
    let begins = blocks(&file);
    std::fs::write(&path, &file[..begins[0]]).unwrap();
    let mut reader = CaptureReader::open(&path).unwrap();
    let mut grow = OpenOptions::new().append(true).open(&path).unwrap();
    let mut seen = Vec::new();
    for length in begins[0]..file.len() {
        assert!(reader.next().unwrap().is_none(), "{length}");
        assert!(reader.is_torn().is_some());
        grow.write_all(&file[length..=length]).unwrap();
        if begins.contains(&(length + 1)) {
            let record = reader.next().unwrap().expect("a block is complete");
            seen.push(Owned::of(record.event));
        }
    }
    assert!(reader.next().unwrap().is_none() && reader.is_torn().is_none());
    assert_eq!(seen, whole);
}

/// Thousands of files with changed, removed, doubled and inserted pieces: read to an error or an end, never further than
/// the original, never a panic.
#[test]
fn mutated_files_do_no_harm() {
    const ROUNDS: u64 = 20_000;
    let originals: Vec<Vec<u8>> = [Compression::None, Compression::Zstd]
        .into_iter()
        .flat_map(|compression| [true, false].map(|each| write(&session(), compression, each)))
        .collect();
    for seed in 1..=ROUNDS {
        let mut random = Mutator(Xoshiro256PlusPlus::seed_from_u64(seed));
        let original = &originals[random.below(originals.len())];
        let mut file = original.clone();
        for _ in 0..=random.below(4) {
            random.mutate(&mut file);
        }
        compare_mutated(seed, original, &file);
    }
}

/// The same with whole blocks, of which each is right alone, and then with the end cut off.
#[test]
fn rearranged_blocks_do_no_harm() {
    const ROUNDS: u64 = 5_000;
    let originals =
        [Compression::None, Compression::Zstd].map(|compression| write(&session(), compression, true));
    for seed in 1..=ROUNDS {
        let mut random = Mutator(Xoshiro256PlusPlus::seed_from_u64(seed));
        let original = &originals[random.below(originals.len())];
        let mut file = original.clone();
        for _ in 0..=random.below(3) {
            random.rearrange(&mut file);
        }
        if random.below(2) == 0 {
            let begins = blocks(&file);
            file.truncate(begins[random.below(begins.len())]);
        }
        compare_mutated(seed, original, &file);
    }
}

/// A mutated file reads up to the first difference at most, and is whole only where there is none.
fn compare_mutated(seed: u64, original: &[u8], file: &[u8]) {
    let Ok(back) = read(file) else { return };
    let whole = read(original).unwrap().records;
    // Checksums cover every byte and the order of the blocks, so what is read at all is what was written.
    assert!(
        back.records.len() <= whole.len() && back.records == whole[..back.records.len()],
        "seed {seed}: {:?}",
        back.records
    );
    let complete = back.error.is_none() && back.tear.is_none();
    assert_eq!(complete, file == original, "seed {seed}");
}

/// A block that is right but at the wrong place is damage there, whatever follows: one that is missing, repeated,
/// exchanged with its neighbour, or of another capture of the same length.
#[test]
fn blocks_fit_only_their_place() {
    for compression in [Compression::None, Compression::Zstd] {
        let file = write(&session(), compression, true);
        let whole = read(&file).unwrap().events();
        let begins = blocks(&file);
        let other = {
            let mut other = Vec::new();
            let info = CaptureInfo {
                created_unix_ns: info().created_unix_ns + 1,
                ..info()
            };
            let mut writer = CaptureWriter::new(&mut other, &info, compression).unwrap();
            for (event, at) in session().iter().zip(0..) {
                writer.write(Duration::from_micros(at), event.event()).unwrap();
                writer.flush().unwrap();
            }
            writer.finish().unwrap();
            other
        };
        assert_eq!(other.len(), file.len());
        let block = |which: usize| &file[begins[which]..begins[which + 1]];
        for which in 0..begins.len() - 2 {
            let (before, after) = (&file[..begins[which]], &file[begins[which + 1]..]);
            let next = block(which + 1);
            let missing = [before, after].concat();
            let exchanged = [before, next, block(which), &after[next.len()..]].concat();
            let repeated = [before, block(which), block(which), after].concat();
            let foreign = [before, &other[begins[which]..begins[which + 1]], after].concat();
            for (name, damaged, read_blocks) in [
                ("missing", missing, which),
                ("exchanged", exchanged, which),
                ("repeated", repeated, which + 1),
                ("foreign", foreign, which),
            ] {
                let back = read(&damaged).unwrap();
                assert_eq!(back.events(), whole[..read_blocks], "{name} {which}");
                let error = back.error.expect("damage").to_string();
                let offset = begins[read_blocks];
                let expected = format!("the block at byte {offset}: the checksum of its header");
                assert!(error.contains(&expected), "{name} {which}: {error}");
            }
        }
    }
}

/// Damages a file at random; each seed is a run that can be repeated.
struct Mutator(Xoshiro256PlusPlus);

impl Mutator {
    /// A number below `limit`, or 0.
    fn below(&mut self, limit: usize) -> usize {
        self.0.random_range(0..limit.max(1))
    }

    fn mutate(&mut self, file: &mut Vec<u8>) {
        let at = self.below(file.len());
        let to = (at + 1 + self.below(64)).min(file.len());
        match self.below(6) {
            0 if !file.is_empty() => file[at] ^= 1 << self.below(8),
            1 => file.truncate(at),
            2 => drop(file.drain(at..to)),
            3 => {
                let piece = file[at..to].to_vec();
                let place = self.below(file.len());
                file.splice(place..place, piece);
            }
            4 => file[at..to].fill(self.0.random()),
            _ => {
                let mut bytes = vec![0; self.below(32)];
                self.0.fill(&mut bytes[..]);
                file.splice(at..at, bytes);
            }
        }
    }

    /// Like [`Self::mutate`], but removes, moves, repeats or exchanges whole blocks.
    fn rearrange(&mut self, file: &mut Vec<u8>) {
        let begins = blocks(file);
        let mut pieces: Vec<_> = begins
            .windows(2)
            .map(|ends| file[ends[0]..ends[1]].to_vec())
            .collect();
        let (from, to) = (self.below(pieces.len()), self.below(pieces.len()));
        match self.below(4) {
            0 => drop(pieces.remove(from)),
            1 => pieces.insert(to, pieces[from].clone()),
            2 => pieces.swap(from, to),
            _ => pieces[to] = pieces[from].clone(),
        }
        file.truncate(begins[0]);
        file.extend(pieces.concat());
    }
}
