//! A stream that the receiver writes to a socket, on its way to standard output.

use crate::output::CommandError;
use colo_ring::net::{Clients, bind_unix};
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Listens at `socket`, has `restore` send a stream there, and copies it to standard output. Returns what `restore` does,
/// unless standard output cannot be written.
///
/// # Errors
/// Those of `restore` and of standard output.
pub(super) fn to_stdout<T: Send>(
    socket: &Path,
    restore: impl FnOnce(String) -> Result<T, CommandError> + Send,
) -> Result<T, CommandError> {
    let listener = bind_unix(socket, Clients::Owner).map_err(CommandError::failed)?;
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| {
            let restored = restore(format!("unix:{}", socket.display()));
            // If the receiver refused, no connection was made, and the copying below still waits.
            drop(std::os::unix::net::UnixStream::connect(socket));
            restored
        });
        let copied = copy(&listener);
        // Closed before it is waited for: the receiver would write on.
        drop(listener);
        let restored = restoring.join();
        let restored =
            restored.unwrap_or_else(|_| Err(CommandError::Failed("the request panicked".to_owned())))?;
        copied.map_err(|error| CommandError::Failed(format!("standard output: {error}")))?;
        Ok(restored)
    })
}

fn copy(listener: &UnixListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut out = io::stdout().lock();
    io::copy(&mut stream, &mut out)?;
    out.flush()
}
