//! Where the main channel and the multifd channels of one session meet (spec §10).
//!
//! * **Sync**: a channel that has read a SYNC *arrives* and is not read further until the main channel, having read
//!   its marker and seen all channels arrived, *releases* them. Marker and SYNCs are matched by count.
//! * **Gate**: between the end of a RAM round and the answer to the next CHECKPOINT_REQUEST no channel may carry
//!   pages. The main channel *closes* the gate before it commits; a channel announces every packet with pages
//!   before it touches guest memory. The later of the two sees the other: either the channel finds the gate closed, or
//!   the main channel finds the channel busy. Both are protocol errors of the primary, so a commit never runs
//!   beside a write to the pages it copies, whatever the primary sends.
//!
//! Nothing here blocks or wakes: the drivers of the channels do that.

use crate::canary::{self, Canary};
use crate::sync::{AtomicBool, AtomicU32, Ordering, fence};
use crate::units::ChannelId;

/// The shared state of one session's channels. One channel is driven by one thread at a time.
#[derive(Debug)]
pub struct Rendezvous {
    channels: Vec<Channel>,
    arrived: AtomicU32,
    generation: AtomicU32,
    gate_closed: AtomicBool,
}

/// On a cache line of its own: it is written for every packet.
#[derive(Debug)]
#[repr(align(64))]
struct Channel {
    busy: AtomicBool,
}

/// What a channel keeps while it is parked at a SYNC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u32);

/// The gate is closed: the primary sent pages after the last sync of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateClosed;

impl Rendezvous {
    /// For a session with this many multifd channels; 0 is plain mode, where every sync is complete at once.
    pub fn new(channels: u8) -> Self {
        let channel = |_| Channel {
            busy: AtomicBool::new(false),
        };
        Self {
            channels: (0..channels).map(channel).collect(),
            arrived: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            gate_closed: AtomicBool::new(false),
        }
    }

    /// A channel has applied everything up to and including its SYNC. Returns its ticket, and whether it was the
    /// last one: then the main channel's driver must be woken.
    pub fn arrive(&self) -> (Ticket, bool) {
        // Read before arriving: the main channel can release as soon as the last one has arrived.
        let ticket = Ticket(self.generation.load(Ordering::Acquire));
        // Release: a thread that sees the arrival sees this channel's pages.
        let before = self.arrived.fetch_add(1, Ordering::AcqRel);
        (
            ticket,
            usize::try_from(before).is_ok_and(|n| n + 1 == self.channels.len()),
        )
    }

    /// Whether the channel parked with this ticket may be read on.
    pub fn is_released(&self, ticket: Ticket) -> bool {
        self.generation.load(Ordering::Acquire) != ticket.0
    }

    /// Whether every channel has arrived.
    pub fn all_arrived(&self) -> bool {
        let early = usize::from(canary::is_set(Canary::EarlySync));
        usize::try_from(self.arrived.load(Ordering::Acquire)).is_ok_and(|n| n + early >= self.channels.len())
    }

