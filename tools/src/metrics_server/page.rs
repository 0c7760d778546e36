//! The page: made of a source's figures, at most once in a while.

use super::FRESH;
use super::http::Format;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{prometheus_protobuf, prometheus_text, text};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// How long figures are waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where figures come from.
pub(crate) trait Source: Send + 'static {
    /// Takes in what was measured meanwhile. Does not wait.
    fn collect(&mut self);

    /// All figures as they are; none if the process does not give them any more.
    fn figures(&mut self) -> impl Future<Output = Option<Box<dyn Collector>>>;
}

/// See the module.
pub(super) struct Page<S> {
    source: S,
    /// When figures were last asked for, also by a client that is gone since.
    asked: Option<Instant>,
    made: Option<Made>,
}

struct Made {
    at: Instant,
    figures: Registry,
    /// In the order of [`Format::ALL`], each once it was asked for.
    bodies: [Option<Arc<[u8]>>; Format::ALL.len()],
}

impl<S: Source> Page<S> {
    pub(super) fn new(source: S) -> Self {
        Self {
            source,
            asked: None,
            made: None,
        }
    }

    pub(super) fn collect(&mut self) {
        self.source.collect();
    }

    /// How long it is too early for [`Self::get`]: clients that are ended while figures are asked for must not ask again and again.
    pub(super) fn early(&mut self) -> Duration {
        self.made.take_if(|made| made.at.elapsed() >= FRESH);
        match (&self.made, self.asked) {
            (None, Some(asked)) => FRESH.saturating_sub(asked.elapsed()),
            _ => Duration::ZERO,
        }
    }

    /// The page in this form; none where there are no figures.
    pub(super) async fn get(&mut self, format: Format) -> Option<Arc<[u8]>> {
        if self.made.is_none() {
            self.asked = Some(Instant::now());
            self.source.collect();
            let mut figures = Registry::default();
            figures.register_collector(timeout(PATIENCE, self.source.figures()).await.ok()??);
            self.made = Some(Made {
                at: Instant::now(),
                figures,
                bodies: Default::default(),
            });
        }
        let made = self.made.as_mut()?;
        let body = &mut made.bodies[format as usize];
        if body.is_none() {
            *body = Some(encode(&made.figures, format)?.into());
        }
        body.clone()
    }
}

/// None never: what is encoded has names and labels that every form can have.
fn encode(figures: &Registry, format: Format) -> Option<Vec<u8>> {
    let mut written = String::new();
    match format {
        Format::OpenMetrics => text::encode(&mut written, figures).ok()?,
        Format::Text => prometheus_text::encode(&mut written, figures).ok()?,
        Format::Protobuf => return prometheus_protobuf::encode_to_vec(figures).ok(),
    }
    Some(written.into_bytes())
}
