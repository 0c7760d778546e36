//! What the world sees of a guest's network: the numbered frames of `tests/guest/frame-sender.rs`, as they arrive at the host's end.

#![expect(unsafe_code, reason = "nix does not say which VLAN a frame came from")]

use crate::HANG_LIMIT;
use std::io;
use std::mem::{MaybeUninit, size_of, size_of_val};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::libc;
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket};
use nix::sys::time::TimeVal;

use super::{LabError, Qemu, wait_for};

/// The kernel keeps so many bytes for a reader that is late: a whole release of a gate.
const KEPT_MAX: usize = 512 << 20;

/// Longest frame.
const FRAME_MAX: usize = 64 << 10;

/// The guest's source address.
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// The VLAN of [`FrameKind::Vlan`].
const VLAN: u16 = 78;

const MAGIC: &[u8; 8] = b"COLORING";

/// Bytes of the magic and of the number, at a frame's end.
const TRAILER: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// An ARP request.
    Arp,
    /// A neighbour solicitation of IPv6.
    Neighbour,
    /// UDP over IPv6.
    Ipv6,
    /// UDP over IPv4 in a VLAN.
    Vlan,
    /// UDP over IPv4.
    Udp,
    /// An ICMP echo request.
    Icmp,
    /// UDP over IPv4, of 9,000 bytes.
    Jumbo,
    /// The first half of a datagram.
    FragmentFirst,
    /// The second one.
    FragmentLast,
}

impl FrameKind {
    /// In the order in which the guest sends all of them, again and again.
    pub const ALL: [Self; 9] = [
        Self::Arp,
        Self::Neighbour,
        Self::Ipv6,
        Self::Vlan,
        Self::Udp,
        Self::Icmp,
        Self::Jumbo,
        Self::FragmentFirst,
        Self::FragmentLast,
    ];

    /// The guest's name for it.
    fn name(self) -> &'static str {
        match self {
            Self::Arp => "arp",
            Self::Neighbour => "neighbour",
            Self::Ipv6 => "ipv6",
            Self::Vlan => "vlan",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Jumbo => "jumbo",
            Self::FragmentFirst => "fragment-first",
            Self::FragmentLast => "fragment-last",
        }
    }

    /// Bytes before the payload, without a VLAN tag.
    fn header(self) -> usize {
        const ETHERNET: usize = 14;
        ETHERNET
            + match self {
                Self::Arp => 28,
                Self::Neighbour => 40 + 32,
                Self::Ipv6 => 40 + 8,
                Self::Vlan | Self::Udp | Self::Icmp | Self::Jumbo | Self::FragmentFirst => 20 + 8,
                Self::FragmentLast => 20,
            }
    }

    /// What a frame is by its headers.
    fn of(frame: &[u8], vlan: Option<u16>) -> Option<Self> {
        if vlan.is_some() {
            return (vlan == Some(VLAN)).then_some(Self::Vlan);
        }
        let short = |at: usize| {
            let bytes = frame.get(at..at + 2)?;
            Some(u16::from_be_bytes([bytes[0], bytes[1]]))
        };
        match (short(12)?, frame.get(20)?, frame.get(23)?) {
            (0x0806, ..) => Some(Self::Arp),
            (0x86dd, 58, _) => Some(Self::Neighbour),
            (0x86dd, 17, _) => Some(Self::Ipv6),
            (0x0800, _, 1) => Some(Self::Icmp),
            (0x0800, _, 17) => Some(match short(20)? {
                0x2000 => Self::FragmentFirst,
                0 if frame.len() > 9000 => Self::Jumbo,
                0 => Self::Udp,
                _ => Self::FragmentLast,
            }),
            _ => None,
        }
    }
}

/// A frame of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenFrame {
    /// Its number in the guest's memory.
    pub number: u64,
    /// What it is; `None` where not a byte of it may be wrong and one is.
    pub kind: Option<FrameKind>,
}

