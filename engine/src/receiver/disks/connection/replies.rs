//! Replies: collected, and sent by the connection's thread and its readers.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, PoisonError};

/// The side of a socket that replies go out on.
pub(super) struct Replies {
    pub(super) socket: Mutex<UnixStream>,
    /// Bytes of reads that readers have.
    pub(super) waiting: AtomicUsize,
}

impl Replies {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Mutex::new(socket),
            waiting: AtomicUsize::new(0),
        }
    }

    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.write_all(bytes)
    }
}

/// Bytes that are collected to be sent. Its memory is zeroed once, and not again for every read that fills it.
pub(super) struct Out {
    bytes: Vec<u8>,
    used: usize,
    head: Vec<u8>,
}

impl Out {
    /// With memory for so many bytes, which are the most that will be collected.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn with_memory(bytes: usize) -> io::Result<Self> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(bytes)?;
        Ok(Self {
            bytes: memory,
            used: 0,
            head: Vec::new(),
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    pub(super) fn len(&self) -> usize {
        self.used
    }

    pub(super) fn truncate(&mut self, length: usize) {
        self.used = self.used.min(length);
    }

    /// Appends what `encode` encodes: a head, which is short.
    pub(super) fn put(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut head = std::mem::take(&mut self.head);
        head.clear();
        encode(&mut head);
        self.room(head.len()).copy_from_slice(&head);
        self.head = head;
    }

    /// Appends so many bytes, which have any content.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        let end = self.used + length;
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        let room = &mut self.bytes[self.used..end];
        self.used = end;
        room
    }
}
