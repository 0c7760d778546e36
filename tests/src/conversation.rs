//! A conversation on the control socket, request by request: what the command does not do, as a claim that is kept.

use colo_ring::net::passing;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// See the module. A claim ends with it.
pub struct Conversation(BufReader<UnixStream>);

impl Conversation {
    /// Connects.
    ///
    /// # Panics
    /// If no receiver listens there.
    #[must_use]
    pub fn open(control: &Path) -> Self {
        let stream = UnixStream::connect(control).expect("the control socket");
        Self(BufReader::new(stream))
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The receiver's reason for refusing it.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn ask(&mut self, request: &Value) -> Result<Value, String> {
        self.ask_with(request, &[])
    }

    /// The same with open files for what is to be written.
    ///
    /// # Errors
    /// As of [`Self::ask`].
    ///
    /// # Panics
    /// As [`Self::ask`].
    pub fn ask_with(&mut self, request: &Value, files: &[BorrowedFd<'_>]) -> Result<Value, String> {
        let line = format!("{request}\n");
        passing::send(self.0.get_ref(), line.as_bytes(), files).expect("the receiver listens");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        let mut line: Value = serde_json::from_str(&line).expect("JSON");
        match line["ok"].as_bool() {
            Some(true) => Ok(line["answer"].take()),
            _ => Err(line["error"].as_str().expect("a reason").to_owned()),
        }
    }

    /// Claims a session's checkpoint.
    ///
    /// # Errors
    /// As of [`Self::ask`].
    pub fn claim(&mut self, session: u32) -> Result<Value, String> {
        self.ask(&json!({"command": "claim", "session": session, "force": false, "retry": false}))
    }

    /// Restores the claimed checkpoint to a file or a connection.
    ///
    /// # Errors
    /// As of [`Self::ask`].
    pub fn restore(
        &mut self,
        session: u32,
        shared: Option<&str>,
        files: &[BorrowedFd<'_>],
    ) -> Result<Value, String> {
        self.ask_with(&restore(session, shared), files)
    }
}

/// The request to restore a checkpoint.
#[must_use]
pub fn restore(session: u32, shared: Option<&str>) -> Value {
    json!({"command": "restore", "session": session, "to": "a test", "shared": shared, "keep": null})
}
