//! What the guest does to its memory, as values of options: how many pages, which, and what they hold.

use clap::ValueEnum;
use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use rand_distr::{Exp1, StandardNormal};
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// Why a shape was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ShapeError {
    /// Not a number of pages.
    #[error(
        "invalid number of pages '{0}': write N, uniform:LOW-HIGH, normal:MEAN,DEVIATION, \
         lognormal:MEDIAN,SIGMA or exponential:MEAN"
    )]
    Distribution(String),
    /// Not a pattern.
    #[error(
        "invalid pattern '{0}': write random, sequential, runs:N or hotset:PAGES,WRITES (shares from 0 to 1)"
    )]
    Pattern(String),
}

/// A number of pages that may differ from checkpoint to checkpoint. What is drawn below 0 counts as 0, and what is
/// above the pages of the guest's RAM as all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// Always so many.
    Fixed(u64),
    /// Each number between the two, both included, as often as any other.
    Uniform {
        /// The smallest.
        low: u64,
        /// The largest.
        high: u64,
    },
    /// The normal distribution.
    Normal {
        /// Mean and median.
        mean: u64,
        /// Standard deviation in pages.
        deviation: f64,
    },
    /// A number whose logarithm is normally distributed: most are small, a few are many times as large.
    LogNormal {
        /// Half of the numbers are below.
        median: u64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
    },
    /// The exponential distribution: many small numbers, fewer large ones.
    Exponential {
        /// The mean.
        mean: u64,
    },
}

impl Distribution {
    /// The number that characterizes it: no other one may exceed the guest's RAM.
    pub(super) fn largest_parameter(self) -> u64 {
        match self {
            Self::Fixed(pages) | Self::Uniform { high: pages, .. } => pages,
            Self::Normal { mean, .. } | Self::Exponential { mean } => mean,
            Self::LogNormal { median, .. } => median,
        }
    }

    /// Whether its parameters make a distribution.
    pub(super) fn is_possible(self) -> bool {
        let width = |width: f64| width.is_finite() && width >= 0.0;
        match self {
            Self::Fixed(_) | Self::Exponential { .. } => true,
            Self::Uniform { low, high } => low <= high,
            Self::Normal { deviation, .. } => width(deviation),
            Self::LogNormal { median, sigma } => median > 0 && width(sigma),
        }
    }

    /// One number, at most `most`.
    pub(super) fn draw(self, rng: &mut Xoshiro256PlusPlus, most: u64) -> u64 {
        let normal = |rng: &mut Xoshiro256PlusPlus| rng.sample::<f64, _>(StandardNormal);
        let drawn = match self {
            Self::Fixed(pages) => return pages.min(most),
            Self::Uniform { low, high } => return rng.random_range(low..=high).min(most),
            Self::Normal { mean, deviation } => mean as f64 + deviation * normal(rng),
            Self::LogNormal { median, sigma } => median as f64 * (sigma * normal(rng)).exp(),
            Self::Exponential { mean } => rng.sample::<f64, _>(Exp1) * mean as f64,
        };
        round(drawn).min(most)
    }
}

/// The next integer; what is below 0 is 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the conversion saturates, which is what is wanted"
)]
pub(super) fn round(number: f64) -> u64 {
    number.round() as u64
}

impl FromStr for Distribution {
    type Err = ShapeError;

