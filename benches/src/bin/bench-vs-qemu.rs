//! `scripts/bench-vs-qemu`: see [`colo_ring_benches::versus`].

use clap::Parser;
use colo_ring_benches::versus::{Options, run};
use colo_ring_tests::lab::{LabError, interrupt};
use colo_ring_tools::output::tell;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::process::ExitCode;

/// QEMU's own secondary, colo-ring in all its ways and a sink, with the same sessions in turn
///
/// Everything that is started is ended, and host settings that are changed (as root: congestion control, slow start
/// after idle, the core for loopback) are set back, also after SIGINT, SIGTERM and SIGHUP. Nothing else should run on
/// the machine meanwhile: what does is noticed, and those checkpoints are left out. The first time, captures are made
/// from a live primary: two or three minutes and 3 GB.
///
/// Exit codes: 0 done, 1 failed or not everything could be measured, 2 wrong usage.
#[derive(Parser)]
#[command(
    name = "bench-vs-qemu",
    after_help = "Example:\n  scripts/bench-vs-qemu --dry-run\n  scripts/bench-vs-qemu --quick --captures idle,30M --spacings 100 --secondaries qemu,uring,sink\n  scripts/bench-vs-qemu --live"
)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let options = Cli::parse().options;
    let plan = match options.plan() {
        Ok(plan) => plan,
        Err(message) => {
            tell(&format!("bench-vs-qemu: {message}"));
            return ExitCode::from(2);
        }
    };
    let ended = interruptible().and_then(|()| run(&options, &plan));
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            tell(&format!("bench-vs-qemu: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Lets signals end the measurement as an error would, so that everything is ended and set back.
fn interruptible() -> Result<(), LabError> {
    let failed = |error| LabError::io("wait for signals")(error);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let wait = move || signals.forever().for_each(|_| interrupt());
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map(drop).map_err(failed)
}
