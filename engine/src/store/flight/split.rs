//! Whose time a pause was: what follows from a record.
//!
//! The core that drives the main channel either runs, could run and is not let, or sleeps: these three are known from the kernel and
//! make up the pause. It sleeps when nothing has arrived for it, which is the primary's or the network's time, unless something of
//! this receiver is known to have been waited for: another core that drove a channel, the workers that decode, the thread that
//! writes a large device state.

use super::record::FlightRecord;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a pause went. The parts add up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PauseSplit {
    /// The sockets were empty: the primary or the network.
    pub primary_ns: u64,
    /// The guard's answer was waited for.
    pub guard_ns: u64,
    /// A core could have run, and this host ran another thread on it.
    pub host_ns: u64,
    /// The core ran: it received, committed, or worked for other guests.
    pub working_ns: u64,
    /// It waited for another core, for a worker or for a thread of this receiver.
    pub waiting_ns: u64,
}

/// The parts of a pause one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Window {
    /// REPLY to VMSTATE_SEND: the primary stops its guest.
    Stop,
    /// Then to the last page.
    Ram,
    /// Then to the end of the device state.
    DeviceState,
    /// Then to the commit.
    Commit,
    /// Then to LOADED.
    Answer,
}

impl Window {
    /// All of them, in their order.
    pub const ALL: [Self; 5] = [
        Self::Stop,
        Self::Ram,
        Self::DeviceState,
        Self::Commit,
        Self::Answer,
    ];
}

impl PauseSplit {
    /// What is this receiver's.
    pub fn ours_ns(&self) -> u64 {
        self.working_ns.saturating_add(self.waiting_ns)
    }

    /// What is the primary's, its guard's and the network's.
    pub fn theirs_ns(&self) -> u64 {
        self.primary_ns.saturating_add(self.guard_ns)
    }
}

impl FlightRecord {
    /// How long a part of the pause took.
    pub fn window_ns(&self, window: Window) -> u64 {
        let (from, to) = match window {
            Window::Stop => (self.reply_ns, self.send_ns),
            Window::Ram => (self.send_ns, self.ram_ns),
            Window::DeviceState => (self.ram_ns, self.device_state_ns),
            Window::Commit => (self.device_state_ns, self.committed_ns),
            Window::Answer => (self.committed_ns, self.loaded_ns),
        };
        to.saturating_sub(from)
    }

    /// Whose time the pause was. None where the kernel does not say when the core ran.
    pub fn split(&self) -> Option<PauseSplit> {
        let scheduler = self.scheduler?;
        let mut rest = self.pause_ns();
        let mut take = |part: u64| {
            let part = part.min(rest);
            rest -= part;
            part
        };
        let working_ns = take(scheduler.ran_ns);
        let home_ns = take(scheduler.runnable_ns);
        let guard_ns = take(self.guard_ns);
        let apart_ns = take(self.apart_ns);
        // While the home core slept, another one may have been at work for it, or not have been let.
        let away_host_ns = take(self.away_runnable_ns);
        let away_ns = take(self.away_ran_ns);
        let decode = self.last_sync_ns.zip(self.last_byte_ns);
        let decode_ns = take(decode.map_or(0, |(sync, byte)| sync.saturating_sub(byte)));
        Some(PauseSplit {
            primary_ns: rest,
            guard_ns,
            host_ns: home_ns + away_host_ns,
            working_ns,
            waiting_ns: apart_ns + away_ns + decode_ns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::flight::SchedulerTimes;

    fn record(ran_ns: u64, runnable_ns: u64) -> FlightRecord {
        FlightRecord {
            reply_ns: 1_000,
            loaded_ns: 101_000,
            scheduler: Some(SchedulerTimes { ran_ns, runnable_ns }),
            ..FlightRecord::default()
        }
    }

    fn sum(split: &PauseSplit) -> u64 {
        split.theirs_ns() + split.host_ns + split.ours_ns()
    }

    #[test]
    fn parts_add_up_to_the_pause() {
        let split = record(30_000, 10_000).split().unwrap();
        assert_eq!(
            (split.working_ns, split.host_ns, split.primary_ns),
            (30_000, 10_000, 60_000)
        );
        let apart = FlightRecord {
            apart_ns: 20_000,
            guard_ns: 15_000,
            away_ran_ns: 5_000,
            away_runnable_ns: 2_000,
            last_byte_ns: Some(10_000),
            last_sync_ns: Some(13_000),
            ..record(30_000, 10_000)
        };
        let split = apart.split().unwrap();
        assert_eq!(
            (split.waiting_ns, split.guard_ns, split.host_ns),
            (28_000, 15_000, 12_000)
        );
        assert_eq!(sum(&split), 100_000);
        // Clocks that do not agree make no part larger than the whole.
        let split = record(500_000, 500_000).split().unwrap();
        assert_eq!((split.working_ns, sum(&split)), (100_000, 100_000));
        assert_eq!(
            FlightRecord {
                scheduler: None,
                ..apart
            }
            .split(),
            None
        );
    }
}
