//! A live primary: how long its guest is paused, by its own STOP and RESUME events.

use super::contest::{Play, Session, TurnOf};
use super::plan::Cell;
use super::replays::{bad_run, session_prefix};
use super::secondary::{Flushed, Secondary, StartOptions};
use super::shape::Shape;
use colo_ring_tests::lab::{LabError, Protection, Qemu};
use colo_ring_tools::run_file::{Checkpoint, Clock, RunFile};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The phase of live sessions: STOP to RESUME.
const STOPPED: &str = "stopped";

/// Beyond the time that its checkpoints need.
const LIMIT: Duration = Duration::from_secs(120);

/// What is measured live: idle, and 40 MiB a checkpoint.
pub const CELLS: [Cell; 2] = [
    Cell {
        shape: Shape::new(0, 4),
        spacing: Duration::from_millis(100),
    },
    Cell {
        shape: Shape::new(40, 4),
        spacing: Duration::from_millis(300),
    },
];

/// A session of a fresh primary, whose guest runs for the cell's spacing between checkpoints, with a fresh
/// secondary. Returns the pauses, µs, and what a receiver has flushed.
///
/// # Errors
/// When one of them fails.
pub fn pauses_us(
    options: &StartOptions<'_>,
    secondary: &Secondary,
    cell: Cell,
    checkpoints: usize,
) -> Result<(Vec<u64>, Option<Flushed>), LabError> {
    let running = secondary.start(options, cell.shape)?;
    let mut primary = Qemu::start(
        options.lab,
        "live-primary",
        &cell.shape.machine(cell.spacing, 100),
    )?;
    primary.wait_serial("tick 2 ", LIMIT)?;
    let protection = Protection::every_ms(
        u32::try_from(cell.spacing.as_millis()).unwrap_or(u32::MAX),
        cell.shape.channels,
    );
    primary.end_precopy_early()?;
    primary.protect(running.address(), &protection)?;
    let needed = cell.spacing * u32::try_from(checkpoints).unwrap_or(u32::MAX);
    primary.wait_checkpoints(checkpoints, LIMIT + needed)?;
    let pauses_us = primary.pauses_us();
    drop(primary);
    Ok((pauses_us, running.end()?))
}

/// Gives live sessions.
#[derive(Debug)]
pub struct Live<'a> {
    /// How.
    pub start: StartOptions<'a>,
    /// Where every session's files are kept.
    pub out: &'a Path,
    /// What QEMU's own secondary is called.
    pub qemu: &'a str,
}

impl Play for Live<'_> {
    fn phases(&self) -> &'static [&'static str] {
        &[STOPPED]
    }

    fn session(&self, turn: &TurnOf<'_>) -> Result<Session, LabError> {
        let started = SystemTime::now();
        let checkpoints = usize::try_from(turn.checkpoints).unwrap_or(usize::MAX);
        let (pauses_us, flushed) = pauses_us(&self.start, turn.secondary, turn.cell, checkpoints)?;
        let name = turn.secondary.title(self.qemu);
        let options = serde_json::json!({ "cell": turn.cell.name() });
        let mut run = RunFile::new(&name, "bench-vs-qemu --live", options, Clock::Primary, started);
        let checkpoint = |(n, pause_us): (u64, &u64)| Checkpoint {
            n,
            phases_ns: BTreeMap::from([(STOPPED.to_owned(), pause_us * 1000)]),
            ..Checkpoint::default()
        };
        run.checkpoints = (1..).zip(&pauses_us).map(checkpoint).collect();
        run.write(&session_prefix(self.out, turn)?).map_err(bad_run)?;
        Ok(Session { run, flushed })
    }
}
