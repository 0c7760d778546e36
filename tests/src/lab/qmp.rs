//! A QMP client: commands one at a time, events collected as they come.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::{LabError, wait_for};

const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// An asynchronous message of QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// QEMU's own time stamp, microseconds since the epoch.
    pub at_us: u64,
    /// Its data; null where it has none.
    pub data: Value,
}

/// A connection to QEMU's monitor. A reader thread ends when QEMU closes it.
#[derive(Debug)]
pub struct Qmp {
    writer: UnixStream,
    replies: Receiver<Value>,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Qmp {
    /// Connects, reads the greeting and leaves the negotiation mode.
    ///
    /// # Errors
    /// When nothing listens at `path` within `limit`, or QEMU does not greet.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, LabError> {
        let writer = wait_for("QEMU's monitor", limit, || Ok(UnixStream::connect(path).ok()))?;
        let reader = writer
            .try_clone()
            .map_err(LabError::io("duplicate the monitor's socket"))?;
        let (sender, replies) = mpsc::channel();
        let events = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&events);
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                let Ok(message) = serde_json::from_str::<Value>(&line) else {
                    break;
                };
                if let Some(event) = parse_event(&message) {
                    lock(&collected).push(event);
                } else if sender.send(message).is_err() {
                    break;
                }
            }
        });
        let mut qmp = Self {
            writer,
            replies,
            events,
        };
        let greeting = qmp.reply("greeting")?;
        if greeting.get("QMP").is_none() {
            return Err(LabError::Malformed {
                what: "QMP greeting".into(),
                detail: greeting.to_string(),
            });
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// [`LabError::Refused`] with QEMU's own words; [`LabError::Ended`] when QEMU is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, LabError> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.writer
            .write_all(line.as_bytes())
            .map_err(LabError::io(format!("send {command} to QEMU")))?;
        let mut reply = self.reply(command)?;
        if let Some(error) = reply.get("error") {
            return Err(LabError::Refused {
                command: command.to_owned(),
                reply: error["desc"].to_string(),
            });
        }
        Ok(reply["return"].take())
    }

    /// All events so far, in order. An event that QEMU sent before a reply is in the list when the reply is.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        lock(&self.events).clone()
    }

    fn reply(&self, command: &str) -> Result<Value, LabError> {
        self.replies
            .recv_timeout(REPLY_LIMIT)
            .map_err(|error| LabError::Ended {
                what: format!("QEMU did not answer {command}"),
                detail: error.to_string(),
            })
    }
}

fn lock(events: &Mutex<Vec<Event>>) -> MutexGuard<'_, Vec<Event>> {
    events.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parse_event(message: &Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    let seconds = message["timestamp"]["seconds"].as_u64()?;
    let microseconds = message["timestamp"]["microseconds"].as_u64()?;
    Some(Event {
        name,
        at_us: seconds * 1_000_000 + microseconds,
        data: message["data"].clone(),
    })
}
