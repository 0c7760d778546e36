//! `colo-ring unprotect`: ends a QEMU's protection; its guest runs on.

use crate::commands::guard::{filter, plug, stop_mark};
use crate::guest_disks::{is_mirrors_connection, remove_all};
use crate::output::{CommandError, print, print_json, tell};
use crate::qmp::{CONNECT_LIMIT, Qmp, QmpError, socket_path};
use clap::Args;
use colo_ring::host::Machine;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long QEMU may be silent, or in COLO, before the connections to its receiver are cut.
const SILENCE_LIMIT: Duration = Duration::from_secs(3);

/// How long it may take then.
const END_LIMIT: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(20);

/// Options of `colo-ring unprotect`.
#[derive(Debug, Args)]
pub struct UnprotectArgs {
    /// QMP socket of the primary
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    qmp: PathBuf,

    /// Print the result as JSON (schema colo-ring.unprotect, version 1)
    #[arg(long)]
    json: bool,
}

/// How a protection was ended.
#[derive(Serialize, JsonSchema)]
pub(crate) struct UnprotectReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// Version of QEMU.
    qemu: String,
    /// Path of its monitor.
    qmp: &'a Path,
    /// QEMU's word for the migration before.
    before: String,
    /// Whether connections had to be cut because QEMU did not answer or did not leave COLO.
    cut: bool,
    /// Mirrors of disks that were removed.
    disks_released: usize,
    /// Network cards whose output a guard that has ended had left held.
    cards_released: usize,
    /// QEMU's word for what the guest does now.
    status: String,
    /// How long it took.
    elapsed_ms: u64,
    /// Where the command ran.
    machine: Machine,
}