impl SeenFrame {
    /// A numbered frame, if it is one.
    fn of(frame: &[u8], vlan: Option<u16>) -> Option<Self> {
        let (rest, trailer) = frame.split_at_checked(frame.len().checked_sub(TRAILER)?)?;
        let number = trailer.strip_prefix(MAGIC)?;
        if frame.get(6..12)? != GUEST_MAC {
            return None;
        }
        let number = u64::from_be_bytes(number.try_into().ok()?);
        let is_right = |kind: &FrameKind| {
            let payload = rest.get(kind.header()..).unwrap_or_default();
            let right = (0_u64..).map(|at| (number.wrapping_add(at) % 256).to_le_bytes()[0]);
            payload.iter().zip(right).all(|(found, right)| *found == right)
        };
        let kind = FrameKind::of(frame, vlan).filter(is_right);
        Some(Self { number, kind })
    }
}

/// Records the numbered frames that arrive in this network namespace, until it is dropped.
#[derive(Debug)]
pub struct FrameCapture {
    seen: Arc<Mutex<Vec<SeenFrame>>>,
    is_ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FrameCapture {
    /// Records from now on. It needs root.
    ///
    /// # Errors
    /// When the kernel refuses the socket.
    pub fn start() -> Result<Self, LabError> {
        let socket = open().map_err(LabError::io("open a packet socket"))?;
        let (seen, is_ending) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (into, ends) = (seen.clone(), is_ending.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; FRAME_MAX];
            while !ends.load(Ordering::Relaxed) {
                // An error is the timeout, after which it looks whether this is the end.
                let Ok((length, vlan)) = receive(&socket, &mut buffer) else {
                    continue;
                };
                if let Some(frame) = SeenFrame::of(&buffer[..length], vlan) {
                    into.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
                }
            }
        });
        Ok(Self {
            seen,
            is_ending,
            thread: Some(thread),
        })
    }

    /// What has arrived so far, in order.
    #[must_use]
    pub fn seen(&self) -> Vec<SeenFrame> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many have arrived.
    #[must_use]
    pub fn count(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Waits until a frame has arrived whose number is so high.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_number(&self, number: u64) -> Result<(), LabError> {
        wait_for(&format!("frame {number}"), HANG_LIMIT, || {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(seen.iter().any(|frame| frame.number >= number).then_some(()))
        })
    }
}

impl Drop for FrameCapture {
    fn drop(&mut self) {
        self.is_ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed.
            let _ = thread.join();
        }
    }
}

/// Has the guest send so many frames, of one kind or all in turn, with a pause after each, and does not wait for it.
///
/// # Errors
/// When the serial port does not take the line.
pub fn ask_for_frames(
    guest: &Qemu,
    kind: Option<FrameKind>,
    count: u64,
    pause_us: u64,
) -> Result<(), LabError> {
    let kind = kind.map_or("all", FrameKind::name);
    guest.send_serial(format!("send {kind} {count} {pause_us}\n").as_bytes())
}

/// A socket that receives every frame of this network namespace, with its VLAN.
fn open() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::EthAll;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    setsockopt(&socket, RcvBufForce, &KEPT_MAX)?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 100_000))?;
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).expect("a few bytes");
    // SAFETY: the kernel reads an `int`, which the pointer is to, and keeps no pointer.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_AUXDATA,
            (&raw const on).cast(),
            length,
        )
    };
    match set {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Room for the one control message that is asked for, aligned as the kernel wants it.
type Control = [u64; 8];

/// Receives a frame: its length, and the VLAN whose tag the kernel has taken out of it.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<(usize, Option<u16>)> {
    let mut control: Control = [0; 8];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a `msghdr` of zeros is one without buffers.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: both buffers are valid for their lengths until the call returns, and nothing else refers to them meanwhile.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: `message` is as recvmsg has left it: its control buffer has whole messages of the length that it says.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    if first.is_null() {
        return Ok((length, None));
    }
    // SAFETY: not null, so it is a header in the control buffer; PACKET_AUXDATA is the one message that this socket asks for.
    let data: libc::tpacket_auxdata = unsafe {
        libc::CMSG_DATA(first)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    let is_tagged = data.tp_status & libc::TP_STATUS_VLAN_VALID != 0;
    Ok((length, is_tagged.then_some(data.tp_vlan_tci & 0xfff)))
}
