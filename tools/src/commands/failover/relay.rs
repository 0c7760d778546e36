//! A stream that the receiver writes to a socket, on its way to standard output.

use super::destination::Destination;
use crate::output::CommandError;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;

/// Has `restore` send a stream to the destination that it is given, and copies it to standard output. Returns what `restore` does,
/// unless standard output cannot be written.
///
/// # Errors
/// Those of `restore` and of standard output.
pub(super) fn to_stdout<T: Send>(
    restore: impl FnOnce(Destination) -> Result<T, CommandError> + Send,
) -> Result<T, CommandError> {
    let (mut stream, other) = UnixStream::pair().map_err(CommandError::failed)?;
    std::thread::scope(|scope| {
        // The stream ends when both the receiver and this have closed the other end.
        let restoring = scope.spawn(|| restore(Destination::Socket(other.into())));
        let copied = copy(&mut stream);
        // Closed before it is waited for: the receiver would write on.
        drop(stream);
        let restored = restoring.join();
        let restored =
            restored.unwrap_or_else(|_| Err(CommandError::Failed("the request panicked".to_owned())));
        // Where both have failed, the receiver has found only what this has closed.
        copied.map_err(|error| CommandError::Failed(format!("standard output: {error}")))?;
        restored
    })
}

fn copy(stream: &mut UnixStream) -> io::Result<()> {
    let mut out = io::stdout().lock();
    io::copy(stream, &mut out)?;
    out.flush()
}