/// Ends the protection, and returns once the guest runs alone.
///
/// # Errors
/// If QEMU does not answer, or does not end it; the error says what is left.
pub fn run(args: &UnprotectArgs) -> Result<ExitCode, CommandError> {
    let mut qmp = Qmp::connect(&args.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
    let began = Instant::now();
    let Released {
        before,
        cut,
        disks: disks_released,
        cards: cards_released,
    } = release(&mut qmp, SILENCE_LIMIT)?;
    let report = UnprotectReport {
        schema: "colo-ring.unprotect",
        schema_version: 1,
        qemu: qmp.version().to_string(),
        qmp: &args.qmp,
        before,
        cut,
        disks_released,
        cards_released,
        status: guest_status(&mut qmp).map_err(CommandError::failed)?,
        elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        machine: Machine::read(),
    };
    if args.json {
        print_json(&report)?;
    } else {
        print(&words(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn words(report: &UnprotectReport) -> String {
    let ended = match &*report.before {
        "colo" => "protection has ended",
        "none" | "completed" | "failed" | "cancelled" => "it was not protected",
        _ => "the first copy was cancelled",
    };
    let guest = match &*report.status {
        "running" => "the guest runs".to_owned(),
        other => format!("the guest is stopped ({other}): QMP `cont` lets it continue"),
    };
    let disks = match report.disks_released {
        0 => String::new(),
        1 => "; 1 disk is no longer mirrored".to_owned(),
        many => format!("; {many} disks are no longer mirrored"),
    };
    let cards = match report.cards_released {
        0 => "",
        _ => "; its output is no longer held",
    };
    format!("{ended}; {guest}{disks}{cards}\n")
}

/// A guest that is not protected any more.
pub(crate) struct Released {
    /// QEMU's word for the migration before.
    before: String,
    /// Whether connections had to be cut.
    cut: bool,
    /// Mirrors that were removed.
    disks: usize,
    /// Network cards whose output was held.
    cards: usize,
}

/// Ends the protection and what belongs to it: QEMU's connections are cut if it does not leave COLO within `patience`.
///
/// # Errors
/// If something is left; the error says what.
pub(crate) fn release(qmp: &mut Qmp, patience: Duration) -> Result<Released, CommandError> {
    let (before, cut) = end_migration(qmp, patience)?;
    let holds = |gates: &str, error: &dyn std::fmt::Display| {
        CommandError::Failed(format!(
            "the guest is no longer protected, but a guard's {gates} may hold its output: {error}"
        ))
    };
    let filters = filter::remove_all(qmp).map_err(|error| holds("filters", &error))?;
    let plugs = plug::remove_all(qmp).map_err(|error| holds("plugs", &error))?;
    // What hangs in a mirror must not hold output up.
    let disks = remove_all(qmp).map_err(|error| {
        CommandError::Failed(format!(
            "the guest is no longer protected, but mirrors of its disks are left: {error}"
        ))
    })?;
    stop_mark::run_on(qmp).map_err(|error| {
        CommandError::Failed(format!(
            "the guest is no longer protected, but may stand as a guard has left it: {error}; QMP `cont` lets it continue"
        ))
    })?;
    Ok(Released {
        before,
        cut,
        disks,
        cards: filters + plugs,
    })
}

/// Ends COLO, or a migration on the way to it. When QEMU does not answer or does not leave it within `patience`, its connections are cut.
/// Returns QEMU's word for what it was, and whether they were.
///
/// # Errors
/// If QEMU does not end it, or is gone.
pub(crate) fn end_migration(qmp: &mut Qmp, patience: Duration) -> Result<(String, bool), CommandError> {
    let asked = qmp.execute_within("query-migrate", &json!({}), patience);
    let (state, mut is_cut) = match asked {
        Ok(state) => (state, false),
        Err(QmpError::Timeout { .. }) => {
            tell("QEMU does not answer, a checkpoint hangs: cutting its connections to the receiver");
            cut_connections(qmp)?;
            let state = qmp.execute("query-migrate", &json!({}));
            (state.map_err(CommandError::failed)?, true)
        }
        Err(error) => return Err(CommandError::failed(error)),
    };
    let before = status_of(&state).to_owned();
    if before == "setup" {
        wait_set_up(qmp)?;
    }
    let end = match &*before {
        over if is_over(over) => return Ok((before, is_cut)),
        "colo" => "x-colo-lost-heartbeat",
        _ => "migrate_cancel",
    };
    match qmp.execute_within(end, &json!({}), patience) {
        // It may have ended by itself; and what is not answered is run once the connections are cut.
        Ok(_) | Err(QmpError::Refused { .. } | QmpError::Timeout { .. }) => {}
        Err(error) => return Err(CommandError::failed(error)),
    }
    let since = Instant::now();
    loop {
        match has_ended(qmp) {
            Ok(true) => return Ok((before, is_cut)),
            Ok(false) | Err(QmpError::Timeout { .. }) => {}
            Err(error) => return Err(CommandError::failed(error)),
        }
        if !is_cut && since.elapsed() > patience {
            tell("QEMU does not leave the migration: cutting its connections to the receiver");
            cut_connections(qmp)?;
            is_cut = true;
        }
        if since.elapsed() > END_LIMIT {
            return Err(CommandError::Failed(format!(
                "QEMU has not ended the migration {END_LIMIT:?} after {end}; `query-migrate` and `query-status` show its \
                 state. Its disks are still mirrored"
            )));
        }
        std::thread::sleep(POLL);
    }
}

/// Waits until a migration is set up, but not for long. QEMU 11.1 that is asked to cancel it before may wait for the receiver's end
/// of the connection, and answer nothing until that comes.
fn wait_set_up(qmp: &mut Qmp) -> Result<(), CommandError> {
    let since = Instant::now();
    while since.elapsed() < SILENCE_LIMIT {
        let state = qmp
            .execute("query-migrate", &json!({}))
            .map_err(CommandError::failed)?;
        if status_of(&state) != "setup" {
            break;
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Whether neither the migration nor a checkpoint holds the guest.
fn has_ended(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let state = qmp.execute_within("query-migrate", &json!({}), SILENCE_LIMIT)?;
    Ok(is_over(status_of(&state)) && guest_status(qmp)? != "colo")
}

pub(crate) fn guest_status(qmp: &mut Qmp) -> Result<String, QmpError> {
    let status = qmp.execute_within("query-status", &json!({}), SILENCE_LIMIT)?;
    Ok(status["status"].as_str().unwrap_or("unknown").to_owned())
}

/// Cuts what QEMU may wait for: the migration's connections and those of the mirrors.
///
/// # Errors
/// If QEMU does not answer, not even out of band.
pub(crate) fn cut_connections(qmp: &mut Qmp) -> Result<(), CommandError> {
    let known = qmp.execute_out_of_band("query-yank", &json!({}), SILENCE_LIMIT);
    let known = known.map_err(CommandError::failed)?;
    let is_ours = |instance: &&Value| instance["type"] == "migration" || is_mirrors_connection(instance);
    let instances: Vec<_> = (known.as_array().into_iter().flatten()).filter(is_ours).collect();
    if instances.is_empty() {
        return Ok(());
    }
    let cut = qmp.execute_out_of_band("yank", &json!({"instances": instances}), SILENCE_LIMIT);
    cut.map(drop).map_err(CommandError::failed)
}

/// Whether there is no migration in that state, or none any more.
pub(crate) fn is_over(status: &str) -> bool {
    matches!(status, "none" | "completed" | "failed" | "cancelled")
}

pub(crate) fn status_of(migration: &Value) -> &str {
    migration["status"].as_str().unwrap_or("none")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::tests::{Responder, monitor};
    use std::sync::{Arc, Mutex};

    /// Ends the protection of a QEMU in that state; returns the report's parts and the commands that it was given.
    fn ended(state: &'static str) -> ((String, bool), Vec<String>) {
        let done = Arc::new(Mutex::new(Vec::new()));
        let seen = done.clone();
        let respond: Responder = Box::new(move |command, _| {
            let mut seen = seen.lock().unwrap();
            if !command.starts_with("query") {
                seen.push(command.to_owned());
            }
            match command {
                "query-migrate" if seen.is_empty() => Ok(json!({"status": state})),
                "query-migrate" => Ok(json!({"status": "completed"})),
                "query-status" => Ok(json!({"status": "running"})),
                _ => Ok(json!({})),
            }
        });
        let path = monitor((11, 1, 3), respond);
        let mut qmp = Qmp::connect(&path.0, Duration::from_secs(5)).unwrap();
        let result = end_migration(&mut qmp, SILENCE_LIMIT).unwrap();
        let done = done.lock().unwrap().clone();
        (result, done)
    }

    #[test]
    fn each_state_has_its_end() {
        for (state, command) in [
            ("colo", Some("x-colo-lost-heartbeat")),
            ("active", Some("migrate_cancel")),
            ("none", None),
            ("completed", None),
        ] {
            let ((before, is_cut), done) = ended(state);
            assert_eq!((before.as_str(), is_cut), (state, false));
            assert_eq!(done, command.map(str::to_owned).into_iter().collect::<Vec<_>>());
        }
    }
}
