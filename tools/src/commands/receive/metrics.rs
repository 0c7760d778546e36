//! What a receiver shows to Prometheus: its status, and the times of its checkpoints as histograms.

use crate::metrics_server::{About, Families, Labels, PhaseHistogram, Source};
use crate::output::printable;
use colo_ring::metrics::{CheckpointSample, Phase, SampleQueue};
use colo_ring::receiver::{DiskState, DiskStatus, SessionState, SessionStatus, StatusHandle, StatusReport};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Phases that have a histogram, and what they are.
const PHASES: [(Phase, About); 3] = [
    (
        Phase::Pause,
        About::seconds(
            "colo_ring_pause",
            "Pause of the guest for a checkpoint as the receiver sees it: CHECKPOINT_REPLY sent to VMSTATE_LOADED sent",
        ),
    ),
    (
        Phase::Transfer,
        About::seconds(
            "colo_ring_transfer",
            "VMSTATE_SEND read until all pages of the checkpoint are here and every channel is synced",
        ),
    ),
    (
        Phase::Commit,
        About::seconds(
            "colo_ring_commit",
            "Device state complete until VMSTATE_LOADED is sent",
        ),
    ),
];

/// Sessions with histograms that are kept without being asked for: more than a receiver has at a time.
const SESSIONS_MAX: usize = 1024;

type Histograms = [PhaseHistogram; PHASES.len()];

/// See the module.
pub(super) struct ReceiverSource {
    status: StatusHandle,
    samples: Arc<SampleQueue>,
    histograms: BTreeMap<u32, Histograms>,
}

impl ReceiverSource {
    pub(super) fn new(status: StatusHandle, samples: Arc<SampleQueue>) -> Self {
        Self {
            status,
            samples,
            histograms: BTreeMap::new(),
        }
    }

    fn record(&mut self, sample: &CheckpointSample) {
        let histograms = self.histograms.entry(sample.session).or_default();
        for ((phase, _), histogram) in PHASES.iter().zip(histograms) {
            histogram.record(sample.phase(*phase));
        }
        // Without a scraper: those of the oldest sessions, which have ended, or come again with their next checkpoint.
        if self.histograms.len() > SESSIONS_MAX {
            self.histograms.pop_first();
        }
    }
}

impl Source for ReceiverSource {
    fn collect(&mut self) {
        while let Some(sample) = self.samples.pop() {
            self.record(&sample);
        }
    }

    async fn figures(&mut self) -> Option<Box<dyn Collector>> {
        // After the samples that are recorded: a session whose histograms are here is in the status, or gone.
        let status = self.status.status().await.ok()?;
        self.histograms
            .retain(|number, _| status.sessions.iter().any(|session| session.session == *number));
        Some(Box::new(ReceiverFigures {
            histograms: self.histograms.clone(),
            samples_dropped: self.samples.dropped(),
            status,
        }))
    }
}

/// What a page shows.
#[derive(Debug)]
struct ReceiverFigures {
    status: Box<StatusReport>,
    histograms: BTreeMap<u32, Histograms>,
    samples_dropped: u64,
}

impl Collector for ReceiverFigures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families::new(encoder);
        families.build()?;
        self.receiver(&mut families)?;
        self.guests(&mut families)?;
        self.checkpoints(&mut families)?;
        self.disks(&mut families)
    }
}

