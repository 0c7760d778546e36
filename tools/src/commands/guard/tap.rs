//! A tap device, as the kernel's other end of a guest's network card.

use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use thiserror::Error;

const DEVICE: &str = "/dev/net/tun";

/// Longest name of an interface, in bytes (IFNAMSIZ - 1).
const NAME_MAX: usize = 15;

/// A tap device cannot be used.
#[derive(Debug, Error)]
pub(super) enum TapError {
    #[error("\"{0}\" is not the name of a network interface: 1 to {NAME_MAX} bytes, without '/' and spaces")]
    Name(String),
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
        let attached = ioctl::set_interface(&file, &request).and_then(|()| ioctl::switch_offloads_off(&file));
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

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
