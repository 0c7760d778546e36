//! The base of a disk: a raw file or a block device, and the names that it may have.

use super::DiskError;
use super::io::{Stretch, write_at};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Most bytes of a disk's name.
const NAME_MAX: usize = 64;

/// The extension of a base.
const EXTENSION: &str = "raw";

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Where QEMU locks bytes of an image that it has open.
const QEMU_LOCKS: std::ops::Range<i64> = 100..300;

/// How many zeros are written at a time where the file cannot be told to hold zeros.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Whether a disk may have this name.
pub(crate) fn is_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.starts_with('.') && (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(is_allowed)
}

/// The base of the disk `name` in a directory.
pub(crate) fn path_of(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.{EXTENSION}"))
}

/// The names of all bases in a directory, in order, at most `most`.
pub(crate) fn names_in(directory: &Path, most: usize) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let file = entry?.file_name();
        let name = file.to_str().and_then(|file| file.rsplit_once('.'));
        if let Some((name, EXTENSION)) = name
            && is_name(name)
        {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    names.truncate(most);
    Ok(names)
}

/// A base that is open.
pub(crate) struct Base {
    file: File,
    path: PathBuf,
    size: u64,
    /// The error of every change, where a test wants one.
    #[cfg(test)]
    fault: std::sync::atomic::AtomicI32,
}

impl Base {
    /// Opens the base at a path.
    ///
    /// # Errors
    /// If it does not exist, is not raw, or a QEMU has it open.
    pub(crate) fn open(path: &Path) -> Result<Self, DiskError> {
        let base = Self::open_shared(path)?;
        match base.is_locked_by_qemu() {
            Ok(false) => Ok(base),
            Ok(true) => Err(DiskError::InUseByQemu(path.to_owned())),
            Err(errno) => Err(DiskError::Base {
                path: path.to_owned(),
                source: errno.into(),
            }),
        }
    }

