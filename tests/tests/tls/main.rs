//! TLS against a running receiver over real sockets, with rustls as the primary's side.

mod flood;
mod identities;
mod records;
mod refusals;
mod sessions;

use colo_ring::receiver::{Event, Receiver, ReceiverOptions, Request, Response, SessionStatus, StatusReport};
use colo_ring_tests::HANG_LIMIT;
use std::sync::mpsc;
use std::time::Instant;

/// A receiver, and what it has told.
pub(crate) struct Running {
    pub(crate) receiver: Receiver,
    events: mpsc::Receiver<Event>,
    told: Vec<Event>,
}

impl Running {
    pub(crate) fn start(options: ReceiverOptions) -> Self {
        let (tell, events) = mpsc::channel();
        let receiver = Receiver::start(options, move |event| {
            // At the very end the other side of the queue is gone.
            let _ = tell.send(event);
        });
        Self {
            receiver: receiver.expect("a receiver"),
            events,
            told: Vec::new(),
        }
    }

    pub(crate) fn wait_for<T>(&mut self, what: &str, find: impl Fn(&Event) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            if let Some(position) = self.told.iter().position(|event| find(event).is_some()) {
                return find(&self.told.remove(position)).expect("found just now");
            }
            let left = HANG_LIMIT.saturating_sub(since.elapsed());
            match self.events.recv_timeout(left) {
                Ok(event) => self.told.push(event),
                Err(_) => panic!("waited for {what}; told meanwhile: {:?}", self.told),
            }
        }
    }

    /// Waits for a warning with these words, and returns it.
    pub(crate) fn warned(&mut self, words: &str) -> String {
        self.wait_for(words, |event| match event {
            Event::Warning(remark) if remark.text.contains(words) => Some(remark.text.clone()),
            _ => None,
        })
    }

    pub(crate) fn began(&mut self) -> u32 {
        self.wait_for("a session that begins", |event| match event {
            Event::Began { session, .. } => Some(session.session),
            _ => None,
        })
    }

    pub(crate) fn ended(&mut self) -> SessionStatus {
        self.wait_for("a session's end", |event| match event {
            Event::Ended(status) => Some(SessionStatus::clone(status)),
            _ => None,
        })
    }

    pub(crate) fn status(&self) -> Box<StatusReport> {
        match self.receiver.ask(Request::Status) {
            Ok(Response::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn stop(self) {
        self.receiver.stop_handle().stop();
        self.receiver.wait().expect("it ends when it is stopped");
    }
}
