//! `colo-ring guard --dry-run`: how the guest would be protected.

use super::{GuardArgs, gates};
use crate::output::{CommandError, print, print_json};
use crate::qmp::{CONNECT_LIMIT, Qmp, QmpError};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// How often QEMU is asked whether it has measured.
const POLL: Duration = Duration::from_millis(200);

/// Links for which it is predicted, in gigabits a second.
const LINKS: [u32; 3] = [1, 10, 25];

/// MiB a second in a gigabit a second.
const MIB_PER_GIGABIT: f64 = 1e9 / 8.0 / (1 << 20) as f64;

/// How long a guest would be stopped for its memory, over a link that nothing else uses. What a checkpoint takes beside that, some
/// milliseconds, is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
struct Prediction {
    /// The link.
    gigabits_per_s: u32,
    /// For how long the guest would be stopped at each checkpoint.
    pause_ms: f64,
    /// The share of its time that it would be stopped.
    stopped_share: f64,
}

impl Prediction {
    /// Of a guest that dirties so much memory, none of it twice between two checkpoints.
    fn make(gigabits_per_s: u32, dirty_mebibytes_per_s: f64, interval: Duration) -> Self {
        let sending = dirty_mebibytes_per_s / (f64::from(gigabits_per_s) * MIB_PER_GIGABIT);
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        Self {
            gigabits_per_s,
            pause_ms: rounded(interval.as_secs_f64() * 1000.0 * sending),
            stopped_share: rounded(sending / (1.0 + sending)),
        }
    }

    fn words(self, args: &GuardArgs) -> String {
        let Self {
            gigabits_per_s,
            pause_ms,
            stopped_share,
        } = self;
        if stopped_share > args.pause_share {
            return format!(
                "  over {gigabits_per_s} Gbit/s: it dirties memory faster than can be sent in {:.0} % of its time (--pause-share)",
                args.pause_share * 100.0
            );
        }
        format!(
            "  over {gigabits_per_s} Gbit/s: a pause of {pause_ms:.1} ms for that every {} ms, {:.1} % of its time",
            args.interval_max,
            stopped_share * 100.0
        )
    }
}

/// What a guard would do.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Plan {
    schema: &'static str,
    schema_version: u32,
    /// How the output of each would be held.
    network_cards: Vec<String>,
    /// As QEMU measures it, where it can.
    dirty_mebibytes_per_s: Option<u64>,
    /// What that means, at checkpoints every `--interval-max`.
    predictions: Vec<Prediction>,
}

/// Prints which gate each network card gets, how much memory the guest dirties, and for how long it would be stopped.
///
/// # Errors
/// If QEMU does not answer, or the output of a card could not be held.
pub(super) fn run(args: &GuardArgs) -> Result<ExitCode, CommandError> {
    let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
    let network_cards = gates::describe(args, &mut qmp).map_err(CommandError::failed)?;
    let dirty_mebibytes_per_s = dirty_rate(&mut qmp).map_err(CommandError::failed)?;
    let interval = Duration::from_millis(args.interval_max.into());
    let predict = |mebibytes: u64| {
        LINKS
            .map(|link| Prediction::make(link, mebibytes as f64, interval))
            .to_vec()
    };
    let plan = Plan {
        schema: "colo-ring.guard-plan",
        schema_version: 1,
        network_cards,
        dirty_mebibytes_per_s,
        predictions: dirty_mebibytes_per_s.map(predict).unwrap_or_default(),
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
    lines.extend(plan.predictions.iter().map(|prediction| prediction.words(args)));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_what_is_dirtied_over_what_is_sent() {
        let interval = Duration::from_millis(500);
        let idle = Prediction::make(10, 0.0, interval);
        assert_eq!((idle.pause_ms, idle.stopped_share), (0.0, 0.0));
        // As much as the link carries.
        let busy = Prediction::make(1, MIB_PER_GIGABIT, interval);
        assert_eq!((busy.pause_ms, busy.stopped_share), (500.0, 0.5));
    }
}
