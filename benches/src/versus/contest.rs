//! Taking turns: in every round each secondary, as a fresh process, gets the same session.

use super::plan::{Cell, Plan, WARM_UP_CHECKPOINTS};
use super::secondary::{Flushed, Secondary};
use colo_ring_tests::lab::LabError;
use colo_ring_tools::run_file::{Checkpoint, RunFile};

/// Beyond the planned rounds, half of them again at most, to make up for disturbed checkpoints.
const EXTRA_ROUNDS_DIVISOR: u64 = 2;

/// A way to give a secondary a session.
pub trait Play {
    /// The phases that its sessions have, the most important first.
    fn phases(&self) -> &'static [&'static str];

    /// Starts that secondary, gives it a session with so many checkpoints, and ends it.
    ///
    /// # Errors
    /// When one side fails.
    fn session(&self, turn: &TurnOf<'_>) -> Result<Session, LabError>;
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug)]
pub struct TurnOf<'a> {
    /// The secondary.
    pub secondary: &'a Secondary,
    /// In which cell.
    pub cell: Cell,
    /// In which round.
    pub round: u64,
    /// Checkpoints of the session, warm-up included.
    pub checkpoints: u64,
}

/// What one session gave.
#[derive(Debug)]
pub struct Session {
    /// All of its checkpoints.
    pub run: RunFile,
    /// What a receiver has flushed in it.
    pub flushed: Option<Flushed>,
}

/// What one secondary did in one cell.
#[derive(Debug)]
pub struct Turns {
    /// The secondary.
    pub secondary: Secondary,
    /// Its undisturbed checkpoints of all rounds, without warm-up; none before the first session. Processor time is
    /// these checkpoints' share of that of the whole sessions.
    pub run: Option<RunFile>,
    /// Checkpoints of the whole sessions.
    pub session_checkpoints: u64,
    /// Guest pages of the whole sessions.
    pub session_pages: u64,
    /// Processor time of the whole sessions, where it is known.
    pub session_cpu_ns: Option<u64>,
    /// What a receiver has flushed in the whole sessions.
    pub flushed: Option<Flushed>,
    /// Why it was not measured (further).
    pub failed: Option<String>,
}

/// What was measured in one cell.
#[derive(Debug)]
pub struct CellResult {
    /// Which.
    pub cell: Cell,
    /// Every secondary of the plan that takes part, in its order.
    pub turns: Vec<Turns>,
}

/// Measures one cell of the plan. `progress` is called with what is being done.
///
/// # Errors
/// Only when interrupted: a secondary that fails is out of the cell, and its result says why.
pub fn measure(
    plan: &Plan,
    cell: Cell,
    play: &dyn Play,
    mut progress: impl FnMut(&str),
) -> Result<CellResult, LabError> {
    let mut all: Vec<_> = plan.secondaries_in(cell).map(Turns::new).collect();
    let rounds = plan.rounds_in(cell);
    let rounds_max = rounds + rounds.div_ceil(EXTRA_ROUNDS_DIVISOR);
    let lacks = |turns: &Turns| turns.failed.is_none() && turns.checkpoints() < plan.checkpoints;
    for round in 0..rounds_max {
        if round >= rounds && !all.iter().any(lacks) {
            break;
        }
        for secondary in plan.order(cell, round) {
            let turns = all.iter_mut().find(|turns| turns.secondary == *secondary);
            let turns = turns.expect("every secondary has its turns");
            if turns.failed.is_some() {
                continue;
            }
            progress(&format!(
                "{}, round {}: {}",
                cell.name(),
                round + 1,
                secondary.name
            ));
            let turn = TurnOf {
                secondary,
                cell,
                round,
                checkpoints: plan.session_checkpoints_in(cell) + WARM_UP_CHECKPOINTS,
            };
            match play.session(&turn) {
                Ok(session) => turns.add(session, round, plan.keep_disturbed),
                Err(LabError::Interrupted) => return Err(LabError::Interrupted),
                Err(error) => turns.failed = Some(error.to_string()),
            }
        }
    }
    Ok(CellResult { cell, turns: all })
}

impl Turns {
    fn new(secondary: &Secondary) -> Self {
        Self {
            secondary: secondary.clone(),
            run: None,
            session_checkpoints: 0,
            session_pages: 0,
            session_cpu_ns: None,
            flushed: None,
            failed: None,
        }
    }

    /// Checkpoints measured so far.
    #[must_use]
    pub fn checkpoints(&self) -> u64 {
        self.run.as_ref().map_or(0, |run| run.checkpoints.len() as u64)
    }

    /// Takes a session's checkpoints, without warm-up and, unless they are to be kept, without the disturbed ones, which
    /// are counted.
    fn add(&mut self, session: Session, round: u64, keep_disturbed: bool) {
        let Session { mut run, flushed } = session;
        self.session_checkpoints += run.checkpoints.len() as u64;
        self.session_pages += run
            .checkpoints
            .iter()
            .map(|checkpoint| checkpoint.pages)
            .sum::<u64>();
        let round = u32::try_from(round).unwrap_or(u32::MAX);
        let (kept, disturbed): (Vec<_>, Vec<_>) = std::mem::take(&mut run.checkpoints)
            .into_iter()
            .skip(usize::try_from(WARM_UP_CHECKPOINTS).unwrap_or(usize::MAX))
            .map(|checkpoint| Checkpoint { round, ..checkpoint })
            .partition(|checkpoint| keep_disturbed || checkpoint.disturbed.is_none());
        run.checkpoints = kept;
        run.dropped += disturbed.len() as u64;
        if let Some(flushed) = flushed {
            let sum = self.flushed.get_or_insert_default();
            sum.pages += flushed.pages;
            sum.ns += flushed.ns;
        }
        if let Some(used) = run.secondary {
            *self.session_cpu_ns.get_or_insert_default() += used.cpu_ns;
        }
        match &mut self.run {
            None => self.run = Some(run),
            Some(all) => add_round(all, run),
        }
        self.share_processor_time();
    }

