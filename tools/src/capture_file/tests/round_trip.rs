use super::*;
use proptest::prelude::*;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::io::{self, Write};

const COMPRESSIONS: [Compression; 2] = [Compression::None, Compression::Zstd];

/// Turns arbitrary choices to events that may follow one another.
fn plausible(choices: Vec<(u8, u16, bool, Vec<u8>)>) -> Vec<Owned> {
    let mut open: Vec<[bool; 2]> = Vec::new();
    let mut events = Vec::new();
    for (kind, which, back, bytes) in choices {
        let direction = Direction::ALL[usize::from(back)];
        let connection = if open.is_empty() {
            0
        } else {
            usize::from(which) % open.len()
        };
        let number = u16::try_from(connection).unwrap();
        let running = open.get_mut(connection).map(|ends| &mut ends[direction.index()]);
        match (kind % 8, running) {
            (0, _) | (_, None) => {
                events.push(Owned::Open(
                    u16::try_from(open.len()).unwrap(),
                    format!("{bytes:?}"),
                ));
                open.push([true; 2]);
            }
            (1, _) => events.push(Owned::Note(String::from_utf8_lossy(&bytes).into_owned())),
            (_, Some(false)) => {}
            (2, Some(running)) => {
                *running = false;
                let how = if bytes.is_empty() {
                    EndKind::Eof
                } else {
                    EndKind::Reset
                };
                events.push(Owned::End(number, direction, how));
            }
            (_, Some(true)) if bytes.is_empty() => {}
            (_, Some(true)) => events.push(Owned::Data(number, direction, bytes)),
        }
    }
    events
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        choices in proptest::collection::vec(
            (any::<u8>(), any::<u16>(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..60),
        zstd in any::<bool>(),
        blocks in any::<bool>(),
    ) {
        let events = plausible(choices);
        let file = write(&events, COMPRESSIONS[usize::from(zstd)], blocks);
        let back = read(&file).unwrap();
        prop_assert!(back.error.is_none() && back.tear.is_none());
        let (end, records) = back.records.split_last().unwrap();
        prop_assert!(matches!(end.1, Owned::Finish(totals) if totals.records == events.len() as u64));
        let expected: Vec<_> = events.into_iter().zip(0..).map(|(event, at)| (Duration::from_micros(at), event)).collect();
        prop_assert_eq!(records, &expected[..]);
    }
}

#[test]
fn the_header_says_what_was_captured() {
    let info = info();
    let mut file = Vec::new();
    CaptureWriter::new(&mut file, &info, Compression::None).unwrap();
    assert_eq!(*CaptureReader::new(Cursor::new(&file)).unwrap().info(), info);
}

/// Long data is cut into records within the limit, over several blocks, and comes back whole; both when it compresses
/// and when it does not.
#[test]
fn long_data_is_split() {
    let mut noise = vec![0; 3 * DATA_MAX + 7];
    Xoshiro256PlusPlus::seed_from_u64(1).fill(&mut noise[..]);
    for (bytes, compressible) in [(vec![7; 3 * DATA_MAX + 7], true), (noise, false)] {
        for compression in COMPRESSIONS {
            let events = [
                Owned::Open(0, String::new()),
                Owned::Data(0, Direction::ToSecondary, bytes.clone()),
            ];
            let file = write(&events, compression, false);
            let smaller = file.len() < bytes.len();
            assert_eq!(smaller, compressible && compression == Compression::Zstd);
            let back = read(&file).unwrap();
            assert!(back.tear.is_none() && back.error.is_none());
            let mut seen = Vec::new();
            for event in back.events() {
                if let Owned::Data(0, Direction::ToSecondary, part) = event {
                    assert!(part.len() <= DATA_MAX);
                    seen.extend_from_slice(&part);
                }
            }
            assert!(seen == bytes, "the data is not what it was");
        }
    }
}

#[test]
fn version_1_is_read() {
    for compression in COMPRESSIONS {
        for each in [true, false] {
            let file = write(&session(), compression, each);
            let (new, old) = (read(&file).unwrap(), read(&as_version_1(&file)).unwrap());
            assert!(old.error.is_none() && old.tear.is_none());
            assert_eq!(old.records, new.records);
        }
    }
}

#[test]
fn records_that_fit_no_session_are_not_written() {
    let mut writer = CaptureWriter::new(Vec::new(), &info(), Compression::None).unwrap();
    let at = Duration::ZERO;
    let open = |connection| Owned::Open(connection, String::new());
    let data = Owned::Data(0, Direction::ToSecondary, vec![1]);
    let end = Owned::End(0, Direction::ToSecondary, EndKind::Eof);
    let mut refused = |event: &Owned| match writer.write(at, event.event()) {
        Ok(()) => None,
        Err(CaptureError::Order(error)) => Some(error),
        Err(other) => panic!("{other}"),
    };
    assert_eq!(refused(&data), Some(OrderError::NotOpened(ConnectionId(0))));
    assert_eq!(
        refused(&open(1)),
        Some(OrderError::Number {
            seen: ConnectionId(1),
            expected: 0
        })
    );
    assert_eq!(refused(&open(0)), None);
    assert_eq!(refused(&data), None);
    assert_eq!(refused(&end), None);
    assert_eq!(refused(&data), Some(OrderError::Ended(ConnectionId(0))));
    assert_eq!(refused(&end), Some(OrderError::Ended(ConnectionId(0))));
    assert_eq!(
        refused(&Owned::Finish(Totals::default())),
        Some(OrderError::Finished)
    );
    let long = Owned::Note("x".repeat(TEXT_MAX + 1));
    assert!(matches!(
        writer.write(at, long.event()),
        Err(CaptureError::TooLong { bytes, .. }) if bytes == TEXT_MAX + 1
    ));
    assert_eq!(writer.finish().unwrap().bytes_to_secondary, 1);
}

#[test]
fn a_file_that_exists_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session.cap");
    let create = || CaptureWriter::create(&path, &info(), Compression::None);
    let first = create().map(drop);
    let second = create().map(drop);
    first.unwrap();
    let text = second.unwrap_err().to_string();
    assert!(text.contains("exists already"), "{text}");
}

