//! Socket options that nix does not have.
#![expect(unsafe_code, reason = "a socket option that nix does not have")]

use std::os::fd::RawFd;

/// Lets the kernel acknowledge at once what the TCP socket receives next. The kernel falls back to delayed acknowledgements
/// by itself, for example when something is sent, so this is repeated after every read (tcp(7), TCP_QUICKACK).
pub fn quick_ack(fd: RawFd) {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).expect("the size of an int");
    // SAFETY: the option's value is a live int of that length; an invalid descriptor is an error, not undefined.
    // The result is ignored: on a socket that has failed meanwhile the next receive returns the error.
    let _ = unsafe {
        libc::setsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_QUICKACK,
            std::ptr::from_ref(&on).cast(),
            length,
        )
    };
}
