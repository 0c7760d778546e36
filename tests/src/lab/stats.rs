//! Distributions of measured times, and the host that they were measured on.

use std::fmt;

/// Times in milliseconds, sorted.
#[derive(Clone, Debug)]
pub struct Distribution {
    sorted_ms: Vec<f64>,
}

impl Distribution {
    /// Takes times in microseconds.
    ///
    /// # Panics
    /// Without any value there is no distribution.
    #[must_use]
    pub fn of_us(values_us: &[u64]) -> Self {
        assert!(!values_us.is_empty(), "nothing was measured");
        let mut sorted = values_us.to_vec();
        sorted.sort_unstable();
        // Pauses are far below 2^32 µs; a longer one is reported as that.
        let to_ms = |us: u64| f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1000.0;
        Self {
            sorted_ms: sorted.into_iter().map(to_ms).collect(),
        }
    }

    /// Number of values.
    #[must_use]
    pub fn n(&self) -> usize {
        self.sorted_ms.len()
    }

    /// The value that `percent` of all values do not exceed (nearest rank), ms.
    #[must_use]
    pub fn percentile_ms(&self, percent: usize) -> f64 {
        let rank = (self.n() * percent).div_ceil(100).max(1);
        self.sorted_ms[rank - 1]
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "n {} · min {:.2} · p50 {:.2} · p90 {:.2} · p99 {:.2} · max {:.2} ms",
            self.n(),
            self.sorted_ms[0],
            self.percentile_ms(50),
            self.percentile_ms(90),
            self.percentile_ms(99),
            self.sorted_ms[self.n() - 1]
        )
    }
}
