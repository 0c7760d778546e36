//! Bytes that no primary should send, and connections that break, against a running receiver over real sockets.
//!
//! The outcome is the same every time: a message that says where and what, the session over at once, the last committed
//! checkpoint untouched, the guest beside it undisturbed, the receiver ready for the next.

mod compressed;
mod connections;
mod cuts;
mod main_channel;
mod packets;
mod precopy;

use colo_ring::ring::BackendKind;
use colo_ring_tests::hostile::packet;

pub(crate) const BACKENDS: [BackendKind; 3] = [BackendKind::Uring, BackendKind::Epoll, BackendKind::Threads];

pub(crate) fn be32(number: u32) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

pub(crate) fn be64(number: u64) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

/// Two pages with content at 0x1000 and 0x2000, and a zero page at 0x3000.
pub(crate) fn good_packet() -> Vec<u8> {
    packet("pc.ram", &[(0x1000, 0xaa), (0x2000, 0xab)], &[0x3000])
}
