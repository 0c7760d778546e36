//! `receive --on-loss`: telling a cluster manager that a primary is lost. What to do about it is its decision.

use crate::options::ControlAddress;
use crate::output::tell;
use colo_ring::receiver::SessionStatus;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most hooks at a time: any peer can end a session, and each takes a process.
const HOOKS_MAX: usize = 64;

/// The command to run.
pub(crate) struct OnLoss {
    command: String,
    control: String,
    running: Arc<AtomicUsize>,
}

impl OnLoss {
    pub(crate) fn new(command: String, control: Option<&ControlAddress>) -> Self {
        Self {
            command,
            control: control.map(ToString::to_string).unwrap_or_default(),
            running: Arc::default(),
        }
    }

    /// Runs the command, on a thread of its own, if the session ended because its primary was lost.
    pub(crate) fn session_ended(&self, status: &SessionStatus) {
        if !status.lost {
            return;
        }
        let session = status.session;
        if self.running.fetch_add(1, Ordering::AcqRel) >= HOOKS_MAX {
            self.running.fetch_sub(1, Ordering::AcqRel);
            return tell(&format!(
                "warning: session {session}: --on-loss was not run: {HOOKS_MAX} of them are running"
            ));
        }
        let (mut command, running) = (self.shell(status), self.running.clone());
        let run = move || {
            match command.status() {
                Ok(status) if status.success() => {}
                Ok(status) => tell(&format!(
                    "warning: session {session}: --on-loss failed ({status})"
                )),
                Err(error) => tell(&format!("warning: session {session}: --on-loss: {error}")),
            }
            running.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(error) = std::thread::Builder::new().name("on-loss".to_owned()).spawn(run) {
            self.running.fetch_sub(1, Ordering::AcqRel);
            tell(&format!(
                "warning: session {session}: --on-loss: no thread for it: {error}"
            ));
        }
    }

    fn shell(&self, status: &SessionStatus) -> Command {
        let number = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
        let age = status.checkpoint.and(status.checkpoint_age_ms);
        let mut command = Command::new("sh");
        command
            .args(["-c", &self.command])
            .env("COLO_RING_SESSION", status.session.to_string())
            .env("COLO_RING_CHECKPOINT", number(status.checkpoint))
            .env("COLO_RING_CHECKPOINT_AGE_MS", number(age))
            .env("COLO_RING_REASON", status.end.as_deref().unwrap_or_default())
            .env("COLO_RING_PEER", &status.peer)
            .env("COLO_RING_MACHINE", status.machine.as_deref().unwrap_or_default())
            .env("COLO_RING_CONTROL", &self.control)
            .stdin(Stdio::null())
            // Standard output is for the report.
            .stdout(std::io::stderr());
        command
    }
}
