//! Runs in a guest: sends numbered frames of many protocols, past the kernel's own stack, as lines on the serial port ask for.
//!
//!     frame-sender INTERFACE
//!
//! `send all COUNT PAUSE_US` sends COUNT frames, with a pause after each; `send KIND COUNT PAUSE_US` those of one kind. "sent N" says
//! that all frames before number N are sent. Numbers go on from one line to the next. The number is kept in memory and is counted before its
//! frame is sent: a number that leaves twice means that a sending was unmade.
//!
//! A frame is whole and valid up to its payload, the byte *i* of which is (number + *i*) mod 256, and which ends with a trailer: eight
//! bytes "COLORING" and the number, big-endian. Where the protocol has no payload (ARP, neighbour discovery), it is padding behind the
//! packet. `tests/src/lab/frames.rs` reads them.

use std::ffi::c_int;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::FromRawFd;
use std::time::Duration;

/// The order of `send all`.
const KINDS: [&str; 9] = [
    "arp", "neighbour", "ipv6", "vlan", "udp", "icmp", "jumbo", "fragment-first", "fragment-last",
];

/// Enough for a jumbo frame.
const MTU: &str = "9000";

/// Addresses that nobody has.
const NOBODY_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0xff];
const NOBODY: [u8; 4] = [169, 254, 78, 99];
const GUEST: [u8; 4] = [169, 254, 78, 2];
const PORT: u16 = 9;

const VLAN: u16 = 78;

const AF_PACKET: u16 = 17;
const SOCK_RAW: c_int = 3;
const SOL_PACKET: c_int = 263;
const PACKET_QDISC_BYPASS: c_int = 20;

#[repr(C)]
struct LinkAddress {
    family: u16,
    protocol: u16,
    interface: c_int,
    hardware: u16,
    kind: u8,
    length: u8,
    address: [u8; 8],
}

unsafe extern "C" {
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const LinkAddress, length: u32) -> c_int;
    fn setsockopt(socket: c_int, level: c_int, option: c_int, value: *const c_int, length: u32) -> c_int;
}

/// A socket that sends whole frames on that interface, and receives nothing.
fn open(interface: c_int) -> std::io::Result<File> {
    // SAFETY: the arguments are numbers.
    let number = unsafe { socket(c_int::from(AF_PACKET), SOCK_RAW, 0) };
    if number < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made above and has no other owner.
    let file = unsafe { File::from_raw_fd(number) };
    let (hardware, kind, length, address) = (0, 0, 0, [0; 8]);
    let link = LinkAddress { family: AF_PACKET, protocol: 0, interface, hardware, kind, length, address };
    // SAFETY: the kernel reads `struct sockaddr_ll`, 20 bytes, which the type has, and keeps no pointer.
    let is_bound = unsafe { bind(number, &raw const link, 20) } == 0;
    // The card's queueing discipline is fair, and would send frames of several protocols in another order.
    let on = 1;
    // SAFETY: the kernel reads an `int`, and keeps no pointer.
    let is_set = unsafe { setsockopt(number, SOL_PACKET, PACKET_QDISC_BYPASS, &raw const on, 4) } == 0;
    match is_bound && is_set {
        true => Ok(file),
        false => Err(std::io::Error::last_os_error()),
    }
}

/// The checksum of the internet protocols.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes: Vec<u8> = parts.concat();
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn payload(number: u64, length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length).map(|at| (number as usize + at) as u8).collect();
    bytes[length - 16..length - 8].copy_from_slice(b"COLORING");
    bytes[length - 8..].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn ipv4(protocol: u8, fragment: u16, content: &[u8]) -> Vec<u8> {
    let length = (20 + content.len() as u16).to_be_bytes();
    let fragment = fragment.to_be_bytes();
    let mut header = [0x45, 0, length[0], length[1], 0, 1, fragment[0], fragment[1], 64, protocol, 0, 0].to_vec();
    header.extend(GUEST.into_iter().chain(NOBODY));
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum);
    [&header, content].concat()
}

fn udp(content: &[u8], length: usize) -> Vec<u8> {
    let ports = PORT.to_be_bytes();
    let length = (8 + length as u16).to_be_bytes();
    // Without a checksum.
    [&[ports[0], ports[1], ports[0], ports[1], length[0], length[1], 0, 0], content].concat()
}

/// An address of this network's own, with that end.
fn link_local(end: [u8; 8]) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&[0xfe, 0x80]);
    address[8..].copy_from_slice(&end);
    address
}

