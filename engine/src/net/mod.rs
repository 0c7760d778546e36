//! Addresses, listening sockets and socket options. Pages are received by the data plane, [`crate::ring`], which asks for quick
//! acknowledgements here.
//!
//! **Acknowledgements.** QEMU leaves Nagle's algorithm on for its main channel and writes it in small pieces, each of
//! which waits for the acknowledgement of the one before. Linux delays that by 40 ms, so the receiver of a main channel
//! requests quick ones after every read *and* every write of its own, since the kernel falls back to delayed ones by itself.

mod address;
mod descriptors;
mod listener;
mod sockopt;

pub use address::{AddressError, ListenAddress};
pub(crate) use descriptors::DescriptorReserve;
pub(crate) use listener::is_gone;
pub use listener::{
    AcceptError, Accepted, Clients, HostWatch, ListenError, Listener, Origin, Peer, bind_unix,
};
pub use sockopt::quick_ack;
