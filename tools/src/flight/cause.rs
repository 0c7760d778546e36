//! Why a checkpoint is slow: the part of it that exceeds the usual most.
//!
//! A checkpoint with many pages takes long, and so does one whose primary stops its guest late. What makes it slow is not its
//! largest part, which may be as large in every checkpoint, but the part that is larger than in the median one.

use super::By;
use colo_ring::store::{FlightRecord, Window};
use schemars::JsonSchema;
use serde::Serialize;
use std::borrow::Cow;

/// Whose time made a checkpoint slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Whose {
    /// The primary's, its guard's or the network's.
    Primary,
    /// This host's scheduler's.
    Host,
    /// This receiver's.
    Ours,
    /// The kernel does not say.
    Unknown,
    /// It was hardly slower than usual.
    Nobody,
}

/// Why a checkpoint is slow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Cause {
    /// Whose time it is.
    pub whose: Whose,
    /// In which part, or by what: a few words.
    pub what: Cow<'static, str>,
    /// How much longer that took than usual.
    pub excess_ns: u64,
}

/// What exceeds the usual by less than one part in so many of the checkpoint is not called slow.
const USUAL_SHARE: u64 = 20;

/// One channel is named if it came later than all others by more than one part in so many of what exceeds the usual.
const LATE_SHARE: u64 = 2;

/// The parts of a pause or of a reply, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) primary: u64,
    pub(super) guard: u64,
    pub(super) host: u64,
    pub(super) working: u64,
    pub(super) waiting: u64,
    pub(super) unknown: u64,
}

impl Parts {
    pub(super) fn of(record: &FlightRecord, by: By) -> Self {
        match (by, record.split()) {
            (By::Reply, _) => {
                // The primary has no part in it: a reply waits for a flush or is sent at once.
                let host = record.reply_runnable_ns.min(record.reply_ns);
                Self {
                    host,
                    working: record.reply_ns - host,
                    ..Self::default()
                }
            }
            (By::Pause, None) => Self {
                unknown: record.pause_ns(),
                ..Self::default()
            },
            (By::Pause, Some(split)) => Self {
                primary: split.primary_ns,
                guard: split.guard_ns,
                host: split.host_ns,
                working: split.working_ns,
                waiting: split.waiting_ns,
                unknown: 0,
            },
        }
    }

    fn all_parts(&self) -> [u64; 6] {
        [
            self.primary,
            self.guard,
            self.host,
            self.working,
            self.waiting,
            self.unknown,
        ]
    }

    pub(super) fn all(&self) -> u64 {
        self.all_parts().iter().sum()
    }
}

/// The median of each part, over all checkpoints.
pub(super) struct Usual {
    pub(super) parts: Parts,
    windows: [u64; 5],
}

pub(super) fn median(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<_> = values.collect();
    let middle = values.len() / 2;
    match values.is_empty() {
        true => 0,
        false => *values.select_nth_unstable(middle).1,
    }
}

impl Usual {
    pub(super) fn of(records: &[FlightRecord], by: By) -> Self {
        let parts: Vec<_> = records.iter().map(|record| Parts::of(record, by)).collect();
        let of = |part: fn(&Parts) -> u64| median(parts.iter().map(part));
        Self {
            parts: Parts {
                primary: of(|parts| parts.primary),
                guard: of(|parts| parts.guard),
                host: of(|parts| parts.host),
                working: of(|parts| parts.working),
                waiting: of(|parts| parts.waiting),
                unknown: of(|parts| parts.unknown),
            },
            windows: Window::ALL.map(|window| median(records.iter().map(|record| record.window_ns(window)))),
        }
    }

    /// The window that exceeds the usual most.
    fn longest_window(&self, record: &FlightRecord) -> Window {
        let excess =
            |(window, usual): (Window, u64)| (record.window_ns(window).saturating_sub(usual), window);
        let excesses = Window::ALL.into_iter().zip(self.windows).map(excess);
        let longest = excesses.max_by_key(|(excess, _)| *excess);
        longest.map_or(Window::Ram, |(_, window)| window)
    }

    /// Why a checkpoint is slow.
    pub(super) fn cause(&self, record: &FlightRecord, by: By) -> Cause {
        let parts = Parts::of(record, by);
        let excesses = parts.all_parts().into_iter().zip(self.parts.all_parts());
        let excesses = excesses.map(|(part, usual)| part.saturating_sub(usual));
        // The first of those that are equal: nothing is blamed on this host or on us for nothing.
        let largest = (0..6).zip(excesses).rev().max_by_key(|(_, excess)| *excess);
        let (part, excess_ns) = largest.unwrap_or_default();
        if excess_ns.saturating_mul(USUAL_SHARE) < by.of(record) {
            return Cause {
                whose: Whose::Nobody,
                what: "usual".into(),
                excess_ns,
            };
        }
        let window = self.longest_window(record);
        let (whose, what) = match (by, part) {
            (By::Reply, 2) => (Whose::Host, "scheduler"),
            (By::Reply, _) if record.waited_for_flush => (Whose::Ours, "flush"),
            (By::Reply, _) => (Whose::Ours, "answer"),
            (By::Pause, 0) => (Whose::Primary, primarys(window)),
            (By::Pause, 1) => (Whose::Primary, "guard"),
            (By::Pause, 2) => (Whose::Host, "scheduler"),
            (By::Pause, 3) => (Whose::Ours, worked(record, window)),
            (By::Pause, 4) => (Whose::Ours, waited(record)),
            (By::Pause, _) => (Whose::Unknown, primarys(window)),
        };
        // One channel whose bytes came late says more than that RAM did; unless one came later still, of which there are no times of its own.
        let latest = record.channels.iter().map(|bytes| bytes.last_byte_ns).max();
        let channel = record.channels.last().filter(|last| {
            whose == Whose::Primary
                && latest >= record.last_byte_ns
                && window == Window::Ram
                && last.behind_others_ns.saturating_mul(LATE_SHARE) > excess_ns
        });
        let what = channel.map_or(what.into(), |last| format!("channel {}", last.channel).into());
        Cause {
            whose,
            what,
            excess_ns,
        }
    }
}

/// What the primary was doing.
fn primarys(window: Window) -> &'static str {
    match window {
        Window::Stop => "stopping",
        Window::Ram => "sending RAM",
        Window::DeviceState => "device state",
        Window::Commit | Window::Answer => "network",
    }
}

/// What this receiver's core was doing.
fn worked(record: &FlightRecord, window: Window) -> &'static str {
    match window {
        // With --commit sync.
        Window::Commit if record.flush_ns.saturating_mul(2) > record.window_ns(window) => "flush",
        Window::Commit => "commit",
        Window::Answer => "answer",
        Window::Stop => "other work",
        Window::Ram | Window::DeviceState => "receiving",
    }
}

/// What it waited for.
fn waited(record: &FlightRecord) -> &'static str {
    let decode = record.last_sync_ns.zip(record.last_byte_ns);
    let decode = decode.map_or(0, |(sync, byte)| sync.saturating_sub(byte));
    let waits = [
        (record.away_ran_ns, "other core"),
        (decode, "decoding"),
        (record.apart_ns, "state file"),
    ];
    let longest = waits.into_iter().max_by_key(|(wait, _)| *wait);
    longest.map_or("", |(_, what)| what)
}
