//! One client of a disk after its handshake: a thread with a blocking socket.
//!
//! A receive brings as many requests as have arrived. Small payloads are copied to their place, and what is missing of a payload is received
//! there. The replies of a batch go out in one write. A read that would have to wait for the medium is left to reader threads, and so
//! are long ones where more than one is asked for; so replies may come out of order.

use crate::disk::{Disk, DiskError, Piece, Source, Wanted, WriteTarget, nbd_error, receive};
use crate::nbd::handshake::Agreed;
use crate::nbd::request::{
    Allocation, Command, NbdError, REQUEST_BYTES, Range, Request, RequestError, STATUS_EXTENTS_MAX,
    put_block_status, put_done, put_error, put_read_head,
};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// Bytes of a payload that are on their way to the base at a time: few enough to be in a processor's cache when they are written.
const BUFFER_BYTES: usize = 256 << 10;

/// Bytes of requests that are received at a time. What is more of a long payload goes to its place in the log without a copy.
const REQUESTS_BYTES: usize = 64 << 10;

/// Replies that are collected before they are sent.
const REPLIES_BYTES: usize = 256 << 10;

/// A longer read is done and sent in parts of that size.
const PART_BYTES: u64 = 1 << 20;

/// A read so long is left to another thread if a request is behind it: one thread alone would copy from the base and to the
/// socket in turn, and others do both at the same time.
const SHARED_BYTES: u64 = 256 << 10;

/// Most bytes of reads that other threads have.
const WAITING_BYTES: usize = 4 << 20;

/// Threads that read beside the connection's own.
const READERS: usize = 4;

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

/// The side of a socket that replies go out on.
struct Replies {
    socket: Mutex<UnixStream>,
    /// Bytes of reads that readers have.
    waiting: AtomicUsize,
}

impl Replies {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.write_all(bytes)
    }
}

/// Bytes that are collected to be sent. Its memory is zeroed once, and not again for every read that fills it.
#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    used: usize,
    head: Vec<u8>,
}

impl Out {
    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    fn len(&self) -> usize {
        self.used
    }

    fn truncate(&mut self, length: usize) {
        self.used = self.used.min(length);
    }

    /// Appends what `encode` encodes: a head, which is short.
    fn put(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut head = std::mem::take(&mut self.head);
        head.clear();
        encode(&mut head);
        self.room(head.len()).copy_from_slice(&head);
        self.head = head;
    }

    /// Appends so many bytes, which have any content.
    fn room(&mut self, length: usize) -> &mut [u8] {
        let end = self.used + length;
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        let room = &mut self.bytes[self.used..end];
        self.used = end;
        room
    }
}

/// A read that another thread has.
struct Waiting {
    cookie: u64,
    range: Range,
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
    readers: Option<Sender<Waiting>>,
}

