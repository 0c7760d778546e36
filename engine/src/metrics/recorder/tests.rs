//! The files are read back with the hdrhistogram crate's own reader.

use super::*;
use crate::metrics::test_samples::sample;
use crate::metrics::{RUNS_KEPT, with_suffix};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

fn run() -> RunDescription {
    RunDescription {
        started: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        options: serde_json::json!({ "channels": 4, "backend": "uring" }),
        machine: Machine::read(),
    }
}

struct Interval {
    session: String,
    start: Duration,
    length: Duration,
    max_ms: f64,
    histogram: Histogram<u64>,
}

fn decode_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0u32, 0u32);
    for letter in text.bytes().filter(|b| *b != b'=') {
        let value = ALPHABET.iter().position(|b| *b == letter).expect("base64");
        bits = bits << 6 | u32::try_from(value).unwrap();
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).unwrap());
        }
    }
    bytes
}

/// The whole intervals of a log, and whether it ended with a torn one.
fn read_log(text: &[u8]) -> (Vec<Interval>, bool) {
    let mut intervals = Vec::new();
    let mut torn = false;
    for entry in IntervalLogIterator::new(text) {
        match entry {
            Ok(LogEntry::StartTime(at) | LogEntry::BaseTime(at)) => assert_eq!(at.as_secs(), 1_700_000_000),
            Ok(LogEntry::Interval(interval)) => {
                let bytes = decode_base64(interval.encoded_histogram());
                intervals.push(Interval {
                    session: interval.tag().unwrap().as_str().to_owned(),
                    start: interval.start_timestamp(),
                    length: interval.duration(),
                    max_ms: interval.max(),
                    histogram: Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap(),
                });
            }
            Err(_) => torn = true,
        }
    }
    (intervals, torn)
}

fn log_of(prefix: &Path, phase: Phase) -> Vec<u8> {
    std::fs::read(with_suffix(prefix, &format!(".{phase}.hlog"))).unwrap()
}

#[test]
fn intervals_come_back_by_phase_and_session() {
    let scratch = tempfile::tempdir().unwrap();
    let prefix = scratch.path().join("run");
    let mut recorder = Recorder::start(Some(&prefix), run(), &Threads::free(), drop).unwrap();
    for n in 1..=10 {
        recorder.record(&sample(7, n, Duration::from_millis(n)));
    }
    recorder.record(&sample(8, 1, Duration::from_millis(50)));
    recorder.write_interval(Duration::from_millis(1000)).unwrap();
    recorder.write_interval(Duration::from_millis(2000)).unwrap();
    recorder.record(&sample(8, 2, Duration::from_millis(60)));
    recorder.name(8, Some("web3".to_owned()));
    recorder.name(8, None);
    // The last interval is written after the session's end.
    recorder.end_session(8);
    let (report, written) = recorder.finish(Duration::from_millis(2500));
    written.unwrap();
    let guests: Vec<_> = report
        .sessions
        .iter()
        .map(|session| session.guest.as_deref())
        .collect();
    assert_eq!(guests, [Some("web3"), None]);

    for phase in Phase::ALL {
        let (intervals, torn) = read_log(&log_of(&prefix, phase));
        assert!(!torn);
        let sessions: Vec<_> = intervals.iter().map(|i| i.session.as_str()).collect();
        assert_eq!(sessions, ["session-7", "session-8", "web3"], "{phase}");
        assert_eq!(intervals[0].histogram.len(), 10);
        let slowest =
            u64::try_from(sample(7, 10, Duration::from_millis(10)).phase(phase).as_nanos()).unwrap();
        assert!(
            intervals[0].histogram.max().abs_diff(slowest) * 1000 <= slowest,
            "{phase}"
        );
    }
    let (intervals, _) = read_log(&log_of(&prefix, Phase::Pause));
    assert!(
        (intervals[0].max_ms - 10.0).abs() < 0.02,
        "milliseconds: {}",
        intervals[0].max_ms
    );
    assert_eq!(intervals[0].start, Duration::ZERO);
    assert_eq!(intervals[0].length, Duration::from_secs(1));
    assert_eq!(intervals[2].start, Duration::from_secs(2));
    assert_eq!(intervals[2].length, Duration::from_millis(500));
}

