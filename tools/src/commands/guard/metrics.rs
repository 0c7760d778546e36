//! What a guard shows to Prometheus: its report, and its times as histograms.

use super::GuardArgs;
use super::measurements::Measurements;
use super::path::GateStatus;
use super::report::{GuardReport, GuardState, SharedReport, Shown};
use crate::metrics_server::{
    About, Families, Labels, MetricsListener, MetricsServer, PhaseHistogram, Source,
};
use crate::output::{CommandError, printable, tell};
use colo_ring::net::{ListenAddress, PassedSockets};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use std::fmt;

/// Serves measurements, where the operator wants that, until what is returned is dropped. Where it cannot be done, it warns: that costs
/// measurements, not the guest's protection.
pub(super) fn serve(args: &GuardArgs, shown: &Shown, measurements: &Measurements) -> Option<MetricsServer> {
    let address = args.metrics.as_ref()?;
    let served = listen(address, shown, measurements);
    let warn = |error: &CommandError| tell(&format!("WARNING: no metrics: {error}"));
    served.inspect_err(warn).ok()
}

fn listen(
    address: &ListenAddress,
    shown: &Shown,
    measurements: &Measurements,
) -> Result<MetricsServer, CommandError> {
    let listener =
        MetricsListener::obtain(address, &PassedSockets::default()).map_err(CommandError::failed)?;
    tell(&format!("serving metrics on {}", listener.address()));
    let (stopped, held) = measurements.histograms();
    let source = GuardSource {
        report: shown.shared(),
        stopped,
        held,
    };
    listener.serve(source, || ()).map_err(CommandError::failed)
}

/// See the module. The histograms are filled by the guard.
struct GuardSource {
    report: SharedReport,
    stopped: PhaseHistogram,
    held: PhaseHistogram,
}

impl Source for GuardSource {
    fn collect(&mut self) {}

    async fn figures(&mut self) -> Option<Box<dyn Collector>> {
        Some(Box::new(GuardFigures {
            report: self.report.now(),
            stopped: self.stopped.clone(),
            held: self.held.clone(),
        }))
    }
}

/// What a page shows.
#[derive(Debug)]
struct GuardFigures {
    report: GuardReport,
    stopped: PhaseHistogram,
    held: PhaseHistogram,
}

impl Collector for GuardFigures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families::new(encoder);
        families.build()?;
        self.protection(&mut families)?;
        self.times(&mut families)?;
        self.gates(&mut families)
    }
}

impl GuardFigures {
    fn labels(&self) -> Labels {
        vec![("guest", printable(&self.report.name))]
    }

    fn protection(&self, families: &mut Families<'_>) -> fmt::Result {
        let report = &self.report;
        let states = GuardState::ALL.into_iter().map(|state| {
            let mut labels = self.labels();
            labels.push(("state", state.name().to_owned()));
            (labels, f64::from(u8::from(report.state == state)))
        });
        families.gauges(
            About::new(
                "colo_ring_guard_state",
                "1 for the state that the guest is in, 0 for others",
            ),
            states,
        )?;
        families.gauges(
            About::seconds(
                "colo_ring_guard_unprotected",
                "Time for which the guest is not protected; 0 while it is",
            ),
            [(self.labels(), report.unprotected_s.unwrap_or(0) as f64)],
        )?;
        families.gauges(
            About::seconds(
                "colo_ring_guard_interval",
                "Time between checkpoints that no output asks for",
            ),
            [(self.labels(), report.interval_ms as f64 / 1000.0)],
        )?;
        for (about, count) in [
            (
                About::new("colo_ring_guard_protections", "How often the guest was protected"),
                report.protections,
            ),
            (
                About::new("colo_ring_guard_checkpoints", "Checkpoints of the guest"),
                report.checkpoints,
            ),
            (
                About::new(
                    "colo_ring_guard_asked_for_output",
                    "Checkpoints that were asked for because output waited",
                ),
                report.asked_for_output,
            ),
        ] {
            families.counters(about, [(self.labels(), count)])?;
        }
        Ok(())
    }

    fn times(&self, families: &mut Families<'_>) -> fmt::Result {
        families.histograms(
            About::seconds(
                "colo_ring_stopped",
                "Pause of the guest for a checkpoint by QEMU's clock: STOP to RESUME",
            ),
            [(self.labels(), &self.stopped)],
        )?;
        families.histograms(
            About::seconds(
                "colo_ring_held",
                "A frame's arrival to its release; through a filter or a plug, from when the guard has seen its copy",
            ),
            [(self.labels(), &self.held)],
        )
    }

    fn gates(&self, families: &mut Families<'_>) -> fmt::Result {
        let all = || {
            self.report.gates.iter().map(|gate| {
                let mut labels = self.labels();
                labels.push(("nic", printable(&gate.nic)));
                labels.push(("gate", gate.gate.to_owned()));
                (labels, gate)
            })
        };
        let counts = |count: fn(&GateStatus) -> u64| all().map(move |(labels, gate)| (labels, count(gate)));
        families.counters(
            About::new("colo_ring_gate_frames", "Frames that the guest has sent"),
            counts(|gate| gate.counts.sent),
        )?;
        families.counters(
            About::new(
                "colo_ring_gate_frames_dropped",
                "Frames that did not fit and were dropped",
            ),
            counts(|gate| gate.counts.dropped),
        )?;
        let held = counts(|gate| gate.counts.held).map(|(labels, count)| (labels, count as f64));
        families.gauges(
            About::new("colo_ring_gate_frames_held", "Frames that wait for a commit"),
            held,
        )?;
        let bytes = counts(|gate| gate.counts.held_bytes).map(|(labels, count)| (labels, count as f64));
        families.gauges(About::bytes("colo_ring_gate_held", "Bytes of them"), bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::guard::path::GateStatus;
    use clap::Parser;
    use colo_ring_tests::openmetrics::Page;
    use prometheus_client::registry::Registry;
    use std::time::Duration;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: GuardArgs,
    }

    #[test]
    fn a_guard_shows_its_report_and_its_times() {
        let line = [
            "guard",
            "--qmp",
            "/q",
            "--to",
            "tcp:192.0.2.2:4444",
            "--name",
            "web3",
        ];
        let mut report = GuardReport::new(&Line::parse_from(line).args);
        report.state = GuardState::Protected;
        report.unprotected_s = None;
        report.checkpoints = 7;
        report.gates.push(GateStatus {
            nic: "net0".to_owned(),
            gate: "relay",
            counts: crate::commands::guard::gate::Counts {
                held_bytes: 60,
                ..Default::default()
            },
        });
        let figures = GuardFigures {
            report,
            stopped: PhaseHistogram::default(),
            held: PhaseHistogram::default(),
        };
        figures.stopped.record(Duration::from_millis(3));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(figures));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let page = Page::read(&text).unwrap_or_else(|rule| panic!("{rule} in\n{text}"));
        let guest = ("guest", "web3");
        for (name, labels, value) in [
            ("colo_ring_guard_state", &[guest, ("state", "protected")][..], 1.0),
            ("colo_ring_guard_state", &[guest, ("state", "copying")], 0.0),
            ("colo_ring_guard_unprotected_seconds", &[guest], 0.0),
            ("colo_ring_guard_checkpoints_total", &[guest], 7.0),
            ("colo_ring_stopped_seconds_count", &[guest], 1.0),
            (
                "colo_ring_gate_held_bytes",
                &[guest, ("nic", "net0"), ("gate", "relay")],
                60.0,
            ),
        ] {
            assert_eq!(page.value(name, labels), Some(value), "{name}");
        }
    }
}
