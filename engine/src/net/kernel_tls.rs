//! TLS of the kernel on a TCP socket (Documentation/networking/tls.rst): the options that give it the key of what is received.

use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{TcpTlsRx, TcpUlp, TlsCryptoInfo};
use std::os::fd::AsFd;

/// Lets the kernel do TLS on a connected TCP socket. It changes nothing before there is a key.
///
/// # Errors
/// ENOENT without the module `tls`, ENOTCONN if the peer has closed its side already.
pub(crate) fn begin_kernel_tls(socket: &impl AsFd) -> Result<(), Errno> {
    setsockopt(socket, TcpUlp::default(), b"tls")
}

/// The kernel opens what is received from now on, or what follows a change of the peer's key, with this key.
///
/// # Errors
/// If it has not the cipher; EBUSY if it cannot take a second key.
pub(crate) fn set_receive_key(socket: &impl AsFd, key: &TlsCryptoInfo) -> Result<(), Errno> {
    setsockopt(socket, TcpTlsRx, key)
}