impl Connection {
    /// A connection of which `first` has arrived already.
    pub(super) fn new(socket: OwnedFd, disk: Arc<Disk>, agreed: Agreed, first: &[u8]) -> io::Result<Self> {
        let mut buffer = vec![0; BUFFER_BYTES];
        buffer[..first.len()].copy_from_slice(first);
        // The type of a socket of any family that is written to.
        let out = UnixStream::from(socket.try_clone()?);
        Ok(Self {
            replies: Arc::new(Replies {
                socket: Mutex::new(out),
                waiting: AtomicUsize::new(0),
            }),
            socket,
            disk,
            agreed,
            buffer,
            begin: 0,
            end: first.len(),
            wanted: Wanted::default(),
            pieces: Vec::new(),
            out: Out::default(),
            readers: None,
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

    fn done(&mut self, cookie: u64, result: Result<(), NbdError>) {
        self.out.put(|out| put_done(out, &self.agreed, cookie, result));
    }

    fn request(&mut self, request: &Request) -> Result<(), ConnectionEnd> {
        let cookie = request.cookie;
        let disk = self.disk.clone();
        let with_flush = |done: Result<(), NbdError>, fua: bool| match fua {
            true => done.and_then(|()| disk.flush()),
            false => done,
        };
        match request.command(disk.base().size(), &self.agreed) {
            Ok(Command::Disconnect) => return Err(ConnectionEnd::Disconnected),
            Ok(Command::Read(range)) => self.read(cookie, range)?,
            Ok(Command::Write { range, fua }) => {
                let done = self.write(range)?;
                self.done(cookie, with_flush(done, fua));
            }
            Ok(Command::Flush) => self.done(cookie, disk.flush()),
            Ok(Command::Trim { range, fua }) => {
                let done = match range.length {
                    0 => Ok(()),
                    length => disk.trim(range.offset, length),
                };
                self.done(cookie, with_flush(done, fua));
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
                self.done(cookie, with_flush(done, fua));
            }
            Ok(Command::Cache(range)) => {
                let done = disk.base().cache(range.offset, range.length);
                self.done(cookie, done.map_err(|error| nbd_error(&error)));
            }
            Ok(Command::BlockStatus { range, one }) => self.block_status(cookie, range, one),
            Err(error) => {
                self.skip(request.payload())?;
                let is_read = request.has_data_reply();
                self.out
                    .put(|out| put_error(out, &self.agreed, cookie, error, is_read));
            }
        }
        Ok(())
    }

    // --- writes ----------------------------------------------------------------------------------------------------

    /// Takes the payload of a write. The outer error ends the connection.
    fn write(&mut self, range: Range) -> Result<Result<(), NbdError>, ConnectionEnd> {
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

    fn take_to_base(&mut self, range: Range) -> Result<Result<(), NbdError>, ConnectionEnd> {
        let mut at = range.offset;
        let mut result = Ok(());
        loop {
            let here = self.take_buffered(range.end() - at);
            if result.is_ok() {
                let written = self.disk.base().write(&self.buffer[here.clone()], at);
                result = written.map_err(|error| nbd_error(&error));
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

    // --- reads -----------------------------------------------------------------------------------------------------

    fn read(&mut self, cookie: u64, range: Range) -> Result<(), ConnectionEnd> {
        if range.length > PART_BYTES {
            return self.read_in_parts(cookie, range);
        }
        let has_more = self.end - self.begin >= REQUEST_BYTES;
        if range.length >= SHARED_BYTES && has_more && self.hand_over(cookie, range) {
            return Ok(());
        }
        let start = self.out.len();
        self.out
            .put(|out| put_read_head(out, &self.agreed, cookie, range));
        let read = fill(
            &self.disk,
            range,
            &mut self.pieces,
            &mut self.out,
            |base, bytes, at| base.read_cached(bytes, at),
        );
        match read {
            Ok(true) => return Ok(()),
            Ok(false) => {
                self.out.truncate(start);
                if self.hand_over(cookie, range) {
                    return Ok(());
                }
            }
            Err(_) => self.out.truncate(start),
        }
        self.flush()?;
        read_and_wait(
            &self.disk,
            &self.agreed,
            cookie,
            range,
            &mut self.pieces,
            &mut self.out,
        );
        Ok(())
    }

    /// Leaves a read to another thread, which may wait. False if they have too much already.
    fn hand_over(&mut self, cookie: u64, range: Range) -> bool {
        let bytes = usize::try_from(range.length).unwrap_or(usize::MAX);
        if self.replies.waiting.load(Ordering::Relaxed).saturating_add(bytes) > WAITING_BYTES {
            return false;
        }
        if self.readers.is_none() {
            self.readers = self.start_readers();
        }
        self.replies.waiting.fetch_add(bytes, Ordering::Relaxed);
        let sent = self
            .readers
            .as_ref()
            .is_some_and(|readers| readers.send(Waiting { cookie, range }).is_ok());
        if !sent {
            self.replies.waiting.fetch_sub(bytes, Ordering::Relaxed);
        }
        sent
    }

    /// Starts the readers; none if there is no thread for them.
    fn start_readers(&self) -> Option<Sender<Waiting>> {
        let (sender, receiver) = mpsc::channel();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..READERS {
            let (disk, agreed) = (self.disk.clone(), self.agreed.clone());
            let (replies, receiver) = (self.replies.clone(), receiver.clone());
            let thread = std::thread::Builder::new().name("nbd-reader".into());
            thread
                .spawn(move || serve_waiting(&disk, &agreed, &replies, &receiver))
                .ok()?;
        }
        Some(sender)
    }

    fn read_in_parts(&mut self, cookie: u64, range: Range) -> Result<(), ConnectionEnd> {
        self.out
            .put(|out| put_read_head(out, &self.agreed, cookie, range));
        // No other reply may come in between.
        let replies = self.replies.clone();
        let mut socket = replies.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = range.offset;
        while at < range.end() {
            let part = Range {
                offset: at,
                length: PART_BYTES.min(range.end() - at),
            };
            fill(&self.disk, part, &mut self.pieces, &mut self.out, wait_for_base)
                .map_err(ConnectionEnd::Base)?;
            socket
                .write_all(self.out.bytes())
                .map_err(ConnectionEnd::Broken)?;
            self.out.truncate(0);
            at = part.end();
        }
        Ok(())
    }

    fn block_status(&mut self, cookie: u64, range: Range, one: bool) {
        let most = if one { 1 } else { STATUS_EXTENTS_MAX };
        match allocation(&self.disk, range, most, &mut self.pieces) {
            Ok(extents) => self.out.put(|out| put_block_status(out, cookie, &extents)),
            Err(error) => self
                .out
                .put(|out| put_error(out, &self.agreed, cookie, nbd_error(&error), true)),
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

type Base = crate::disk::Base;

fn wait_for_base(base: &Base, bytes: &mut [u8], at: u64) -> io::Result<bool> {
    base.read(bytes, at).map(|()| true)
}

/// Appends the content of a range to `out`; false if `read` did not want to wait for the base.
fn fill(
    disk: &Disk,
    range: Range,
    pieces: &mut Vec<Piece>,
    out: &mut Out,
    read: impl Fn(&Base, &mut [u8], u64) -> io::Result<bool>,
) -> io::Result<bool> {
    disk.pieces(range.offset, range.length, pieces);
    for piece in &*pieces {
        // At most a part's.
        let bytes = out.room(usize::try_from(piece.length).unwrap_or(0));
        match &piece.source {
            Source::Segment(segment, place) => segment.read(*place, bytes),
            Source::Zero => bytes.fill(0),
            Source::Base => {
                if !read(disk.base(), bytes, piece.offset)? {
                    return Ok(false);
                }
            }
        }
    }
    // Not before the next read: a segment that is looked at is not used again.
    pieces.clear();
    Ok(true)
}

/// Appends the reply to a read.
fn read_and_wait(
    disk: &Disk,
    agreed: &Agreed,
    cookie: u64,
    range: Range,
    pieces: &mut Vec<Piece>,
    out: &mut Out,
) {
    let start = out.len();
    out.put(|out| put_read_head(out, agreed, cookie, range));
    if let Err(error) = fill(disk, range, pieces, out, wait_for_base) {
        out.truncate(start);
        out.put(|out| put_error(out, agreed, cookie, nbd_error(&error), true));
    }
}

fn serve_waiting(disk: &Disk, agreed: &Agreed, replies: &Replies, receiver: &Mutex<Receiver<Waiting>>) {
    let (mut pieces, mut out) = (Vec::new(), Out::default());
    loop {
        let waiting = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Waiting { cookie, range }) = waiting else {
            return;
        };
        out.truncate(0);
        read_and_wait(disk, agreed, cookie, range, &mut pieces, &mut out);
        // A connection that has broken is noticed by its own thread.
        let _ = replies.send(out.bytes());
        let bytes = usize::try_from(range.length).unwrap_or(usize::MAX);
        replies.waiting.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What is allocated in a range, from its beginning on, in at most so many extents.
fn allocation(
    disk: &Disk,
    range: Range,
    most: usize,
    pieces: &mut Vec<Piece>,
) -> io::Result<Vec<(u32, Allocation)>> {
    let mut extents: Vec<(u32, Allocation)> = Vec::new();
    disk.pieces(range.offset, range.length, pieces);
    for piece in &*pieces {
        let (mut at, end) = (piece.offset, piece.offset + piece.length);
        while at < end {
            let (is_data, to) = match piece.source {
                Source::Segment(..) => (true, end),
                Source::Zero => (false, end),
                Source::Base => disk.base().extent(at, end)?,
            };
            let kind = if is_data {
                Allocation::Data
            } else {
                Allocation::Hole
            };
            // A request's length has 32 bits.
            let length = u32::try_from(to - at).unwrap_or(u32::MAX);
            let count = extents.len();
            match extents.last_mut() {
                Some((known, last)) if *last == kind => *known += length,
                _ if count == most => return Ok(extents),
                _ => extents.push((length, kind)),
            }
            at = to;
        }
    }
    Ok(extents)
}
