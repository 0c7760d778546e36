use super::*;
use colo_ring::store::{ChannelBytes, ChannelMoments, SchedulerTimes};

const MS: u64 = 1_000_000;

/// A checkpoint of 4 ms, of which the core ran 1.
fn record(checkpoint: u64) -> FlightRecord {
    FlightRecord {
        checkpoint,
        requested_at_ns: checkpoint * 100 * MS,
        reply_ns: MS / 10,
        send_ns: MS,
        ram_ns: 3 * MS,
        device_state_ns: 3 * MS + MS / 2,
        committed_ns: 4 * MS,
        loaded_ns: 4 * MS + MS / 10,
        scheduler: Some(SchedulerTimes {
            ran_ns: MS,
            runnable_ns: 0,
        }),
        pages: 250,
        ..FlightRecord::default()
    }
}

/// The same, where everything from a moment on is later.
fn late(checkpoint: u64, by: u64, ran: u64, runnable: u64, is_late: impl Fn(usize) -> bool) -> FlightRecord {
    let usual = record(checkpoint);
    let add = |moment: usize, at: u64| if is_late(moment) { at + by } else { at };
    FlightRecord {
        send_ns: add(0, usual.send_ns),
        ram_ns: add(1, usual.ram_ns),
        device_state_ns: add(2, usual.device_state_ns),
        committed_ns: add(3, usual.committed_ns),
        loaded_ns: add(4, usual.loaded_ns),
        scheduler: Some(SchedulerTimes {
            ran_ns: MS + ran,
            runnable_ns: runnable,
        }),
        ..usual
    }
}

fn report(slow: Vec<FlightRecord>) -> SlowReport {
    let usual = (1..=1000).map(record);
    let log = FlightLog {
        session: 3,
        capacity: 65_536,
        records: usual.chain(slow).collect(),
        ..FlightLog::default()
    };
    SlowReport::of(&log, Some("web3".to_owned()), 20, By::Pause)
}

#[test]
fn the_right_one_is_blamed() {
    let cases = [
        (late(2001, 50 * MS, 0, 0, |_| true), Whose::Primary, "stopping"),
        (
            late(2001, 50 * MS, 0, 0, |moment| moment > 0),
            Whose::Primary,
            "sending RAM",
        ),
        (
            late(2001, 50 * MS, 0, 0, |moment| moment > 1),
            Whose::Primary,
            "device state",
        ),
        (
            late(2001, 50 * MS, 0, 49 * MS, |_| true),
            Whose::Host,
            "scheduler",
        ),
        (
            late(2001, 50 * MS, 50 * MS, 0, |moment| moment > 0),
            Whose::Ours,
            "receiving",
        ),
        (
            late(2001, 50 * MS, 50 * MS, 0, |moment| moment > 2),
            Whose::Ours,
            "commit",
        ),
    ];
    for (slow, whose, what) in cases {
        let report = report(vec![slow]);
        let first = &report.slowest[0];
        assert_eq!(first.record.checkpoint, 2001);
        assert_eq!((first.cause.whose, &*first.cause.what), (whose, what));
        assert!(first.cause.excess_ns >= 49 * MS && first.cause.excess_ns <= 50 * MS);
    }
    // What it waited for beside the primary is ours.
    let slow = late(2001, 50 * MS, 0, 0, |moment| moment > 2);
    let apart = FlightRecord {
        apart_ns: 50 * MS,
        ..slow
    };
    assert_eq!(report(vec![apart]).slowest[0].cause.what, "state file");
    let guard = FlightRecord {
        guard_ns: 50 * MS,
        ..slow
    };
    assert_eq!(report(vec![guard]).slowest[0].cause.what, "guard");
    let unknown = FlightRecord {
        scheduler: None,
        ..slow
    };
    assert_eq!(report(vec![unknown]).slowest[0].cause.whose, Whose::Unknown);
}

/// Four channels, of which this one is complete so much later than the others.
fn with_channels(record: FlightRecord, late: u8, by_ns: u64) -> FlightRecord {
    let bytes = (0..4).map(|channel| ChannelBytes {
        channel,
        first_byte_ns: MS,
        last_byte_ns: if channel == late { 2 * MS + by_ns } else { 2 * MS },
    });
    let channels = ChannelMoments::from(bytes.collect::<Vec<_>>());
    FlightRecord { channels, ..record }
}

