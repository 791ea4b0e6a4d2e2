//! The registry of a program's metrics, in Prometheus's text format: base units, no key and no address in a label.
//!
//! Each room has a struct of its own metrics, which it registers here, every series at 0.

use prometheus::core::Collector;
use prometheus::{
    Encoder as _, Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, TextEncoder,
};

/// Buckets in seconds, from the time that a local gateway takes to more than the longest budget in use.
const DURATION_BUCKETS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// All metrics of this program. Clones share them. A name that is registered twice is an error.
#[derive(Debug, Clone, Default)]
pub struct MetricsRegistry(prometheus::Registry);

impl MetricsRegistry {
    /// A new counter.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.add(IntCounter::new(name, help)?)
    }

    /// New counters, by these labels.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// New counters by one label, with these values.
    pub fn counters_of(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> Result<IntCounterVec, Error> {
        let counters = self.counters(name, help, &[label])?;
        for value in values {
            counters.with_label_values(&[value.as_ref()]);
        }
        Ok(counters)
    }

    /// A new gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.add(IntGauge::new(name, help)?)
    }

    /// New gauges, by these labels.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// A new histogram with these buckets.
    pub fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Result<Histogram, Error> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
    }

    /// A new histogram of durations.
    pub fn seconds(&self, name: &str, help: &str) -> Result<Histogram, Error> {
        self.histogram(name, help, DURATION_BUCKETS.into())
    }

    /// New histograms of durations, by these labels.
    pub fn seconds_by(&self, name: &str, help: &str, labels: &[&str]) -> Result<HistogramVec, Error> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(DURATION_BUCKETS.into()), labels)?)
    }

    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    /// The text that Prometheus scrapes.
    pub fn text(&self) -> Result<Vec<u8>, Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.gather(), &mut text)?;
        Ok(text)
    }
}

/// Sets a gauge to a count.
pub fn set(gauge: &IntGauge, number: usize) {
    gauge.set(i64::try_from(number).unwrap_or(i64::MAX));
}