    fn from_str(text: &str) -> Result<Self, ShapeError> {
        let malformed = || ShapeError::Distribution(text.to_owned());
        let pages = |digits: &str| digits.parse().map_err(|_| malformed());
        let real = |digits: &str| digits.parse().map_err(|_| malformed());
        let Some((kind, parameters)) = text.split_once(':') else {
            return pages(text).map(Self::Fixed);
        };
        let two = |separator| parameters.split_once(separator).ok_or_else(malformed);
        let distribution = match kind {
            "uniform" => {
                let (low, high) = two('-')?;
                let (low, high) = (pages(low)?, pages(high)?);
                Self::Uniform { low, high }
            }
            "normal" => {
                let (mean, deviation) = two(',')?;
                let (mean, deviation) = (pages(mean)?, real(deviation)?);
                Self::Normal { mean, deviation }
            }
            "lognormal" => {
                let (median, sigma) = two(',')?;
                let (median, sigma) = (pages(median)?, real(sigma)?);
                Self::LogNormal { median, sigma }
            }
            "exponential" => {
                let mean = pages(parameters)?;
                Self::Exponential { mean }
            }
            _ => return Err(malformed()),
        };
        distribution
            .is_possible()
            .then_some(distribution)
            .ok_or_else(malformed)
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(pages) => write!(f, "{pages}"),
            Self::Uniform { low, high } => write!(f, "uniform:{low}-{high}"),
            Self::Normal { mean, deviation } => write!(f, "normal:{mean},{deviation}"),
            Self::LogNormal { median, sigma } => write!(f, "lognormal:{median},{sigma}"),
            Self::Exponential { mean } => write!(f, "exponential:{mean}"),
        }
    }
}

/// Which pages the guest dirties before a checkpoint. They are sent in the order of their addresses, as QEMU does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Single pages anywhere.
    Random,
    /// The next pages after those of the checkpoint before.
    Sequential,
    /// Runs of so many neighbouring pages, anywhere.
    Runs(u64),
    /// Single pages, most of them out of a few that are the same all the time and lie scattered over the guest.
    HotSet {
        /// Share of the guest's pages that are hot.
        pages: f64,
        /// Share of the dirtied pages that are taken from them as long as there are clean ones; the others are
        /// anywhere.
        writes: f64,
    },
}

impl Pattern {
    pub(super) fn is_possible(self) -> bool {
        let share = |share: f64| (0.0..=1.0).contains(&share);
        match self {
            Self::Random | Self::Sequential => true,
            Self::Runs(length) => length > 0,
            Self::HotSet { pages, writes } => pages > 0.0 && share(pages) && share(writes),
        }
    }
}

impl FromStr for Pattern {
    type Err = ShapeError;

    fn from_str(text: &str) -> Result<Self, ShapeError> {
        let malformed = || ShapeError::Pattern(text.to_owned());
        let pattern = match text.split_once(':') {
            None if text == "random" => Self::Random,
            None if text == "sequential" => Self::Sequential,
            Some(("runs", length)) => Self::Runs(length.parse().map_err(|_| malformed())?),
            Some(("hotset", shares)) => {
                let (pages, writes) = shares.split_once(',').ok_or_else(malformed)?;
                let share = |digits: &str| digits.parse().map_err(|_| malformed());
                let (pages, writes) = (share(pages)?, share(writes)?);
                Self::HotSet { pages, writes }
            }
            _ => return Err(malformed()),
        };
        pattern.is_possible().then_some(pattern).ok_or_else(malformed)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.write_str("random"),
            Self::Sequential => f.write_str("sequential"),
            Self::Runs(length) => write!(f, "runs:{length}"),
            Self::HotSet { pages, writes } => write!(f, "hotset:{pages},{writes}"),
        }
    }
}

/// In reports both stand as they are typed.
impl Serialize for Distribution {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What is wrong with a ratio.
pub(super) const RATIOS: &str = "a ratio of compression is between 1 and 16";

/// What a page that is not zero holds. No two are equal, nor are two versions of one.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// Bytes that nothing can compress
    Random,
    /// A quarter of each 64 bytes random, the rest zero
    Compressible,
    /// Lines of words
    Text,
    /// What zlib and zstd make about so many times smaller
    #[value(skip)]
    Ratio(f64),
}