    /// Opens the base at a path, which a QEMU may have open: only to be looked at.
    ///
    /// # Errors
    /// If it does not exist, or is not raw.
    pub(crate) fn open_shared(path: &Path) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Base {
            path: path.to_owned(),
            source,
        };
        let opened = File::options()
            .read(true)
            .write(true)
            // A name of a FIFO must not hang.
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => DiskError::NoBase(path.to_owned()),
            io::ErrorKind::PermissionDenied if path.is_symlink() => DiskError::LinkedBase {
                path: path.to_owned(),
                source: error,
            },
            _ => failed(error),
        })?;
        let about = file.metadata().map_err(failed)?;
        let size = match about.file_type() {
            kind if kind.is_file() => about.len(),
            kind if kind.is_block_device() => {
                let end = lseek(&file, 0, Whence::SeekEnd).map_err(|errno| failed(errno.into()))?;
                u64::try_from(end).unwrap_or(0)
            }
            _ => return Err(DiskError::NotRaw(path.to_owned())),
        };
        let mut first = [0; QCOW2_MAGIC.len()];
        if size >= 4 && file.read_exact_at(&mut first, 0).is_ok() && first == QCOW2_MAGIC {
            return Err(DiskError::Qcow2(path.to_owned()));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            size,
            #[cfg(test)]
            fault: 0.into(),
        })
    }

    /// Lets every change of it fail from now on, or none.
    #[cfg(test)]
    pub(super) fn fail(&self, errno: Option<Errno>) {
        let number = errno.map_or(0, |errno| errno as i32);
        self.fault.store(number, std::sync::atomic::Ordering::Relaxed);
    }

    #[cfg(test)]
    fn check_fault(&self) -> io::Result<()> {
        match self.fault.load(std::sync::atomic::Ordering::Relaxed) {
            0 => Ok(()),
            number => Err(io::Error::from_raw_os_error(number)),
        }
    }

    /// Whether a QEMU has it open, by the locks that it takes on images.
    fn is_locked_by_qemu(&self) -> nix::Result<bool> {
        let short = |number: i32| libc::c_short::try_from(number).unwrap_or(0);
        let mut lock = libc::flock {
            l_type: short(libc::F_WRLCK),
            l_whence: short(libc::SEEK_SET),
            l_start: QEMU_LOCKS.start,
            l_len: QEMU_LOCKS.end - QEMU_LOCKS.start,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        Ok(lock.l_type != short(libc::F_UNLCK))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to copy it.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `bytes` from `offset` on.
    pub(crate) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Fills `bytes` if all of it is in the page cache. Else returns false: the medium would have to be waited for. Waits where the file
    /// system cannot tell.
    pub(crate) fn read_cached(&self, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
        let length = bytes.len();
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.file, &mut [io::IoSliceMut::new(bytes)], offset, flags) {
            Ok(read) => Ok(read == length),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(rustix::io::Errno::OPNOTSUPP) => self.read(bytes, offset).map(|()| true),
            Err(errno) => Err(errno.into()),
        }
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.check_fault()?;
        self.file.write_all_at(bytes, offset)
    }

    /// Writes what is in a log, one stretch behind the other from `offset` on.
    pub(super) fn write_stretches(&self, stretches: &[Stretch<'_>], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.check_fault()?;
        write_at(self.file.as_fd(), stretches, offset)
    }

    /// Makes a range zero; with `may_punch` also by a hole. Returns `Unsupported` if it is to be `fast` and would take writing.
    pub(crate) fn zero(&self, offset: u64, length: u64, may_punch: bool, fast: bool) -> io::Result<()> {
        #[cfg(test)]
        self.check_fault()?;
        let (signed_offset, signed_length) = (signed(offset)?, signed(length)?);
        if length == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let ways: &[FallocateFlags] = if may_punch { &[hole, zero] } else { &[zero] };
        for way in ways {
            match fallocate(&self.file, *way, signed_offset, signed_length) {
                Ok(()) => return Ok(()),
                // Not by this file system, or not a device of this granularity.
                Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if fast {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done)
                .unwrap_or(usize::MAX)
                .min(ZEROS.len());
            self.write(&ZEROS[..part], offset + done)?;
            done += u64::try_from(part).unwrap_or(0);
        }
        Ok(())
    }

    /// Frees a range, whose content means nothing any more, where the file can; it reads as zeros then.
    pub(crate) fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.zero(offset, length, true, true) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        self.check_fault()?;
        self.file.sync_data()
    }

    /// Reads a range ahead.
    pub(crate) fn cache(&self, offset: u64, length: u64) -> io::Result<()> {
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        posix_fadvise(&self.file, signed(offset)?, signed(length)?, advice)?;
        Ok(())
    }

    /// Whether there is data at `offset`, and where that ends, at most at `end`.
    pub(crate) fn extent(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        let from = signed(offset)?;
        extent_by(|whence| lseek(&self.file, from, whence), offset, end)
    }
}

/// Whether there is data at `offset`, and where that ends, by what a file answers to a seek from there.
fn extent_by(seek: impl Fn(Whence) -> nix::Result<i64>, offset: u64, end: u64) -> io::Result<(bool, u64)> {
    let seek = |whence| match seek(whence) {
        Ok(found) => Ok(u64::try_from(found).unwrap_or(end).min(end)),
        // Nothing of that kind up to the end of the file.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno),
    };
    let found = match seek(Whence::SeekData) {
        Ok(data) if data > offset => return Ok((false, data)),
        Ok(_) => seek(Whence::SeekHole),
        Err(errno) => Err(errno),
    };
    match found {
        Ok(hole) => Ok((true, hole)),
        // A block device knows no holes.
        Err(Errno::EINVAL) => Ok((true, end)),
        Err(errno) => Err(errno.into()),
    }
}

fn signed(number: u64) -> io::Result<i64> {
    i64::try_from(number).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for name in ["root", "web3-root", "a.b_c-9"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".root", "a/b", "a b", "..", "ä", &"x".repeat(65)] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn bases_are_raw_and_exist() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_of(directory.path(), "disk");
        let error = Base::open(&path).err().unwrap().to_string();
        assert!(
            error.contains("truncate -s") && error.contains("disk.raw"),
            "{error}"
        );
        std::fs::write(&path, b"QFI\xfb and more").unwrap();
        let error = Base::open(&path).err().unwrap().to_string();
        assert!(error.contains("qemu-img convert"), "{error}");
        std::fs::write(&path, [7; 9000]).unwrap();
        assert_eq!(Base::open(&path).unwrap().size(), 9000);
        assert_eq!(names_in(directory.path(), 9).unwrap(), ["disk"]);
    }

    #[test]
    fn an_image_that_a_qemu_has_open_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_of(directory.path(), "disk");
        std::fs::write(&path, [7; 9000]).unwrap();
        let qemu = File::open(&path).unwrap();
        let lock = libc::flock {
            l_type: libc::c_short::try_from(libc::F_RDLCK).unwrap(),
            l_whence: 0,
            l_start: 101,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&qemu, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(matches!(Base::open(&path), Err(DiskError::InUseByQemu(_))));
        drop(qemu);
        assert!(Base::open(&path).is_ok());
    }

    #[test]
    fn zeros_and_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_of(directory.path(), "disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let base = Base::open(&path).unwrap();
        base.zero(4096, 100_000, true, false).unwrap();
        base.zero(500_001, 7, false, false).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 1 << 20);
        for (at, byte) in content.iter().enumerate() {
            let is_zero = (4096..104_096).contains(&at) || (500_001..500_008).contains(&at);
            assert_eq!(*byte == 0, is_zero, "{at}");
        }
        let (is_data, end) = base.extent(0, 1 << 20).unwrap();
        assert!(is_data && end <= 1 << 20);
    }

    #[test]
    fn extents_by_what_seeks_find() {
        let by = |data: nix::Result<i64>, hole: nix::Result<i64>| {
            let seek = move |whence| match whence {
                Whence::SeekData => data,
                _ => hole,
            };
            extent_by(seek, 100, 1000).unwrap()
        };
        assert_eq!(by(Ok(100), Ok(300)), (true, 300));
        assert_eq!(by(Ok(100), Ok(5000)), (true, 1000));
        assert_eq!(by(Ok(200), Ok(100)), (false, 200));
        assert_eq!(by(Err(Errno::ENXIO), Ok(100)), (false, 1000));
        // A block device.
        assert_eq!(by(Err(Errno::EINVAL), Err(Errno::EINVAL)), (true, 1000));
        assert!(extent_by(|_| Err(Errno::EIO), 100, 1000).is_err());
    }
}
