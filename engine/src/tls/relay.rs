//! Relays a connection with TLS to a plain socket of this process: for what is small and rare, the links of guards.

use super::handshake::{Channel, HandshakeError};
use std::io;
use std::os::fd::AsRawFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Bytes that are relayed at a time: a record holds more.
const PIECE_BYTES: usize = 8 << 10;

/// Relays both directions until one of them ends; then both have.
pub(crate) async fn relay(mut stream: TcpStream, mut channel: Channel, mut plain: UnixStream) {
    let (mut from_here, mut to_here) = plain.split();
    let fd = stream.as_raw_fd();
    let outgoing = channel.outgoing.clone();
    let (mut reader, mut writer) = stream.split();
    let out = async {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = from_here.read(&mut piece).await?;
            if count == 0 {
                return Ok::<(), io::Error>(());
            }
            let record = outgoing.record(&piece[..count]).map_err(io::Error::other)?;
            writer.write_all(&record).await?;
        }
    };
    let into = async {
        loop {
            let plain = std::mem::take(&mut channel.plain);
            to_here.write_all(&plain).await?;
            channel.read_more(&mut reader, fd).await?;
        }
        #[expect(unreachable_code, reason = "the type of its errors")]
        Ok::<(), HandshakeError>(())
    };
    tokio::select! {
        _ = out => {}
        _ = into => {}
    }
}
