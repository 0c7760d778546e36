//! What the command's programs connect with: addresses as QEMU writes them, and sockets of either kind.

mod address;
mod socket;
mod tls_stream;

pub use address::{Address, AddressError};
pub use socket::ConnectError;
pub(crate) use socket::Socket;
pub(crate) use tls_stream::TlsStream;
