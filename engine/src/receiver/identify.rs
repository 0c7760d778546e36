//! Reading what accepted connections are: one task a connection, so that a silent one holds up nobody.
//!
//! Exactly the bytes that tell the kind of a channel are taken off the socket, and for a multifd channel its init packet.

use super::assemble::Identity;
use crate::net::{Accepted, Stream};
use crate::wire::multifd::{INIT_LEN, Init};
use crate::wire::stream::{ChannelKind, classify};
use nix::sys::socket::{Shutdown, shutdown};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Bytes that tell the kind of a connection.
pub const FIRST_LEN: usize = 4;

/// Most connections that are accepted and not identified, or wait for the rest of their session. More are closed.
pub const PENDING_MAX: usize = 1024;

/// Reads what kind of connection this is.
///
/// # Errors
/// What an operator should know: it is no migration channel, or ended or stayed silent.
pub(super) async fn identify(
    accepted: &Accepted,
    uring: bool,
    deadline: Duration,
) -> Result<Identity, String> {
    let reading = async {
        let text = |error: io::Error| error.to_string();
        let stream =
            Stream::new(accepted.socket.try_clone().map_err(text)?, accepted.is_tcp, uring).map_err(text)?;
        let first: [u8; FIRST_LEN] = read(&stream).await?;
        let identity = match classify(first).map_err(|error| error.to_string())? {
            ChannelKind::Main => Identity::Main,
            ChannelKind::Multifd => {
                let mut init = [0; INIT_LEN];
                let rest: [u8; INIT_LEN - FIRST_LEN] = read(&stream).await?;
                init[..FIRST_LEN].copy_from_slice(&first);
                init[FIRST_LEN..].copy_from_slice(&rest);
                Init::decode(&init)
                    .map(Identity::Multifd)
                    .map_err(|error| error.to_string())?
            }
        };
        stream.leave().map_err(text)?;
        Ok(identity)
    };
    let result = match tokio::time::timeout(deadline, reading).await {
        Ok(result) => result,
        Err(_) => Err(format!("it did not say what it is within {deadline:?}")),
    };
    if result.is_err() {
        // It also ends a read that is still in flight.
        let _ = shutdown(accepted.socket.as_raw_fd(), Shutdown::Both);
    }
    result
}

/// Exactly N bytes, and not one more: what follows belongs to the data plane.
async fn read<const N: usize>(stream: &Stream) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    let mut have = 0;
    while have < N {
        let rest = &mut bytes[have..];
        let (count, part) = stream.read(Vec::new(), rest.len()).await;
        match count {
            Ok(0) => return Err("it was closed before it said what it is".into()),
            Ok(count) => {
                rest[..count].copy_from_slice(&part[..count]);
                have += count;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(bytes)
}
