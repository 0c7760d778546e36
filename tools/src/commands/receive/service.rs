//! A receiver as a service: what it says to the service manager, and the sockets that it gets from it.

use crate::output::tell;
use crate::service::{ServiceManager, passed_sockets};
use colo_ring::net::{Keep, ListenAddress, PassedSockets, kept_name};
use colo_ring::receiver::{Receiver, Request, Response, SessionState, StatusReport};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the number of guests is reported to the manager, where it has no watchdog.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// See the module. Without a service manager it does nothing.
pub(super) struct Service {
    manager: Arc<ServiceManager>,
    pub(super) passed: PassedSockets,
    /// When the manager hears of the receiver again.
    next: Instant,
}

impl Service {
    /// Takes what the manager has passed. To be called while the process may still connect.
    pub(super) fn begin() -> Self {
        let manager = ServiceManager::of_environment().unwrap_or_else(|error| {
            tell(&format!(
                "warning: the service manager cannot be reached at NOTIFY_SOCKET: {error}"
            ));
            ServiceManager::default()
        });
        let manager = Arc::new(manager);
        let keeper = manager.clone();
        let keep = move |name: &str, socket: BorrowedFd<'_>| {
            // What was kept by this name may be another socket of that address, to which nobody can connect any more.
            keeper.forget(name);
            keeper.keep(name, socket)
        };
        let keep = manager.keeps_sockets().then(|| Arc::new(keep) as Arc<Keep>);
        let (passed, others) = PassedSockets::new(passed_sockets(), keep);
        if !others.is_empty() {
            tell(&format!(
                "warning: {} of the descriptors that the service manager has passed are no sockets that listen: closed",
                others.len()
            ));
        }
        Self {
            manager,
            passed,
            next: Instant::now(),
        }
    }

    /// Closes what the manager has passed and no listener on these addresses will take. To be called before anything is bound.
    pub(super) fn close_others(&self, wanted: &[ListenAddress]) {
        for (address, why) in self.passed.close_others(wanted) {
            tell(&format!(
                "warning: the service manager has passed a socket of {address}, but {why}: closed"
            ));
            self.manager.forget(&kept_name(&address));
        }
    }

    /// The receiver listens.
    pub(super) fn ready(&self) {
        self.manager.ready();
    }

    /// Says that the receiver is alive, if it is time to and its control thread answers.
    pub(super) fn look(&mut self, receiver: &Receiver) {
        let now = Instant::now();
        if !self.manager.is_there() || now < self.next {
            return;
        }
        self.next = now + self.manager.alive_every().unwrap_or(STATUS_EVERY);
        // Without an answer it ends, or hangs: then the manager acts.
        if let Ok(Response::Status(status)) = receiver.ask(Request::Status) {
            self.manager.alive();
            self.manager.status(&guests(&status));
        }
    }

    pub(super) fn stopping(&self) {
        self.manager.stopping();
    }
}

fn guests(status: &StatusReport) -> String {
    let count = |wanted: fn(SessionState) -> bool| {
        let sessions = status.sessions.iter();
        sessions.filter(|session| wanted(session.state)).count()
    };
    let protected = count(|state| state == SessionState::Protected);
    let copying = count(|state| state == SessionState::Precopy);
    let kept = count(|state| matches!(state, SessionState::Ended | SessionState::Recovered));
    format!("guests: {protected} protected, {copying} in their first copy; checkpoints kept: {kept}")
}
