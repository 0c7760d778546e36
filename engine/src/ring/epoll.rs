//! The backend `epoll`: readiness and recvmsg, for hosts without io_uring.
//!
//! A receive is tried at once when it is posted; only where nothing has arrived does it wait for the socket.
#![expect(
    unsafe_code,
    reason = "a plan is kept by address while its receive is pending"
)]

use super::backend::{Backend, Completion, Wait};
use super::receive::{self, receive};
use super::wake::CoreWake;
use super::{ReceivePlan, Region};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

const WAKE: u64 = u64::MAX;

struct Socket {
    fd: RawFd,
    /// The posted receive that is waiting for bytes.
    waiting: Option<NonNull<ReceivePlan>>,
}

pub(super) struct EpollBackend {
    epoll: Epoll,
    wake: Arc<CoreWake>,
    sockets: Vec<Option<Socket>>,
    ready: Vec<Completion>,
    events: Vec<EpollEvent>,
}

impl EpollBackend {
    pub(super) fn new(wake: Arc<CoreWake>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let ready = Vec::with_capacity(64);
        Ok(Self {
            epoll,
            wake,
            sockets: Vec::new(),
            ready,
            events: vec![EpollEvent::empty(); 64],
        })
    }

    fn socket(&mut self, slot: usize, fd: RawFd) -> io::Result<&mut Socket> {
        if self.sockets.len() <= slot {
            self.sockets.resize_with(slot + 1, || None);
        }
        if self.sockets[slot].is_none() {
            let token = u64::try_from(slot).map_err(io::Error::other)?;
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
            // SAFETY: the connection of this slot owns the descriptor and keeps it open until `forget`.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
            self.epoll.add(borrowed, EpollEvent::new(flags, token))?;
        }
        Ok(self.sockets[slot].get_or_insert(Socket { fd, waiting: None }))
    }

    fn try_waiting(&mut self, slot: usize) {
        let Some(socket) = self.sockets.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        let Some(mut plan) = socket.waiting else { return };
        // SAFETY: posted and not completed, so the plan lives where it was and nothing else touches it (contract of
        // `core`: its connection stays until the completion was reported).
        match receive(socket.fd, unsafe { plan.as_mut() }, libc::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.try_waiting(slot),
            result => {
                socket.waiting = None;
                self.ready.push(Completion { slot, result });
            }
        }
    }
}

impl Backend for EpollBackend {
    fn post(&mut self, slot: usize, fd: RawFd, plan: &mut ReceivePlan) {
        match self.socket(slot, fd) {
            Err(error) => self.ready.push(Completion {
                slot,
                result: Err(error),
            }),
            Ok(socket) => {
                // Without blocking, the kernel would report less than all, too; what is missing is asked for again.
                plan.wait_all = false;
                socket.waiting = Some(NonNull::from(plan));
                self.try_waiting(slot);
            }
        }
    }

    fn wait(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool> {
        // Its waits are whole milliseconds: while bytes gather, the core polls.
        let block = wait == Wait::Block && self.ready.is_empty();
        let timeout = if block {
            EpollTimeout::NONE
        } else {
            EpollTimeout::ZERO
        };
        let count = match self.epoll.wait(&mut self.events, timeout) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        let mut woken = false;
        for event in 0..count {
            match self.events[event].data() {
                WAKE => {
                    self.wake.clear();
                    woken = true;
                }
                token => self.try_waiting(usize::try_from(token).map_err(io::Error::other)?),
            }
        }
        done.append(&mut self.ready);
        Ok(woken)
    }

    fn queued(&self, fd: RawFd) -> u64 {
        receive::queued(fd)
    }

    fn forget(&mut self, slot: usize, fd: RawFd) {
        if let Some(socket) = self.sockets.get_mut(slot).and_then(Option::take) {
            debug_assert_eq!(socket.fd, fd);
            // SAFETY: the connection is dropped only after this, so the descriptor is still its own.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
            // Closing the socket would take it out as well; an error here changes nothing.
            let _ = self.epoll.delete(borrowed);
        }
    }

    fn buffers(&self) -> usize {
        0
    }

    fn reserve_buffers(&mut self, _count: u16) -> Option<u16> {
        None
    }

    fn register(&mut self, _index: u16, _region: &dyn Region) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister(&mut self, _index: u16) {}

    fn release_buffers(&mut self, _first: u16, _count: u16) {}
}
