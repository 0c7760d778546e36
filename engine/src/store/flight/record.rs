//! One checkpoint's record: when what happened, and what the receiving core did meanwhile.
//!
//! A record has the same size for every guest: it has the first and the last byte of the first 16 channels, and of all of up to 255 the one that
//! began first, when the last one began, the one whose last byte came last, and the first and the last arrival at the sync.

use super::channels::{ChannelBytes, ChannelMoments, FLIGHT_CHANNELS};
use super::ticks::{high, known, low, maybe_ticks, ticks};
use super::{RECORD_WORDS, checksum};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// In the word of the channels: their numbers, and whether the reply waited for a flush.
const CHANNEL_MASK: u32 = 0x1ff;
const WAITED_BIT: u32 = 31;

/// The words of the channels one by one begin here. The one before is free.
const CHANNELS_AT: usize = RECORD_WORDS - FLIGHT_CHANNELS;

/// What the kernel's scheduler says of the core that drives the main channel, from REPLY sent to LOADED sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SchedulerTimes {
    /// It ran, in the kernel too: receiving is copying there.
    pub ran_ns: u64,
    /// It could have run, and another thread did.
    pub runnable_ns: u64,
}

/// See the module. Times without another word are spans since the request was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FlightRecord {
    /// The checkpoint's number in its session.
    pub checkpoint: u64,
    /// CHECKPOINT_REQUEST read, since the receiver's start.
    pub requested_at_ns: u64,
    /// CHECKPOINT_REPLY sent.
    pub reply_ns: u64,
    /// VMSTATE_SEND read.
    pub send_ns: u64,
    /// First byte on a multifd channel. None in plain mode, like what follows of channels.
    pub first_byte_ns: Option<u64>,
    /// First byte on the channel that began last.
    pub last_begin_ns: Option<u64>,
    /// First arrival of a channel at the last sync.
    pub first_sync_ns: Option<u64>,
    /// Last byte on the channel that ended last.
    pub last_byte_ns: Option<u64>,
    /// Last arrival of a channel at the last sync: later than its last byte where compressed packets were still to be decoded.
    pub last_sync_ns: Option<u64>,
    /// The channel that began first.
    pub first_channel: Option<u8>,
    /// The channel that arrived last.
    pub last_channel: Option<u8>,
    /// First and last byte of each channel up to number 15.
    #[schemars(with = "Vec<ChannelBytes>")]
    pub channels: ChannelMoments,
    /// All pages here, every channel synced.
    pub ram_ns: u64,
    /// The device state complete.
    pub device_state_ns: u64,
    /// Committed.
    pub committed_ns: u64,
    /// VMSTATE_LOADED sent.
    pub loaded_ns: u64,
    /// None where the kernel does not say it.
    pub scheduler: Option<SchedulerTimes>,
    /// Most time that another core was busy with one of the channels.
    pub away_ran_ns: u64,
    /// Most time that such a core could have run, and another thread did.
    pub away_runnable_ns: u64,
    /// The main channel waited for a thread that wrote a large device state to its file.
    pub apart_ns: u64,
    /// It waited for the guard's answer.
    pub guard_ns: u64,
    /// Whether CHECKPOINT_REPLY waited for the flush of the checkpoint before. The guest ran meanwhile.
    pub waited_for_flush: bool,
    /// In that wait the core could have run, and another thread did.
    pub reply_runnable_ns: u64,
    /// The copying to the RAM image, summed over the threads that did it. 0 until it has ended.
    pub flush_ns: u64,
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// On all channels.
    pub bytes: u64,
}

/// Channels are counted from 1 here, 0 is none.
fn channel_number(channel: Option<u8>) -> u32 {
    channel.map_or(0, |channel| u32::from(channel) + 1)
}

fn channel(number: u32) -> Option<u8> {
    number
        .checked_sub(1)
        .and_then(|channel| u8::try_from(channel).ok())
}

impl FlightRecord {
    /// The guest's pause as the receiver sees it: REPLY sent to LOADED sent.
    pub fn pause_ns(&self) -> u64 {
        self.loaded_ns.saturating_sub(self.reply_ns)
    }

