//! Runs in a guest: a TCP service whose connections have a state that a failover must not lose.
//!
//!     net-server PORT
//!
//! A client sends the numbers 1, 2, 3 and so on, a line each, and gets each back. The number that comes next is kept in memory: a number
//! that is not the one after the last means that what the client has seen and what the guest remembers are not of the same
//! instant. Such a client gets "error expected N", and the serial port a line "error …". `bulk N` sends N bytes of numbered lines; what
//! comes after `sink N` is read, N bytes, and answered by `done N`.
//!
//! Lines: "tick N answered A", ten times a second.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn serve(stream: TcpStream, answered: &AtomicU64) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let (mut last, mut line) = (0_u64, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["bulk", bytes] => {
                let (mut left, mut number) = (bytes.parse::<u64>().unwrap_or(0), 0_u64);
                while left > 0 {
                    number += 1;
                    let text = format!("{number:015}\n");
                    let part = usize::try_from(left.min(16)).unwrap_or(16);
                    writer.write_all(&text.as_bytes()[..part])?;
                    left -= part as u64;
                }
            }
            ["sink", bytes] => {
                let bytes: u64 = bytes.parse().unwrap_or(0);
                std::io::copy(&mut (&mut reader).take(bytes), &mut std::io::sink())?;
                writer.write_all(format!("done {bytes}\n").as_bytes())?;
            }
            [number] if number.parse() == Ok(last + 1) => {
                last += 1;
                writer.write_all(line.as_bytes())?;
                answered.fetch_add(1, Ordering::Relaxed);
            }
            _ => {
                println!("error: {:?} came, and {} was expected", line.trim(), last + 1);
                writer.write_all(format!("error expected {}\n", last + 1).as_bytes())?;
                return Ok(());
            }
        }
    }
}

fn main() {
    let port: u16 = std::env::args()
        .nth(1)
        .and_then(|port| port.parse().ok())
        .expect("a port");
    let answered = Arc::new(AtomicU64::new(0));
    let counted = answered.clone();
    std::thread::spawn(move || {
        for tick in 1_u64.. {
            println!("tick {tick} answered {}", counted.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("a listener");
    println!("listening {port}");
    for stream in listener.incoming() {
        let answered = answered.clone();
        match stream {
            // A client that has gone ends its thread.
            Ok(stream) => drop(std::thread::spawn(move || serve(stream, &answered))),
            Err(error) => println!("error: accept: {error}"),
        }
    }
}
