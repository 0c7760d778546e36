//! Ratios of figures, each with the interval that the ratio of other samples would lie in 95 times of 100.
//!
//! The percentile bootstrap: both runs are resampled many times, and the middle 95 % of the ratios are the interval.
//! [`Resampling`] names what is resampled: rounds where there are enough of them, because checkpoints of one
//! round share what disturbed it; else blocks of consecutive checkpoints; else, from a histogram, single values.
//! Where the runs were alternated (the same rounds in both), the same rounds are drawn for both.

use super::distribution::{Distribution, Figures, Resampling};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use schemars::JsonSchema;
use serde::Serialize;

/// Values that a run must have for an interval to mean anything.
pub const COUNT_MIN: u64 = 20;

/// How much values of a histogram of three digits may differ from what was measured, as a ratio.
const ROUNDING: f64 = 1e-3;

/// A figure of a run, divided by the baseline's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Ratio {
    /// The ratio. None if the baseline's figure is 0.
    pub ratio: Option<f64>,
    /// The 95 % interval. None for maxima, and where there are too few values.
    pub interval: Option<Interval>,
}

/// A 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Whether it excludes 1.
    pub difference_shown: bool,
}

/// Every figure as a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Ratios {
    /// Of the means.
    pub mean: Ratio,
    /// Of the medians.
    pub p50: Ratio,
    /// Of the 90th percentiles.
    pub p90: Ratio,
    /// Of the 99th percentiles.
    pub p99: Ratio,
    /// Of the 99.9th percentiles.
    pub p99_9: Ratio,
    /// Of the maxima, without an interval.
    pub max: Ratio,
}

impl Ratios {
    /// In the order of the table's columns.
    pub fn columns(&self) -> [Ratio; 6] {
        [self.mean, self.p50, self.p90, self.p99, self.p99_9, self.max]
    }
}

/// A distribution and its resampled figures.
pub(super) struct Resampled {
    pub distribution: Distribution,
    figures: Vec<Figures>,
}

impl Resampled {
    /// Resamples `resamples` times. Of runs that get the same `stream` the same rounds are drawn.
    pub(super) fn new(distribution: Distribution, seed: u64, stream: u64, resamples: u32) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_add(stream.wrapping_mul(0x9e37_79b9)));
        let mut counts = Vec::new();
        let figures = match distribution.count() {
            0..COUNT_MIN => Vec::new(),
            _ => (0..resamples)
                .map(|_| distribution.resample(&mut rng, &mut counts))
                .collect(),
        };
        Self {
            distribution,
            figures,
        }
    }

    /// How it was resampled, if it was.
    pub(super) fn resampling(&self) -> Option<Resampling> {
        (!self.figures.is_empty()).then(|| self.distribution.resampling())
    }

    /// The ratios of this run to the baseline.
    pub(super) fn ratios(&self, baseline: &Self) -> Ratios {
        let count = self.distribution.count().min(baseline.distribution.count());
        let max = |resampled: &Self| resampled.distribution.max() as f64;
        let figure = |count_min: u64, figure: fn(&Figures) -> f64| Ratio {
            ratio: ratio(
                figure(&self.distribution.figures()),
                figure(&baseline.distribution.figures()),
            ),
            interval: self.interval(baseline, figure).filter(|_| count >= count_min),
        };
        Ratios {
            mean: figure(0, |figures| figures.mean),
            p50: figure(0, |figures| figures.p50 as f64),
            p90: figure(0, |figures| figures.p90 as f64),
            // Below they are maxima.
            p99: figure(100, |figures| figures.p99 as f64),
            p99_9: figure(1000, |figures| figures.p99_9 as f64),
            max: Ratio {
                ratio: ratio(max(self), max(baseline)),
                interval: None,
            },
        }
    }

    fn interval(&self, baseline: &Self, figure: fn(&Figures) -> f64) -> Option<Interval> {
        let pairs = self.figures.iter().zip(&baseline.figures);
        // One resample of the baseline with 0 leaves no interval: it would have no upper end.
        let mut ratios = pairs
            .map(|(one, other)| ratio(figure(one), figure(other)))
            .collect::<Option<Vec<_>>>()?;
        if ratios.is_empty() {
            return None;
        }
        ratios.sort_unstable_by(f64::total_cmp);
        let rounded = self.distribution.is_rounded() || baseline.distribution.is_rounded();
        let margin = if rounded { ROUNDING } else { 0.0 };
        // 2.5 % of them lie outside at either end.
        let outside = ratios.len() / 40;
        let low = ratios[outside] * (1.0 - margin);
        let high = ratios[ratios.len() - 1 - outside] * (1.0 + margin);
        Some(Interval {
            low,
            high,
            difference_shown: high < 1.0 || low > 1.0,
        })
    }
}

