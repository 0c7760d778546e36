//! Reads requests of a client: lines, with the open files that come with them.

use super::error::RequestError;
use crate::net::passing;
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Longest line, in bytes.
const LINE_MAX: usize = 64 << 10;

/// Most files that come with one: those of a dump of a guest of as many RAM blocks as there can be, and with many disks.
const FILES_MAX: usize = 1024;

/// Bytes received at a time.
const RECEIVE_BYTES: usize = 4 << 10;

/// A request as it comes.
#[derive(Debug, Default)]
pub(super) struct RequestLine {
    /// With the line's end.
    pub(super) text: Vec<u8>,
    pub(super) files: Vec<OwnedFd>,
}

/// What was received of a client and not taken yet.
#[derive(Default)]
pub(super) struct RequestLines {
    received: Vec<u8>,
    files: Vec<OwnedFd>,
    files_lost: bool,
}

impl RequestLines {
    /// The next request; none at the end. Inner errors are the client's, and nothing more can be read of it.
    ///
    /// # Errors
    /// Those of the socket.
    pub(super) async fn next(
        &mut self,
        stream: &UnixStream,
    ) -> io::Result<Option<Result<RequestLine, RequestError>>> {
        loop {
            if self.files.len() > FILES_MAX {
                return Ok(Some(Err(RequestError::TooManyFiles(FILES_MAX))));
            }
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                let text = std::mem::replace(&mut self.received, rest);
                let files = std::mem::take(&mut self.files);
                return Ok(Some(match std::mem::take(&mut self.files_lost) {
                    true => Err(RequestError::FilesLost),
                    false => Ok(RequestLine { text, files }),
                }));
            }
            if self.received.len() >= LINE_MAX {
                return Ok(Some(Err(RequestError::TooLong(LINE_MAX))));
            }
            let mut bytes = [0; RECEIVE_BYTES];
            let received = stream
                .async_io(Interest::READABLE, || {
                    passing::receive(stream, &mut bytes, &mut self.files)
                })
                .await?;
            self.files_lost |= received.files_lost;
            match received.bytes {
                0 if self.received.is_empty() => return Ok(None),
                0 => return Ok(Some(Err(RequestError::TooLong(LINE_MAX)))),
                count => self.received.extend(&bytes[..count]),
            }
        }
    }
}
