//! Bulk data over one TCP connection to the service of a guest, `tests/guest/net-server.rs`.

use crate::HANG_LIMIT;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Instant;

use super::{GUEST_ADDRESS, LabError, wait_for};

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest sends it.
    OutOfTheGuest,
    /// The guest receives it.
    IntoTheGuest,
}

/// Transfers so many bytes. Returns how many MiB there were a second.
///
/// # Errors
/// When the connection ends, or a byte is wrong.
pub fn bulk_mib_per_s(direction: Direction, bytes: u64) -> Result<f64, LabError> {
    let stream = wait_for("the guest's service", HANG_LIMIT, || {
        Ok(TcpStream::connect(GUEST_ADDRESS).ok())
    })?;
    let since = Instant::now();
    let transferred = stream
        .set_read_timeout(Some(HANG_LIMIT))
        .and_then(|()| match direction {
            Direction::OutOfTheGuest => receive(&stream, bytes),
            Direction::IntoTheGuest => send(&stream, bytes),
        });
    transferred.map_err(LabError::io("transfer bulk data"))?;
    Ok(bytes as f64 / f64::from(1 << 20) / since.elapsed().as_secs_f64())
}

/// Lines of 16 bytes, numbered from 1 on.
fn receive(mut stream: &TcpStream, bytes: u64) -> std::io::Result<()> {
    stream.write_all(format!("bulk {bytes}\n").as_bytes())?;
    let mut reader = BufReader::with_capacity(1 << 20, stream);
    let mut line = [0; 16];
    for number in 1..=bytes / 16 {
        reader.read_exact(&mut line)?;
        if line != format!("{number:015}\n").as_bytes() {
            return Err(std::io::Error::other(format!("line {number} is {line:?}")));
        }
    }
    Ok(())
}

/// What the kernel knows of connections to the guest: round trip, windows, and what limits the sender.
fn print_connections() -> std::io::Result<()> {
    let listed = Command::new("ss")
        .args(["-tinH", "dst", GUEST_ADDRESS])
        .output()?;
    println!("{}", String::from_utf8_lossy(&listed.stdout).trim());
    Ok(())
}

fn send(mut stream: &TcpStream, bytes: u64) -> std::io::Result<()> {
    stream.write_all(format!("sink {bytes}\n").as_bytes())?;
    for part in [bytes / 2, bytes - bytes / 2] {
        std::io::copy(&mut std::io::repeat(b'x').take(part), &mut stream)?;
        print_connections()?;
    }
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match answer == format!("done {bytes}\n") {
        true => Ok(()),
        false => Err(std::io::Error::other(format!("answered by {answer:?}"))),
    }
}
