//! A tap device, as the kernel's other end of a guest's network card.

use crate::output::tell;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};
use thiserror::Error;

const DEVICE: &str = "/dev/net/tun";

/// How long a tap device may be busy: the kernel closes that of a process that was killed a moment after its end.
const BUSY_LIMIT: Duration = Duration::from_secs(5);

/// How often it is tried.
const BUSY_POLL: Duration = Duration::from_millis(10);

/// Longest name of an interface, in bytes (IFNAMSIZ - 1).
const NAME_MAX: usize = 15;

/// A tap device cannot be used.
#[derive(Debug, Error)]
pub(super) enum TapError {
    #[error("\"{0}\" is not the name of a network interface: 1 to {NAME_MAX} bytes, without '/' and spaces")]
    Name(String),
    #[error("the tap device {0} was deleted: make it again")]
    Gone(String),
    #[error("cannot open {DEVICE}: {0}; is the module tun loaded?")]
    Device(io::Error),
    #[error(
        "cannot attach to the tap device {name}: {errno}; make it for this user: \
         ip tuntap add {name} mode tap user $(id -un), and bring it up: ip link set {name} up"
    )]
    Attach { name: String, errno: Errno },
}

/// An open tap device. It does not block.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
}

/// `struct ifreq` of <linux/if.h> as far as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_MAX + 1],
    flags: u16,
    padding: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

/// Frames of Ethernet, without a header of packet information before each.
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;

mod ioctl {
    #![expect(unsafe_code, reason = "an ioctl has no safe interface")]

    use super::InterfaceRequest;
    use nix::errno::Errno;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    mod raw {
        nix::ioctl_write_ptr_bad!(
            tunsetiff,
            nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
            super::InterfaceRequest
        );
        nix::ioctl_write_int_bad!(
            tunsetoffload,
            nix::request_code_write!(b'T', 208, size_of::<nix::libc::c_uint>())
        );
    }

    /// TUNSETIFF.
    pub(super) fn set_interface(tun: &File, request: &InterfaceRequest) -> Result<(), Errno> {
        // SAFETY: the kernel reads `struct ifreq`, 40 bytes, which the type has (asserted above), and keeps no pointer.
        unsafe { raw::tunsetiff(tun.as_raw_fd(), request) }.map(drop)
    }

    /// TUNSETOFFLOAD with nothing.
    pub(super) fn switch_offloads_off(tun: &File) -> Result<(), Errno> {
        // SAFETY: its argument is a number.
        unsafe { raw::tunsetoffload(tun.as_raw_fd(), 0) }.map(drop)
    }
}

impl Tap {
    /// Attaches to the tap device of that name, which is made where it is not there and the caller may.
    ///
    /// # Errors
    /// If the name is none, or the kernel refuses.
    pub(super) fn open(name: &str) -> Result<Self, TapError> {
        Self::attach(name, |file, request| match ioctl::set_interface(file, request) {
            Err(Errno::EBUSY) => {
                tell(&format!(
                    "the tap device {name} is busy: another process has it; trying for {BUSY_LIMIT:?}"
                ));
                attach_within(BUSY_LIMIT, || ioctl::set_interface(file, request))
            }
            attached => attached,
        })
    }

    /// Attaches again to a tap device that was deleted, if one of that name is there: none is made, and none is waited for.
    ///
    /// # Errors
    /// If there is none, or the kernel refuses.
    pub(super) fn reopen(name: &str) -> Result<Self, TapError> {
        // One that was made here would be in no bridge, and in the way of the operator's.
        if_nametoindex(name).map_err(|_| TapError::Gone(name.to_owned()))?;
        Self::attach(name, ioctl::set_interface)
    }

    fn attach(
        name: &str,
        set_interface: impl FnOnce(&File, &InterfaceRequest) -> Result<(), Errno>,
    ) -> Result<Self, TapError> {
        let is_allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        if name.is_empty() || name.len() > NAME_MAX || !name.bytes().all(is_allowed) {
            return Err(TapError::Name(name.to_owned()));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(nix::libc::O_NONBLOCK);
        let file = options.open(DEVICE).map_err(TapError::Device)?;
        let mut request = InterfaceRequest {
            name: [0; NAME_MAX + 1],
            flags: IFF_TAP | IFF_NO_PI,
            padding: [0; 22],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // A device that a QEMU had before keeps what that wanted: frames without checksums, and longer than any.
        let attached = set_interface(&file, &request).and_then(|()| ioctl::switch_offloads_off(&file));
        attached.map_err(|errno| TapError::Attach {
            name: name.to_owned(),
            errno,
        })?;
        Ok(Self { file })
    }

    /// Reads a frame, if one is there.
    ///
    /// # Errors
    /// Of the device; [`io::ErrorKind::WouldBlock`] if there is none.
    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Writes a frame, whole.
    ///
    /// # Errors
    /// Of the device: EIO while it is down.
    pub(super) fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

/// Tries again and again while the device is busy.
fn attach_within(limit: Duration, mut attach: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    let since = Instant::now();
    loop {
        match attach() {
            Err(Errno::EBUSY) if since.elapsed() < limit => std::thread::sleep(BUSY_POLL),
            attached => return attached,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_busy_for_a_moment_is_waited_for() {
        let mut busy = 3;
        let attached = attach_within(BUSY_LIMIT, || {
            busy -= 1;
            if busy > 0 { Err(Errno::EBUSY) } else { Ok(()) }
        });
        assert_eq!((attached, busy), (Ok(()), 0));
        let attached = attach_within(Duration::ZERO, || Err(Errno::EBUSY));
        assert_eq!(attached, Err(Errno::EBUSY));
        let attached = attach_within(BUSY_LIMIT, || Err(Errno::EPERM));
        assert_eq!(attached, Err(Errno::EPERM));
    }
}
