//! recvmsg(2) into a plan, for the backends that call it themselves.
#![expect(unsafe_code, reason = "the kernel writes to the places of a plan")]

use super::plan::ReceivePlan;
use std::io;
use std::os::fd::RawFd;

/// Receives into `plan`, with MSG_WAITALL if the plan asks for it, and with `flags` in addition.
///
/// # Errors
/// Of recvmsg(2); EAGAIN where the socket or the flags say not to block.
pub(super) fn receive(fd: RawFd, plan: &mut ReceivePlan, flags: libc::c_int) -> io::Result<usize> {
    let wait_all = if plan.wait_all { libc::MSG_WAITALL } else { 0 };
    let message = plan.message();
    // SAFETY: the message's pieces are memory that the plan's connection answers for (contract of `plan`); the call
    // ends before it returns here.
    let received = unsafe { libc::recvmsg(fd, message, flags | wait_all) };
    // Negative is -1, the error.
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// Bytes that wait in a socket. 0 for one that has failed: the next receive reports that.
pub(super) fn queued(fd: RawFd) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, and `bytes` is that, alive during the call; an invalid descriptor is an error, not
    // undefined.
    let result = unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut bytes) };
    match result {
        0 => u64::try_from(bytes).unwrap_or(0),
        _ => 0,
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn what_waits_in_a_socket_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        assert_eq!(queued(receiver.as_raw_fd()), 0);
        sender.write_all(&[7; 5000]).unwrap();
        // Loopback delivers it before the write returns, but that is not guaranteed.
        while queued(receiver.as_raw_fd()) < 5000 {
            std::thread::yield_now();
        }
        receiver.read_exact(&mut [0; 4000]).unwrap();
        assert_eq!(queued(receiver.as_raw_fd()), 1000);
        assert_eq!(queued(-1), 0);
    }
}
