//! The protocol of sd_notify(3): datagrams to the socket that `NOTIFY_SOCKET` names.

use colo_ring::net::passing;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The manager of the service that this process is; or none, which takes everything and does nothing.
#[derive(Debug, Default)]
pub(crate) struct ServiceManager {
    /// Connected now: a confined process connects to nothing.
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    keeps_sockets: bool,
}

impl ServiceManager {
    /// The one that the environment names.
    ///
    /// # Errors
    /// If it names one that cannot be reached.
    pub(crate) fn of_environment() -> io::Result<Self> {
        Self::of(|name| std::env::var_os(name))
    }

    fn of(variable: impl Fn(&str) -> Option<OsString>) -> io::Result<Self> {
        let Some(path) = variable("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Ok(Self::default());
        };
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        let is_for_this =
            number("WATCHDOG_PID").is_none_or(|process| process == u64::from(std::process::id()));
        Ok(Self {
            socket: Some(connect(&path)?),
            watchdog: number("WATCHDOG_USEC")
                .filter(|_| is_for_this)
                .map(Duration::from_micros),
            // Set where the unit has FileDescriptorStoreMax=.
            keeps_sockets: number("FDSTORE").is_some_and(|most| most > 0),
        })
    }

    /// How often [`Self::alive`] is to be called: twice in the time after which the manager takes this process for hung.
    pub(crate) fn alive_every(&self) -> Option<Duration> {
        self.watchdog.map(|time| time / 2)
    }

    /// Whether there is one.
    pub(crate) fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// Whether [`Self::keep`] can be expected to keep anything.
    pub(crate) fn keeps_sockets(&self) -> bool {
        self.keeps_sockets && self.is_there()
    }

    pub(crate) fn ready(&self) {
        self.tell("READY=1");
    }

    pub(crate) fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    pub(crate) fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// What `systemctl status` shows.
    pub(crate) fn status(&self, text: &str) {
        self.tell(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// Has a duplicate of a socket kept for the next process of this service. Returns whether it was sent.
    pub(crate) fn keep(&self, name: &str, socket: BorrowedFd<'_>) -> bool {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), &[socket])
    }

    /// Has what was kept by this name closed.
    pub(crate) fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    fn tell(&self, text: &str) {
        // A manager that does not read is not waited for.
        let _ = self.send(text, &[]);
    }

    fn send(&self, text: &str, sockets: &[BorrowedFd<'_>]) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let sent = match sockets.is_empty() {
            true => socket.send(text.as_bytes()).map(drop),
            false => passing::send(socket, text.as_bytes(), sockets),
        };
        sent.is_ok()
    }
}

fn connect(path: &OsStr) -> io::Result<UnixDatagram> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::os::fd::AsFd;

    fn manager(variables: &[(&str, &str)]) -> io::Result<ServiceManager> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        ServiceManager::of(|name| variables.get(name).map(OsString::from))
    }

    fn heard(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 256];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_manager_hears_what_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let own = std::process::id().to_string();
        let variables = [
            ("NOTIFY_SOCKET", path.to_str().unwrap()),
            ("WATCHDOG_USEC", "3000000"),
            ("WATCHDOG_PID", &own),
            ("FDSTORE", "16"),
        ];
        let manager = manager(&variables).unwrap();
        assert_eq!(manager.alive_every(), Some(Duration::from_millis(1500)));
        assert!(manager.keeps_sockets());
        manager.ready();
        assert_eq!(heard(&socket), "READY=1");
        manager.status("two\nlines");
        assert_eq!(heard(&socket), "STATUS=two lines");
        let kept = UnixDatagram::unbound().unwrap();
        assert!(manager.keep("tcp_1", kept.as_fd()));
        let mut files = Vec::new();
        let mut bytes = [0; 256];
        let received = colo_ring::net::passing::receive(&socket, &mut bytes, &mut files).unwrap();
        assert_eq!(&bytes[..received.bytes], b"FDSTORE=1\nFDNAME=tcp_1");
        assert_eq!(files.len(), 1);
        // One that does not read is not waited for.
        (0..10_000).for_each(|_| manager.alive());
    }

    #[test]
    fn an_abstract_name_is_reached_and_one_that_is_not_there_is_an_error() {
        let name = format!("colo-ring-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        let there = manager(&[("NOTIFY_SOCKET", &format!("@{name}"))]).unwrap();
        there.stopping();
        assert_eq!(heard(&socket), "STOPPING=1");
        assert!(manager(&[("NOTIFY_SOCKET", "/nonexistent/notify")]).is_err());
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let none = manager(&[("WATCHDOG_USEC", "1"), ("FDSTORE", "1")]).unwrap();
        assert!(!none.is_there() && !none.keeps_sockets());
        assert_eq!(none.alive_every(), None);
        none.ready();
        let other = [("NOTIFY_SOCKET", ""), ("WATCHDOG_USEC", "5")];
        assert!(!manager(&other).unwrap().is_there());
    }
}