/// There are times of the first 16 channels, and the last byte of all.
#[test]
fn no_channel_is_named_where_one_without_times_came_later() {
    let slow = with_channels(late(2001, 50 * MS, 0, 0, |moment| moment > 0), 3, 49 * MS);
    let what = |last_byte_ns| {
        let slow = FlightRecord { last_byte_ns, ..slow };
        report(vec![slow]).slowest[0].cause.what.to_string()
    };
    assert_eq!(what(Some(51 * MS)), "channel 3");
    assert_eq!(what(Some(52 * MS)), "sending RAM");
}

#[test]
fn the_channel_that_came_late_is_named() {
    let usual = (1..=1000).map(|checkpoint| with_channels(record(checkpoint), 1, MS / 10));
    let in_ram = |checkpoint| late(checkpoint, 50 * MS, 0, 0, |moment| moment > 0);
    let slow = [
        with_channels(in_ram(2001), 3, 49 * MS),
        with_channels(in_ram(2002), 3, 48 * MS),
        // All of them came late.
        with_channels(in_ram(2003), 2, 0),
    ];
    let log = FlightLog {
        records: usual.chain(slow).collect(),
        ..FlightLog::default()
    };
    let report = SlowReport::of(&log, None, 3, By::Pause);
    let whats: Vec<_> = report.slowest.iter().map(|slow| &*slow.cause.what).collect();
    assert_eq!(whats, ["channel 3", "channel 3", "sending RAM"]);
    let last = report.slowest[0].last.unwrap();
    assert_eq!((last.channel, last.behind_others_ns), (3, 49 * MS));
    let expected = ChannelSpread {
        usual_ns: MS / 10,
        of_slowest_ns: 48 * MS,
        last_channel: 3,
        last_count: 3,
    };
    assert_eq!(report.channels, Some(expected));
    let table = report.table();
    let said = "channels end 48.0 ms apart, usually 100 µs; channel 3 is last in 3 of them";
    assert!(table.contains(said), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let page = page(&report);
    assert_eq!(page.matches(r#"class="channel""#).count(), 12);
    assert!(
        page.contains("2001: channel 3 from 900 µs to 50.9 ms after CHECKPOINT_REPLY"),
        "{page}"
    );
}

#[test]
fn tables_fit_80_columns_and_say_whose_time_it_was() {
    let slow: Vec<_> = (0..30)
        .map(|n| late(9_000_000 + n, 330 * MS + n, 0, 300 * MS, |_| true))
        .collect();
    let report = report(slow);
    let table = report.table();
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    for said in ["session 3 (web3)", "usual by: 20 host", "9000029", "host 9"] {
        assert!(table.contains(said), "{said}: {table}");
    }
    let page = page(&report);
    assert_eq!(page.matches("<svg ").count(), page.matches("</svg>").count());
    assert!(page.contains("9000029") && !page.contains("NaN"));
}

#[test]
fn replies_are_the_flush_or_the_host() {
    let reply = |reply_ns, reply_runnable_ns| {
        let usual = record(2001);
        let shift = |at: u64| at + reply_ns;
        FlightRecord {
            reply_ns,
            send_ns: shift(usual.send_ns),
            ram_ns: shift(usual.ram_ns),
            device_state_ns: shift(usual.device_state_ns),
            committed_ns: shift(usual.committed_ns),
            loaded_ns: shift(usual.loaded_ns),
            waited_for_flush: true,
            reply_runnable_ns,
            ..usual
        }
    };
    for (runnable, whose, what) in [(0, Whose::Ours, "flush"), (9 * MS, Whose::Host, "scheduler")] {
        let log = FlightLog {
            records: (1..=10).map(record).chain([reply(10 * MS, runnable)]).collect(),
            ..FlightLog::default()
        };
        let report = SlowReport::of(&log, None, 3, By::Reply);
        let cause = &report.slowest[0].cause;
        assert_eq!((cause.whose, &*cause.what), (whose, what));
    }
}

#[test]
fn an_empty_recorder_has_nothing_to_show() {
    let report = SlowReport::of(&FlightLog::default(), None, 20, By::Pause);
    assert!(report.table().contains("the last 0 checkpoints"));
    assert!(page(&report).contains("</html>"));
}