impl ReceiverFigures {
    fn receiver(&self, families: &mut Families<'_>) -> fmt::Result {
        let status = &self.status;
        families.gauge(
            About::seconds("colo_ring_uptime", "Time since the receiver's start"),
            seconds(status.uptime_ms),
        )?;
        families.gauge(
            About::bytes("colo_ring_memory_held", "Memory that guests have taken"),
            exact(status.ram_held_bytes),
        )?;
        families.gauge(
            About::bytes("colo_ring_memory_limit", "Memory that guests may take together"),
            exact(status.ram_limit_bytes),
        )?;
        if let Some(tls) = &status.tls {
            let validity = &tls.validity;
            let ends = [
                ("server", Some(validity.expires_unix_s)),
                ("ca", Some(validity.ca_expires_unix_s)),
                ("crl", validity.crl_next_update_unix_s),
            ];
            let ends = ends.into_iter().filter_map(|(what, end)| Some((what, end?)));
            families.gauges(
                About::seconds(
                    "colo_ring_tls_expiry_timestamp",
                    "When what --tls has is valid no longer, since 1970: the certificate of the receiver, the first of its CA, and the list of \
                     revoked ones",
                ),
                ends.map(|(what, end)| (labels([("what", what)]), end as f64)),
            )?;
        }
        families.counter(
            About::new(
                "colo_ring_intervals_lost",
                "Intervals that are missing in the logs of --hist because they could not be written",
            ),
            status.intervals_lost,
        )?;
        families.counter(
            About::new(
                "colo_ring_samples_lost",
                "Checkpoints that are missing in the histograms here because too many came at once",
            ),
            self.samples_dropped,
        )?;
        let about = About::new("colo_ring_sessions", "Sessions by their state");
        families.gauges(
            about,
            SessionState::ALL.into_iter().map(|state| {
                let sessions = self.status.sessions.iter();
                let count = sessions.filter(|session| session.state == state).count();
                (labels([("state", state.name())]), count as f64)
            }),
        )
    }

    fn guests(&self, families: &mut Families<'_>) -> fmt::Result {
        let about = About::new(
            "colo_ring_guest_state",
            "1 for the state that the guest's session is in, 0 for others",
        );
        let of_all = self.sessions().flat_map(|(labels, session)| {
            SessionState::ALL.into_iter().map(move |state| {
                let mut labels = labels.clone();
                labels.push(("state", state.name().to_owned()));
                (labels, flag(session.state == state))
            })
        });
        families.gauges(about, of_all)?;
        families.infos(
            About::new(
                "colo_ring_guest",
                "The guest's machine type and UUID, where its primary is or was, and the address that it came to",
            ),
            self.sessions().map(|(labels, session)| {
                let known = |text: &Option<String>| text.clone().unwrap_or_default();
                let texts = [
                    ("machine", known(&session.machine)),
                    ("uuid", known(&session.uuid)),
                    ("peer", session.peer.clone()),
                    ("listener", known(&session.listener)),
                ];
                (labels, texts.map(|(name, text)| (name, printable(&text))).into())
            }),
        )?;
        self.gauges(
            families,
            About::new(
                "colo_ring_guest_lost",
                "1 if the session ended because its primary was lost",
            ),
            |session| Some(flag(session.lost)),
        )?;
        self.gauges(
            families,
            About::seconds(
                "colo_ring_stalled",
                "Time without progress, if that is longer than is usual for the guest; else 0",
            ),
            |session| Some(seconds(session.stalled_ms.unwrap_or(0))),
        )?;
        self.gauges(
            families,
            About::new(
                "colo_ring_guard_linked",
                "1 if the link of the guest's guard is up; absent without a guard",
            ),
            |session| session.guard.as_ref().map(|guard| flag(guard.linked)),
        )?;
        self.gauges(
            families,
            About::new(
                "colo_ring_fallbacks",
                "Options that are not in force for the guest because the host lacks what they need",
            ),
            |session| Some(session.fallbacks.len() as f64),
        )?;
        self.gauges(
            families,
            About::bytes("colo_ring_guest_memory", "RAM of the guest"),
            |session| session.ram_bytes.map(exact),
        )?;
        self.gauges(
            families,
            About::bytes(
                "colo_ring_pool",
                "Pages that wait for their commit have this much room",
            ),
            |session| session.pool_bytes.map(exact),
        )?;
        self.gauges(
            families,
            About::bytes("colo_ring_pool_used", "As much of that room is in use"),
            |session| session.pool_used_bytes.map(exact),
        )?;
        self.counters(
            families,
            About::new(
                "colo_ring_pool_slabs_inline",
                "Parts of the pool that were made while pages waited for them",
            ),
            |session| session.pool_slabs_inline,
        )
    }

