//! Sockets that tasks wait for: what the control thread accepts and identifies connections with, and what a proxy forwards
//! with. No page of a receiver passes here; those are the data plane's, [`crate::ring`].
//!
//! **Acknowledgements.** QEMU leaves Nagle's algorithm on for its main channel and writes it in small pieces, each of
//! which waits for the acknowledgement of the one before. Linux delays that by 40 ms, so who receives a main channel
//! asks for quick ones after every read *and* every write of its own, as the kernel forgets it ([`Stream::quick_ack`]).

mod address;
mod listener;
mod runtime;
mod stream;

pub use address::{AddressError, ListenAddress};
pub use listener::{Accepted, HostWatch, ListenError, Listener, Origin, Peer, bind_unix};
pub use runtime::Runtime;
pub use stream::Stream;
