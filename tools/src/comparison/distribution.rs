//! The values of one phase of one run, their figures, and how they may be drawn again.

use hdrhistogram::Histogram;
use rand::{Rng, RngExt};
use rand_distr::{Binomial, Distribution as _};
use schemars::JsonSchema;
use serde::Serialize;
use std::ops::Range;

/// Rounds from which on they are drawn as wholes. Fewer say too little about what changes from round to round.
pub const ROUNDS_MIN: usize = 6;

/// One measured duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Point {
    pub round: u32,
    pub at_ns: u64,
    pub value_ns: u64,
    pub disturbed: bool,
}

/// What the figures are resampled by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Resampling {
    /// Whole rounds.
    Rounds,
    /// Blocks of consecutive checkpoints.
    Blocks,
    /// Single values, from the counts of a histogram.
    Counts,
}

/// Mean and percentiles, in nanoseconds. The maximum is not among them: what a maximum would be in another sample
/// cannot be learned from this one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Figures {
    pub mean: f64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

/// See the module's documentation. Never empty where figures are taken from it.
#[derive(Clone, Debug)]
pub(super) struct Distribution {
    /// Different values, ascending.
    values: Vec<u64>,
    /// How often each.
    counts: Vec<u64>,
    count: u64,
    order: Option<Order>,
}

/// Which value came when.
#[derive(Clone, Debug)]
struct Order {
    /// Indices of `values`, in the order of the run, round by round.
    ranks: Vec<usize>,
    /// Where in `ranks` each round is, and its number.
    rounds: Vec<(u32, Range<usize>)>,
}

impl Distribution {
    pub(super) fn of_points(points: &[Point]) -> Self {
        let mut sorted: Vec<_> = points.iter().map(|point| point.value_ns).collect();
        sorted.sort_unstable();
        let mut values = sorted.clone();
        values.dedup();
        let mut counts = vec![0; values.len()];
        let rank = |value| values.binary_search(&value).expect("every value is there");
        // Stable: within a round the order of the run stays.
        let mut in_rounds = points.to_vec();
        in_rounds.sort_by_key(|point| point.round);
        let ranks: Vec<_> = in_rounds.iter().map(|point| rank(point.value_ns)).collect();
        ranks.iter().for_each(|rank| counts[*rank] += 1);
        let mut rounds: Vec<(u32, Range<usize>)> = Vec::new();
        for (index, point) in in_rounds.iter().enumerate() {
            match rounds.last_mut() {
                Some((round, range)) if *round == point.round => range.end = index + 1,
                _ => rounds.push((point.round, index..index + 1)),
            }
        }
        Self {
            values,
            counts,
            count: points.len() as u64,
            order: Some(Order { ranks, rounds }),
        }
    }