    fn share_processor_time(&mut self) {
        let measured = u128::from(self.checkpoints());
        let (Some(cpu_ns), Some(run)) = (self.session_cpu_ns, &mut self.run) else {
            return;
        };
        let share = u128::from(cpu_ns) * measured / u128::from(self.session_checkpoints.max(1));
        if let Some(used) = &mut run.secondary {
            used.cpu_ns = u64::try_from(share).expect("a share is no more than all");
        }
    }
}

fn add_round(all: &mut RunFile, mut new: RunFile) {
    all.dropped += new.dropped;
    all.checkpoints.append(&mut new.checkpoints);
    if let (Some(all), Some(new)) = (&mut all.secondary, new.secondary) {
        all.rss_bytes_max = all.rss_bytes_max.max(new.rss_bytes_max);
    }
    for note in new.notes {
        if !all.notes.contains(&note) {
            all.notes.push(note);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::Shape;
    use super::*;
    use colo_ring_tools::run_file::{Clock, SecondaryUse};
    use std::cell::RefCell;
    use std::time::{Duration, SystemTime};

    /// Sessions in which every second measured checkpoint is disturbed, and one secondary fails.
    #[derive(Default)]
    struct Fake {
        order: RefCell<Vec<(u64, String)>>,
    }

    impl Play for Fake {
        fn phases(&self) -> &'static [&'static str] {
            &["loaded"]
        }

        fn session(&self, turn: &TurnOf<'_>) -> Result<Session, LabError> {
            self.order
                .borrow_mut()
                .push((turn.round, turn.secondary.name.clone()));
            if turn.secondary.name == "sink" {
                return Err(LabError::Ended {
                    what: "sink".into(),
                    detail: "broken".into(),
                });
            }
            let mut run = RunFile::new(
                "x",
                "test",
                serde_json::Value::Null,
                Clock::Primary,
                SystemTime::now(),
            );
            run.secondary = Some(SecondaryUse {
                pid: 1,
                cpu_ns: 10,
                rss_bytes_max: turn.round,
            });
            run.checkpoints = (0..turn.checkpoints)
                .map(|n| Checkpoint {
                    n,
                    pages: 1,
                    disturbed: (n >= WARM_UP_CHECKPOINTS && n % 2 == 0).then(|| "others".to_owned()),
                    ..Checkpoint::default()
                })
                .collect();
            Ok(Session { run, flushed: None })
        }
    }

    fn measured(checkpoints: u64, keep_disturbed: bool) -> (CellResult, Vec<(u64, String)>) {
        let cell = Cell {
            shape: Shape::new(0, 4),
            spacing: Duration::ZERO,
        };
        let secondaries = ["qemu", "sink"]
            .iter()
            .flat_map(|name| Secondary::named(name))
            .collect();
        let plan = Plan {
            cells: vec![cell],
            secondaries,
            checkpoints,
            rounds: 4,
            keep_disturbed,
        };
        let fake = Fake::default();
        let result = measure(&plan, cell, &fake, |_| ()).unwrap();
        (result, fake.order.into_inner())
    }

    #[test]
    fn warm_up_and_disturbed_checkpoints_are_left_out_and_made_up_for() {
        let (result, order) = measured(40, false);
        let qemu = &result.turns[0];
        // 10 of each session, of which half are disturbed: two more rounds are all that is added.
        assert_eq!(order.iter().filter(|(_, name)| name == "qemu").count(), 6);
        assert_eq!(qemu.checkpoints(), 30);
        let run = qemu.run.as_ref().unwrap();
        assert_eq!(run.dropped, 30);
        assert_eq!(
            run.secondary.unwrap(),
            SecondaryUse {
                pid: 1,
                // Of 60 for six sessions of 13, 30 of which count.
                cpu_ns: 23,
                rss_bytes_max: 5
            }
        );
        assert_eq!(run.checkpoints.iter().map(|one| one.round).max(), Some(5));
        assert!(
            run.checkpoints
                .iter()
                .all(|one| one.n >= WARM_UP_CHECKPOINTS && one.disturbed.is_none())
        );
        assert_eq!(qemu.session_pages, 6 * (10 + WARM_UP_CHECKPOINTS));
    }

    #[test]
    fn disturbed_checkpoints_count_where_they_are_to_be_kept() {
        let (result, order) = measured(40, true);
        assert_eq!(order.iter().filter(|(_, name)| name == "qemu").count(), 4);
        let run = result.turns[0].run.as_ref().unwrap();
        assert_eq!((run.checkpoints.len(), run.dropped), (40, 0));
    }

    #[test]
    fn who_fails_is_out_and_the_others_go_on() {
        let (result, order) = measured(4, false);
        assert_eq!(order.iter().filter(|(_, name)| name == "sink").count(), 1);
        assert!(result.turns[1].failed.as_ref().unwrap().contains("broken"));
        assert_eq!(result.turns[1].checkpoints(), 0);
        assert!(result.turns[0].failed.is_none());
    }
}