impl Content {
    pub(super) fn is_possible(self) -> bool {
        match self {
            Self::Random | Self::Compressible | Self::Text => true,
            Self::Ratio(ratio) => (1.0..=16.0).contains(&ratio),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.pad("random"),
            Self::Compressible => f.pad("compressible"),
            Self::Text => f.pad("text"),
            Self::Ratio(ratio) => write!(f, "compressible {ratio} to 1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    const GUEST_PAGES: u64 = 1 << 20;
    const DRAWS: u32 = 20_000;

    /// Mean, standard deviation and median of many draws.
    fn figures(distribution: Distribution) -> (f64, f64, f64) {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(42);
        let mut drawn: Vec<_> = (0..DRAWS)
            .map(|_| distribution.draw(&mut rng, GUEST_PAGES) as f64)
            .collect();
        drawn.sort_by(f64::total_cmp);
        let mean = drawn.iter().sum::<f64>() / f64::from(DRAWS);
        let variance = drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(DRAWS);
        (mean, variance.sqrt(), drawn[drawn.len() / 2])
    }

    /// Bounds are five standard errors at 20,000 draws, or more.
    fn near(seen: f64, expected: f64, share: f64) {
        assert!(
            (seen - expected).abs() <= expected * share,
            "{seen} instead of {expected}"
        );
    }

    #[test]
    fn distributions_have_the_moments_that_they_promise() {
        let (mean, deviation, _) = figures("1000".parse().unwrap());
        assert_eq!((mean, deviation), (1000.0, 0.0));
        let (mean, deviation, median) = figures("uniform:500-1500".parse().unwrap());
        near(mean, 1000.0, 0.015);
        near(deviation, 1001.0 / 12f64.sqrt(), 0.03);
        near(median, 1000.0, 0.03);
        let (mean, deviation, _) = figures("normal:1000,200".parse().unwrap());
        near(mean, 1000.0, 0.01);
        near(deviation, 200.0, 0.04);
        let (mean, _, median) = figures("lognormal:1000,0.5".parse().unwrap());
        near(median, 1000.0, 0.03);
        near(mean, 1000.0 * (0.125f64).exp(), 0.03);
        let (mean, deviation, median) = figures("exponential:1000".parse().unwrap());
        near(mean, 1000.0, 0.04);
        near(deviation, 1000.0, 0.06);
        near(median, 1000.0 * 2f64.ln(), 0.06);
    }

    #[test]
    fn draws_stay_between_nothing_and_the_guest() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        for text in [
            "normal:100,1000",
            "lognormal:100,3",
            "exponential:900",
            "uniform:0-5000",
            "2000",
        ] {
            let distribution: Distribution = text.parse().unwrap();
            let drawn: Vec<_> = (0..2000).map(|_| distribution.draw(&mut rng, 1000)).collect();
            assert!(
                drawn.contains(&1000) && drawn.iter().all(|&pages| pages <= 1000),
                "{text}"
            );
        }
        let wide: Distribution = "uniform:0-18446744073709551614".parse().unwrap();
        assert_eq!(wide.draw(&mut rng, 7), 7);
    }

    #[test]
    fn shapes_are_written_as_they_are_read() {
        for text in [
            "0",
            "1000",
            "uniform:1-1",
            "normal:1000,2.5",
            "lognormal:1000,0.5",
            "exponential:7",
        ] {
            assert_eq!(text.parse::<Distribution>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "-1",
            "1.5",
            "uniform",
            "uniform:",
            "uniform:5",
            "uniform:5-4",
            "uniform:1-2-3",
            "normal:5",
            "normal:5,-1",
            "normal:5,NaN",
            "normal:5,inf",
            "lognormal:0,1",
            "exponential:x",
            "poisson:5",
            "uniform:1,2",
        ] {
            assert!(text.parse::<Distribution>().is_err(), "{text}");
        }
        for text in ["random", "sequential", "runs:8", "hotset:0.1,0.9", "hotset:1,0"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "runs",
            "runs:0",
            "runs:-1",
            "hotset:0,1",
            "hotset:0.1",
            "hotset:2,1",
            "hotset:0.1,NaN",
            "random:1",
        ] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }
}
