//! Runs in a guest: a TCP service whose connections have a state that a failover must not lose.
//!
//!     net-server PORT
//!
//! A client sends the numbers 1, 2, 3 and so on, a line each, and gets each back. The number that comes next is kept in memory: a number
//! that is not the one after the last means that what the client has seen and what the guest remembers are not of the same
//! instant. Such a client gets "error expected N", and the serial port a line "error …". `bulk N` sends N bytes of numbered lines of 16; what
//! comes after `sink N` is read, N bytes, and answered by `done N`. After `exchange` both sides send lines of 64 bytes as fast as they go,
//! until the connection ends: the client 1, 2, 3 and so on, the guest the same with the number of client's lines that it has read.
//! `burst PORT COUNT BYTES PAUSE` sends COUNT datagrams of BYTES to the client's address at PORT, with a pause of PAUSE microseconds after
//! each, and is answered by `done COUNT`. Each begins with its number, of all that the guest has ever sent, eight bytes, big-endian.
//!
//! Lines: "tick N answered A", ten times a second.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Datagrams that were sent; held while one is, so that they leave in order.
static SENT: Mutex<u64> = Mutex::new(0);

fn burst(to: SocketAddr, [count, bytes, pause_us]: [u64; 3]) -> std::io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    let mut datagram = vec![0; usize::try_from(bytes).unwrap_or(0).clamp(8, 1400)];
    for _ in 0..count {
        let mut sent = SENT.lock().expect("no panic");
        *sent += 1;
        datagram[..8].copy_from_slice(&sent.to_be_bytes());
        socket.send_to(&datagram, to)?;
        drop(sent);
        std::thread::sleep(Duration::from_micros(pause_us));
    }
    Ok(())
}

fn serve(stream: TcpStream, answered: &AtomicU64) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let (mut last, mut line) = (0_u64, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        // Cut off by the connection's end.
        if !line.ends_with('\n') {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["bulk", bytes] => {
                let mut buffered = BufWriter::with_capacity(64 << 10, &mut writer);
                for number in 1..=bytes.parse::<u64>().unwrap_or(0) / 16 {
                    buffered.write_all(format!("{number:015}\n").as_bytes())?;
                }
                buffered.flush()?;
            }
            ["sink", bytes] => {
                let bytes: u64 = bytes.parse().unwrap_or(0);
                std::io::copy(&mut (&mut reader).take(bytes), &mut std::io::sink())?;
                writer.write_all(format!("done {bytes}\n").as_bytes())?;
            }
            ["exchange"] => return exchange(&mut reader, writer),
            ["burst", port, count, bytes, pause_us] => {
                // An IPv4 address, where the listener says an IPv6 one of it.
                let ip = reader.get_ref().peer_addr()?.ip().to_canonical();
                let to = SocketAddr::new(ip, port.parse().unwrap_or(0));
                let numbers = [count, bytes, pause_us].map(|number| number.parse().unwrap_or(0));
                burst(to, numbers)?;
                writer.write_all(format!("done {}\n", numbers[0]).as_bytes())?;
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

/// Numbered lines in both directions.
fn exchange(reader: &mut impl BufRead, mut writer: TcpStream) -> std::io::Result<()> {
    let read = Arc::new(AtomicU64::new(0));
    let counted = read.clone();
    // Ends with the connection.
    std::thread::spawn(move || {
        for number in 1_u64.. {
            let line = format!("{number} {}", counted.load(Ordering::SeqCst));
            if writer.write_all(format!("{line:<63}\n").as_bytes()).is_err() {
                return;
            }
        }
    });
    let mut line = String::new();
    for number in 1_u64.. {
        line.clear();
        reader.read_line(&mut line)?;
        if !line.ends_with('\n') {
            break;
        }
        if line.trim().parse() != Ok(number) {
            println!("error: {:?} came, and {number} was expected", line.trim());
            break;
        }
        read.store(number, Ordering::SeqCst);
    }
    Ok(())
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
    let listener = TcpListener::bind(("::", port)).expect("a listener");
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
