//! When the bytes of each multifd channel came: of the first channels, as many as a record of fixed size has room for.

use super::ticks::{UNKNOWN, known, ticks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Channels that a record has one by one. Of those above there is what all channels have in common.
pub const FLIGHT_CHANNELS: usize = 16;

/// First and last byte of one channel, since the request was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChannelBytes {
    /// The channel.
    pub channel: u8,
    /// Its first byte.
    pub first_byte_ns: u64,
    /// Its last byte.
    pub last_byte_ns: u64,
}

/// First and last byte of each of the first channels, as they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Vec<ChannelBytes>", from = "Vec<ChannelBytes>")]
pub struct ChannelMoments([(u32, u32); FLIGHT_CHANNELS]);

impl Default for ChannelMoments {
    fn default() -> Self {
        Self([(UNKNOWN, UNKNOWN); FLIGHT_CHANNELS])
    }
}

impl ChannelMoments {
    /// Notes a channel, if there is room for it.
    pub fn set(&mut self, bytes: ChannelBytes) {
        if let Some(place) = self.0.get_mut(usize::from(bytes.channel)) {
            *place = (ticks(bytes.first_byte_ns), ticks(bytes.last_byte_ns));
        }
    }

    /// The channels on which something came, by their numbers.
    pub fn iter(&self) -> impl Iterator<Item = ChannelBytes> + '_ {
        (0u8..).zip(&self.0).filter_map(|(channel, (first, last))| {
            Some(ChannelBytes {
                channel,
                first_byte_ns: known(*first)?,
                last_byte_ns: known(*last)?,
            })
        })
    }

    /// The channel whose last byte came last, and when the last byte of the first one and of the last one before it came. None of fewer
    /// than two channels.
    pub fn last(&self) -> Option<LastChannel> {
        let mut ends: [Option<ChannelBytes>; FLIGHT_CHANNELS] = [None; FLIGHT_CHANNELS];
        let mut count = 0;
        for (place, bytes) in ends.iter_mut().zip(self.iter()) {
            *place = Some(bytes);
            count += 1;
        }
        let ends = &mut ends[..count];
        ends.sort_by_key(|bytes| bytes.map(|bytes| bytes.last_byte_ns));
        let (last, others) = ends.split_last()?;
        let (last, first, before) = ((*last)?, (*others.first()?)?, (*others.last()?)?);
        Some(LastChannel {
            channel: last.channel,
            behind_first_ns: last.last_byte_ns - first.last_byte_ns,
            behind_others_ns: last.last_byte_ns - before.last_byte_ns,
        })
    }

    pub(super) fn to_words(self) -> [u64; FLIGHT_CHANNELS] {
        self.0
            .map(|(first, last)| u64::from(first) | u64::from(last) << 32)
    }

    pub(super) fn of_words(words: &[u64; FLIGHT_CHANNELS]) -> Self {
        Self(words.map(|word| (super::ticks::low(word), super::ticks::high(word))))
    }
}

impl From<ChannelMoments> for Vec<ChannelBytes> {
    fn from(moments: ChannelMoments) -> Self {
        moments.iter().collect()
    }
}

impl From<Vec<ChannelBytes>> for ChannelMoments {
    fn from(channels: Vec<ChannelBytes>) -> Self {
        let mut moments = Self::default();
        channels.into_iter().for_each(|bytes| moments.set(bytes));
        moments
    }
}

/// The channel whose last byte came last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LastChannel {
    /// The channel.
    pub channel: u8,
    /// How much later than the last byte of the channel that was complete first.
    pub behind_first_ns: u64,
    /// How much later than the last byte of every other channel up to number 15.
    pub behind_others_ns: u64,
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    fn moments(ends: &[u64]) -> ChannelMoments {
        let mut moments = ChannelMoments::default();
        for (channel, last_byte_ns) in (0..).zip(ends.iter().copied()) {
            moments.set(ChannelBytes {
                channel,
                first_byte_ns: 100,
                last_byte_ns,
            });
        }
        moments
    }

    #[test]
    fn the_last_channel_is_compared_with_the_first_and_with_the_others() {
        let last = moments(&[5_000, 900_000, 1_000, 200_000]).last();
        let expected = LastChannel {
            channel: 1,
            behind_first_ns: 899_000,
            behind_others_ns: 700_000,
        };
        assert_eq!(last, Some(expected));
        assert_eq!(moments(&[7_000]).last(), None);
        assert_eq!(moments(&[]).last(), None);
        let two = moments(&[7_000, 6_000]).last().unwrap();
        assert_eq!(
            (two.channel, two.behind_first_ns, two.behind_others_ns),
            (0, 1_000, 1_000)
        );
    }

    #[test]
    fn there_is_room_for_sixteen_and_no_others_are_mixed_with_them() {
        let ends: Vec<u64> = (1..=20).map(|channel| channel * 1_000).collect();
        let moments = moments(&ends);
        let channels: Vec<ChannelBytes> = moments.into();
        assert_eq!(channels.len(), FLIGHT_CHANNELS);
        assert_eq!(channels[15].last_byte_ns, 16_000);
        assert_eq!(ChannelMoments::of_words(&moments.to_words()), moments);
        assert_eq!(ChannelMoments::from(channels), moments);
    }
}
