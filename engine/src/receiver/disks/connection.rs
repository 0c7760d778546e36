//! One client of a disk after its handshake: a thread with a blocking socket.
//!
//! A receive brings as many requests as have arrived. Small payloads are copied to their place, and what is missing of a payload is received
//! there. The replies of a batch go out in one write. A read that would have to wait for the medium is left to reader threads, and so
//! are long ones where more than one is asked for; so replies may come out of order.

mod reads;
mod replies;

use crate::disk::{Disk, DiskError, Piece, RequestFailure, Wanted, WriteTarget, receive};
use crate::nbd::handshake::Agreed;
use crate::nbd::request::{
    Command, NbdError, REQUEST_BYTES, Range, Request, RequestError, put_done, put_error,
};
use crate::threads::Threads;
use reads::{PART_BYTES_MAX, Readers};
use replies::{Out, Replies};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use thiserror::Error;

/// Bytes of a payload that are on their way to the base at a time: few enough to be in a processor's cache when they are written.
const BUFFER_BYTES: usize = 256 << 10;

/// Bytes of requests that are received at a time. What is more of a long payload goes to its place in the log without a copy.
const REQUESTS_BYTES: usize = 64 << 10;

/// Replies that are collected before they are sent.
const REPLIES_BYTES: usize = 256 << 10;

/// Most memory of one connection: its buffer, its replies, reads that wait.
pub(crate) const CONNECTION_BYTES: u64 = 16 << 20;

/// Why a connection ended.
#[derive(Debug, Error)]
pub(super) enum ConnectionEnd {
    /// By the client's request.
    #[error("the client has disconnected")]
    Disconnected,
    /// Without one.
    #[error("the client has closed it")]
    Closed,
    #[error("{0}")]
    Broken(io::Error),
    #[error("{0}")]
    Protocol(#[from] RequestError),
    /// An error that the protocol has no way to report.
    #[error("reading the base: {0}")]
    Base(io::Error),
}

impl From<RequestFailure> for NbdError {
    fn from(failure: RequestFailure) -> Self {
        match failure {
            RequestFailure::Ended => Self::Shutdown,
            RequestFailure::NoSpace => Self::NoSpace,
            RequestFailure::Unsupported => Self::Unsupported,
            RequestFailure::Io => Self::Io,
            RequestFailure::Invalid => Self::Invalid,
        }
    }
}

/// The number of an error of the system.
fn nbd_error(error: &io::Error) -> NbdError {
    RequestFailure::from(error).into()
}

/// See the module.
pub(super) struct Connection {
    socket: OwnedFd,
    disk: Arc<Disk>,
    agreed: Agreed,
    buffer: Vec<u8>,
    /// What of the buffer has arrived and is not used.
    begin: usize,
    end: usize,
    wanted: Wanted,
    pieces: Vec<Piece>,
    out: Out,
    replies: Arc<Replies>,
    readers: Option<Readers>,
    threads: Threads,
}

impl Connection {
    /// A connection of which `first` has arrived already.
    pub(super) fn new(
        socket: OwnedFd,
        disk: Arc<Disk>,
        agreed: Agreed,
        first: &[u8],
        threads: Threads,
    ) -> io::Result<Self> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(BUFFER_BYTES)?;
        buffer.resize(BUFFER_BYTES, 0);
        buffer[..first.len()].copy_from_slice(first);
        // The type of a socket of any family that is written to.
        let out = UnixStream::from(socket.try_clone()?);
        Ok(Self {
            replies: Arc::new(Replies::new(out)),
            socket,
            disk,
            agreed,
            buffer,
            begin: 0,
            end: first.len(),
            wanted: Wanted::default(),
            pieces: Vec::new(),
            out: Out::with_memory(REPLIES_BYTES + PART_BYTES_MAX)?,
            readers: None,
            threads,
        })
    }

    /// Serves requests until the connection ends.
    pub(super) fn serve(&mut self) -> ConnectionEnd {
        loop {
            if let Err(end) = self.serve_arrived().and_then(|()| self.receive_more()) {
                // What was answered before may still reach the client.
                let _ = self.flush();
                return end;
            }
        }
    }

