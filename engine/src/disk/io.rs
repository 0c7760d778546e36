//! Receives into segments and writes from segments, without a copy in between.
#![expect(unsafe_code, reason = "the kernel reads and writes segments by address")]

use super::segment::Segment;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most pieces in one call; the kernel allows 1024.
pub(crate) const SLICES_MAX: usize = 256;

/// Bytes in a segment.
#[derive(Clone, Copy)]
pub(crate) struct Stretch<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) place: usize,
    pub(crate) length: usize,
}

impl Stretch<'_> {
    fn vector(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.segment.memory().bytes(self.place, self.length).cast(),
            iov_len: self.length,
        }
    }
}

fn count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX)
}

/// Receives once: into the stretches, and what is more into `rest`. Waits for at least one byte; 0 is the end of the stream. At most
/// [`SLICES_MAX`] stretches.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    stretches: &[Stretch<'_>],
    rest: &mut [u8],
) -> io::Result<usize> {
    let mut vectors = [EMPTY; SLICES_MAX + 1];
    let mut used = 0;
    for stretch in stretches.iter().take(SLICES_MAX) {
        vectors[used] = stretch.vector();
        used += 1;
    }
    if stretches.len() <= SLICES_MAX {
        vectors[used] = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        used += 1;
    }
    loop {
        // SAFETY: each vector is memory that stays valid for the call: a borrowed segment's bytes, of which `Mapping::bytes` has checked
        // the bounds and to which there are no references, or the caller's slice.
        let got = unsafe { libc::readv(socket.as_raw_fd(), vectors.as_ptr(), count(&vectors[..used])) };
        match Errno::result(got) {
            Ok(got) => return Ok(usize::try_from(got).unwrap_or(0)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Lets `each` transfer what is left of the vectors until all is.
fn transfer_all(
    vectors: &mut [libc::iovec],
    mut each: impl FnMut(&[libc::iovec]) -> isize,
) -> io::Result<()> {
    let mut first = 0;
    while first < vectors.len() {
        if vectors[first].iov_len == 0 {
            first += 1;
            continue;
        }
        let mut done = match Errno::result(each(&vectors[first..])) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => usize::try_from(done).unwrap_or(0),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        while first < vectors.len() && done >= vectors[first].iov_len {
            done -= vectors[first].iov_len;
            first += 1;
        }
        if let Some(vector) = vectors.get_mut(first) {
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(done).cast();
            vector.iov_len -= done;
        }
    }
    Ok(())
}

/// Writes stretches to a file, one behind the other from `offset` on.
pub(crate) fn write_at(file: BorrowedFd<'_>, stretches: &[Stretch<'_>], offset: u64) -> io::Result<()> {
    let mut offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    for stretches in stretches.chunks(SLICES_MAX) {
        let mut vectors = [EMPTY; SLICES_MAX];
        for (vector, stretch) in vectors.iter_mut().zip(stretches) {
            *vector = stretch.vector();
        }
        transfer_all(&mut vectors[..stretches.len()], |vectors| {
            // SAFETY: the kernel reads memory of borrowed segments, which stays valid for the call.
            let done = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count(vectors), offset) };
            offset += i64::try_from(done.max(0)).unwrap_or(0);
            done
        })?;
    }
    Ok(())
}
