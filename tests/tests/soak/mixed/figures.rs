//! What a process takes of its host.

use std::fmt;
use std::fs;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    resident_kib: u64,
    descriptors: usize,
    mappings: usize,
    threads: usize,
}

/// What an allocator keeps of what was freed, and threads' stacks that it keeps.
const KEPT_KIB: u64 = 24 << 10;
const KEPT_MAPPINGS: usize = 64;

/// Descriptors and threads that come and go by themselves.
const SLACK: usize = 4;

impl Figures {
    /// Those of a process that runs.
    pub fn of(pid: u32) -> Self {
        let process = format!("/proc/{pid}");
        let entries = |what: &str| {
            fs::read_dir(format!("{process}/{what}"))
                .expect("it runs")
                .count()
        };
        let status = fs::read_to_string(format!("{process}/status")).expect("it runs");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|line| line.trim().strip_suffix("kB"));
        let maps = fs::read_to_string(format!("{process}/maps")).expect("it runs");
        Self {
            resident_kib: resident.expect("kB").trim().parse().expect("a number"),
            descriptors: entries("fd"),
            mappings: maps.lines().count(),
            threads: entries("task"),
        }
    }

    /// Whether nothing is held but what was held before there was a session.
    pub fn is_idle_like(&self, before: &Self) -> bool {
        self.descriptors <= before.descriptors + SLACK
            && self.threads <= before.threads + SLACK
            && self.mappings <= before.mappings + KEPT_MAPPINGS
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            resident_kib,
            descriptors,
            mappings,
            threads,
        } = self;
        let mib = resident_kib >> 10;
        write!(
            f,
            "{mib} MiB resident, {descriptors} descriptors, {mappings} mappings, {threads} threads"
        )
    }
}

/// One of the figures.
type Figure = fn(&Figures) -> u64;

/// What leaks raises the least that is held; sessions that come and go raise only the most. So the least of the last third is not
/// above that of the second.
pub fn check_level(figures: &[Figures]) {
    let third = figures.len() / 3;
    // Too few say nothing.
    if third < 3 {
        return;
    }
    let (second, last) = (&figures[third..2 * third], &figures[2 * third..]);
    let least = |some: &[Figures], of: Figure| some.iter().map(of).min().expect("some");
    let all: [(&str, Figure, u64); 4] = [
        ("KiB resident", |figures| figures.resident_kib, KEPT_KIB),
        ("descriptors", |figures| figures.descriptors as u64, 8),
        (
            "mappings",
            |figures| figures.mappings as u64,
            KEPT_MAPPINGS as u64,
        ),
        ("threads", |figures| figures.threads as u64, 4),
    ];
    for (name, of, slack) in all {
        let (before, after) = (least(second, of), least(last, of));
        assert!(
            after <= before + slack,
            "{name}: at least {before} in the second third, {after} in the last"
        );
    }
}
