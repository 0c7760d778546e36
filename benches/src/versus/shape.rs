//! What the captured sessions are like: how much a checkpoint carries, and how.

use colo_ring_tests::lab::{Compression, Content, Guest, Machine, TestGuest};
use std::fmt;
use std::time::Duration;

/// Memory of the captured guest, MiB.
pub const MEMORY_MIB: u32 = 512;
/// The part of it that a busy guest writes to, at random. Almost all, so that pages are as scattered as they can be.
const REGION_MIB: u32 = 440;
const PAGES_PER_MIB: u32 = 256;

/// A captured session's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Guest pages of a checkpoint, MiB; 0 is an idle guest.
    pub mib: u32,
    /// multifd channels; 0 is plain mode.
    pub channels: u8,
    /// How the channels compress.
    pub compression: Option<Compression>,
}

/// Channels of sessions that are compressed.
const COMPRESSED_CHANNELS: u8 = 4;

impl Shape {
    /// Those that are measured when asked for: their pages compress to about a third.
    pub const COMPRESSED: [Self; 4] = [
        Self::compressed(5, Compression::Zstd(1)),
        Self::compressed(40, Compression::Zstd(1)),
        Self::compressed(5, Compression::Zlib(1)),
        Self::compressed(40, Compression::Zlib(1)),
    ];

    /// Those that are measured unless others are asked for.
    pub const ALL: [Self; 8] = [
        Self::new(0, 4),
        Self::new(5, 4),
        Self::new(30, 4),
        Self::new(160, 4),
        Self::new(0, 0),
        Self::new(5, 0),
        Self::new(30, 0),
        Self::new(160, 0),
    ];

    /// A kind.
    #[must_use]
    pub const fn new(mib: u32, channels: u8) -> Self {
        Self {
            mib,
            channels,
            compression: None,
        }
    }

    /// A kind whose channels compress.
    #[must_use]
    pub const fn compressed(mib: u32, compression: Compression) -> Self {
        Self {
            compression: Some(compression),
            ..Self::new(mib, COMPRESSED_CHANNELS)
        }
    }

    /// All there are.
    pub fn every() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().chain(Self::COMPRESSED)
    }

    /// Those that a word names: a whole name like `30M-plain`, a load like `30M` of sessions that are not compressed,
    /// or a mode like `plain` or `zstd`.
    #[must_use]
    pub fn named(word: &str) -> Vec<Self> {
        let meant = |shape: &Self| {
            let is_load = shape.compression.is_none() && shape.load() == word;
            is_load || shape.name() == word || shape.mode() == word
        };
        Self::every().filter(meant).collect()
    }

    /// Its name in options and files.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-{}", self.load(), self.mode())
    }

    /// How much it carries.
    #[must_use]
    pub fn load(&self) -> String {
        match self.mib {
            0 => "idle".to_owned(),
            mib => format!("{mib}M"),
        }
    }

    /// How it carries it.
    #[must_use]
    pub fn mode(&self) -> String {
        match (self.compression, self.channels) {
            (Some(compression), _) => compression.method_and_level().0.to_owned(),
            (None, 0) => "plain".to_owned(),
            (None, channels) => format!("multifd-{channels}"),
        }
    }

    /// Guest pages of a checkpoint that are wanted.
    #[must_use]
    pub fn pages(&self) -> u64 {
        u64::from(self.mib * PAGES_PER_MIB)
    }

    /// Checkpoints to capture: replays repeat them, but those that are compressed, in one stream for the session. Few
    /// where they are large, as a replay holds them in memory.
    #[must_use]
    pub fn captured_checkpoints(&self) -> usize {
        match self.mib {
            _ if self.compression.is_some() => 56,
            0..=9 => 10,
            10..=99 => 8,
            _ => 4,
        }
    }

    /// How long the guest runs between two checkpoints while it is captured.
    #[must_use]
    pub fn delay(&self) -> Duration {
        match self.mib {
            0 => Duration::from_millis(200),
            _ => Duration::from_millis(500),
        }
    }

    /// The guest that makes such checkpoints when it runs for `delay` between them. `percent` is 100, or what a first
    /// attempt has shown to be needed.
    #[must_use]
    pub fn machine(&self, delay: Duration, percent: u64) -> Machine {
        let guest = match self.mib {
            0 => TestGuest::idle(),
            mib => {
                let writes = writes_for(mib * PAGES_PER_MIB, REGION_MIB * PAGES_PER_MIB);
                let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).max(1);
                let rate = writes * 1000 * percent / 100 / delay_ms;
                TestGuest {
                    rate_pages_per_s: u32::try_from(rate).unwrap_or(u32::MAX),
                    region_mib: REGION_MIB,
                    content: match self.compression {
                        None => Content::Incompressible,
                        Some(_) => Content::Compressible,
                    },
                    ..TestGuest::idle()
                }
            }
        };
        Machine::bare("pc", MEMORY_MIB, Guest::Test(guest))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mib {
            0 => write!(f, "idle, {}", self.mode()),
            mib => write!(f, "{mib} MiB, {}", self.mode()),
        }?;
        match self.compression {
            None => Ok(()),
            Some(compression) => write!(f, " level {}", compression.method_and_level().1),
        }
    }
}

/// Writes to random pages of a region until so many different ones are written, on average.
fn writes_for(pages: u32, region_pages: u32) -> u64 {
    const STEP: u64 = 16;
    // In units of 1/1024 page, so that a step is no whole number of pages.
    let (goal, region) = (u64::from(pages) << 10, u64::from(region_pages) << 10);
    let (mut dirty, mut writes) = (0, 0);
    while dirty < goal && dirty < region {
        dirty += ((STEP << 10) * (region - dirty)).div_ceil(region);
        writes += STEP;
    }
    writes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_name_shapes() {
        assert_eq!(Shape::named("30M-plain"), [Shape::new(30, 0)]);
        assert_eq!(Shape::named("idle"), [Shape::new(0, 4), Shape::new(0, 0)]);
        assert_eq!(Shape::named("plain").len(), 4);
        assert_eq!(Shape::named("3M"), []);
        assert_eq!(Shape::named("zstd").len(), 2);
        assert_eq!(Shape::named("5M").len(), 2, "without those that are compressed");
        for shape in Shape::every() {
            assert_eq!(Shape::named(&shape.name()), [shape]);
        }
        assert_eq!(Shape::named("40M-zlib")[0].to_string(), "40 MiB, zlib level 1");
    }

    #[test]
    fn more_writes_than_pages_are_needed_where_they_meet() {
        let few = writes_for(1000, 100_000);
        assert!((1000..1030).contains(&few), "{few}");
        // -ln(1 - 1/2) = 0.693
        let half = writes_for(50_000, 100_000);
        assert!((68_800..69_800).contains(&half), "{half}");
        assert!(writes_for(100_000, 100_000) < 2_000_000);
    }
}
