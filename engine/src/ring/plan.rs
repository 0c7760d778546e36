//! What to receive next, and where to: what a connection hands to a backend.
//!
//! Contract: from the moment the plan is posted until the backend reports its completion, the addresses in it stay valid
//! and nothing but the kernel touches the memory there. The connection that owns the plan upholds that: it holds the memory
//! (its own buffers, and the store by an `Arc`) and is not dropped while a receive is posted. Pages of guest memory are an
//! exception to "nothing but the kernel", as `store::memory::copy` explains. A plan never moves while it is posted: it is
//! boxed.
#![expect(unsafe_code, reason = "a plan has raw addresses and crosses threads")]

use crate::opaque::write_bytes;

/// Most pieces of a plan: the pages of one packet, and the header of the next.
pub const PIECES_MAX: usize = crate::units::PACKET_PAGES + 2;

/// A list of memory pieces to fill from a socket, in order, and how much of it is still missing.
pub struct ReceivePlan {
    pieces: [libc::iovec; PIECES_MAX],
    first: usize,
    end: usize,
    remaining: usize,
    message: libc::msghdr,
    /// Where set, complete only when every byte is there (the kernel waits); else with what has arrived.
    pub wait_all: bool,
    /// Much has been received in this round and more is expected: larger portions are cheaper.
    pub bulk: bool,
    /// The tenant's region in which every piece lies, if one does: see [`super::Tenant::region`].
    pub region: Option<u16>,
    /// The registered buffer that it is, in the ring that has this receive: set by the core before it posts the plan.
    pub(super) registered: Option<u16>,
}

/// How far the missing pieces of a plan are filled: see [`ReceivePlan::write`].
#[derive(Debug, Default)]
pub struct PlanCursor {
    piece: usize,
    at: usize,
}

// SAFETY: the raw addresses are only numbers until a backend hands them to the kernel; the connection that owns the
// plan answers for the memory behind them (contract above), on whatever thread it is driven.
unsafe impl Send for ReceivePlan {}

impl ReceivePlan {
    /// An empty plan.
    pub fn new() -> Box<Self> {
        let nothing = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
        let message = unsafe { std::mem::zeroed() };
        Box::new(Self {
            pieces: [nothing; PIECES_MAX],
            first: 0,
            end: 0,
            remaining: 0,
            message,
            wait_all: false,
            bulk: false,
            region: None,
            registered: None,
        })
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.first = 0;
        self.end = 0;
        self.remaining = 0;
        self.region = None;
        self.registered = None;
    }

    /// Adds `bytes` bytes at `address`.
    ///
    /// # Panics
    /// With more than [`PIECES_MAX`] pieces: a packet has at most 128 pages, whatever the peer says.
    pub(crate) fn push(&mut self, address: *mut u8, bytes: usize) {
        self.pieces[self.end] = libc::iovec {
            iov_base: address.cast(),
            iov_len: bytes,
        };
        self.end += 1;
        self.remaining += bytes;
    }

    /// Bytes that are still missing.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Records `bytes` received bytes.
    ///
    /// # Panics
    /// With more bytes than were missing: no backend reports more than it was asked for.
    pub fn advance(&mut self, bytes: usize) {
        self.remaining = self
            .remaining
            .checked_sub(bytes)
            .expect("the kernel fills no more than it was given");
        let mut left = bytes;
        while left > 0 {
            let piece = &mut self.pieces[self.first];
            if left < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(left).cast();
                piece.iov_len -= left;
                return;
            }
            left -= piece.iov_len;
            self.first += 1;
        }
    }

    /// The pieces that are still missing.
    pub(super) fn pieces(&self) -> &[libc::iovec] {
        &self.pieces[self.first..self.end]
    }

    /// Puts bytes behind those that were put there before with this cursor, where nothing is posted: what a kernel does otherwise.
    /// Returns how many had room. They are not received before [`Self::advance`].
    pub(crate) fn write(&mut self, cursor: &mut PlanCursor, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            let Some(piece) = self.pieces().get(cursor.piece) else {
                break;
            };
            let count = (piece.iov_len - cursor.at).min(bytes.len() - written);
            // SAFETY: inside of the piece, whose memory the plan's connection answers for (contract above); the kernel has no receive
            // there. `bytes` is ordinary memory of the caller.
            unsafe {
                let place = piece.iov_base.cast::<u8>().add(cursor.at);
                write_bytes(place, &bytes[written..written + count]);
            }
            written += count;
            cursor.at += count;
            if cursor.at == piece.iov_len {
                (cursor.piece, cursor.at) = (cursor.piece + 1, 0);
            }
        }
        written
    }

    /// Puts bytes behind the first `filled` missing ones, as a kernel does that has not reported them yet.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(super) fn put(&mut self, filled: usize, bytes: &[u8]) {
        let (mut skip, mut bytes) = (filled, bytes);
        for piece in self.pieces() {
            let at = skip.min(piece.iov_len);
            skip -= at;
            let (now, later) = bytes.split_at(bytes.len().min(piece.iov_len - at));
            // SAFETY: inside of the piece, whose memory the plan's connection answers for (contract above); the simulation
            // that calls this has one thread.
            unsafe {
                let place = piece.iov_base.cast::<u8>().add(at);
                std::ptr::copy_nonoverlapping(now.as_ptr(), place, now.len());
            }
            bytes = later;
        }
        assert!(bytes.is_empty(), "no more than was asked for");
    }

    /// The same as a message header for recvmsg. It points into this plan.
    pub(super) fn message(&mut self) -> &mut libc::msghdr {
        self.message.msg_iov = self.pieces[self.first..self.end].as_mut_ptr();
        self.message.msg_iovlen = self.end - self.first;
        self.message.msg_flags = 0;
        &mut self.message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_receipts_leave_the_rest() {
        let mut memory = [0u8; 64];
        let base = memory.as_mut_ptr();
        let mut plan = ReceivePlan::new();
        plan.push(base, 10);
        plan.push(base, 20);
        plan.push(base, 30);
        plan.advance(10);
        assert_eq!((plan.remaining(), plan.pieces().len()), (50, 2));
        plan.advance(5);
        assert_eq!((plan.remaining(), plan.pieces()[0].iov_len), (45, 15));
        plan.advance(20);
        assert_eq!((plan.pieces().len(), plan.pieces()[0].iov_len), (1, 25));
        plan.advance(25);
        assert_eq!((plan.remaining(), plan.pieces().len()), (0, 0));
    }

    #[test]
    fn bytes_are_written_over_pieces_up_to_the_last() {
        let mut memory = [0u8; 16];
        let base = memory.as_mut_ptr();
        let mut plan = ReceivePlan::new();
        plan.push(base, 3);
        plan.push(base.wrapping_add(8), 4);
        plan.advance(1);
        let mut cursor = PlanCursor::default();
        assert_eq!(plan.write(&mut cursor, &[1]), 1);
        assert_eq!(plan.write(&mut cursor, &[2, 3, 4]), 3);
        assert_eq!(plan.write(&mut cursor, &[5, 6, 7, 8]), 2);
        assert_eq!(plan.write(&mut cursor, &[9]), 0);
        assert_eq!(plan.remaining(), 6);
        assert_eq!(memory, [0, 1, 2, 0, 0, 0, 0, 0, 3, 4, 5, 6, 0, 0, 0, 0]);
    }
}