    /// The word of its place that says whose it is, and what follows it.
    pub(super) fn to_words(self) -> [u64; RECORD_WORDS] {
        let spans = [
            ticks(self.reply_ns),
            ticks(self.send_ns),
            maybe_ticks(self.first_byte_ns),
            maybe_ticks(self.last_begin_ns),
            maybe_ticks(self.first_sync_ns),
            maybe_ticks(self.last_byte_ns),
            maybe_ticks(self.last_sync_ns),
            ticks(self.ram_ns),
            ticks(self.device_state_ns),
            ticks(self.committed_ns),
            ticks(self.loaded_ns),
            maybe_ticks(self.scheduler.map(|times| times.ran_ns)),
            maybe_ticks(self.scheduler.map(|times| times.runnable_ns)),
            ticks(self.away_ran_ns),
            ticks(self.away_runnable_ns),
            ticks(self.apart_ns),
            ticks(self.guard_ns),
            ticks(self.reply_runnable_ns),
            ticks(self.flush_ns),
            channel_number(self.first_channel)
                | channel_number(self.last_channel) << 16
                | u32::from(self.waited_for_flush) << WAITED_BIT,
        ];
        let mut words = [0; RECORD_WORDS];
        words[0] = self.checkpoint.saturating_add(1);
        words[2] = self.requested_at_ns;
        for (word, pair) in words[3..13].iter_mut().zip(spans.chunks_exact(2)) {
            *word = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        words[13] = self.bytes;
        let count = |pages: u64| u64::from(u32::try_from(pages).unwrap_or(u32::MAX));
        words[14] = count(self.pages) | count(self.zero_pages) << 32;
        words[CHANNELS_AT..].copy_from_slice(&self.channels.to_words());
        words[1] = Self::check(&words);
        words
    }

    fn check(words: &[u64; RECORD_WORDS]) -> u64 {
        let mut checked = *words;
        checked[1] = 0;
        checksum(&checked)
    }

    /// None if it is not as it was written.
    pub(super) fn of_words(words: &[u64; RECORD_WORDS]) -> Option<Self> {
        if Self::check(words) != words[1] {
            return None;
        }
        let span = |number: usize| {
            let word = words[3 + number / 2];
            if number.is_multiple_of(2) {
                low(word)
            } else {
                high(word)
            }
        };
        let time = |number| known(span(number)).unwrap_or(0);
        let maybe = |number| known(span(number));
        let channels = span(19);
        let record = Self {
            checkpoint: words[0].checked_sub(1)?,
            requested_at_ns: words[2],
            reply_ns: time(0),
            send_ns: time(1),
            first_byte_ns: maybe(2),
            last_begin_ns: maybe(3),
            first_sync_ns: maybe(4),
            last_byte_ns: maybe(5),
            last_sync_ns: maybe(6),
            first_channel: channel(channels & CHANNEL_MASK),
            last_channel: channel(channels >> 16 & CHANNEL_MASK),
            channels: ChannelMoments::of_words(words.last_chunk()?),
            ram_ns: time(7),
            device_state_ns: time(8),
            committed_ns: time(9),
            loaded_ns: time(10),
            scheduler: maybe(11)
                .zip(maybe(12))
                .map(|(ran_ns, runnable_ns)| SchedulerTimes { ran_ns, runnable_ns }),
            away_ran_ns: time(13),
            away_runnable_ns: time(14),
            apart_ns: time(15),
            guard_ns: time(16),
            waited_for_flush: channels >> WAITED_BIT & 1 == 1,
            reply_runnable_ns: time(17),
            flush_ns: time(18),
            pages: u64::from(low(words[14])),
            zero_pages: u64::from(high(words[14])),
            bytes: words[13],
        };
        // A checksum says that it is what was written. What is shown of it is subtracted: it must be in order.
        let moments = [
            record.reply_ns,
            record.send_ns,
            record.ram_ns,
            record.device_state_ns,
            record.committed_ns,
            record.loaded_ns,
        ];
        moments.is_sorted().then_some(record)
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> FlightRecord {
        FlightRecord {
            checkpoint: 7,
            requested_at_ns: 123_456_789_012,
            reply_ns: 1_000,
            send_ns: 2_000_000,
            first_byte_ns: Some(2_100_000),
            last_begin_ns: Some(2_200_000),
            first_sync_ns: Some(3_000_000),
            last_byte_ns: Some(3_400_000),
            last_sync_ns: Some(3_500_000),
            first_channel: Some(0),
            last_channel: Some(254),
            channels: ChannelMoments::from(vec![ChannelBytes {
                channel: 15,
                first_byte_ns: 2_200_000,
                last_byte_ns: 3_400_000,
            }]),
            ram_ns: 3_600_000,
            device_state_ns: 3_700_000,
            committed_ns: 3_800_000,
            loaded_ns: 3_900_000,
            scheduler: Some(SchedulerTimes {
                ran_ns: 900_000,
                runnable_ns: 100,
            }),
            away_ran_ns: 1,
            waited_for_flush: true,
            reply_runnable_ns: 700,
            bytes: u64::MAX,
            pages: 3,
            zero_pages: 4,
            ..FlightRecord::default()
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let written = record();
        let read = FlightRecord::of_words(&written.to_words()).unwrap();
        // Below a tick nothing is kept.
        assert_eq!(
            read,
            FlightRecord {
                away_ran_ns: 0,
                ..written
            }
        );
        let plain = FlightRecord::of_words(&FlightRecord::default().to_words()).unwrap();
        assert_eq!(plain, FlightRecord::default());
        let endless = FlightRecord {
            loaded_ns: u64::MAX,
            ..written
        };
        let read = FlightRecord::of_words(&endless.to_words()).unwrap();
        assert!(read.loaded_ns > 420_000_000_000, "{}", read.loaded_ns);
    }

    #[test]
    fn what_cannot_have_been_is_not_read() {
        let reversed = FlightRecord {
            loaded_ns: 0,
            ..record()
        };
        assert_eq!(FlightRecord::of_words(&reversed.to_words()), None);
    }

    proptest! {
        #[test]
        fn no_damage_is_taken_for_a_record(word in 0..RECORD_WORDS, bit in 0..64u32) {
            let mut words = record().to_words();
            words[word] ^= 1 << bit;
            prop_assert_eq!(FlightRecord::of_words(&words), None);
        }
    }
}
