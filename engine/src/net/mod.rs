//! Addresses, listening sockets and socket options. Pages are received by the data plane, [`crate::ring`], which asks for quick
//! acknowledgements here.
//!
//! **Acknowledgements.** QEMU leaves Nagle's algorithm on for its main channel and writes it in small pieces, each of
//! which waits for the acknowledgement of the one before. Linux delays that by 40 ms, so the receiver of a main channel
//! requests quick ones after every read *and* every write of its own, since the kernel falls back to delayed ones by itself.

mod address;
mod descriptors;
pub(crate) mod kernel_tls;
mod listener;
mod passed;
pub mod passing;
mod sockopt;
mod unix_socket;

pub use address::{AddressError, ListenAddress, SOCKET_PATH_MAX, SocketPathError, socket_path};
pub(crate) use descriptors::{ACCEPTED_MAX, DescriptorReserve};
pub(crate) use listener::is_gone;
pub use listener::{AcceptError, Accepted, HostWatch, ListenError, Listener, Origin, Peer, QUEUE_MAX};
pub use passed::{Keep, NotTaken, PassedSockets, kept_name};
pub use sockopt::quick_ack;
pub use unix_socket::{BoundSocket, Clients, SocketFile, bind_unix};
