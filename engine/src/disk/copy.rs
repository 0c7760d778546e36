//! A copy of a disk's base. It shares its blocks with the base where the file system can, and holes stay holes.

use super::base::Base;
use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that are copied at a time where the kernel does not copy by itself.
const STEP: usize = 1 << 20;

/// Copies all of a base to a file that is open and empty, and waits until it is on the disk.
///
/// # Errors
/// What the system says.
pub(crate) fn copy_base(from: &Base, to: &File) -> io::Result<()> {
    let source = from.file();
    let end = lseek64(source, 0, Whence::SeekEnd)?;
    to.set_len(end.unsigned_abs())?;
    let mut at = 0;
    while at < end {
        let data = match lseek64(source, at, Whence::SeekData) {
            Ok(data) => data,
            // A hole up to the end.
            Err(Errno::ENXIO) => break,
            // A device: all of it is data.
            Err(Errno::EINVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = lseek64(source, data, Whence::SeekHole).unwrap_or(end);
        copy_range(source, to, data, hole)?;
        at = hole;
    }
    to.sync_all()
}

/// By the kernel, which shares blocks where it can; by hand where it refuses.
fn copy_range(source: &File, target: &File, from: i64, to: i64) -> io::Result<()> {
    let (mut in_at, mut out_at) = (from, from);
    while in_at < to {
        let length = usize::try_from(to - in_at).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut in_at), target, Some(&mut out_at), length) {
            // It has become shorter.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::EINTR) => {}
            Err(Errno::EINVAL | Errno::EXDEV | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                return copy_by_hand(source, target, in_at.unsigned_abs(), to.unsigned_abs());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &File, target: &File, from: u64, to: u64) -> io::Result<()> {
    let mut buffer = vec![0; STEP];
    let mut at = from;
    while at < to {
        let length = usize::try_from(to - at).map_or(STEP, |left| left.min(STEP));
        source.read_exact_at(&mut buffer[..length], at)?;
        target.write_all_at(&buffer[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_same_bytes_and_holes() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        let base = File::create(&from).unwrap();
        base.set_len(64 << 20).unwrap();
        base.write_all_at(&[7; 9000], 1 << 20).unwrap();
        base.write_all_at(&[8; 5], (64 << 20) - 5).unwrap();
        let opened = Base::open(&from).unwrap();
        copy_base(&opened, &File::create(&to).unwrap()).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        // Where the kernel refuses.
        let by_hand = directory.path().join("by-hand");
        copy_by_hand(
            &File::open(&from).unwrap(),
            &File::create(&by_hand).unwrap(),
            0,
            64 << 20,
        )
        .unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&by_hand).unwrap());
    }
}