/// `checksum_at` is where the protocol's checksum is in the content.
fn ipv6(protocol: u8, to: [u8; 16], content: &[u8], checksum_at: usize) -> Vec<u8> {
    let from = link_local([0x50, 0x54, 0, 0xff, 0xfe, 0, 0, 1]);
    let length = (content.len() as u16).to_be_bytes();
    let mut content = content.to_vec();
    let sum = checksum(&[&from, &to, &[0, 0], &length, &[0, 0, 0, protocol], &content]);
    content[checksum_at..checksum_at + 2].copy_from_slice(&sum);
    let header = [0x60, 0, 0, 0, length[0], length[1], protocol, 255];
    [&header[..], &from, &to, &content].concat()
}

fn neighbour_solicitation(mac: [u8; 6]) -> Vec<u8> {
    let wanted = link_local([0, 0, 0, 0, 0, 0, 0, 0x99]);
    let mut group = [0; 16];
    group[..2].copy_from_slice(&[0xff, 2]);
    group[11..].copy_from_slice(&[1, 0xff, 0, 0, 0x99]);
    let content = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &wanted, &[1, 1], &mac].concat();
    ipv6(58, group, &content, 2)
}

fn icmp_echo(content: &[u8]) -> Vec<u8> {
    let mut message = [&[8, 0, 0, 0, 0, 1, 0, 1][..], content].concat();
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum);
    message
}

fn frame(kind: &str, number: u64, mac: [u8; 6]) -> Vec<u8> {
    const MORE_FRAGMENTS: u16 = 0x2000;
    let small = payload(number, 256);
    let large = payload(number, 1472);
    let to_nobody = NOBODY_MAC;
    let (to, ether_type, packet): ([u8; 6], u16, Vec<u8>) = match kind {
        "arp" => {
            let words = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &GUEST, &[0; 6], &NOBODY, &payload(number, 32)];
            ([0xff; 6], 0x0806, words.concat())
        }
        "neighbour" => {
            let packet = [neighbour_solicitation(mac), payload(number, 32)].concat();
            ([0x33, 0x33, 0xff, 0, 0, 0x99], 0x86dd, packet)
        }
        "ipv6" => {
            let to = link_local([0, 0, 0, 0, 0, 0, 0, 0x99]);
            (to_nobody, 0x86dd, ipv6(17, to, &udp(&small, small.len()), 6))
        }
        "vlan" => {
            let inner = ipv4(17, 0, &udp(&small, small.len()));
            (to_nobody, 0x8100, [&VLAN.to_be_bytes()[..], &0x0800_u16.to_be_bytes(), &inner].concat())
        }
        "udp" => (to_nobody, 0x0800, ipv4(17, 0, &udp(&small, small.len()))),
        "icmp" => (to_nobody, 0x0800, ipv4(1, 0, &icmp_echo(&payload(number, 56)))),
        "jumbo" => (to_nobody, 0x0800, ipv4(17, 0, &udp(&payload(number, 8972), 8972))),
        // Of one datagram, whose second half begins at 1480 bytes.
        "fragment-first" => (to_nobody, 0x0800, ipv4(17, MORE_FRAGMENTS, &udp(&large, 2 * large.len()))),
        "fragment-last" => (to_nobody, 0x0800, ipv4(17, 1480 / 8, &large)),
        other => panic!("unknown kind {other}"),
    };
    [&to[..], &mac, &ether_type.to_be_bytes(), &packet].concat()
}

fn send(mut socket: &File, frame: &[u8]) {
    const ENOBUFS: i32 = 105;
    loop {
        match socket.write(frame) {
            Ok(_) => return,
            // The card's queue is full.
            Err(error) if error.raw_os_error() == Some(ENOBUFS) || error.kind() == ErrorKind::Interrupted => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => {
                println!("error: cannot send a frame of {} bytes: {error}", frame.len());
                return;
            }
        }
    }
}

fn read(interface: &str, what: &str) -> String {
    let path = format!("/sys/class/net/{interface}/{what}");
    fs::read_to_string(path).expect("an interface").trim().to_owned()
}

fn main() {
    let interface = std::env::args().nth(1).expect("an interface");
    let bytes = read(&interface, "address");
    let bytes: Vec<u8> = bytes.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
    let mac: [u8; 6] = bytes.try_into().expect("a MAC address");
    let socket = open(read(&interface, "ifindex").parse().expect("a number")).expect("a socket");
    let mut number = 0;
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["send", kind, count, pause_us] = words[..] else {
            println!("error: frame-sender does not know {line:?}");
            continue;
        };
        fs::write(format!("/sys/class/net/{interface}/mtu"), MTU).expect("a card that sends jumbo frames");
        let pause = Duration::from_micros(pause_us.parse().expect("a number"));
        for _ in 0..count.parse::<u64>().expect("a number") {
            let at = (number % KINDS.len() as u64) as usize;
            let kind = if kind == "all" { KINDS[at] } else { kind };
            let bytes = frame(kind, number, mac);
            number += 1;
            send(&socket, &bytes);
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
        }
        println!("sent {number}");
    }
}
