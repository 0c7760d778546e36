use super::*;
use colo_ring::metrics::IntervalLog;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::time::{Duration, UNIX_EPOCH};

fn collect(text: &[u8]) -> Result<Log, HlogError> {
    Log::collect(&mut Reader::new(text, Path::new("x.hlog")))
}

/// A log of ours: three intervals of two sessions.
fn ours() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.hlog");
    let started = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let mut log = IntervalLog::create(path.clone(), &["a comment".to_owned()], started).unwrap();
    for (second, tag) in [(0, "session-1"), (1, "session-2"), (2, "session-1")] {
        let mut histogram = empty();
        for n in 1..=100 {
            histogram.record(n * 1_000_000).unwrap();
        }
        let second = Duration::from_secs(second);
        log.add(Some(tag), &histogram, second, Duration::from_secs(1))
            .unwrap();
    }
    log.append().unwrap();
    std::fs::read(&path).unwrap()
}

#[test]
fn ours_is_read_by_tag() {
    let log = collect(&ours()).unwrap();
    assert_eq!((log.intervals, log.total.len(), log.torn), (3, 300, None));
    assert_eq!(log.start_time_s, Some(1_700_000_000.0));
    assert_eq!(log.comments[0], "a comment");
    let tags: Vec<_> = log
        .tags
        .iter()
        .map(|(tag, (n, h))| (tag.as_str(), *n, h.len()))
        .collect();
    assert_eq!(tags, [("session-1", 2, 200), ("session-2", 1, 100)]);
    assert!(log.total.value_at_quantile(0.5).abs_diff(50_000_000) <= 50_000);
}

#[test]
fn line_ends_blanks_and_whole_numbers_do_not_matter() {
    let text = String::from_utf8(ours()).unwrap();
    let crlf = text.replace('\n', "\r\n\r\n").replace("0.000,1.000", " 0 , 1e0");
    assert_eq!(collect(crlf.as_bytes()).unwrap().total.len(), 300);
    // A last line without its end is whole if its histogram is.
    assert_eq!(collect(text.trim_end().as_bytes()).unwrap().torn, None);
}

#[test]
fn a_cut_log_is_read_up_to_the_cut() {
    let text = ours();
    let last = text[..text.len() - 1]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .unwrap()
        + 1;
    // Without its padding and its end alone, the line is whole.
    let whole = text.len() - text.iter().rev().take_while(|byte| b"=\n".contains(byte)).count();
    for cut in last + 1..whole {
        let log = collect(&text[..cut]).unwrap();
        assert_eq!(log.intervals, 2, "cut at {cut}");
        assert_eq!(log.torn.unwrap().offset, last as u64);
    }
}

#[test]
fn damage_before_the_end_is_an_error_with_line_and_byte() {
    let text = String::from_utf8(ours()).unwrap();
    let damaged = text.replacen("Tag=session-2,1.000", "Tag=session-2,abc", 1);
    let said = collect(damaged.as_bytes()).unwrap_err().to_string();
    let offset = damaged.find("Tag=session-2").unwrap();
    let line = damaged[..offset].matches('\n').count() + 1;
    assert!(
        said.contains(&format!("line {line} (byte {offset}): the start is \"abc\"")),
        "{said}"
    );
}

#[test]
fn foreign_files_are_told_from_logs() {
    for (text, says) in [
        (&b"{\n \"a\": 1 }\n"[..], "line 1 (byte 0): neither a comment"),
        (b"\x7fELF\x02\x01\n\xff\xff\n", "neither a comment"),
        (b"hello", "has no interval; cut in line 1"),
        (b"", "has no interval"),
        (b"# nothing\n", "has no interval"),
        (b"1,2,3,HISTFAAAA!\n", "not base64"),
        (b"1,2,3,HISTE\n", "base64"),
        (b"1,2,inf,HISTFAAA\n", "the maximum is \"inf\""),
        (b"1,2,3,AAAAAAAAAAAA\n", "0x00000000"),
        (b"1,2,3,\n", "ends after 0 bytes"),
    ] {
        let said = collect(text).unwrap_err().to_string();
        assert!(said.contains(says), "{says}: {said}");
    }
    let endless = vec![b'x'; LINE_BYTES_MAX + 10];
    let said = collect(&endless).unwrap_err().to_string();
    assert!(said.contains("longer than"), "{said}");
}