/// A capture has the guest's whole memory.
#[test]
fn a_capture_is_its_owners_alone_and_overwrites_nothing_of_others() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let [path, victim] = ["session.cap", "victim"].map(|name| directory.path().join(name));
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    drop(CaptureWriter::create(&path, &info(), Compression::None).unwrap());
    assert_eq!(mode(), 0o600);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    drop(CaptureWriter::replace(&path, &info(), Compression::None).unwrap());
    assert_eq!(mode(), 0o600);
    std::fs::write(&victim, "precious").unwrap();
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&victim, &path).unwrap();
    let refused = CaptureWriter::replace(&path, &info(), Compression::None).map(drop);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("is not replaced"), "{text}");
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

/// Takes so many bytes and is then full.
struct Disk {
    room: usize,
    bytes: Vec<u8>,
}

impl Write for &mut Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room - self.bytes.len());
        if count == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// On a disk that is full, every record whose flush succeeded is readable, and nothing is appended to the half block.
#[test]
fn a_full_disk_leaves_what_fitted() {
    let whole = write(&session(), Compression::None, true);
    let header_len = write(&[], Compression::None, false).len() - 2 * 20 - 32;
    for room in header_len..whole.len() {
        let mut disk = Disk {
            room,
            bytes: Vec::new(),
        };
        let mut writer = CaptureWriter::new(&mut disk, &info(), Compression::None).unwrap();
        let mut written = 0;
        for event in &session() {
            let result = writer
                .write(Duration::ZERO, event.event())
                .and_then(|()| writer.flush());
            match result {
                Ok(()) => written += 1,
                Err(CaptureError::Write { source, .. }) => {
                    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
                    break;
                }
                Err(other) => panic!("{other}"),
            }
        }
        if written < session().len() {
            let after = writer.write(Duration::ZERO, Event::Note("more"));
            assert!(matches!(after, Err(CaptureError::Ended)));
            assert!(matches!(writer.finish(), Err(CaptureError::Ended)));
        }
        let back = read(&disk.bytes).unwrap();
        assert_eq!(back.events(), session()[..written]);
        assert!(back.tear.is_some() && back.error.is_none());
    }
}
