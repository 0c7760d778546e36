//! A primary that is controlled byte by byte, to be everything that a primary should not be.
//!
//! It sends what a test gives it and counts, so that a test knows at which packet and byte of which channel the wrong
//! ones begin. What it was answered and what must have been committed is known too: [`HostilePrimary::image`] changes
//! only by [`HostilePrimary::checkpoint`].

pub mod attack;
pub mod bench;
mod bytes;
pub mod load;

use crate::HANG_LIMIT;
use crate::command::until;
pub use bytes::*;
use colo_ring::units::{ChannelId, PAGE_SIZE};
use colo_ring::wire::codec::{Encoder, Method};
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::Init;
use colo_ring::wire::ram::{BlockRef, RamRecord};
use colo_ring::wire::stream::{Command, Section};
use nix::libc::linger;
use nix::sys::socket::sockopt::{IpBindAddressNoPort, Linger};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrStorage, bind, connect, setsockopt, socket,
};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The blocks of its guest. One name is the beginning of another.
pub const BLOCKS: [(&str, u64); 2] = [("pc.ram", 64 * PAGE), ("pc.ram2", 8 * PAGE)];

/// Bytes of a page.
pub const PAGE: u64 = PAGE_SIZE as u64;

/// Id of the RAM section.
pub const RAM: u32 = 1;

const STATE_BYTES: usize = 24;

/// How a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// In order: the peer reads the end of the stream.
    Fin,
    /// By a reset: what is on its way may be lost.
    Rst,
}

impl Cut {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Fin, Self::Rst];

    /// Cuts a connection.
    pub fn apply(self, socket: TcpStream) {
        if self == Self::Rst {
            let at_once = linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&socket, Linger, &at_once).expect("a socket option");
        }
        drop(socket);
    }
}

/// Where a primary connects to, and from.
#[derive(Clone, Copy, Debug)]
pub struct Destination {
    /// The receiver's address.
    pub address: SocketAddr,
    /// An address of this host: of the primary's origin, as the receiver sees it.
    pub from: Ipv4Addr,
}

impl From<SocketAddr> for Destination {
    fn from(address: SocketAddr) -> Self {
        let from = Ipv4Addr::LOCALHOST;
        Self { address, from }
    }
}

impl Destination {
    fn connect(self) -> io::Result<TcpStream> {
        let socket = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        // The port is chosen with the whole connection: there may be more of these than ports, one after the other.
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        bind(
            socket.as_raw_fd(),
            &SockaddrIn::from(SocketAddrV4::new(self.from, 0)),
        )?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(self.address))?;
        Ok(TcpStream::from(socket))
    }
}

/// The primary, its connections and its counts.
pub struct HostilePrimary {
    /// What its channels say that its machine is.
    pub uuid: [u8; 16],
    /// The main channel.
    pub main: Link,
    /// The multifd channels in the order of their ids.
    pub channels: Vec<Link>,
    /// What compresses the pages of each channel; none without compression.
    pub encoders: Vec<Encoder>,
    image: Vec<Vec<u8>>,
    device_state: Vec<u8>,
}

/// One connection.
pub struct Link {
    socket: Option<TcpStream>,
    /// Bytes sent.
    pub bytes: u64,
    /// Whole packets sent.
    pub packets: u64,
}

impl Link {
    /// Connects, and sends nothing yet.
    ///
    /// # Panics
    /// If nothing listens there.
    #[must_use]
    pub fn connect(to: impl Into<Destination>) -> Self {
        Self::of(to.into().connect().expect("the receiver listens"))
    }

    /// The same, of another host: the one of this machine's own network 127.0.2.0/24 with that number.
    ///
    /// # Panics
    /// If nothing listens there on IPv4.
    #[must_use]
    pub fn connect_from(host: u8, to: SocketAddr) -> Self {
        let SocketAddr::V4(to) = to else {
            panic!("it listens on IPv4");
        };
        Self::of(attack::connect_from(Ipv4Addr::new(127, 0, 2, host), to).expect("the receiver listens"))
    }

