//! Slow checkpoints as a table for a terminal of 80 columns.

use super::cause::Parts;
use super::{By, SlowCheckpoint, SlowReport, Sums, Whose};
use crate::output::table;
use colo_ring::metrics::display_nanoseconds;

impl Whose {
    /// All of them.
    const ALL: [Self; 5] = [Self::Primary, Self::Host, Self::Ours, Self::Unknown, Self::Nobody];

    /// As tables say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Host => "host",
            Self::Ours => "ours",
            Self::Unknown => "not known",
            Self::Nobody => "nobody",
        }
    }
}

impl SlowReport {
    /// The table, and what it comes to.
    pub fn table(&self) -> String {
        let mut text = self.head();
        text.push_str("\n\n");
        if self.slowest.is_empty() {
            return text;
        }
        let names = [
            "number",
            "at",
            self.by.name(),
            "primary",
            "host",
            "ours",
            "pages",
            "slow by",
        ];
        let mut rows = vec![names.map(str::to_owned).to_vec()];
        rows.extend(self.slowest.iter().map(|checkpoint| row(checkpoint, self.by)));
        text.push_str(&table(&rows));
        text.push('\n');
        text.push_str(&self.summary());
        text.push('\n');
        text.push_str(LEGEND);
        text
    }

    /// What it is of, and how long checkpoints usually take.
    pub fn head(&self) -> String {
        let guest = self.guest.as_deref().map(|guest| format!(" ({guest})"));
        let mut text = format!(
            "session {}{}: the last {} checkpoints",
            self.session,
            guest.unwrap_or_default(),
            self.checkpoints,
        );
        if self.checkpoints > 0 {
            text.push_str(&format!(
                "\n{}: p50 {}, p99 {}, max {}",
                self.by.name(),
                display_nanoseconds(self.durations.p50_ns),
                display_nanoseconds(self.durations.p99_ns),
                display_nanoseconds(self.durations.max_ns)
            ));
        }
        if self.damaged > 0 {
            text.push_str(&format!(
                "\n{} records are damaged, or were being written, and are left out",
                self.damaged
            ));
        }
        text
    }

    /// Whose time the slowest were.
    pub fn summary(&self) -> String {
        let mut text = format!(
            "of the {} of the {} slowest: {}\nof the usual {}: {}\n",
            display_nanoseconds(self.of_slowest.all_ns),
            self.slowest.len(),
            shares(&self.of_slowest),
            display_nanoseconds(self.usual.all_ns),
            shares(&self.usual)
        );
        let made = Whose::ALL.map(|whose| {
            let slow = self.slowest.iter().filter(|slow| slow.cause.whose == whose);
            (slow.count(), whose.name())
        });
        let made = made.iter().filter(|(count, _)| *count > 0);
        let made: Vec<_> = made.map(|(count, whose)| format!("{count} {whose}")).collect();
        text.push_str(&format!("slower than usual by: {}\n", made.join(", ")));
        if let Some(channels) = self.channels.filter(|_| self.by == By::Pause) {
            text.push_str(&format!(
                "channels end {} apart, usually {}; channel {} is last in {} of them\n",
                display_nanoseconds(channels.of_slowest_ns),
                display_nanoseconds(channels.usual_ns),
                channels.last_channel,
                channels.last_count
            ));
        }
        if self.by == By::Pause && self.waited_for_flush > 0 {
            text.push_str(&format!(
                "{} replies waited for a flush while the guest ran: --by reply shows them\n",
                self.waited_for_flush
            ));
        }
        text
    }
}

const LEGEND: &str = "\
primary: nothing had come from it, by its own or the network's delay. host: a
receiving core could have run, and another thread did. ours: this receiver
worked, or waited for a thread of its own. slow by: what took longer than usual;
channel N: its last bytes came long after those of the others.
";

fn row(checkpoint: &SlowCheckpoint, by: By) -> Vec<String> {
    let record = &checkpoint.record;
    let parts = Parts::of(record, by);
    let part = |nanoseconds: u64| match parts.unknown {
        0 => display_nanoseconds(nanoseconds),
        _ => "-".to_owned(),
    };
    vec![
        record.checkpoint.to_string(),
        format!("{:.3} s", record.requested_at_ns as f64 / 1e9),
        display_nanoseconds(checkpoint.duration_ns),
        part(parts.primary + parts.guard),
        part(parts.host),
        part(parts.working + parts.waiting),
        record.pages.to_string(),
        checkpoint.cause.what.to_string(),
    ]
}

/// In hundredths, which add up to 100 but for rounding.
fn shares(sums: &Sums) -> String {
    let share = |part: u64| part as f64 * 100.0 / (sums.all_ns.max(1)) as f64;
    let parts = [
        (sums.primary_ns, "primary and network"),
        (sums.host_ns, "host"),
        (sums.ours_ns, "ours"),
        (sums.unknown_ns, "unknown"),
    ];
    let shown = parts
        .iter()
        .filter(|(part, name)| *name != "unknown" || *part > 0);
    let shown: Vec<_> = shown
        .map(|(part, name)| format!("{name} {:.0} %", share(*part)))
        .collect();
    shown.join(", ")
}