    fn checkpoints(&self, families: &mut Families<'_>) -> fmt::Result {
        self.gauges(
            families,
            About::seconds("colo_ring_checkpoint_age", "Age of the last committed checkpoint"),
            |session| session.checkpoint_age_ms.map(seconds),
        )?;
        self.counters(
            families,
            About::new(
                "colo_ring_checkpoints",
                "Checkpoints that were committed and measured",
            ),
            |session| session.summary.checkpoints,
        )?;
        self.counters(
            families,
            About::bytes("colo_ring_received", "Bytes received on all channels"),
            |session| session.bytes,
        )?;
        self.counters(
            families,
            About::new(
                "colo_ring_pages",
                "Pages received with content; their rate is the guest's dirty rate",
            ),
            |session| session.pages,
        )?;
        self.counters(
            families,
            About::new("colo_ring_zero_pages", "Pages received as zero"),
            |session| session.zero_pages,
        )?;
        for (position, (_, about)) in PHASES.iter().enumerate() {
            let of_all = self.sessions().filter_map(|(labels, session)| {
                let histograms = self.histograms.get(&session.session)?;
                Some((labels, &histograms[position]))
            });
            families.histograms(*about, of_all)?;
        }
        Ok(())
    }

    fn disks(&self, families: &mut Families<'_>) -> fmt::Result {
        let all = || {
            self.sessions().flat_map(|(labels, session)| {
                session.disks.iter().map(move |disk| {
                    let mut labels = labels.clone();
                    labels.push(("disk", printable(&disk.name)));
                    (labels, disk)
                })
            })
        };
        let gauges = |value: fn(&DiskStatus) -> f64| all().map(move |(labels, disk)| (labels, value(disk)));
        families.gauges(
            About::new(
                "colo_ring_disk_in_sync",
                "1 if the disk has all that its primary has written",
            ),
            gauges(|disk| flag(disk.state == DiskState::InSync)),
        )?;
        families.gauges(
            About::bytes("colo_ring_disk_log", "Size of the disk's log"),
            gauges(|disk| exact(disk.log_bytes)),
        )?;
        families.gauges(
            About::bytes(
                "colo_ring_disk_lag",
                "Bytes that are committed and not in the disk's base yet",
            ),
            gauges(|disk| exact(disk.lag_bytes)),
        )
    }

    /// Every session with the labels that all of its metrics have.
    fn sessions(&self) -> impl Iterator<Item = (Labels, &SessionStatus)> {
        self.status.sessions.iter().map(|session| {
            let number = session.session.to_string();
            let unnamed = || format!("session-{number}");
            let guest = session.guest.as_deref().map_or_else(unnamed, printable);
            (vec![("guest", guest), ("session", number)], session)
        })
    }

    fn gauges(
        &self,
        families: &mut Families<'_>,
        about: About,
        value: impl Fn(&SessionStatus) -> Option<f64>,
    ) -> fmt::Result {
        let values = self.sessions();
        families.gauges(
            about,
            values.filter_map(|(labels, session)| Some((labels, value(session)?))),
        )
    }

    fn counters(
        &self,
        families: &mut Families<'_>,
        about: About,
        value: impl Fn(&SessionStatus) -> u64,
    ) -> fmt::Result {
        let values = self.sessions();
        families.counters(about, values.map(|(labels, session)| (labels, value(session))))
    }
}

fn labels<const N: usize>(pairs: [(&'static str, &str); N]) -> Labels {
    pairs.map(|(name, value)| (name, value.to_owned())).into()
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

fn seconds(milliseconds: u64) -> f64 {
    milliseconds as f64 / 1000.0
}

/// Up to 8 PiB.
fn exact(bytes: u64) -> f64 {
    bytes as f64
}
