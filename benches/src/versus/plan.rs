//! What is measured: cells, each a capture and a spacing, in which all secondaries take turns.

use super::secondary::Secondary;
use super::shape::Shape;
use std::fmt;
use std::time::Duration;

/// Checkpoints at the start of every session that are left out: they touch what nothing has touched before.
pub const WARM_UP_CHECKPOINTS: u64 = 3;

/// A capture, replayed at a spacing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The capture.
    pub shape: Shape,
    /// From the beginning of a checkpoint to that of the next, if it has ended by then; zero is back to back.
    pub spacing: Duration,
}

/// All that is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In this order.
    pub cells: Vec<Cell>,
    /// The secondaries that take turns.
    pub secondaries: Vec<Secondary>,
    /// Undisturbed checkpoints wanted of each secondary in each cell.
    pub checkpoints: u64,
    /// Sessions of each secondary in each cell in which to get them.
    pub rounds: u64,
    /// Whether disturbed checkpoints count.
    pub keep_disturbed: bool,
}

impl Cell {
    /// Its name in files.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-every-{}ms", self.shape.name(), self.spacing.as_millis())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secondaries: Vec<_> = self.secondaries.iter().map(|one| &*one.name).collect();
        write!(
            f,
            "{} cells, in each {} secondaries ({}) with {} checkpoints in {} rounds",
            self.cells.len(),
            secondaries.len(),
            secondaries.join(", "),
            self.checkpoints,
            self.rounds
        )
    }
}

impl Plan {
    /// Measured checkpoints of one session.
    #[must_use]
    pub fn session_checkpoints(&self) -> u64 {
        self.checkpoints.div_ceil(self.rounds)
    }

    /// Measured checkpoints of one session in that cell: no more than the capture has where it cannot be repeated.
    #[must_use]
    pub fn session_checkpoints_in(&self, cell: Cell) -> u64 {
        let captured = cell.shape.captured_checkpoints() as u64;
        match cell.shape.compression {
            None => self.session_checkpoints(),
            Some(_) => self.session_checkpoints().min(captured - WARM_UP_CHECKPOINTS),
        }
    }

    /// Sessions of each secondary in that cell.
    #[must_use]
    pub fn rounds_in(&self, cell: Cell) -> u64 {
        let needed = self.checkpoints.div_ceil(self.session_checkpoints_in(cell));
        self.rounds.max(needed)
    }

    /// The secondaries that take turns in that cell.
    pub fn secondaries_in(&self, cell: Cell) -> impl Iterator<Item = &Secondary> {
        let takes_part = move |one: &&Secondary| cell.shape.compression.is_some() || !one.is_decoders();
        self.secondaries.iter().filter(takes_part)
    }

    /// The secondaries in the order of one round: each round begins with another one, and every other round goes
    /// backwards, so that none always follows the same one.
    #[must_use]
    pub fn order(&self, cell: Cell, round: u64) -> Vec<&Secondary> {
        let mut order: Vec<_> = self.secondaries_in(cell).collect();
        let count = u64::try_from(order.len()).unwrap_or(1).max(1);
        order.rotate_left(usize::try_from(round % count).unwrap_or(0));
        if round % 2 == 1 {
            order.reverse();
        }
        order
    }

    /// About how long it takes, by what a machine of two cores took, without captures that are to be made first.
    #[must_use]
    pub fn estimate(&self) -> Duration {
        let turns = self
            .cells
            .iter()
            .flat_map(|cell| self.secondaries_in(*cell).map(move |one| (cell, one)));
        turns
            .map(|(cell, secondary)| self.estimate_of(*cell, secondary))
            .sum()
    }

    /// All sessions of one secondary in one cell.
    fn estimate_of(&self, cell: Cell, secondary: &Secondary) -> Duration {
        /// A checkpoint with QEMU's own secondary waits once or twice for a delayed acknowledgement.
        const QEMU_OVER_TCP: Duration = Duration::from_millis(86);
        let mib = cell.shape.mib;
        let stalls = if secondary.is_qemu() {
            QEMU_OVER_TCP
        } else {
            Duration::ZERO
        };
        let checkpoint = Duration::from_micros(500) + Duration::from_micros(500) * mib + stalls;
        // Start, precopy, reading of the capture, end.
        let around = Duration::from_millis(1500) + Duration::from_millis(15) * mib;
        let checkpoints =
            u32::try_from(self.session_checkpoints_in(cell) + WARM_UP_CHECKPOINTS).unwrap_or(u32::MAX);
        let rounds = u32::try_from(self.rounds_in(cell)).unwrap_or(u32::MAX);
        (around + checkpoint.max(cell.spacing) * checkpoints) * rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rounds: u64) -> Plan {
        Plan {
            cells: vec![Cell {
                shape: Shape::new(0, 4),
                spacing: Duration::from_millis(100),
            }],
            secondaries: Secondary::usual(),
            checkpoints: 300,
            rounds,
            keep_disturbed: false,
        }
    }

    #[test]
    fn each_has_the_same_turns_and_its_own_place_each_round() {
        let plan = plan(6);
        let count = plan.secondaries.len();
        let first: Vec<_> = (0..count as u64)
            .map(|round| &plan.order(plan.cells[0], round)[0].name)
            .collect();
        let mut followers = std::collections::BTreeSet::new();
        for round in 0..count as u64 {
            let order = plan.order(plan.cells[0], round);
            assert_eq!(order.len(), count);
            let qemu = order.iter().position(|one| one.is_qemu()).unwrap();
            followers.insert(&order[(qemu + 1) % count].name);
        }
        assert!(first.iter().collect::<std::collections::BTreeSet<_>>().len() > 1);
        assert!(followers.len() > 1, "{followers:?}");
    }

    #[test]
    fn a_compressed_capture_is_not_repeated() {
        let compressed = Cell {
            shape: Shape::COMPRESSED[0],
            spacing: Duration::ZERO,
        };
        let mut plan = plan(2);
        plan.secondaries.push(Secondary::decoders());
        assert_eq!(plan.session_checkpoints_in(plan.cells[0]), 150);
        assert_eq!(
            (
                plan.session_checkpoints_in(compressed),
                plan.rounds_in(compressed)
            ),
            (53, 6)
        );
        let decode = |cell| plan.secondaries_in(cell).filter(|one| one.is_decoders()).count();
        assert_eq!((decode(plan.cells[0]), decode(compressed)), (0, 1));
    }

    #[test]
    fn an_estimate_grows_with_what_is_measured() {
        assert_eq!(plan(6).session_checkpoints(), 50);
        assert_eq!(plan(7).session_checkpoints(), 43);
        let short = plan(1).estimate();
        // 300 checkpoints 100 ms apart are half a minute for each.
        assert!(short > Duration::from_secs(30) * plan(1).secondaries.len().try_into().unwrap());
        assert!(plan(6).estimate() > short);
    }
}