    pub(super) fn of_histogram(histogram: &Histogram<u64>) -> Self {
        let steps = histogram.iter_recorded();
        let (values, counts) = steps
            .map(|step| (step.value_iterated_to(), step.count_at_value()))
            .unzip();
        Self {
            values,
            counts,
            count: histogram.len(),
            order: None,
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn max(&self) -> u64 {
        self.values.last().copied().unwrap_or(0)
    }

    pub(super) fn figures(&self) -> Figures {
        figures(&self.values, &self.counts)
    }

    /// The different values with how many values are as large or larger.
    pub(super) fn exceedances(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut above = self.count;
        self.values.iter().zip(&self.counts).map(move |(value, count)| {
            let exceeding = above;
            above -= count;
            (*value, exceeding)
        })
    }

    /// Whether its values have been rounded to a histogram's digits.
    pub(super) fn is_rounded(&self) -> bool {
        self.order.is_none()
    }

    pub(super) fn resampling(&self) -> Resampling {
        match &self.order {
            None => Resampling::Counts,
            Some(order) if order.rounds.len() >= ROUNDS_MIN => Resampling::Rounds,
            Some(_) => Resampling::Blocks,
        }
    }

    /// The numbers of its rounds. Runs that have the same were alternated.
    pub(super) fn rounds(&self) -> Vec<u32> {
        let rounds = self.order.iter().flat_map(|order| &order.rounds);
        rounds.map(|(round, _)| *round).collect()
    }

    /// Figures of another sample as it might have been. `counts` is room to work in.
    pub(super) fn resample(&self, rng: &mut impl Rng, counts: &mut Vec<u64>) -> Figures {
        counts.clear();
        counts.resize(self.values.len(), 0);
        match (&self.order, self.resampling()) {
            (Some(order), Resampling::Rounds) => order.draw_rounds(rng, counts),
            (Some(order), _) => order.draw_blocks(rng, counts),
            (None, _) => self.draw_counts(rng, counts),
        }
        figures(&self.values, counts)
    }

    /// Single values with replacement: the counts are then multinomial, drawn as binomials one after the other.
    fn draw_counts(&self, rng: &mut impl Rng, counts: &mut [u64]) {
        let mut left_here = self.count;
        let mut left_to_draw = self.count;
        for (drawn, count) in counts.iter_mut().zip(&self.counts) {
            let probability = *count as f64 / left_here as f64;
            *drawn = Binomial::new(left_to_draw, probability.min(1.0))
                .expect("a probability between 0 and 1")
                .sample(rng);
            left_here -= count;
            left_to_draw -= *drawn;
            if left_to_draw == 0 {
                break;
            }
        }
    }
}

impl Order {
    fn draw_rounds(&self, rng: &mut impl Rng, counts: &mut [u64]) {
        for _ in 0..self.rounds.len() {
            let (_, round) = &self.rounds[rng.random_range(0..self.rounds.len())];
            self.ranks[round.clone()]
                .iter()
                .for_each(|rank| counts[*rank] += 1);
        }
    }

    /// Blocks of the cube root of the number of checkpoints, the usual length; around the end at the beginning again.
    fn draw_blocks(&self, rng: &mut impl Rng, counts: &mut [u64]) {
        let count = self.ranks.len();
        let length = (1..=count).find(|length| length.pow(3) >= count).unwrap_or(count);
        let mut drawn = 0;
        while drawn < count {
            let start = rng.random_range(0..count);
            let block = length.min(count - drawn);
            let ranks = self.ranks[start..].iter().chain(&self.ranks).take(block);
            ranks.for_each(|rank| counts[*rank] += 1);
            drawn += block;
        }
    }
}

/// The figures of values that were measured, and the largest of them.
pub(super) fn figures_of(values: impl Iterator<Item = u64>) -> (Figures, u64) {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    let figures = figures(&values, &vec![1; values.len()]);
    (figures, values.last().copied().unwrap_or(0))
}

/// Percentiles are values that were measured: the smallest that so many of a thousand do not exceed.
fn figures(values: &[u64], counts: &[u64]) -> Figures {
    let total: u64 = counts.iter().sum();
    let mut percentiles = [500u128, 900, 990, 999].map(|per_mille| {
        let rank = (u128::from(total) * per_mille).div_ceil(1000);
        (rank, 0u64)
    });
    let mut wanted = percentiles.iter_mut().peekable();
    let (mut below, mut sum) = (0u128, 0u128);
    for (value, count) in values.iter().zip(counts) {
        below += u128::from(*count);
        sum += u128::from(*value) * u128::from(*count);
        while let Some((_, percentile)) = wanted.next_if(|(rank, _)| *rank <= below) {
            *percentile = *value;
        }
    }
    let [p50, p90, p99, p99_9] = percentiles.map(|(_, percentile)| percentile);
    Figures {
        mean: sum as f64 / total.max(1) as f64,
        p50,
        p90,
        p99,
        p99_9,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::Xoshiro256PlusPlus;

    fn points(values: impl IntoIterator<Item = (u32, u64)>) -> Vec<Point> {
        let point = |(round, value_ns)| Point {
            round,
            at_ns: 0,
            value_ns,
            disturbed: false,
        };
        values.into_iter().map(point).collect()
    }

    #[test]
    fn figures_are_those_of_the_values() {
        let distribution = Distribution::of_points(&points((1..=1000).rev().map(|n| (0, n))));
        let figures = distribution.figures();
        assert_eq!(
            (figures.p50, figures.p90, figures.p99, figures.p99_9),
            (500, 900, 990, 999)
        );
        assert_eq!((figures.mean, distribution.max()), (500.5, 1000));
        let few = Distribution::of_points(&points((1..100).map(|n| (0, n)))).figures();
        assert_eq!((few.p99, few.p99_9), (99, 99));
        let one = Distribution::of_points(&points([(0, 7)])).figures();
        assert_eq!((one.p50, one.p99_9, one.mean), (7, 7, 7.0));
    }

    #[test]
    fn exceedances_count_down_from_all_to_the_maximum() {
        let distribution = Distribution::of_points(&points([(0, 5), (0, 1), (0, 5), (0, 9)]));
        assert_eq!(
            distribution.exceedances().collect::<Vec<_>>(),
            [(1, 4), (5, 3), (9, 1)]
        );
    }

    /// However they are drawn, as many are drawn as there are, and the mean of means is the mean.
    #[test]
    fn every_resampling_draws_all_and_no_value_more_than_others() {
        let values = |rounds: u32| points((0..1200).map(|n| (n * rounds / 1200, u64::from(n) + 1)));
        let mut histogram = Histogram::new(3).unwrap();
        (1..=1200).for_each(|value| histogram.record(value).unwrap());
        for (distribution, resampling) in [
            (Distribution::of_points(&values(8)), Resampling::Rounds),
            (Distribution::of_points(&values(3)), Resampling::Blocks),
            (Distribution::of_histogram(&histogram), Resampling::Counts),
        ] {
            assert_eq!(distribution.resampling(), resampling);
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
            let mut counts = Vec::new();
            let mut sum = 0.0;
            for _ in 0..2000 {
                sum += distribution.resample(&mut rng, &mut counts).mean;
                assert_eq!(counts.iter().sum::<u64>(), 1200, "{resampling:?}");
            }
            let mean = sum / 2000.0;
            assert!((mean - 600.5).abs() < 10.0, "{resampling:?}: {mean}");
        }
    }
}
