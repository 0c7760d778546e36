//! The ring against a real kernel.

use super::*;
use std::io::Write;
use std::os::unix::net::UnixStream;

/// A ring, where there is io_uring.
fn ring(test: &str) -> Option<UringBackend> {
    let wake = Arc::new(CoreWake::new().unwrap());
    match UringBackend::new(wake, false) {
        Ok(ring) => Some(ring),
        Err(error) => {
            colo_ring_skip::skip(test, &RingUnavailable::here(&error).to_string());
            None
        }
    }
}

/// While a large guest's memory is registered, the ring is only polled: the other guests' receives must complete.
#[test]
fn a_poll_takes_what_completed_since() {
    let Some(mut ring) = ring("a_poll_takes_what_completed_since") else {
        return;
    };
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let mut memory = [0u8; 8];
    let mut plan = ReceivePlan::new();
    plan.push(memory.as_mut_ptr(), memory.len());
    ring.post(3, socket.as_raw_fd(), &mut plan);
    let mut done = Vec::new();
    ring.wait(Wait::Poll, &mut done).unwrap();
    assert!(done.is_empty());
    peer.write_all(b"abc").unwrap();
    for _ in 0..100 {
        ring.wait(Wait::Poll, &mut done).unwrap();
    }
    let polled = done.len();
    // In any case nothing is posted any more when the memory is freed.
    if polled == 0 {
        ring.wait(Wait::Block, &mut done).unwrap();
    }
    assert_eq!(
        (polled, done[0].slot, done[0].result.as_ref().unwrap()),
        (1, 3, &3)
    );
}

/// The wait while bytes gather ends by its timeout, or by a receive that completes.
#[test]
fn a_coalescing_wait_ends_by_itself() {
    let Some(mut ring) = ring("a_coalescing_wait_ends_by_itself") else {
        return;
    };
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let mut memory = [0u8; 8];
    let mut plan = ReceivePlan::new();
    plan.push(memory.as_mut_ptr(), memory.len());
    ring.post(5, socket.as_raw_fd(), &mut plan);
    let mut done = Vec::new();
    let begin = std::time::Instant::now();
    let woken = ring.wait(Wait::Coalesce, &mut done).unwrap();
    let waited = begin.elapsed();
    peer.write_all(b"abc").unwrap();
    // Nothing is posted any more when the memory is freed.
    while done.is_empty() {
        ring.wait(Wait::Coalesce, &mut done).unwrap();
    }
    assert!(
        !woken && (waited >= COALESCE_DELAY || !ring.features.timed),
        "{waited:?}"
    );
    assert_eq!((done[0].slot, done[0].result.as_ref().unwrap()), (5, &3));
}

/// No filter of system calls sees what a ring does: a thread that may only receive must not open files by it.
#[test]
fn a_ring_can_do_nothing_but_receive() {
    let Some(mut ring) = ring("a_ring_can_do_nothing_but_receive") else {
        return;
    };
    if !ring.features().restricted {
        return colo_ring_skip::skip(
            "a_ring_can_do_nothing_but_receive",
            "this kernel restricts no rings",
        );
    }
    let path = c"/dev/null";
    let root = types::Fd(libc::AT_FDCWD);
    let open = opcode::OpenAt::new(root, path.as_ptr()).build().user_data(1);
    let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0)
        .build()
        .user_data(2);
    for entry in [open, socket] {
        ring.push(&entry).unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            ring.wait(Wait::Block, &mut done).unwrap();
        }
        let refused = done[0].result.as_ref().unwrap_err().raw_os_error();
        assert_eq!(refused, Some(libc::EACCES));
    }
    // Nor can that be undone, or files be registered.
    let files = ring.ring.submitter().register_files(&[0]);
    assert_eq!(files.unwrap_err().raw_os_error(), Some(libc::EACCES));
}
