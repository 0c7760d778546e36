//! The other end of a receiver's control socket: one JSON object a line, asked and answered.

use crate::options::ControlAddress;
use crate::output::CommandError;
use clap::Args;
use colo_ring::net::passing;
use colo_ring::receiver::{Request, SessionTitle};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

/// A line as it comes back.
#[derive(Deserialize)]
#[serde(bound(deserialize = "A: DeserializeOwned"))]
struct Line<A> {
    answer: Option<A>,
    error: Option<String>,
}

/// Asks the receiver at `address` and waits for its answer, however long it takes: a dump takes as long as the disk.
///
/// # Errors
/// If there is no receiver, it goes away, or it refuses: with its reason.
pub fn ask<A: DeserializeOwned>(address: &ControlAddress, request: &Request) -> Result<A, CommandError> {
    Conversation::open(address)?.ask(request)
}

/// A connection to a receiver's control socket: what was claimed in it belongs to it.
pub struct Conversation {
    address: ControlAddress,
    stream: BufReader<UnixStream>,
}

impl Conversation {
    /// Connects to the receiver at `address`.
    ///
    /// # Errors
    /// If there is no receiver, or another process owns it.
    pub fn open(address: &ControlAddress) -> Result<Self, CommandError> {
        let stream = UnixStream::connect(&address.0).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "; is a receiver running with this --control?"
                }
                io::ErrorKind::PermissionDenied => "; only the receiver's own user can connect to it",
                _ => "",
            };
            CommandError::Failed(format!("cannot connect to {address}: {error}{hint}"))
        })?;
        Ok(Self {
            address: address.clone(),
            stream: BufReader::new(stream),
        })
    }

    /// Asks, and waits for the answer, however long it takes.
    ///
    /// # Errors
    /// If the receiver goes away or refuses: with its reason.
    pub fn ask<A: DeserializeOwned>(&mut self, request: &Request) -> Result<A, CommandError> {
        self.ask_with(request, &[])
    }

    /// The same with open files for what is to be written.
    ///
    /// # Errors
    /// Those of [`Self::ask`].
    pub fn ask_with<A: DeserializeOwned>(
        &mut self,
        request: &Request,
        files: &[BorrowedFd<'_>],
    ) -> Result<A, CommandError> {
        let address = &self.address;
        let failed = |doing: &str, error: &io::Error| {
            CommandError::Failed(format!("cannot {doing} {address}: {error}"))
        };
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        let written = passing::send(self.stream.get_ref(), &line, files);
        written.map_err(|error| failed("write to", &error))?;
        let mut text = String::new();
        let count = self.stream.read_line(&mut text);
        if count.map_err(|error| failed("read from", &error))? == 0 {
            return Err(CommandError::Failed(format!(
                "the receiver at {address} ended without an answer"
            )));
        }
        let not_understood = |error| {
            CommandError::Failed(format!(
                "the answer from {address} is not understood ({error}); is it a receiver of another version?"
            ))
        };
        match serde_json::from_str(&text).map_err(not_understood)? {
            Line {
                answer: Some(answer), ..
            } => Ok(answer),
            Line {
                error: Some(error), ..
            } => Err(CommandError::Failed(error)),
            Line { .. } => Err(CommandError::Failed(format!(
                "the answer from {address} is empty"
            ))),
        }
    }
}

/// A session, by its number or by its guest.
#[derive(Clone, Debug, Args)]
#[group(id = "which", required = true, multiple = false)]
pub struct WhichSession {
    /// Number of the session, as `colo-ring status` lists it
    #[arg(long, value_name = "N")]
    session: Option<u32>,

    /// The guest, by its name or its UUID, in place of the session
    #[arg(long, value_name = "NAME")]
    guest: Option<String>,
}

impl WhichSession {
    /// The session that is meant.
    ///
    /// # Errors
    /// If none is, or several are.
    pub fn find(&self, conversation: &mut Conversation) -> Result<SessionTitle, CommandError> {
        self.find_among(conversation, false)
    }

    /// The same, where only one that runs can be.
    ///
    /// # Errors
    /// If none is, or several are.
    pub fn find_running(&self, conversation: &mut Conversation) -> Result<SessionTitle, CommandError> {
        self.find_among(conversation, true)
    }

    fn find_among(&self, conversation: &mut Conversation, runs: bool) -> Result<SessionTitle, CommandError> {
        #[derive(Deserialize)]
        struct Found {
            found: SessionTitle,
        }
        let guest = match (&self.guest, self.session) {
            (Some(guest), _) => guest.clone(),
            (None, session) => session.unwrap_or_default().to_string(),
        };
        let found: Found = conversation.ask(&Request::Find { guest, runs })?;
        Ok(found.found)
    }
}
