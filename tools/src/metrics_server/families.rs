//! Writes families of metrics, as a collector of `prometheus-client` does.

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::{Histogram, NativeHistogramConfig};
use prometheus_client::registry::Unit;
use std::fmt;
use std::time::Duration;

/// Labels of one metric.
pub(crate) type Labels = Vec<(&'static str, String)>;

/// Upper bounds of classic buckets, in seconds: a checkpoint takes from some hundred microseconds to a second.
const BOUNDS: [f64; 16] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Growth from one native bucket to the next, at most.
const NATIVE_FACTOR: f64 = 1.1;

/// Most native buckets of a histogram: then it loses resolution.
const NATIVE_BUCKETS_MAX: usize = 160;

/// Times, in classic and in native buckets.
#[derive(Clone, Debug)]
pub(crate) struct PhaseHistogram(Histogram);

impl Default for PhaseHistogram {
    fn default() -> Self {
        let native = NativeHistogramConfig::new(NATIVE_FACTOR).max_buckets(NATIVE_BUCKETS_MAX);
        Self(Histogram::new_classic_and_native(BOUNDS, native))
    }
}

impl PhaseHistogram {
    pub(crate) fn record(&self, time: Duration) {
        self.0.observe(time.as_secs_f64());
    }
}

/// What a family is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About {
    name: &'static str,
    unit: Option<&'static Unit>,
    help: &'static str,
}

impl About {
    pub(crate) const fn new(name: &'static str, help: &'static str) -> Self {
        let unit = None;
        Self { name, unit, help }
    }

    /// In seconds, which its name ends with.
    pub(crate) const fn seconds(name: &'static str, help: &'static str) -> Self {
        let unit = Some(&Unit::Seconds);
        Self { name, unit, help }
    }

    /// In bytes, which its name ends with.
    pub(crate) const fn bytes(name: &'static str, help: &'static str) -> Self {
        let unit = Some(&Unit::Bytes);
        Self { name, unit, help }
    }
}

/// Writes families. A family without any metric is left out.
pub(crate) struct Families<'a>(DescriptorEncoder<'a>);

impl<'a> Families<'a> {
    pub(crate) fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// What the program is.
    pub(crate) fn build(&mut self) -> fmt::Result {
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        let about = About::new("colo_ring_build", "Version of this process");
        self.infos(about, [(Labels::new(), version)])
    }

    /// Texts about what the first labels name.
    pub(crate) fn infos(
        &mut self,
        about: About,
        metrics: impl IntoIterator<Item = (Labels, Labels)>,
    ) -> fmt::Result {
        self.write(about, MetricType::Info, metrics, |mut metric, texts| {
            metric.encode_info(&texts)
        })
    }

    pub(crate) fn gauges(
        &mut self,
        about: About,
        metrics: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        self.write(about, MetricType::Gauge, metrics, |mut metric, value| {
            metric.encode_gauge(&value)
        })
    }

    /// A gauge of which there is one.
    pub(crate) fn gauge(&mut self, about: About, value: f64) -> fmt::Result {
        self.gauges(about, [(Labels::new(), value)])
    }

    pub(crate) fn counters(
        &mut self,
        about: About,
        metrics: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        self.write(about, MetricType::Counter, metrics, |mut metric, value| {
            metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
        })
    }

    /// A counter of which there is one.
    pub(crate) fn counter(&mut self, about: About, value: u64) -> fmt::Result {
        self.counters(about, [(Labels::new(), value)])
    }

    pub(crate) fn histograms<'h>(
        &mut self,
        about: About,
        metrics: impl IntoIterator<Item = (Labels, &'h PhaseHistogram)>,
    ) -> fmt::Result {
        self.write(about, MetricType::Histogram, metrics, |metric, histogram| {
            histogram.0.encode(metric)
        })
    }

    fn write<T>(
        &mut self,
        about: About,
        kind: MetricType,
        metrics: impl IntoIterator<Item = (Labels, T)>,
        encode: impl Fn(prometheus_client::encoding::MetricEncoder<'_>, T) -> fmt::Result,
    ) -> fmt::Result {
        let mut metrics = metrics.into_iter().peekable();
        if metrics.peek().is_none() {
            return Ok(());
        }
        let About { name, unit, help } = about;
        let mut family = self.0.encode_descriptor(name, help, unit, kind)?;
        metrics.try_for_each(|(labels, value)| encode(family.encode_family(&labels)?, value))
    }
}
