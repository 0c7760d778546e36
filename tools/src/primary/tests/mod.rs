//! The synthetic primary against a minimal secondary.

pub(super) mod layout;
mod patterns;
mod secondary;

use super::{Distribution, Pattern, SyncMode, SynthError, SynthOptions, SynthPrimary, Version, run};
use crate::net::Address;
use secondary::{Seen, secondary};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

fn small(version: Version) -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        dirty_pages: Distribution::Fixed(700),
        interval: Duration::ZERO,
        zero_share: 0.2,
        ..SynthOptions::new(version)
    }
}

/// Runs a session and compares all memory and the device state after precopy and after each checkpoint.
fn session(options: &SynthOptions, checkpoints: u32) -> Arc<Seen> {
    let secondary = secondary(options);
    let mut primary = SynthPrimary::connect(&secondary.address, options).unwrap();
    let same = |primary: &SynthPrimary| {
        let memory = secondary.seen.memory.lock().unwrap();
        for (position, (name, length)) in primary.blocks().iter().enumerate() {
            let image = primary.image(name).unwrap();
            assert_eq!(image.len() as u64, *length);
            assert!(*image == memory.blocks[position][..], "block {name} differs");
        }
        assert_eq!(primary.device_state(), memory.device_state);
        assert!(memory.received.iter().all(|&count| count > 0));
        memory.received.iter().sum::<u32>()
    };
    let mut received = same(&primary);
    for _ in 0..checkpoints {
        let report = primary.checkpoint().unwrap();
        assert_eq!(Distribution::Fixed(report.pages), options.dirty_pages);
        assert!(Duration::ZERO < report.received && report.received <= report.loaded);
        assert_eq!(report.waited, Duration::ZERO);
        let pages_bytes = (report.pages - report.zero_pages) * 4096;
        let (least, most) = if options.xbzrle {
            (0, pages_bytes / 2)
        } else {
            (pages_bytes, pages_bytes + 100_000)
        };
        assert!((least..most).contains(&report.bytes), "{report:?}");
        let before = std::mem::replace(&mut received, same(&primary));
        // 7.2 sends a page in passing again.
        let sent = u64::from(received - before);
        let twice = if options.version == Version::V7_2 { 3 } else { 0 };
        assert!(
            (report.pages..=report.pages + twice).contains(&sent),
            "{sent} of {}",
            report.pages
        );
    }
    primary.close().unwrap();
    assert_eq!(secondary.thread.join().unwrap(), checkpoints);
    secondary.seen
}

#[test]
fn multifd_as_each_version_has_it() {
    for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
        for pattern in [Pattern::Random, Pattern::Sequential, Pattern::Runs(50)] {
            let options = SynthOptions {
                pattern,
                ..small(version)
            };
            let seen = session(&options, 5);
            let memory = seen.memory.lock().unwrap();
            let old = version == Version::V7_2;
            // Per section: START, one PART, END, 5 checkpoints. Per round: START, two in END, and one or two in each
            // checkpoint, two where the scan for dirty pages wraps.
            let markers = if old { 8..9 } else { 8 + 1..8 + 5 + 1 };
            assert!(markers.contains(&memory.markers), "{} markers", memory.markers);
            assert_eq!(memory.syncs_with_pages > 0, old);
            assert_eq!(memory.stale_packets > 0, old);
            assert_eq!(memory.zero_on_main > 0, old);
            assert_eq!(memory.zero_in_packets > 0, !old);
        }
    }
}

#[test]
fn plain() {
    for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
        let options = SynthOptions {
            channels: 0,
            ..small(version)
        };
        let seen = session(&options, 3);
        assert!(seen.memory.lock().unwrap().zero_on_main > 0);
    }
}

#[test]
fn plain_with_deltas() {
    for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
        let options = SynthOptions {
            channels: 0,
            xbzrle: true,
            ..small(version)
        };
        let seen = session(&options, 3);
        let memory = seen.memory.lock().unwrap();
        // Of 700 dirty pages most have content before and after.
        assert!(memory.deltas > 3 * 300, "{}", memory.deltas);
    }
    let both = SynthOptions {
        xbzrle: true,
        ..small(Version::V11_1)
    };
    assert!(both.check().unwrap_err().to_string().contains("main channel"));
}

#[test]
fn machine_types_up_to_8_0_and_other_channel_counts() {
    for channels in [1, 2, 16] {
        let options = SynthOptions {
            channels,
            sync_mode: SyncMode::PerSection,
            zero_pages_on_main: true,
            ..small(Version::V11_1)
        };
        let seen = session(&options, 3);
        let memory = seen.memory.lock().unwrap();
        assert!(memory.zero_on_main > 0 && memory.zero_in_packets == 0);
    }
}

