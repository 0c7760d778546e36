//! Reads, and what is allocated: by the connection's thread from what is in memory, else by threads that wait for the medium.

use super::replies::{Out, Replies};
use super::{Connection, ConnectionEnd, nbd_error};
use crate::disk::{Base, Disk, Piece, Source};
use crate::nbd::handshake::Agreed;
use crate::nbd::request::{
    Allocation, REQUEST_BYTES, Range, STATUS_EXTENTS_MAX, put_block_status, put_error, put_read_head,
};
use crate::sandbox::ThreadKind;
use std::io::{self, Write};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A longer read is done and sent in parts of that size.
const PART_BYTES: u64 = PART as u64;
const PART: usize = 1 << 20;

/// Most bytes of a reply: a part of a read, or all extents of a block status, and its head.
pub(super) const PART_BYTES_MAX: usize = PART + 4096;

const _: () = assert!(STATUS_EXTENTS_MAX * 8 < PART);

/// A read so long is left to another thread if a request is behind it: one thread alone would copy from the base and to the
/// socket in turn, and others do both at the same time.
const SHARED_BYTES: u64 = 256 << 10;

/// Most bytes of reads that other threads have.
const WAITING_BYTES: usize = 4 << 20;

/// What a read takes that waits, beside its bytes.
const WAITING_EACH: usize = 4096;

/// Threads that read beside the connection's own.
const READERS: usize = 4;

/// A read that another thread has.
pub(super) struct Waiting {
    cookie: u64,
    range: Range,
}

/// The threads that read for a connection.
pub(super) struct Readers {
    queue: Sender<Waiting>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    /// Waits until all that they have is answered.
    pub(super) fn finish(self) {
        drop(self.queue);
        for thread in self.threads {
            // It reports its own panic.
            let _ = thread.join();
        }
    }
}

impl Connection {
    pub(super) fn read(&mut self, cookie: u64, range: Range) -> Result<(), ConnectionEnd> {
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
        let bytes = waiting_bytes(range);
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
            .is_some_and(|readers| readers.queue.send(Waiting { cookie, range }).is_ok());
        if !sent {
            self.replies.waiting.fetch_sub(bytes, Ordering::Relaxed);
        }
        sent
    }

    /// Starts the readers; none if there is no thread or no memory for them.
    fn start_readers(&self) -> Option<Readers> {
        let (queue, receiver) = mpsc::channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut threads = Vec::new();
        for _ in 0..READERS {
            let (disk, agreed) = (self.disk.clone(), self.agreed.clone());
            let (replies, receiver) = (self.replies.clone(), receiver.clone());
            let out = Out::with_memory(PART_BYTES_MAX).ok()?;
            let started = self.threads.start(ThreadKind::Disk, "nbd-reader", move || {
                serve_waiting(&disk, &agreed, &replies, &receiver, out);
            });
            threads.push(started.ok()?);
        }
        Some(Readers { queue, threads })
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

    pub(super) fn block_status(&mut self, cookie: u64, range: Range, one: bool) {
        let most = if one { 1 } else { STATUS_EXTENTS_MAX };
        match allocation(&self.disk, range, most, &mut self.pieces) {
            Ok(extents) => self.out.put(|out| put_block_status(out, cookie, &extents)),
            Err(error) => self
                .out
                .put(|out| put_error(out, &self.agreed, cookie, nbd_error(&error), true)),
        }
    }
}

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
    let mut at = range.offset;
    while at < range.end() {
        at = disk.pieces(at, range.end() - at, pieces);
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

fn waiting_bytes(range: Range) -> usize {
    let bytes = usize::try_from(range.length).unwrap_or(usize::MAX);
    bytes.saturating_add(WAITING_EACH)
}

fn serve_waiting(
    disk: &Disk,
    agreed: &Agreed,
    replies: &Replies,
    receiver: &Mutex<Receiver<Waiting>>,
    mut out: Out,
) {
    let mut pieces = Vec::new();
    loop {
        let waiting = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Waiting { cookie, range }) = waiting else {
            return;
        };
        out.truncate(0);
        read_and_wait(disk, agreed, cookie, range, &mut pieces, &mut out);
        // A connection that has broken is noticed by its own thread.
        let _ = replies.send(out.bytes());
        replies.waiting.fetch_sub(waiting_bytes(range), Ordering::Relaxed);
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
    let mut looked_up = range.offset;
    while looked_up < range.end() {
        looked_up = disk.pieces(looked_up, range.end() - looked_up, pieces);
        for piece in &*pieces {
            if !add_extents(disk.base(), piece, most, &mut extents)? {
                return Ok(extents);
            }
        }
    }
    Ok(extents)
}

/// Appends the extents of a piece. False if there are enough before its end.
fn add_extents(
    base: &Base,
    piece: &Piece,
    most: usize,
    extents: &mut Vec<(u32, Allocation)>,
) -> io::Result<bool> {
    let (mut at, end) = (piece.offset, piece.offset + piece.length);
    while at < end {
        let (is_data, to) = match piece.source {
            Source::Segment(..) => (true, end),
            Source::Zero => (false, end),
            Source::Base => base.extent(at, end)?,
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
            _ if count == most => return Ok(false),
            _ => extents.push((length, kind)),
        }
        at = to;
    }
    Ok(true)
}