fn encode(plain: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(plain)
}

fn plain(digits: u32, low: u64, high: u64, claimed: u32, counts: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [0x1c84_9313, claimed, 0, digits] {
        bytes.extend(word.to_be_bytes());
    }
    for long in [low, high, 1f64.to_bits()] {
        bytes.extend(long.to_be_bytes());
    }
    bytes.extend(counts);
    bytes
}

#[test]
fn a_histogram_that_claims_too_much_is_refused_before_it_is_believed() {
    let refused = |bytes: &[u8]| {
        let line = format!("0.0,1.0,1.0,{}\n", encode(bytes));
        collect(line.as_bytes()).unwrap_err().to_string()
    };
    // 4 GiB of counts that are not there.
    assert!(refused(&plain(3, 1, 1000, u32::MAX, &[2])).contains("ends after 41 bytes"));
    // A run of zeroes of the most negative number.
    let most_negative = [0xff; 9];
    assert!(refused(&plain(3, 1, 1000, 9, &most_negative)).contains("damaged at byte 40"));
    // Counts that overflow their sum.
    let huge = [[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]; 4].concat();
    assert!(refused(&plain(3, 1, 1000, 36, &huge)).contains("damaged at byte 40"));
    // A number that goes on behind the end.
    assert!(refused(&plain(3, 1, 1000, 1, &[0x80])).contains("damaged at byte 40"));
    for (digits, low, high) in [
        (6, 1, 1000),
        (3, 0, 1000),
        (3, u64::MAX, u64::MAX),
        (3, 10, 11),
        (3, 1 << 62, u64::MAX),
    ] {
        assert!(refused(&plain(digits, low, high, 1, &[2])).contains("cannot be decoded"));
    }
    // More counts than its range has.
    assert!(
        refused(&plain(0, 1, 2, 2, &[0x7f, 2])).contains("longer than"),
        "{}",
        refused(&plain(0, 1, 2, 2, &[0x7f, 2]))
    );
    // A bomb: 64 MiB of zero bytes, deflated.
    let mut deflated = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut deflated, &vec![0; 64 << 20]).unwrap();
    let deflated = deflated.finish().unwrap();
    let mut bomb = 0x1c84_9314u32.to_be_bytes().to_vec();
    bomb.extend(u32::try_from(deflated.len()).unwrap().to_be_bytes());
    bomb.extend(deflated);
    assert!(refused(&bomb).contains("more than"));
}

#[test]
fn the_widest_histogram_is_read() {
    let line = format!("0.0,1.0,1.0,{}\n", encode(&plain(5, 1, u64::MAX, 2, &[2, 4])));
    assert_eq!(collect(line.as_bytes()).unwrap().total.len(), 3);
}

/// Whatever a file contains, it is read or refused.
#[test]
fn damaged_logs_never_panic() {
    let good = ours();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..1000 {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bad.len());
            match rng.random_range(0..4) {
                0 => bad[at] = rng.random(),
                1 => bad.truncate(at.max(1)),
                2 => {
                    bad.remove(at);
                }
                _ => bad[at] ^= 1 << rng.random_range(0..7),
            }
        }
        match collect(&bad) {
            Ok(_) => read += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
}

/// The same below base64 and zlib, where damage is not found by a checksum.
#[test]
fn damaged_histograms_never_panic() {
    let good = plain(3, 1, 1 << 40, 8, &[2, 4, 0x81, 0x01, 6, 2, 0x87, 0x02]);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..4000 {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            // The first bytes are the encoding's name: hardly a change to them gets further.
            let at = rng.random_range(4..bad.len());
            bad[at] = rng.random();
        }
        let line = format!("0.0,1.0,1.0,{}\n", encode(&bad));
        match collect(line.as_bytes()) {
            Ok(_) => read += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
}
