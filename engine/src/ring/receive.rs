//! recvmsg(2) into a plan, for the backends that call it themselves.

use super::plan::ReceivePlan;
use std::io;
use std::os::fd::RawFd;

/// Receives into `plan`, with MSG_WAITALL if the plan asks for it, and with `flags` besides.
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

/// Lets the kernel acknowledge at once what the TCP socket receives next. It falls back to delayed acknowledgements
/// by itself, when we send for example, so this is repeated after every read (tcp(7), TCP_QUICKACK).
pub fn quick_ack(fd: RawFd) {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).expect("the size of an int");
    // SAFETY: the option's value is a live int of that length; an invalid descriptor is an error, not undefined.
    // The result is of no use: on a socket that has failed meanwhile the next receive says why.
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

/// Bytes that a socket holds and that were not read yet: 0 for one that has failed, which the next receive will tell.
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
        // Loopback delivers it before the write returns, but nobody promises that.
        while queued(receiver.as_raw_fd()) < 5000 {
            std::thread::yield_now();
        }
        receiver.read_exact(&mut [0; 4000]).unwrap();
        assert_eq!(queued(receiver.as_raw_fd()), 1000);
        assert_eq!(queued(-1), 0);
    }
}