    /// At a marker with all channels arrived: the next epoch begins. Only the main channel's driver calls it.
    pub fn release(&self) {
        // All channels are parked, so none arrives between the two stores.
        self.arrived.store(0, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A channel is about to write pages of a packet.
    ///
    /// # Errors
    /// If the gate is closed: the packet must not be applied.
    pub fn begin_packet(&self, channel: ChannelId) -> Result<(), GateClosed> {
        let busy = &self.channels[usize::from(channel.0)].busy;
        // Only the channel's driver writes it. It is set while pages of an earlier packet are still to be applied.
        let was_busy = busy.load(Ordering::Relaxed);
        busy.store(true, Ordering::Relaxed);
        // With its twin in `close_gate`: of the two stores around the fences, at least one is seen by the other side.
        fence(Ordering::SeqCst);
        if self.gate_closed.load(Ordering::Acquire) && !canary::is_set(Canary::OpenGate) {
            busy.store(was_busy, Ordering::Release);
            return Err(GateClosed);
        }
        Ok(())
    }

    /// The pages of all packets that began are in place.
    pub fn end_packet(&self, channel: ChannelId) {
        self.channels[usize::from(channel.0)]
            .busy
            .store(false, Ordering::Release);
    }

    /// The RAM round is complete; nothing may be written until [`Self::open_gate`].
    ///
    /// # Errors
    /// The first channel that is in the middle of a packet.
    pub fn close_gate(&self) -> Result<(), ChannelId> {
        self.gate_closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // Acquire: what a channel wrote before it ended its packet is visible to the commit.
        let busy = self
            .channels
            .iter()
            .position(|channel| channel.busy.load(Ordering::Acquire));
        match busy.map(u8::try_from) {
            None => Ok(()),
            Some(position) => Err(ChannelId(position.unwrap_or(u8::MAX))),
        }
    }

    /// The next round may begin: before CHECKPOINT_REPLY is sent.
    pub fn open_gate(&self) {
        // Release: a packet that finds it open also sees that the commit has ended.
        self.gate_closed.store(false, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn back_to_back_markers_are_two_syncs() {
        let meeting = Rendezvous::new(2);
        assert!(!meeting.all_arrived());
        let (first, last) = meeting.arrive();
        assert!(!last && !meeting.is_released(first));
        let (second, last) = meeting.arrive();
        assert!(last && meeting.all_arrived());
        meeting.release();
        assert!(meeting.is_released(first) && meeting.is_released(second));
        assert!(!meeting.all_arrived());
        let (again, last) = meeting.arrive();
        assert!(!last && !meeting.is_released(again));
    }

    #[test]
    fn plain_mode_never_waits() {
        let meeting = Rendezvous::new(0);
        assert!(meeting.all_arrived());
        meeting.release();
        assert!(meeting.all_arrived());
    }

    #[test]
    fn pages_and_commit_exclude_each_other() {
        let meeting = Rendezvous::new(2);
        meeting.begin_packet(ChannelId(1)).unwrap();
        assert_eq!(meeting.close_gate(), Err(ChannelId(1)));
        meeting.end_packet(ChannelId(1));
        meeting.close_gate().unwrap();
        assert_eq!(meeting.begin_packet(ChannelId(0)), Err(GateClosed));
        meeting.close_gate().unwrap();
        meeting.open_gate();
        meeting.begin_packet(ChannelId(0)).unwrap();
        // A packet that is refused does not end the one before it.
        meeting.close_gate().unwrap_err();
        assert_eq!(meeting.begin_packet(ChannelId(0)), Err(GateClosed));
        assert_eq!(meeting.close_gate(), Err(ChannelId(0)));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use loom::sync::{Arc, Notify};

    /// All interleavings with at most that many preemptions: wake-ups may be spurious, which makes more too many.
    fn explore(case: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(case);
    }

    /// What channels wrote before they arrived is seen by the main channel that the last of them wakes, and nothing
    /// of the next epoch is.
    #[test]
    fn loom_sync_hands_pages_over() {
        explore(|| {
            let meeting = Arc::new(Rendezvous::new(2));
            let pages = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
            let wake_main = Arc::new(Notify::new());
            let wake_channels = [Arc::new(Notify::new()), Arc::new(Notify::new())];
            let channels: Vec<_> = (0..2)
                .map(|n| {
                    let (meeting, pages) = (meeting.clone(), pages.clone());
                    let (wake_main, released) = (wake_main.clone(), wake_channels[n].clone());
                    loom::thread::spawn(move || {
                        pages[n].store(1, Relaxed);
                        let (ticket, last) = meeting.arrive();
                        if last {
                            wake_main.notify();
                        }
                        while !meeting.is_released(ticket) {
                            released.wait();
                        }
                        pages[n].store(2, Relaxed);
                    })
                })
                .collect();
            while !meeting.all_arrived() {
                wake_main.wait();
            }
            assert_eq!(pages[0].load(Relaxed) + pages[1].load(Relaxed), 2);
            meeting.release();
            wake_channels.iter().for_each(|channel| channel.notify());
            for channel in channels {
                channel.join().unwrap();
            }
        });
    }

    /// A packet is either refused or seen by the commit.
    #[test]
    fn loom_gate_keeps_packets_out_of_a_commit() {
        loom::model(|| {
            let meeting = Arc::new(Rendezvous::new(1));
            let page = Arc::new(AtomicUsize::new(0));
            let channel = {
                let (meeting, page) = (meeting.clone(), page.clone());
                loom::thread::spawn(move || {
                    if meeting.begin_packet(ChannelId(0)).is_ok() {
                        page.store(1, Relaxed);
                        meeting.end_packet(ChannelId(0));
                    }
                })
            };
            if meeting.close_gate().is_ok() {
                let first = page.load(Relaxed);
                assert_eq!(first, page.load(Relaxed));
                // Nothing is written any more: the page is what it was.
                channel.join().unwrap();
                assert_eq!(first, page.load(Relaxed));
            } else {
                channel.join().unwrap();
            }
        });
    }
}
