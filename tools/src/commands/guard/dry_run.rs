//! `colo-ring guard --dry-run`: how the guest would be protected.

use super::{GuardArgs, gates};
use crate::output::{CommandError, print, print_json};
use crate::qmp::{Qmp, QmpError};
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// How long QEMU's monitor may take to be there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How often QEMU is asked whether it has measured.
const POLL: Duration = Duration::from_millis(200);

/// What a guard would do.
#[derive(Serialize)]
struct Plan {
    schema: &'static str,
    schema_version: u32,
    /// How the output of each would be held.
    network_cards: Vec<String>,
    /// As QEMU measures it, where it can.
    dirty_mebibytes_per_s: Option<u64>,
}

/// Prints which gate each network card gets, and how much memory the guest dirties.
///
/// # Errors
/// If QEMU does not answer, or the output of a card could not be held.
pub(super) fn run(args: &GuardArgs) -> Result<ExitCode, CommandError> {
    let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
    let plan = Plan {
        schema: "colo-ring.guard-plan",
        schema_version: 1,
        network_cards: gates::describe(args, &mut qmp).map_err(CommandError::failed)?,
        dirty_mebibytes_per_s: dirty_rate(&mut qmp).map_err(CommandError::failed)?,
    };
    if args.json {
        print_json(&plan)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines = plan.network_cards;
    lines.push(match plan.dirty_mebibytes_per_s {
        Some(mebibytes) => format!("the guest dirties {mebibytes} MiB of memory a second"),
        None => "QEMU cannot measure how much memory the guest dirties".to_owned(),
    });
    print(&(lines.join("\n") + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// MiB that the guest dirties in a second, as QEMU measures it.
fn dirty_rate(qmp: &mut Qmp) -> Result<Option<u64>, QmpError> {
    match qmp.execute("calc-dirty-rate", &json!({"calc-time": 1})) {
        Ok(_) => {}
        Err(QmpError::Refused { .. }) => return Ok(None),
        Err(error) => return Err(error),
    }
    loop {
        std::thread::sleep(POLL);
        let rate = qmp.execute("query-dirty-rate", &json!({}))?;
        if rate["status"] != "measuring" {
            return Ok(rate["dirty-rate"].as_u64());
        }
    }
}
