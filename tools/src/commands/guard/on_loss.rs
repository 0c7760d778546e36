//! `guard --on-loss`: the operator's command when a protection is lost.

use super::GuardArgs;
use crate::output::{printable, tell};
use std::process::{Child, Command, Stdio};

/// Runs it, if there is one, and does not wait for it.
pub(super) fn run(args: &GuardArgs, reason: &str) {
    let Some(child) = start(args, reason) else { return };
    let name = args.name.clone();
    let wait = move || end(&name, child);
    if let Err(error) = std::thread::Builder::new().name("on-loss".to_owned()).spawn(wait) {
        tell(&format!(
            "WARNING: {}: it is not known how --on-loss ends: no thread for it: {error}",
            args.name
        ));
    }
}

/// Runs it, if there is one, and waits for it.
pub(super) fn run_and_wait(args: &GuardArgs, reason: &str) {
    if let Some(child) = start(args, reason) {
        end(&args.name, child);
    }
}

fn start(args: &GuardArgs, reason: &str) -> Option<Child> {
    let started = Command::new("sh")
        .args(["-c", args.on_loss.as_ref()?])
        .env("COLO_RING_NAME", &args.name)
        .env("COLO_RING_REASON", printable(reason))
        .env("COLO_RING_QMP", &args.primary.qmp)
        .env("COLO_RING_TO", args.primary.to.to_string())
        .stdin(Stdio::null())
        // Standard output is for the states.
        .stdout(std::io::stderr())
        .spawn();
    started
        .inspect_err(|error| tell(&format!("WARNING: {}: --on-loss: {error}", args.name)))
        .ok()
}

fn end(name: &str, mut child: Child) {
    match child.wait() {
        Ok(status) if status.success() => {}
        Ok(status) => tell(&format!("WARNING: {name}: --on-loss failed ({status})")),
        Err(error) => tell(&format!("WARNING: {name}: --on-loss: {error}")),
    }
}
