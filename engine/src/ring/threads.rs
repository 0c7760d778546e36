//! The backend `threads`: a thread per connection with blocking receives and a semaphore hand-over at each sync.
//!
//! QEMU's own secondary works like this; it is the baseline that the other backends are compared with.

use super::inbox::guarded;
use super::receive::receive;
use super::{Connection, Loss, Semaphore, Tenant};
use std::io;
use std::ops::ControlFlow;

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

/// No other connection waits for this thread.
fn go_on(connection: &mut dyn Connection, flow: ControlFlow<()>) -> ControlFlow<()> {
    let mut flow = flow;
    while flow.is_continue() && connection.has_more() {
        flow = connection.resume();
    }
    flow
}

fn drive(connection: &mut dyn Connection, tenant: &mut Option<Box<dyn Tenant>>, turn: &Semaphore) {
    // It may have come with something.
    if go_on(connection, ControlFlow::Continue(())).is_break() {
        return;
    }
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
        let flow = go_on(connection, flow);
        if flow.is_break() {
            return;
        }
        // To its end: the primary's next request waits for it anyhow.
        let mut has_worked = false;
        while tenant.as_mut().is_some_and(|tenant| tenant.background()) {
            has_worked = true;
        }
        // As after a wake-up, which the thread sees only when the connection is parked.
        if has_worked {
            let flow = connection.resume();
            if go_on(connection, flow).is_break() {
                return;
            }
        }
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::ring::core::tests::Fragile;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_panic_ends_the_session() {
        let (mut peer, socket) = UnixStream::pair().unwrap();
        // Open beside the connection, as a session's sockets are: its drop alone does not reach the peer.
        let _session = socket.try_clone().unwrap();
        peer.write_all(&[1]).unwrap();
        run(Box::new(Fragile::new(socket)), None, &Semaphore::default());
        peer.set_nonblocking(true).unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }
}
