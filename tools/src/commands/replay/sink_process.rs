//! A sink of this replay's own, in a process of its own.

use crate::net::Address;
use crate::output::CommandError;
use crate::own_program;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};

/// A running `colo-ring sink`, ended when dropped.
pub(super) struct SinkProcess {
    child: Child,
    address: Address,
}

impl SinkProcess {
    /// Starts it for this many sessions and waits until it listens.
    pub fn start(channels: usize, sessions: u32) -> Result<Self, CommandError> {
        let mut child = own_program::command()
            .args(["sink", "--listen", "tcp:127.0.0.1:0"])
            .args([
                "--channels",
                &channels.to_string(),
                "--sessions",
                &sessions.to_string(),
            ])
            // A SIGINT of the terminal is for the replay, which ends its sink.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| CommandError::failed(format!("cannot start a sink: {error}")))?;
        let mut said = BufReader::new(
            child
                .stderr
                .take()
                .ok_or_else(|| CommandError::failed("the sink has no standard error"))?,
        );
        let mut first = String::new();
        let read = said.read_line(&mut first);
        let address = first
            .trim()
            .strip_prefix("listening on ")
            .and_then(|address| address.parse().ok());
        let (Ok(_), Some(address)) = (read, address) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(CommandError::failed(format!("the sink does not listen: {first}")));
        };
        // What it says of its sessions is of no interest, but must not fill the pipe.
        let drain = move || {
            let mut rest = Vec::new();
            let _ = said.read_to_end(&mut rest);
        };
        std::thread::spawn(drain);
        Ok(Self { child, address })
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for SinkProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
