//! Commands and their replies. Each command has a number, which its reply repeats: so several callers wait at a time, and a command that
//! hangs holds up no other caller.

use super::error::QmpError;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The commands that were sent and not answered.
#[derive(Debug, Default)]
struct Unanswered {
    commands: u64,
    callers: BTreeMap<u64, Sender<Value>>,
    is_closed: bool,
}

/// What the thread that reads hands replies to.
#[derive(Clone, Debug, Default)]
pub(super) struct Replies(Arc<Mutex<Unanswered>>);

impl Replies {
    fn lock(&self) -> MutexGuard<'_, Unanswered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reply has come. One whose caller has given up is dropped.
    pub(super) fn deliver(&self, reply: Value) {
        let mut unanswered = self.lock();
        // One without a number is the greeting, or to something that was not understood: then the oldest.
        let oldest = unanswered.callers.keys().next().copied();
        let number = reply["id"].as_u64().or(oldest);
        if let Some(caller) = number.and_then(|number| unanswered.callers.remove(&number)) {
            // It may give up in this moment.
            let _ = caller.send(reply);
        }
    }

    /// No reply comes any more.
    pub(super) fn close(&self) {
        let mut unanswered = self.lock();
        unanswered.is_closed = true;
        unanswered.callers.clear();
    }

    /// A caller that waits for the next number.
    pub(super) fn wait(&self) -> Reply {
        let (sender, receiver) = channel();
        let mut unanswered = self.lock();
        let number = unanswered.commands;
        unanswered.commands += 1;
        if !unanswered.is_closed {
            unanswered.callers.insert(number, sender);
        }
        Reply {
            number,
            receiver,
            replies: self.clone(),
        }
    }
}

/// A reply to come.
pub(super) struct Reply {
    number: u64,
    receiver: Receiver<Value>,
    replies: Replies,
}

impl Reply {
    /// Waits for it, as long as that.
    pub(super) fn receive(&self, limit: Duration) -> Result<Value, RecvTimeoutError> {
        self.receiver.recv_timeout(limit)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.replies.lock().callers.remove(&self.number);
    }
}

/// A command that was sent, and whose reply nothing waits for.
pub(crate) struct Asked {
    command: &'static str,
    replies: Vec<Reply>,
}

impl Asked {
    /// Its reply, once it is there. Comes once.
    ///
    /// # Errors
    /// As of [`super::Qmp::execute`].
    pub(crate) fn reply(&mut self) -> Result<Option<Value>, QmpError> {
        self.wait(Duration::ZERO)
    }

    /// The same, after as long as that at most. The command stays asked: QEMU takes a few that it has not answered, and then reads none.
    ///
    /// # Errors
    /// As of [`super::Qmp::execute`].
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<Option<Value>, QmpError> {
        let reply = match self.replies.first().map(|reply| reply.receive(limit)) {
            None | Some(Err(RecvTimeoutError::Timeout)) => return Ok(None),
            Some(Err(RecvTimeoutError::Disconnected)) => Err(closed(self.command)),
            Some(Ok(reply)) => returned(self.command, reply).map(Some),
        };
        self.replies.clear();
        reply
    }
}

/// How a command is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// After those before it.
    InTurn,
    /// Past those that are not answered.
    OutOfBand,
}

/// What all clones of a monitor's client use.
#[derive(Debug)]
pub(super) struct Conversation {
    writer: Mutex<UnixStream>,
    replies: Replies,
}

impl Conversation {
    pub(super) fn new(writer: UnixStream, replies: Replies) -> Self {
        Self {
            writer: Mutex::new(writer),
            replies,
        }
    }

    pub(super) fn writer(&self) -> MutexGuard<'_, UnixStream> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends commands in one piece.
    fn send(&self, verb: Verb, commands: &[(&str, &Value)]) -> Result<Vec<Reply>, QmpError> {
        let verb = match verb {
            Verb::InTurn => "execute",
            Verb::OutOfBand => "exec-oob",
        };
        let mut lines = String::new();
        let replies: Vec<_> = commands
            .iter()
            .map(|(command, arguments)| {
                let reply = self.replies.wait();
                let line = json!({verb: command, "arguments": arguments, "id": reply.number});
                lines.push_str(&line.to_string());
                reply
            })
            .collect();
        let first = commands.first().map_or("nothing", |(command, _)| command);
        let written = self.writer().write_all(lines.as_bytes());
        written.map_err(|_| closed(first))?;
        Ok(replies)
    }

    /// Sends a command whose reply is looked for later.
    pub(super) fn ask(&self, command: &'static str, arguments: &Value) -> Result<Asked, QmpError> {
        let replies = self.send(Verb::InTurn, &[(command, arguments)])?;
        Ok(Asked { command, replies })
    }

    /// Sends commands in one piece, and waits for their replies, `limit` in all. Returns that of the last one.
    ///
    /// # Errors
    /// Of the first that failed; those after it may have been run.
    pub(super) fn run(
        &self,
        verb: Verb,
        commands: &[(&str, &Value)],
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let replies = self.send(verb, commands)?;
        let deadline = Instant::now() + limit;
        let mut last = Value::Null;
        for ((command, _), reply) in commands.iter().zip(replies) {
            let left = deadline.saturating_duration_since(Instant::now());
            let reply = reply.receive(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => QmpError::Timeout {
                    command: (*command).to_owned(),
                    limit,
                },
                RecvTimeoutError::Disconnected => closed(command),
            })?;
            last = returned(command, reply)?;
        }
        Ok(last)
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        // QEMU takes the next client then, and the thread that reads ends.
        let _ = self.writer().shutdown(Shutdown::Both);
    }
}

/// What the command returned.
fn returned(command: &str, mut reply: Value) -> Result<Value, QmpError> {
    if let Some(error) = reply.get("error") {
        let description = error["desc"].as_str().unwrap_or("it did not say why");
        return Err(QmpError::Refused {
            command: command.to_owned(),
            description: description.to_owned(),
        });
    }
    match reply.get_mut("return") {
        Some(returned) => Ok(returned.take()),
        None => Err(closed(command)),
    }
}

fn closed(command: &str) -> QmpError {
    QmpError::Closed {
        command: command.to_owned(),
    }
}
