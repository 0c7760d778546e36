//! Counts what a guest sends on a tap device, as it sends it.
//!
//! A packet socket gets a copy of each frame before the kernel looks at the device's ingress filter, so before it is held. Its buffer takes
//! one or two: they wake this process, and the kernel only counts those that do not fit. What has left the ifb is not seen again.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socket, sockopt};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Every protocol (<linux/if_ether.h>), in the byte order of the network.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();

/// Frames that are taken out of the buffer at a time; it never has so many.
const FRAMES_MAX: usize = 64;

/// A packet socket on a tap device.
#[derive(Debug)]
pub(super) struct Frames {
    socket: OwnedFd,
}

impl Frames {
    /// Counts from now on.
    ///
    /// # Errors
    /// If the caller may not (CAP_NET_RAW), or there is no such interface.
    pub(super) fn watch(interface: u32) -> Result<Self, Errno> {
        // Without a protocol it gets nothing, until it is bound.
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        // The kernel makes it as small as it goes.
        setsockopt(&socket, sockopt::RcvBuf, &1)?;
        system::ignore_outgoing(&socket)?;
        system::bind(&socket, interface, ETH_P_ALL)?;
        Ok(Self { socket })
    }

    /// How many frames there were since the last call.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub(super) fn take(&self) -> Result<u64, Errno> {
        // First, so that one that comes in between is still in the buffer and wakes again. Errors: the device went down or away.
        for _ in 0..FRAMES_MAX {
            let taken = recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::empty());
            if taken == Err(Errno::EAGAIN) {
                break;
            }
        }
        system::take_count(&self.socket)
    }
}

impl AsFd for Frames {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

mod system {
    #![expect(unsafe_code, reason = "nix has no packet sockets")]

    use nix::errno::Errno;
    use nix::libc::{self, c_int, sockaddr_ll, socklen_t};
    use std::os::fd::{AsRawFd, OwnedFd};

    /// PACKET_IGNORE_OUTGOING and PACKET_STATISTICS of <linux/if_packet.h>.
    const IGNORE_OUTGOING: c_int = 23;
    const STATISTICS: c_int = 6;

    /// `struct tpacket_stats`: frames, with those that did not fit; and those alone.
    type Statistics = [u32; 2];

    fn size<T>() -> socklen_t {
        socklen_t::try_from(size_of::<T>()).expect("it is small")
    }

    /// What goes to the guest is not seen.
    pub(super) fn ignore_outgoing(socket: &OwnedFd) -> Result<(), Errno> {
        let on: c_int = 1;
        // SAFETY: the kernel reads an int at that address, and keeps no pointer.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                IGNORE_OUTGOING,
                (&raw const on).cast(),
                size::<c_int>(),
            )
        };
        Errno::result(done).map(drop)
    }

    /// Binds it to that interface and protocol.
    pub(super) fn bind(socket: &OwnedFd, interface: u32, protocol: u16) -> Result<(), Errno> {
        let address = sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).expect("it is 17"),
            sll_protocol: protocol,
            sll_ifindex: i32::try_from(interface).map_err(|_| Errno::ENODEV)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the kernel reads an address of that size, and keeps no pointer.
        let done = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size::<sockaddr_ll>(),
            )
        };
        Errno::result(done).map(drop)
    }

    /// Frames since the last call.
    pub(super) fn take_count(socket: &OwnedFd) -> Result<u64, Errno> {
        let mut statistics: Statistics = [0; 2];
        let mut length = size::<Statistics>();
        // SAFETY: the kernel writes at most `length` bytes of two numbers there, and that length, and keeps no pointer.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        Errno::result(done).map(|_| u64::from(statistics[0]))
    }
}
