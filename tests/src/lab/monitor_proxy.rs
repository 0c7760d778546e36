//! A proxy before a QEMU's monitor, which can be cut: the monitor's client loses it, and QEMU is well.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Lab, LabError};

/// See the module. Clones are the same proxy.
#[derive(Clone, Debug)]
pub struct MonitorProxy {
    path: PathBuf,
    /// Both ends of every connection.
    ends: Arc<Mutex<Vec<UnixStream>>>,
}

impl MonitorProxy {
    /// Listens for clients of the monitor at `to`.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(lab: &Lab, to: &Path) -> Result<Self, LabError> {
        let path = lab.fresh_file("monitor-proxy", "sock");
        let listener = UnixListener::bind(&path).map_err(LabError::io("listen before a monitor"))?;
        let ends: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
        let (of_thread, to) = (ends.clone(), to.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A client whose QEMU has ended loses its connection.
                let _ = pass(client, &to, &of_thread);
            }
        });
        Ok(Self { path, ends })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes every connection.
    pub fn cut(&self) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        for end in ends.drain(..) {
            // It may be closed.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

/// Begins to pass on a connection, both ways.
fn pass(client: UnixStream, to: &Path, ends: &Mutex<Vec<UnixStream>>) -> io::Result<()> {
    let server = UnixStream::connect(to)?;
    let mut ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
    ends.extend([client.try_clone()?, server.try_clone()?]);
    for (mut from, mut to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
        std::thread::spawn(move || {
            // An end, however it comes, is one of both.
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