#[test]
fn a_log_cut_anywhere_is_readable_up_to_the_cut() {
    let scratch = tempfile::tempdir().unwrap();
    let prefix = scratch.path().join("run");
    let mut recorder = Recorder::start(Some(&prefix), run(), &Threads::free(), drop).unwrap();
    for second in 1..=3u64 {
        recorder.record(&sample(1, second, Duration::from_millis(second)));
        recorder.write_interval(Duration::from_secs(second)).unwrap();
        // Not finished, not even dropped: what a killed process leaves.
        let (mut intervals, mut torn) = (Vec::new(), true);
        while (intervals.len() as u64, torn) != (second, false) {
            std::thread::sleep(Duration::from_millis(1));
            (intervals, torn) = read_log(&log_of(&prefix, Phase::Transfer));
        }
    }
    let text = log_of(&prefix, Phase::Transfer);
    let second_last = text[..text.len() - 1].iter().rposition(|b| *b == b'\n').unwrap() + 1;
    for cut in second_last..text.len() {
        let (intervals, torn) = read_log(&text[..cut]);
        assert_eq!(intervals.len(), 2, "cut at {cut}");
        assert_eq!(torn, cut > second_last);
    }
}

#[test]
fn the_report_is_whole_and_can_be_read_back() {
    let scratch = tempfile::tempdir().unwrap();
    let prefix = scratch.path().join("run");
    let mut recorder = Recorder::start(Some(&prefix), run(), &Threads::free(), drop).unwrap();
    for n in 1..=100 {
        recorder.record(&sample(1, n, Duration::from_millis(2)));
    }
    assert_eq!(recorder.end_session(1).checkpoints, 100);
    recorder.record(&sample(2, 1, Duration::from_millis(4)));
    let (report, written) = recorder.finish(Duration::from_secs(5));
    written.unwrap();
    let text = std::fs::read_to_string(with_suffix(&prefix, ".json")).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    assert_eq!(
        (report.schema.as_str(), report.schema_version),
        ("colo-ring.histograms", 1)
    );
    assert_eq!(report.duration_ms, 5000);
    assert_eq!(report.total.checkpoints, 101);
    let sessions: Vec<_> = report
        .sessions
        .iter()
        .map(|s| (s.session, s.summary.checkpoints))
        .collect();
    assert_eq!(sessions, [(1, 100), (2, 1)]);
    assert_eq!(report.options["channels"], 4);
    for key in [
        "\"p99_ns\"",
        "\"phase\": \"transfer\"",
        "\"cpu_model\"",
        "\"memory_bytes\"",
    ] {
        assert!(text.contains(key), "{key} is missing in {text}");
    }
    assert!(!with_suffix(&prefix, ".json~part").exists());
}

#[test]
fn dropped_samples_are_reported_in_the_log_and_in_the_report() {
    let scratch = tempfile::tempdir().unwrap();
    let prefix = scratch.path().join("run");
    let queue = SampleQueue::with_capacity(1);
    queue.push(sample(1, 1, Duration::from_millis(1)));
    queue.push(sample(1, 2, Duration::from_millis(1)));
    let mut recorder = Recorder::start(Some(&prefix), run(), &Threads::free(), drop).unwrap();
    recorder.drain(&queue);
    let (report, written) = recorder.finish(Duration::from_secs(1));
    written.unwrap();
    assert_eq!((report.samples_dropped, report.total.checkpoints), (1, 1));
    let log = String::from_utf8(log_of(&prefix, Phase::Flush)).unwrap();
    assert!(log.contains("#1 checkpoints are missing"), "{log}");
}