    /// Answers the reads that other threads have: the protocol wants all requests before a DISC answered.
    pub(super) fn finish_reads(&mut self) {
        if let Some(readers) = self.readers.take() {
            readers.finish();
        }
    }

    fn serve_arrived(&mut self) -> Result<(), ConnectionEnd> {
        while let Some(head) = self.buffer[self.begin..self.end].first_chunk::<REQUEST_BYTES>() {
            let request = Request::parse(head)?;
            self.begin += REQUEST_BYTES;
            self.request(&request)?;
            if self.out.len() >= REPLIES_BYTES {
                self.flush()?;
            }
        }
        self.flush()
    }

    fn receive_more(&mut self) -> Result<(), ConnectionEnd> {
        self.buffer.copy_within(self.begin..self.end, 0);
        self.end -= self.begin;
        self.begin = 0;
        let got = receive(
            self.socket.as_fd(),
            &[],
            &mut self.buffer[self.end..REQUESTS_BYTES],
        );
        self.end += arrived(got)?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ConnectionEnd> {
        if self.out.len() > 0 {
            self.replies
                .send(self.out.bytes())
                .map_err(ConnectionEnd::Broken)?;
            self.out.truncate(0);
        }
        Ok(())
    }

    fn done(&mut self, cookie: u64, result: Result<(), RequestFailure>) {
        let result = result.map_err(NbdError::from);
        self.out.put(|out| put_done(out, &self.agreed, cookie, result));
    }

    /// Answers a request that changes the disk.
    fn changed(&mut self, cookie: u64, result: Result<(), RequestFailure>) {
        // What is not possible fast is asked for again in another way.
        if let Err(failure) = result
            && failure != RequestFailure::Unsupported
        {
            self.disk.change_failed(failure);
        }
        self.done(cookie, result);
    }

    fn request(&mut self, request: &Request) -> Result<(), ConnectionEnd> {
        let cookie = request.cookie;
        let disk = self.disk.clone();
        let with_flush = |done: Result<(), RequestFailure>, fua: bool| match fua {
            true => done.and_then(|()| disk.flush()),
            false => done,
        };
        match request.command(disk.base().size(), &self.agreed) {
            Ok(Command::Disconnect) => return Err(ConnectionEnd::Disconnected),
            Ok(Command::Read(range)) => self.read(cookie, range)?,
            Ok(Command::Write { range, fua }) => {
                let done = self.write(range)?;
                self.changed(cookie, with_flush(done, fua));
            }
            Ok(Command::Flush) => self.done(cookie, disk.flush()),
            Ok(Command::Trim { range, fua }) => {
                let done = match range.length {
                    0 => Ok(()),
                    length => disk.trim(range.offset, length),
                };
                self.changed(cookie, with_flush(done, fua));
            }
            Ok(Command::WriteZeroes {
                range,
                fua,
                may_punch,
                fast,
            }) => {
                let done = match range.length {
                    0 => Ok(()),
                    length => disk.zero(range.offset, length, may_punch, fast),
                };
                self.changed(cookie, with_flush(done, fua));
            }
            Ok(Command::Cache(range)) => {
                let done = disk.base().cache(range.offset, range.length);
                self.done(cookie, done.map_err(|error| RequestFailure::from(&error)));
            }
            Ok(Command::BlockStatus { range, one }) => self.block_status(cookie, range, one),
            Err(error) => {
                if request.is_change() {
                    self.disk.change_failed(RequestFailure::Invalid);
                }
                self.skip(request.payload())?;
                let is_read = request.has_data_reply();
                self.out
                    .put(|out| put_error(out, &self.agreed, cookie, error, is_read));
            }
        }
        Ok(())
    }

    /// Takes the payload of a write. The outer error ends the connection.
    fn write(&mut self, range: Range) -> Result<Result<(), RequestFailure>, ConnectionEnd> {
        if range.length == 0 {
            return Ok(Ok(()));
        }
        let mut wanted = std::mem::take(&mut self.wanted);
        let target = self.disk.begin_write((range.offset, range.length), &mut wanted);
        let taken = match target {
            Err(error) => {
                self.skip(range.length)?;
                Err(error)
            }
            Ok(WriteTarget::Log) => {
                self.take_to_log(&wanted, range.length)?;
                self.disk.end_write(WriteTarget::Log, &wanted)
            }
            Ok(WriteTarget::Base) => {
                let taken = self.take_to_base(range)?;
                if let Err(failure) = taken {
                    // Before a session can take the disk.
                    self.disk.change_failed(failure);
                }
                self.disk.end_write(WriteTarget::Base, &wanted).and(taken)
            }
        };
        wanted.clear();
        self.wanted = wanted;
        Ok(taken)
    }

    /// The bytes of a payload of which `length` are still to come that are in the buffer: they are used by this.
    fn take_buffered(&mut self, length: u64) -> std::ops::Range<usize> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let begin = self.begin;
        self.begin += length.min(self.end - begin);
        begin..self.begin
    }