    fn of(socket: TcpStream) -> Self {
        socket.set_nodelay(true).expect("a TCP socket");
        socket.set_read_timeout(Some(HANG_LIMIT)).expect("a timeout");
        socket.set_write_timeout(Some(HANG_LIMIT)).expect("a timeout");
        Self {
            socket: Some(socket),
            bytes: 0,
            packets: 0,
        }
    }

    /// Connects as a multifd channel.
    #[must_use]
    pub fn multifd(to: impl Into<Destination>, uuid: [u8; 16], id: u8) -> Self {
        let mut link = Self::connect(to);
        let channel = ChannelId(id);
        link.send(&Init { uuid, channel }.encode());
        link
    }

    /// Sends bytes in one write. That the receiver has closed meanwhile is what many tests are about.
    pub fn send(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        if let Some(socket) = &mut self.socket {
            let _ = socket.write_all(bytes);
        }
    }

    /// The same, where it is to be known whether the receiver has closed.
    ///
    /// # Errors
    /// Those of the write.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len() as u64;
        let socket = self.socket.as_mut().expect("it was not cut");
        socket.write_all(bytes)
    }

    /// Sends a whole packet.
    pub fn send_packet(&mut self, bytes: &[u8]) {
        self.send(bytes);
        self.packets += 1;
    }

    /// Sends bytes one by one, each in a segment of its own.
    pub fn dribble(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.send(&[*byte]));
    }

    /// Waits until the receiver has read this many of the bytes that were sent.
    ///
    /// # Panics
    /// If it does not, or the link was cut.
    pub fn wait_until_read(&self, bytes: u64) {
        let socket = self.socket.as_ref().expect("it was not cut");
        let own = socket.local_addr().expect("a TCP socket");
        let peer = socket.peer_addr().expect("a connection");
        until("bytes to arrive", || {
            (socket_queues(own, peer)?.unacknowledged == 0).then_some(())
        });
        until("bytes to be read", || {
            let unread = socket_queues(peer, own)?.unread;
            (self.bytes - unread >= bytes).then_some(())
        });
    }

    /// Ends it.
    pub fn cut(&mut self, cut: Cut) {
        if let Some(socket) = self.socket.take() {
            cut.apply(socket);
        }
    }

    /// Ends our direction only.
    pub fn half_close(&mut self) {
        if let Some(socket) = &self.socket {
            // Fails where the receiver has closed already, which is the same in the end.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    /// Reads exactly these bytes.
    ///
    /// # Panics
    /// If something else comes, or nothing.
    pub fn expect(&mut self, expected: &[u8]) {
        let mut seen = vec![0; expected.len()];
        let socket = self.socket.as_mut().expect("it was not cut");
        socket.read_exact(&mut seen).expect("an answer");
        assert_eq!(seen, expected);
    }

    /// The same, where the receiver may close instead.
    ///
    /// # Errors
    /// Those of the read, and something else that came.
    pub fn try_expect(&mut self, expected: &[u8]) -> io::Result<()> {
        let mut seen = vec![0; expected.len()];
        let socket = self.socket.as_mut().expect("it was not cut");
        socket.read_exact(&mut seen)?;
        match seen == expected {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Whether nothing comes for this long.
    pub fn is_silent(&mut self, time: Duration) -> bool {
        let socket = self.socket.as_mut().expect("it was not cut");
        socket.set_read_timeout(Some(time)).expect("a timeout");
        let error = loop {
            match socket.read(&mut [0; 64]) {
                // A read with a time limit is not restarted by the kernel.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other.err(),
            }
        };
        socket.set_read_timeout(Some(HANG_LIMIT)).expect("a timeout");
        error.is_some_and(|error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }

    /// Whether the receiver closes it, or it was cut here.
    pub fn is_closed(&mut self) -> bool {
        let Some(socket) = &mut self.socket else {
            return true;
        };
        match socket.read_to_end(&mut Vec::new()) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

/// Bytes in the queues of a socket.
struct SocketQueues {
    /// Sent, and not acknowledged by the other side's kernel.
    unacknowledged: u64,
    /// Received, and not read by the program.
    unread: u64,
}

/// Those of a TCP socket of this network namespace, as the kernel lists them; none if there is no such socket.
fn socket_queues(local: SocketAddr, peer: SocketAddr) -> Option<SocketQueues> {
    let hex = |address: SocketAddr| match address {
        SocketAddr::V4(address) => {
            let bytes = u32::from_ne_bytes(address.ip().octets());
            format!("{bytes:08X}:{:04X}", address.port())
        }
        SocketAddr::V6(_) => panic!("the receiver listens on IPv4"),
    };
    let ends = format!(" {} {} ", hex(local), hex(peer));
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's table of TCP sockets");
    let row = table.lines().find(|row| row.contains(&ends))?;
    let (sent, received) = row.split_whitespace().nth(4)?.split_once(':')?;
    let count = |digits| u64::from_str_radix(digits, 16).expect("a number in hexadecimal");
    Some(SocketQueues {
        unacknowledged: count(sent),
        unread: count(received),
    })
}

impl HostilePrimary {
    /// Only the connections, main first, of a machine that is none of those before: a receiver would take it for one that is protected again.
    #[must_use]
    pub fn connect(to: impl Into<Destination>, channels: u8) -> Self {
        static MACHINES: AtomicU64 = AtomicU64::new(1);
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let mut uuid = [7; 16];
        uuid[8..].copy_from_slice(&number.to_be_bytes());
        Self::connect_as(to, channels, uuid)
    }

    /// The same, of this machine.
    #[must_use]
    pub fn connect_as(to: impl Into<Destination>, channels: u8, uuid: [u8; 16]) -> Self {
        let to = to.into();
        let main = Link::connect(to);
        let channels = (0..channels).map(|id| Link::multifd(to, uuid, id));
        let image = BLOCKS
            .iter()
            .map(|(_, bytes)| vec![0; usize::try_from(*bytes).expect("a small guest")]);
        Self {
            uuid,
            main,
            channels: channels.collect(),
            encoders: Vec::new(),
            image: image.collect(),
            device_state: Vec::new(),
        }
    }

    /// A session whose precopy is complete and which has committed one checkpoint: every page has a content.
    #[must_use]
    pub fn protected(to: impl Into<Destination>, channels: u8) -> Self {
        Self::protected_with(to, channels, Method::None)
    }

    /// The same from a primary that compresses.
    #[must_use]
    pub fn protected_with(to: impl Into<Destination>, channels: u8, method: Method) -> Self {
        let mut primary = Self::connect(to, channels);
        primary.encoders = (0..channels).filter_map(|_| Encoder::new(method, 1)).collect();
        primary.precopy();
        primary.checkpoint(&[(0, 1, 0x11), (0, 2, 0x12), (0, 3, 0x13), (1, 7, 0x17)]);
        primary
    }

    /// Everything until READY.
    pub fn precopy(&mut self) {
        for (_, bytes) in self.precopy_parts() {
            self.main.send(&bytes);
        }
        self.sync();
        self.fill_memory();
        self.sync();
        self.main.expect(&answers_to_precopy());
        self.device_state = device_state(0);
    }

    /// The main channel's bytes until READY, in named pieces. The channels owe two SYNCs for them.
    #[must_use]
    pub fn precopy_parts(&self) -> Vec<(&'static str, Vec<u8>)> {
        let marker = self.marker();
        vec![
            ("header", header()),
            ("commands", commands(&[Command::OpenReturnPath, Command::Ping(1)])),
            (
                "block list",
                [ram_start(), block_list(), marker.clone(), end_of_body()].concat(),
            ),
            (
                "part",
                [section(Section::Part { id: RAM }), end_of_body()].concat(),
            ),
            (
                "end",
                [section(Section::End { id: RAM }), marker, end_of_body()].concat(),
            ),
            ("device state", device_state(0)),
            ("vmdesc", vmdesc()),
        ]
    }

    /// The sync marker of this session's main channel.
    #[must_use]
    pub fn marker(&self) -> Vec<u8> {
        if self.channels.is_empty() {
            return Vec::new();
        }
        record(RamRecord::MultifdFlush)
    }

    /// A SYNC on every channel.
    pub fn sync(&mut self) {
        for channel in &mut self.channels {
            channel.send_packet(&sync_packet());
        }
    }

    fn fill_memory(&mut self) {
        if self.channels.is_empty() {
            return;
        }
        // Where pages are compressed, the last channel's stream begins later.
        let compressed = !self.encoders.is_empty();
        let with_pages = (self.channels.len() - usize::from(compressed)).max(1);
        for (block, (name, bytes)) in BLOCKS.iter().enumerate() {
            for page in 0..bytes / PAGE {
                let fill = u8::try_from(0x80 | page).expect("few pages");
                let position = usize::try_from(page).expect("few pages") % with_pages;
                self.send_page(position, name, page, fill);
                self.put(block, page, fill);
            }
        }
    }

    /// A packet of one page.
    fn send_page(&mut self, channel: usize, name: &str, page: u64, fill: u8) {
        let packet = match self.encoders.get_mut(channel) {
            None => packet(name, &[(page * PAGE, fill)], &[]),
            Some(encoder) => {
                let mut payload = Vec::new();
                encoder.encode(&[fill; PAGE_SIZE], &mut payload);
                compressed_packet(encoder.method(), name, &[page * PAGE], &payload)
            }
        };
        self.channels[channel].send_packet(&packet);
    }

    fn put(&mut self, block: usize, page: u64, fill: u8) {
        let at = usize::try_from(page).expect("few pages") * PAGE_SIZE;
        self.image[block][at..at + PAGE_SIZE].fill(fill);
    }

    /// CHECKPOINT_REQUEST, and the answer to it.
    pub fn request(&mut self) {
        self.main.send(&message(Message::CheckpointRequest));
        self.main.expect(&message(Message::CheckpointReply));
    }

    /// What the main channel sends for a checkpoint after REPLY, with these RAM records. The channels owe one SYNC
    /// for it.
    #[must_use]
    pub fn checkpoint_bytes(&self, moment: u8, records: &[u8]) -> Vec<u8> {
        let state = device_state(moment);
        let size = Message::VmstateSize(state.len() as u64);
        [
            message(Message::VmstateSend),
            self.round(records),
            section(Section::Eof),
            message(size),
            state,
        ]
        .concat()
    }

    /// The RAM section of a checkpoint on the main channel.
    #[must_use]
    pub fn round(&self, records: &[u8]) -> Vec<u8> {
        let head = section(Section::End { id: RAM });
        [&head[..], records, &self.marker(), &end_of_body()].concat()
    }

    /// A whole checkpoint with these pages as (block, page, fill byte), committed when this returns.
    pub fn checkpoint(&mut self, pages: &[(usize, u64, u8)]) {
        self.request();
        let mut records = Vec::new();
        for &(block, page, fill) in pages {
            let (name, _) = BLOCKS[block];
            if !self.channels.is_empty() {
                self.send_page(0, name, page, fill);
            } else {
                records.extend(page_record(BlockRef::Named(name.as_bytes()), page * PAGE, fill));
            }
        }
        let moment = 1;
        self.main.send(&self.checkpoint_bytes(moment, &records));
        self.sync();
        self.main.expect(&answers_to_checkpoint());
        self.committed(pages, moment);
    }

    /// What must be committed: every block's name and content.
    pub fn image(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        BLOCKS
            .iter()
            .zip(&self.image)
            .map(|((name, _), image)| (*name, &image[..]))
    }

    /// The device state that must be committed.
    #[must_use]
    pub fn device_state(&self) -> &[u8] {
        &self.device_state
    }

    /// Takes note of a checkpoint that was sent: pages as (block, page, fill byte).
    pub fn committed(&mut self, pages: &[(usize, u64, u8)], moment: u8) {
        pages
            .iter()
            .for_each(|&(block, page, fill)| self.put(block, page, fill));
        self.device_state = device_state(moment);
    }

    /// Cuts all connections.
    pub fn cut(&mut self, cut: Cut) {
        self.main.cut(cut);
        self.channels.iter_mut().for_each(|channel| channel.cut(cut));
    }

    /// Whether the receiver has closed all that is not cut.
    pub fn is_closed(&mut self) -> bool {
        self.main.is_closed() && self.channels.iter_mut().all(Link::is_closed)
    }
}
