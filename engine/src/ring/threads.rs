//! The backend `threads`: a thread per connection with blocking receives and a semaphore hand-over at each sync.
//!
//! QEMU's own secondary works like this; it is the baseline that the other backends are compared with.

use super::inbox::guarded;
use super::receive::receive;
use super::{Connection, Loss, Semaphore, Tenant};
use std::io;

/// Drives one connection to its end on the calling thread, and the background work of a tenant.
pub(super) fn run(
    mut connection: Box<dyn Connection>,
    mut tenant: Option<Box<dyn Tenant>>,
    turn: &Semaphore,
) {
    if guarded(|| drive(&mut *connection, &mut tenant, turn)).is_err() {
        // No primary may be left waiting: its session ends.
        let error = io::Error::other("its receiving thread panicked");
        let _ = guarded(|| connection.lost(Loss::Error(error)));
    }
}

fn drive(connection: &mut dyn Connection, tenant: &mut Option<Box<dyn Tenant>>, turn: &Semaphore) {
    loop {
        let fd = connection.fd();
        let flow = match connection.plan() {
            None => {
                turn.wait();
                connection.resume()
            }
            Some(plan) => match receive(fd, plan, 0) {
                Ok(0) => return connection.lost(Loss::Eof),
                Ok(bytes) => connection.received(bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return connection.lost(Loss::Error(error)),
            },
        };
        if flow.is_break() {
            return;
        }
        // To its end: the primary's next request waits for it anyhow.
        let mut has_worked = false;
        while tenant.as_mut().is_some_and(|tenant| tenant.background()) {
            has_worked = true;
        }
        // As after a wake-up, which the thread sees only when the connection is parked.
        if has_worked && connection.resume().is_break() {
            return;
        }
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::ring::ReceivePlan;
    use std::io::{Read, Write};
    use std::ops::ControlFlow;
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::net::UnixStream;

    /// Panics at the first byte; shuts its socket down when it is lost, as a session does.
    struct Fragile {
        socket: UnixStream,
        plan: Box<ReceivePlan>,
        byte: Box<[u8; 1]>,
    }

    impl Connection for Fragile {
        fn fd(&self) -> RawFd {
            self.socket.as_raw_fd()
        }
        fn tenant(&self) -> u64 {
            1
        }
        fn plan(&mut self) -> Option<&mut ReceivePlan> {
            self.plan.clear();
            self.plan.push(self.byte.as_mut_ptr(), 1);
            Some(&mut self.plan)
        }
        fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
            panic!("meant by the test");
        }
        fn lost(&mut self, _loss: Loss) {
            self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        }
        fn resume(&mut self) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }
        fn attached(&mut self, _core: usize) {}
    }

    #[test]
    fn a_panic_ends_the_session() {
        let (mut peer, socket) = UnixStream::pair().unwrap();
        // Open beside the connection, as a session's sockets are: its drop alone does not reach the peer.
        let _session = socket.try_clone().unwrap();
        peer.write_all(&[1]).unwrap();
        let connection = Fragile {
            socket,
            plan: ReceivePlan::new(),
            byte: Box::new([0]),
        };
        run(Box::new(connection), None, &Semaphore::default());
        peer.set_nonblocking(true).unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }
}