    fn take_to_log(&mut self, wanted: &Wanted, length: u64) -> Result<(), ConnectionEnd> {
        let here = self.take_buffered(length);
        let mut left = here.len();
        let mut missing = Vec::new();
        for mut stretch in wanted.stretches() {
            let copied = left.min(stretch.length);
            if copied > 0 {
                let from = here.end - left;
                stretch
                    .segment
                    .write(stretch.place, &self.buffer[from..from + copied]);
                left -= copied;
            }
            if copied < stretch.length {
                stretch.place += copied;
                stretch.length -= copied;
                missing.push(stretch);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        // The buffer is used up. Replies do not wait for the rest of this payload.
        self.flush()?;
        (self.begin, self.end) = (0, 0);
        let mut first = 0;
        while first < missing.len() {
            let requests = &mut self.buffer[..REQUESTS_BYTES];
            let got = receive(self.socket.as_fd(), &missing[first..], requests);
            let mut got = arrived(got)?;
            while let Some(stretch) = missing.get_mut(first).filter(|_| got > 0) {
                let taken = got.min(stretch.length);
                stretch.place += taken;
                stretch.length -= taken;
                got -= taken;
                if stretch.length == 0 {
                    first += 1;
                }
            }
            self.end = got;
        }
        Ok(())
    }

    fn take_to_base(&mut self, range: Range) -> Result<Result<(), RequestFailure>, ConnectionEnd> {
        let mut at = range.offset;
        let mut result = Ok(());
        loop {
            let here = self.take_buffered(range.end() - at);
            if result.is_ok() {
                let written = self.disk.base().write(&self.buffer[here.clone()], at);
                result = written.map_err(|error| RequestFailure::from(&error));
            }
            at += u64::try_from(here.len()).unwrap_or(0);
            if at == range.end() {
                return Ok(result);
            }
            self.flush()?;
            self.receive_payload(range.end() - at)?;
        }
    }

    /// Receives more of a payload into the buffer, which is used up: as much as fits, if it is a long one.
    fn receive_payload(&mut self, missing: u64) -> Result<(), ConnectionEnd> {
        (self.begin, self.end) = (0, 0);
        let enough = usize::try_from(missing).unwrap_or(usize::MAX).min(BUFFER_BYTES);
        while self.end < enough {
            let got = receive(self.socket.as_fd(), &[], &mut self.buffer[self.end..]);
            self.end += arrived(got)?;
        }
        Ok(())
    }

    fn skip(&mut self, length: u64) -> Result<(), ConnectionEnd> {
        let mut left = length;
        loop {
            let here = self.take_buffered(left);
            left -= u64::try_from(here.len()).unwrap_or(0);
            if left == 0 {
                return Ok(());
            }
            self.flush()?;
            self.receive_payload(left)?;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Also by a panic: what was not received is missing.
        let _ = nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.socket),
            nix::sys::socket::Shutdown::Both,
        );
        if std::thread::panicking() {
            self.disk.lose(DiskError::ConnectionLost {
                disk: self.disk.name().to_owned(),
                reason: "its thread panicked".to_owned(),
            });
        }
    }
}

fn arrived(got: io::Result<usize>) -> Result<usize, ConnectionEnd> {
    match got {
        Ok(0) => Err(ConnectionEnd::Closed),
        Ok(got) => Ok(got),
        Err(error) => Err(ConnectionEnd::Broken(error)),
    }
}
