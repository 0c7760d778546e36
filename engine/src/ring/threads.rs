//! The backend `threads`: a thread per connection with blocking receives and a semaphore hand-over at each sync.
//!
//! This is how QEMU's own secondary is built, and it stands here as the baseline that the others are compared with.

use super::receive::receive;
use super::{Endpoint, Loss, Semaphore};
use std::sync::Arc;

/// Drives one endpoint to its end on the calling thread.
pub(super) fn run(mut endpoint: Box<dyn Endpoint>, turn: &Arc<Semaphore>) {
    loop {
        let fd = endpoint.fd();
        let flow = match endpoint.plan() {
            None => {
                turn.wait();
                endpoint.resume()
            }
            Some(plan) => match receive(fd, plan, 0) {
                Ok(0) => return endpoint.lost(Loss::Eof),
                Ok(bytes) => endpoint.received(bytes),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return endpoint.lost(Loss::Error(error)),
            },
        };
        if flow.is_break() {
            return;
        }
        // To its end: the primary's next request waits for it anyhow.
        while endpoint.background() {}
    }
}