fn ratio(one: f64, other: f64) -> Option<f64> {
    (other > 0.0).then(|| one / other)
}

#[cfg(test)]
mod tests {
    use super::super::distribution::Point;
    use super::*;
    use rand::RngExt;

    /// Values around `centre`, of rounds that are disturbed by `disturbance` each in its own way.
    fn run(
        rng: &mut Xoshiro256PlusPlus,
        rounds: u32,
        centre: f64,
        disturbances: &mut dyn FnMut(u32) -> f64,
    ) -> Distribution {
        let mut points = Vec::new();
        for round in 0..rounds {
            let disturbed = disturbances(round);
            for _ in 0..100 {
                let value = centre * disturbed * rng.random_range(0.5..1.5);
                points.push(Point {
                    round,
                    at_ns: 0,
                    value_ns: format!("{value:.0}").parse().unwrap(),
                    disturbed: false,
                });
            }
        }
        Distribution::of_points(&points)
    }

    /// The interval's promise: of runs that do not differ it shows a difference about 5 times of 100, whether rounds
    /// were disturbed or not.
    #[test]
    fn equal_runs_show_no_difference_19_times_of_20() {
        for disturbed in [false, true] {
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
            let mut shown = 0;
            for seed in 0..100 {
                let mut draw = Xoshiro256PlusPlus::seed_from_u64(seed + 1000);
                // Alternated: a round disturbs both alike.
                let factors: Vec<f64> = (0..12).map(|_| draw.random_range(0.7..1.4)).collect();
                let mut factor = |round: u32| if disturbed { factors[round as usize] } else { 1.0 };
                let one = run(&mut rng, 12, 1e6, &mut factor);
                let other = run(&mut rng, 12, 1e6, &mut factor);
                let one = Resampled::new(one, seed, 0, 200);
                let other = Resampled::new(other, seed, 0, 200);
                let ratios = one.ratios(&other);
                shown += u32::from(ratios.p50.interval.unwrap().difference_shown);
            }
            assert!(shown <= 12, "{shown} of 100, disturbed: {disturbed}");
        }
    }

    #[test]
    fn a_difference_is_found_with_its_size() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
        let slow = run(&mut rng, 1, 1e6, &mut |_| 1.0);
        let slow = [0; 10].map(|_| slow.clone());
        let fast = run(&mut rng, 10, 0.7e6, &mut |_| 1.0);
        let baseline = run(&mut rng, 10, 1e6, &mut |_| 1.0);
        let ratios = Resampled::new(fast, 1, 1, 500).ratios(&Resampled::new(baseline.clone(), 1, 2, 500));
        for ratio in [ratios.mean, ratios.p50, ratios.p90, ratios.p99] {
            let interval = ratio.interval.unwrap();
            assert!(interval.difference_shown, "{ratio:?}");
            assert!(interval.low < 0.7 && 0.7 < interval.high, "{ratio:?}");
        }
        // 100 and 1000 values: p99.9 of the smaller is its maximum.
        let [slow, ..] = slow;
        let ratios = Resampled::new(slow, 1, 1, 500).ratios(&Resampled::new(baseline, 1, 2, 500));
        assert!(ratios.p99.interval.is_some() && ratios.p99_9.interval.is_none());
        assert!(ratios.max.interval.is_none());
    }

    #[test]
    fn too_few_values_and_a_baseline_of_zero_have_no_interval() {
        let points = |count: u64, value_ns| {
            let point = |_| Point {
                round: 0,
                at_ns: 0,
                value_ns,
                disturbed: false,
            };
            Distribution::of_points(&(0..count).map(point).collect::<Vec<_>>())
        };
        let few = Resampled::new(points(19, 5), 1, 1, 100);
        let zero = Resampled::new(points(50, 0), 1, 2, 100);
        let ratios = few.ratios(&Resampled::new(points(50, 10), 1, 2, 100));
        assert_eq!((ratios.p50.ratio, ratios.p50.interval), (Some(0.5), None));
        let ratios = zero.ratios(&zero);
        assert_eq!((ratios.p50.ratio, ratios.p50.interval), (None, None));
    }
}
