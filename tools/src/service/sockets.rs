//! The protocol of sd_listen_fds(3): sockets that a service manager passes to a process that it starts.
#![expect(
    unsafe_code,
    reason = "descriptors that a process is started with are numbers, which no safe function makes owned"
)]

use std::ffi::OsString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The number of the first one.
const FIRST: RawFd = 3;

/// Most that are taken.
const MOST: RawFd = 256;

static IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// The descriptors that this process was started with, at the first call; none later. To be called before anything else is opened.
pub(crate) fn passed_sockets() -> Vec<OwnedFd> {
    let count = count(|name| std::env::var_os(name));
    if IS_TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let numbers = FIRST..FIRST + count;
    let open = numbers.filter(|number| rustix::io::fcntl_getfd(borrowed(*number)).is_ok());
    let owned = open.map(|number| {
        // SAFETY: the descriptor is open; the service manager has made it for this process, which the variables name by its id; nothing here
        // has opened it, since it was there before the process began, and no other call of this function owns it, as `IS_TAKEN` says.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        // Programs that are started here do not get it.
        let _ = rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC);
        socket
    });
    owned.collect()
}

fn borrowed(number: RawFd) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: it is only asked whether it is open; the kernel answers EBADF for one that is not.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(number) }
}

/// How many there are for this process.
fn count(variable: impl Fn(&str) -> Option<OsString>) -> RawFd {
    let number = |name: &str| variable(name)?.to_str()?.parse::<u32>().ok();
    let is_for_this = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").filter(|_| is_for_this).unwrap_or(0);
    RawFd::try_from(count).unwrap_or(MOST).min(MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_for_another_process_are_left_alone() {
        let own = std::process::id().to_string();
        for (process, count_text, taken) in [
            (Some(&*own), Some("2"), 2),
            (Some("1"), Some("2"), 0),
            (None, Some("2"), 0),
            (Some(&own), None, 0),
            (Some(&own), Some("-1"), 0),
            (Some(&own), Some("4000000000"), MOST),
        ] {
            let variable = |name: &str| match name {
                "LISTEN_PID" => process.map(OsString::from),
                _ => count_text.map(OsString::from),
            };
            assert_eq!(count(variable), taken, "{process:?} {count_text:?}");
        }
    }
}
