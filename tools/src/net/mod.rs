//! What the command's programs connect with: addresses as QEMU writes them, and sockets of either kind.

mod address;
mod socket;

pub use address::{Address, AddressError};
pub use socket::ConnectError;
pub(crate) use socket::Socket;