#[test]
fn old_sessions_give_way_but_stay_in_the_total() {
    let mut recorder = Recorder::start(None, run(), &Threads::free(), drop).unwrap();
    let sessions = u32::try_from(SESSIONS_KEPT).unwrap() + 5;
    for session in 0..sessions {
        recorder.record(&sample(session, 1, Duration::from_millis(1)));
        recorder.end_session(session);
    }
    let (report, written) = recorder.finish(Duration::from_secs(1));
    written.unwrap();
    assert_eq!(report.sessions.len(), SESSIONS_KEPT);
    assert_eq!(report.sessions_not_listed, 5);
    assert_eq!(report.sessions[0].session, 5);
    assert_eq!(report.total.checkpoints, u64::from(sessions));
}

#[test]
fn a_prefix_in_no_directory_is_refused_with_advice() {
    let error = Recorder::start(
        Some(Path::new("/nonexistent/dir/run")),
        run(),
        &Threads::free(),
        drop,
    )
    .err()
    .unwrap();
    let text = error.to_string();
    assert!(
        text.contains("cannot create /nonexistent/dir/run") && text.contains("choose a prefix"),
        "{text}"
    );
}

#[test]
fn of_starts_at_one_instant_one_has_the_prefix() {
    for _ in 0..20 {
        let scratch = tempfile::tempdir().unwrap();
        let prefix = scratch.path().join("run");
        let all_ready = std::sync::Barrier::new(8);
        let started: Vec<_> = std::thread::scope(|scope| {
            let start = || {
                all_ready.wait();
                Recorder::start(Some(&prefix), run(), &Threads::free(), drop)
            };
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        let (begun, refused): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
        assert_eq!(begun.len(), 1);
        for refused in refused {
            let error = refused.err().unwrap();
            assert!(matches!(error, MetricsError::InUse(_)), "{error}");
        }
        for mut recorder in begun.into_iter().flatten() {
            recorder.record(&sample(1, 1, Duration::from_millis(1)));
            recorder.finish(Duration::from_secs(1)).1.unwrap();
        }
        assert_eq!(read_log(&log_of(&prefix, Phase::Pause)).0.len(), 1);
    }
}

/// Anyone can begin sessions with names, and a receiver may run for years.
#[test]
fn names_of_sessions_that_are_gone_are_not_kept() {
    let mut recorder = Recorder::start(None, run(), &Threads::free(), drop).unwrap();
    for session in 0..100 {
        recorder.name(session, Some("web".to_owned()));
        recorder.end_session(session);
    }
    recorder.record(&sample(100, 1, Duration::from_millis(1)));
    recorder.name(100, Some("db".to_owned()));
    recorder.write_interval(Duration::from_secs(1)).unwrap();
    assert_eq!(recorder.names.len(), 1);
}

#[test]
fn an_earlier_run_is_set_aside_and_a_running_one_is_left_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let prefix = scratch.path().join("run");
    let files = || {
        let names = std::fs::read_dir(scratch.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    let once = |pauses: u64| {
        let mut recorder = Recorder::start(Some(&prefix), run(), &Threads::free(), drop).unwrap();
        recorder.record(&sample(1, 1, Duration::from_millis(pauses)));
        let error = Recorder::start(Some(&prefix), run(), &Threads::free(), drop)
            .err()
            .unwrap();
        assert!(
            matches!(&error, MetricsError::InUse(path) if path == &with_suffix(&prefix, ".reply.hlog")),
            "{error}"
        );
        recorder.finish(Duration::from_secs(1)).1.unwrap();
    };
    once(3);
    once(5);
    let earlier = with_suffix(&prefix, ".run-1");
    assert_eq!(read_log(&log_of(&earlier, Phase::Pause)).0.len(), 1);
    assert!(with_suffix(&earlier, ".json").exists());
    assert_eq!(files().len(), 2 * (Phase::ALL.len() + 1));
    for _ in 0..RUNS_KEPT + 2 {
        once(1);
    }
    assert_eq!(files().len(), (RUNS_KEPT + 1) * (Phase::ALL.len() + 1));
    assert!(!with_suffix(&earlier, ".json").exists());
    let error = Recorder::start(Some(&scratch.path().join("")), run(), &Threads::free(), drop)
        .err()
        .unwrap();
    assert!(error.to_string().contains("is a directory"), "{error}");
}