#[test]
fn idle_and_busy_guests() {
    for (dirty_pages, zero_share) in [(0, 0.0), (1, 1.0), (2048, 0.5), (2048, 0.0)] {
        let options = SynthOptions {
            dirty_pages: Distribution::Fixed(dirty_pages),
            zero_share,
            ..small(Version::V11_1)
        };
        session(&options, 3);
    }
}

/// The waiting that a stall of the secondary causes has a lower bound, whatever else this machine does.
#[test]
fn a_stall_is_in_every_checkpoint_that_waited_for_it() {
    let take = |closed_loop| {
        let interval = Duration::from_millis(20);
        let options = SynthOptions {
            interval,
            closed_loop,
            ..small(Version::V11_1)
        };
        let secondary = secondary(&options);
        let mut primary = SynthPrimary::connect(&secondary.address, &options).unwrap();
        let mut reports = Vec::new();
        for checkpoint in 0..6 {
            if checkpoint == 1 {
                *secondary.seen.stall.lock().unwrap() = STALL;
            }
            reports.push(primary.checkpoint().unwrap());
        }
        reports
    };
    const STALL: Duration = Duration::from_millis(300);
    let open = take(false);
    assert!(open[1].service() >= STALL, "{open:?}");
    for (position, report) in (1u32..).zip(&open[2..]) {
        let left = STALL - Duration::from_millis(20) * position;
        assert!(report.waited >= left, "{position}: {report:?}");
        assert!(
            report.loaded >= left && report.received >= left,
            "{position}: {report:?}"
        );
        assert_eq!(report.service(), report.loaded - report.waited);
    }
    let closed = take(true);
    assert!(closed[1].service() >= STALL, "{closed:?}");
    assert!(
        closed
            .iter()
            .all(|report| report.waited.is_zero() && report.loaded == report.service())
    );
}

#[test]
fn the_same_seed_dirties_the_same_pages() {
    let guest = |seed| {
        let options = SynthOptions {
            seed,
            ..small(Version::V11_1)
        };
        let mut guest = super::guest::GuestRam::new(&options);
        let pages = guest.run(Distribution::Fixed(500), Pattern::Random, 0.3);
        let content: Vec<_> = pages
            .iter()
            .map(|page| *guest.page(page.block, page.offset))
            .collect();
        (pages, content)
    };
    assert_eq!(guest(3), guest(3));
    assert_ne!(guest(3), guest(4));
}

#[test]
fn a_secondary_that_goes_away_or_errs_is_named() {
    let options = SynthOptions {
        channels: 0,
        patience: Duration::from_millis(200),
        ..small(Version::V10_0)
    };
    let answered = |answer: Option<&'static [u8]>| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1 << 16];
            // Until the vmdesc's last byte, which no page of this guest ends a read with.
            while stream
                .read(&mut buffer)
                .is_ok_and(|read| read > 0 && !buffer[..read].ends_with(b"]}"))
            {}
            match answer {
                Some(answer) => stream.write_all(answer).unwrap(),
                // Until the primary has given up.
                None => drop(stream.read(&mut buffer)),
            }
        });
        let result = run(&Address::Unix(path.clone()), &options);
        thread.join().unwrap();
        result.unwrap_err()
    };
    assert!(matches!(answered(None), SynthError::Silent { .. }));
    assert!(matches!(answered(Some(b"")), SynthError::Closed { .. }));
    assert!(matches!(
        answered(Some(&[0, 0, 0, 5])),
        SynthError::Unexpected { .. }
    ));
    assert!(matches!(answered(Some(&[9; 4])), SynthError::Unexpected { .. }));
    let absent = Address::Unix("/nonexistent/socket".into());
    assert!(matches!(run(&absent, &options), Err(SynthError::Connect { .. })));
}

#[test]
fn a_session_over_tcp() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address: Address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = [0; 4];
        stream.read_exact(&mut first).unwrap();
        first
    });
    let options = SynthOptions {
        channels: 0,
        ..small(Version::V11_1)
    };
    // Only that it connects and begins: the rest does not depend on the kind of socket.
    assert!(run(&address, &options).is_err());
    assert_eq!(thread.join().unwrap(), *b"QEVM");
}

#[test]
fn bad_options_are_refused() {
    let absent = Address::Unix("/nonexistent/socket".into());
    let bad = |change: fn(&mut SynthOptions)| {
        let mut options = small(Version::V11_1);
        change(&mut options);
        matches!(run(&absent, &options), Err(SynthError::Options(_)))
    };
    assert!(!bad(|_| ()));
    assert!(bad(|options| options.ram_bytes = 4097));
    assert!(bad(|options| options.ram_bytes = 0));
    assert!(bad(|options| options.zero_share = 1.5));
    assert!(bad(|options| options.zero_share = f64::NAN));
    assert!(bad(|options| options.dirty_pages = Distribution::Fixed(2049)));
    assert!(bad(|options| options.pattern = Pattern::Runs(0)));
    assert!(bad(|options| options.patience = Duration::ZERO));
}
