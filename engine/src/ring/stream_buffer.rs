//! A receive buffer that the kernel fills at its end while its beginning is being read.
//!
//! Contract: `space` is called only while no receive into it is posted, and bytes behind `filled` are never read.
//! So a slice of the buffer and the memory that the kernel writes never overlap.
#![expect(unsafe_code, reason = "the kernel fills the buffer behind what is read")]

use std::cell::Cell;
use std::collections::TryReserveError;
use std::ptr::NonNull;

/// Bytes `pos..filled` have arrived and are not yet consumed; `filled..capacity` is free.
pub struct StreamBuffer {
    memory: NonNull<u8>,
    capacity: usize,
    pos: Cell<usize>,
    filled: usize,
}

// SAFETY: it owns its memory alone, like a Vec.
unsafe impl Send for StreamBuffer {}

impl StreamBuffer {
    /// An empty buffer of `capacity` bytes, of a page at most: see [`Self::try_new`].
    pub fn new(capacity: usize) -> Self {
        Self::of(vec![0; capacity])
    }

    /// An empty buffer of `capacity` bytes.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn try_new(capacity: usize) -> Result<Self, TryReserveError> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(capacity)?;
        memory.resize(capacity, 0);
        Ok(Self::of(memory))
    }

    fn of(memory: Vec<u8>) -> Self {
        let memory = Box::leak(memory.into_boxed_slice());
        Self {
            capacity: memory.len(),
            memory: NonNull::from(memory).cast(),
            pos: Cell::new(0),
            filled: 0,
        }
    }

    /// What has arrived and is not consumed.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: pos <= filled <= capacity always; bytes below `filled` are not written while this borrow
        // lives: `space`, which moves them, needs `&mut self`, and the kernel was given memory behind `filled` only.
        unsafe {
            std::slice::from_raw_parts(
                self.memory.as_ptr().add(self.pos.get()),
                self.filled - self.pos.get(),
            )
        }
    }

    /// The same, to be changed in place. A receive may be posted: it has the memory behind these bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; nothing else refers to these bytes while `self` is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.memory.as_ptr().add(self.pos.get()),
                self.filled - self.pos.get(),
            )
        }
    }

    /// Consumes the first `count` of [`Self::bytes`]. They stay readable through slices taken before, until
    /// [`Self::space`] moves what is left.
    pub fn consume(&self, count: usize) {
        assert!(
            count <= self.filled - self.pos.get(),
            "no more can be consumed than has arrived"
        );
        self.pos.set(self.pos.get() + count);
    }

    /// Appends bytes that were received elsewhere. Like [`Self::space`], only while no receive is posted.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn put(&mut self, bytes: &[u8]) {
        let Some((space, free)) = self.space() else {
            return assert!(bytes.is_empty());
        };
        assert!(bytes.len() <= free, "room for them");
        // SAFETY: the space is that long and not in use otherwise while no receive is posted; `bytes` is not part of it,
        // being borrowed beside `&mut self`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), space, bytes.len()) };
        self.fill(bytes.len());
    }

    /// The kernel has put `count` bytes into the space it was given.
    pub fn fill(&mut self, count: usize) {
        assert!(
            count <= self.capacity - self.filled,
            "the kernel fills no more than it was given"
        );
        self.filled += count;
    }

    /// Discards what is in it, and returns all of its space. Only to be called while no receive is posted.
    pub fn restart(&mut self) -> (*mut u8, usize) {
        self.pos.set(0);
        self.filled = 0;
        (self.memory.as_ptr(), self.capacity)
    }

    /// Free space, after moving what is left to the front when the end is near. None while the buffer is full of
    /// unconsumed bytes. Only to be called while no receive is posted.
    pub fn space(&mut self) -> Option<(*mut u8, usize)> {
        let pos = self.pos.get();
        if pos == self.filled {
            self.restart();
        } else if self.capacity - self.filled < self.capacity / 2 && pos > 0 {
            // SAFETY: both ranges lie in the buffer; no receive is posted, so nothing else touches it.
            unsafe {
                let from = self.memory.as_ptr().add(pos);
                std::ptr::copy(from, self.memory.as_ptr(), self.filled - pos);
            }
            self.filled -= pos;
            self.pos.set(0);
        }
        let free = self.capacity - self.filled;
        (free > 0).then_some((self.memory.as_ptr().wrapping_add(self.filled), free))
    }
}

impl Drop for StreamBuffer {
    fn drop(&mut self) {
        let slice = std::ptr::slice_from_raw_parts_mut(self.memory.as_ptr(), self.capacity);
        // SAFETY: made by Box::leak of a slice of this length in `of`; the owner drops it with no receive posted.
        drop(unsafe { Box::from_raw(slice) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_over_many_wraps() {
        let mut buffer = StreamBuffer::new(16);
        let (mut next_in, mut next_out) = (0u8, 0u8);
        for round in 0..1000usize {
            let count = round % 7;
            if buffer.space().is_some_and(|(_, free)| free >= count) {
                let chunk: Vec<u8> = (0..count)
                    .map(|_| {
                        next_in = next_in.wrapping_add(1);
                        next_in
                    })
                    .collect();
                buffer.put(&chunk);
            }
            let take = buffer.bytes().len().min(round % 5);
            for byte in &buffer.bytes()[..take] {
                next_out = next_out.wrapping_add(1);
                assert_eq!(*byte, next_out);
            }
            buffer.consume(take);
        }
        assert!(next_out > 0);
    }

    #[test]
    fn a_full_buffer_has_no_space() {
        let mut buffer = StreamBuffer::new(4);
        buffer.put(&[1, 2, 3, 4]);
        assert!(buffer.space().is_none());
        buffer.consume(1);
        assert_eq!(buffer.space().map(|(_, free)| free), Some(1));
        assert_eq!(buffer.bytes(), [2, 3, 4]);
    }
}
