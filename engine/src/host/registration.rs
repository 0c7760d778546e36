//! Tries to register a buffer with a ring: the only unsafe of the probe.

use io_uring::IoUring;
use std::io;

/// Registers a buffer of `bytes` with a ring made for it, and undoes it.
///
/// # Errors
/// What the kernel says; ENOMEM means that the limit on pinned memory is too small.
pub(super) fn try_registration(bytes: usize) -> io::Result<()> {
    // Declared before the ring, so it is dropped after it on every path.
    let mut buffer = vec![0u8; bytes];
    let ring = IoUring::new(1)?;
    let extent = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the extent is the whole of `buffer`, which this function owns, keeps in place and drops only after
    // the ring; no operation is ever submitted, so the kernel neither reads nor writes it.
    unsafe { ring.submitter().register_buffers(&[extent]) }?;
    ring.submitter().unregister_buffers()
}
