//! Writes to what a client has opened: a file, a pipe, or a connection.
//!
//! A pipe that nobody reads, or a connection whose other end hangs, takes nothing for as long as it likes. The end of a receiver waits
//! for what its background threads write, so such a write must not wait without limit once the receiver ends. Each waits for room by
//! poll(2) and writes no more than fits: a pipe has room for `PIPE_BUF` bytes then, if no other process writes to it.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a write that waits looks whether it still should, in milliseconds.
const LOOK_EVERY_MS: u16 = 100;

/// How long the other end may take nothing once the receiver ends. What it takes in time is written to its end: a failover that is under way
/// should not fail.
const STOPPING_PATIENCE: Duration = Duration::from_secs(2);

/// Whether the receiver ends. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Stopping {
    has_begun: Arc<AtomicBool>,
    patience: Duration,
}

impl Default for Stopping {
    fn default() -> Self {
        Self::with_patience(STOPPING_PATIENCE)
    }
}

impl Stopping {
    fn with_patience(patience: Duration) -> Self {
        Self {
            has_begun: Arc::default(),
            patience,
        }
    }

    /// It does from now on.
    pub(super) fn begin(&self) {
        self.has_begun.store(true, Ordering::Relaxed);
    }

    /// Whether what has waited so long is to be given up.
    fn ends(&self, waited: Duration) -> bool {
        waited > self.patience && self.has_begun.load(Ordering::Relaxed)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing waits for another process.
    File,
    /// A pipe, a terminal or another device.
    Pipe,
    Socket,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Outlet {
    file: File,
    kind: Kind,
    stopping: Stopping,
    /// How long the other end of a connection may take nothing.
    patience: Duration,
}

impl Outlet {
    /// # Errors
    /// If the system does not say what it is.
    pub(super) fn new(file: File, stopping: Stopping, patience: Duration) -> io::Result<Self> {
        let file_type = file.metadata()?.file_type();
        let kind = match () {
            () if file_type.is_socket() => Kind::Socket,
            () if file_type.is_fifo() || file_type.is_char_device() => Kind::Pipe,
            () => Kind::File,
        };
        Ok(Self {
            file,
            kind,
            stopping,
            patience,
        })
    }

    pub(super) fn is_socket(&self) -> bool {
        self.kind == Kind::Socket
    }

    /// Waits until what was written is on the disk: some file systems report only then that they are full.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.kind {
            Kind::File => self.file.sync_all(),
            // Nothing to wait for.
            Kind::Pipe | Kind::Socket => Ok(()),
        }
    }

    /// Waits until the other end takes something, or has gone.
    fn wait_for_room(&self) -> io::Result<()> {
        let since = Instant::now();
        loop {
            let mut waits = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut waits, PollTimeout::from(LOOK_EVERY_MS)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            let waited = since.elapsed();
            if self.stopping.ends(waited) {
                let text = format!(
                    "this receiver ends, and nothing was taken for {:?}",
                    self.stopping.patience
                );
                return Err(io::Error::other(text));
            }
            if self.is_socket() && waited > self.patience {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
    }
}

impl Write for &Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let written = match self.kind {
                Kind::File => return (&self.file).write(bytes),
                Kind::Pipe => {
                    self.wait_for_room()?;
                    (&self.file).write(&bytes[..bytes.len().min(libc::PIPE_BUF)])
                }
                Kind::Socket => {
                    self.wait_for_room()?;
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    send(self.file.as_raw_fd(), bytes, flags).map_err(io::Error::from)
                }
            };
            match written {
                // There was room for less, or another process has filled it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn outlet(descriptor: impl Into<OwnedFd>, stopping: &Stopping, patience: Duration) -> Outlet {
        Outlet::new(File::from(descriptor.into()), stopping.clone(), patience).unwrap()
    }

    fn ends() -> [(OwnedFd, OwnedFd); 2] {
        let (read, write) = nix::unistd::pipe().unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        [(read, write), (there.into(), here.into())]
    }

    const FOR_EVER: Duration = Duration::from_secs(3600);

    #[test]
    fn what_is_read_slowly_comes_whole_also_at_the_end_of_the_receiver() {
        for (read, write) in ends() {
            let stopping = Stopping::with_patience(FOR_EVER);
            let outlet = outlet(write, &stopping, FOR_EVER);
            stopping.begin();
            let bytes: Vec<u8> = (0..3u32 << 20).map(|n| (n % 251) as u8).collect();
            let reader = std::thread::spawn(move || {
                let (mut read, mut all) = (File::from(read), Vec::new());
                std::thread::sleep(Duration::from_millis(300));
                read.read_to_end(&mut all).unwrap();
                all
            });
            (&outlet).write_all(&bytes).unwrap();
            drop(outlet);
            assert!(reader.join().unwrap() == bytes);
        }
    }

    #[test]
    fn what_nobody_reads_ends_with_the_receiver() {
        for (_read, write) in ends() {
            let stopping = Stopping::with_patience(Duration::from_millis(200));
            let outlet = outlet(write, &stopping, FOR_EVER);
            let writer = std::thread::spawn(move || (&outlet).write_all(&vec![1; 8 << 20]));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!writer.is_finished());
            stopping.begin();
            let error = writer.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("this receiver ends"), "{error}");
        }
    }

    #[test]
    fn a_connection_that_hangs_is_given_up_and_a_closed_one_at_once() {
        let [(_, _), (there, here)] = ends();
        let stopping = Stopping::default();
        let hangs = outlet(here, &stopping, Duration::from_millis(200));
        let error = (&hangs).write_all(&vec![1; 8 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(there);
        for (read, write) in ends() {
            drop(read);
            let closed = outlet(write, &stopping, FOR_EVER);
            let error = (&closed).write_all(&[1]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}
