//! Serving one session: the first thread reads the main channel, and the channels are distributed over all threads.

use super::connections::Connections;
use crate::net::Socket;
use colo_ring::host::pin;
use colo_ring::session::{
    Action, MultifdChannel, Outbound, PacketAction, Session, SessionLimits, SessionMethod,
};
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, PacketHeader};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io::{self, IoSlice, Read};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Small enough to stay in a core's cache.
const BUFFER_BYTES: usize = 64 << 10;

/// Totals of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Served {
    pub checkpoints: u64,
    pub bytes: u64,
}

/// What the threads share.
struct Shared {
    /// SYNCs that each channel has reached.
    syncs: Vec<AtomicU64>,
    /// Wakes the main channel's thread: a channel of another thread has reached a SYNC.
    wake: EventFd,
    /// Bytes of the multifd channels.
    bytes: AtomicU64,
    /// How their payloads are compressed.
    method: SessionMethod,
}

/// Serves a session until its main channel ends.
pub(super) fn session(connections: Connections, cores: &[usize]) -> io::Result<Served> {
    let count = connections.channels.len();
    let shared = Shared {
        syncs: (0..count).map(|_| AtomicU64::new(0)).collect(),
        wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?,
        bytes: AtomicU64::new(0),
        method: SessionMethod::default(),
    };
    let threads = cores.len().clamp(1, count.max(1));
    let mut groups: Vec<Vec<Channel>> = (0..threads).map(|_| Vec::new()).collect();
    let mut clones = Vec::new();
    for (number, socket) in connections.channels.into_iter().enumerate() {
        clones.push(socket.try_clone()?);
        groups[number % threads].push(Channel::new(number, socket));
    }
    let mut main = MainChannel::new(connections.main, count);
    std::thread::scope(|scope| {
        let mut own = groups.remove(0);
        let helpers: Vec<_> = groups
            .into_iter()
            .zip(cores.iter().skip(1))
            .map(|(mut group, core)| {
                let shared = &shared;
                scope.spawn(move || pin(&[*core]).and_then(|()| serve(None, &mut group, shared)))
            })
            .collect();
        let pinned = cores.first().map_or(Ok(()), |core| pin(&[*core]));
        let served = pinned.and_then(|()| serve(Some(&mut main), &mut own, &shared));
        // The helpers' connections end with the main one.
        clones.iter().for_each(Socket::shutdown);
        for helper in helpers {
            let ended = helper
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ended?;
        }
        served
    })?;
    Ok(Served {
        checkpoints: main.checkpoints,
        bytes: main.bytes + shared.bytes.load(Ordering::Relaxed),
    })
}

/// What can be read now.
struct Ready {
    channels: Vec<bool>,
    main: bool,
}

/// Waits until something can be read, or a helper has woken the main channel's thread.
fn wait(main: Option<&MainChannel>, channels: &[Channel], shared: &Shared) -> io::Result<Option<Ready>> {
    let reading = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let open = channels.iter().filter(|channel| !channel.ended);
    let open = open.map(|channel| channel.socket.as_fd());
    let mut descriptors: Vec<_> = open.map(reading).collect();
    let open = descriptors.len();
    if let Some(main) = main {
        descriptors.push(reading(shared.wake.as_fd()));
        // With a full buffer it waits for the channels.
        descriptors.extend(main.has_room().then(|| reading(main.socket.as_fd())));
    }
    if descriptors.is_empty() {
        return Ok(None);
    }
    match poll(&mut descriptors, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut ready = descriptors
        .iter()
        .map(|descriptor| descriptor.any().unwrap_or(true));
    let channels = ready.by_ref().take(open).collect();
    let main = ready.any(|ready| ready);
    Ok(Some(Ready { channels, main }))
}

/// Reads until the main channel ends, or without one, until all channels have ended.
fn serve(mut main: Option<&mut MainChannel>, channels: &mut [Channel], shared: &Shared) -> io::Result<()> {
    let is_helper = main.is_none();
    while let Some(ready) = wait(main.as_deref(), channels, shared)? {
        let open = channels.iter_mut().filter(|channel| !channel.ended);
        let mut syncs = 0;
        for (channel, _) in open.zip(ready.channels).filter(|(_, ready)| *ready) {
            syncs += channel.read(shared)?;
        }
        match &mut main {
            None if syncs > 0 => {
                shared.wake.write(1)?;
            }
            Some(main) if ready.main || syncs > 0 => {
                match shared.wake.read() {
                    Ok(_) | Err(Errno::EAGAIN) => {}
                    Err(errno) => return Err(errno.into()),
                }
                if main.read(shared)? {
                    return Ok(());
                }
            }
            _ => {}
        }
    }
    debug_assert!(is_helper, "the main channel's thread ends with it");
    Ok(())
}

/// A multifd channel.
struct Channel {
    number: usize,
    socket: Socket,
    buffer: Box<[u8]>,
    /// Bytes of an incomplete header at the start of the buffer.
    filled: usize,
    protocol: MultifdChannel,
    /// Bytes that are skipped next, and whether they are a packet's payload.
    skip: u64,
    is_in_packet: bool,
    ended: bool,
}

impl Channel {
    fn new(number: usize, socket: Socket) -> Self {
        Self {
            number,
            socket,
            buffer: vec![0; BUFFER_BYTES].into(),
            filled: 0,
            protocol: MultifdChannel::default(),
            skip: INIT_LEN as u64,
            is_in_packet: false,
            ended: false,
        }
    }

    /// Reads what has arrived. Returns how many SYNCs were reached.
    fn read(&mut self, shared: &Shared) -> io::Result<u64> {
        let mut syncs = 0;
        while let Some(count) = read_some(&mut self.socket, &mut self.buffer[self.filled..])? {
            if count == 0 {
                self.ended = true;
                break;
            }
            shared.bytes.fetch_add(count as u64, Ordering::Relaxed);
            syncs += self.follow(self.filled + count, &shared.method)?;
        }
        shared.syncs[self.number].fetch_add(syncs, Ordering::Release);
        Ok(syncs)
    }

    /// Parses the packets in the first `end` bytes of the buffer. Returns how many SYNCs were reached.
    fn follow(&mut self, end: usize, method: &SessionMethod) -> io::Result<u64> {
        let (mut begin, mut syncs) = (0, 0);
        loop {
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(end - begin);
            begin += skipped;
            self.skip -= skipped as u64;
            if self.skip == 0 && std::mem::take(&mut self.is_in_packet) {
                let action = self.protocol.on_pages();
                syncs += self.end_packet(action);
            }
            let Some(header) = self.buffer[begin..end].first_chunk::<HEADER_LEN>() else {
                break;
            };
            let packet = PacketHeader::decode(header).map_err(io::Error::other)?;
            let action = self.protocol.on_header(&packet, method);
            let action = action.map_err(io::Error::other)?;
            begin += HEADER_LEN;
            match action {
                PacketAction::Zero | PacketAction::Place { .. } | PacketAction::Decode { .. } => {
                    (self.skip, self.is_in_packet) = (packet.payload_len().into(), true);
                }
                PacketAction::ReadHeader | PacketAction::Arrive => syncs += self.end_packet(action),
            }
        }
        self.buffer.copy_within(begin..end, 0);
        self.filled = end - begin;
        Ok(syncs)
    }

    /// Returns how many SYNCs were reached. The channel is released at once, because the
    /// order of pages that are discarded does not matter.
    fn end_packet(&mut self, action: PacketAction) -> u64 {
        if action != PacketAction::Arrive {
            return 0;
        }
        self.protocol.on_release();
        1
    }
}

/// The main channel.
struct MainChannel {
    socket: Socket,
    session: Session,
    buffer: Box<[u8]>,
    filled: usize,
    /// Markers read. The session waits at the last one until all channels have reached as many SYNCs.
    markers: u64,
    outbound: Vec<u8>,
    /// What has arrived looks like the end of the initial device state.
    looks_ended: bool,
    checkpoints: u64,
    bytes: u64,
}

impl MainChannel {
    fn new(socket: Socket, channels: usize) -> Self {
        let limits = SessionLimits::of_protocol(u8::try_from(channels).unwrap_or(u8::MAX));
        Self {
            socket,
            session: Session::new(limits),
            buffer: vec![0; BUFFER_BYTES].into(),
            filled: 0,
            markers: 0,
            outbound: Vec::with_capacity(Outbound::LEN_MAX),
            looks_ended: false,
            checkpoints: 0,
            bytes: 0,
        }
    }

    fn has_room(&self) -> bool {
        self.filled < self.buffer.len()
    }

    fn is_waiting(&self, shared: &Shared) -> bool {
        shared
            .syncs
            .iter()
            .any(|syncs| syncs.load(Ordering::Acquire) < self.markers)
    }

    /// Reads and answers what has arrived. Returns whether the channel has ended.
    fn read(&mut self, shared: &Shared) -> io::Result<bool> {
        loop {
            self.step(shared)?;
            if !self.has_room() {
                return Ok(false);
            }
            let count = read_some(&mut self.socket, &mut self.buffer[self.filled..])?;
            self.socket.quick_ack();
            match count {
                // Its figures are of what a primary sends; nothing is kept, and no guest could gain anything.
                None if std::mem::take(&mut self.looks_ended) => self.session.silence(),
                None => return Ok(false),
                Some(0) => return Ok(true),
                Some(count) => self.filled += count,
            }
            self.bytes += count.unwrap_or(0) as u64;
        }
    }

    fn step(&mut self, shared: &Shared) -> io::Result<()> {
        let mut begin = 0;
        while !self.is_waiting(shared) {
            let (consumed, action) = self
                .session
                .step(&self.buffer[begin..self.filled])
                .map_err(io::Error::other)?;
            begin += consumed;
            self.looks_ended = matches!(action, Action::LooksEnded(_));
            match action {
                Action::NeedMore | Action::LooksEnded(_) => break,
                Action::Marker => self.markers += u64::from(!shared.syncs.is_empty()),
                Action::Commit(_) => self.session.committed(),
                Action::FinishFlush => self.session.flush_finished(),
                Action::Send(outbound) => {
                    outbound.encode(&mut self.outbound);
                    self.socket.write_parts(&mut [IoSlice::new(&self.outbound)])?;
                    self.checkpoints += u64::from(outbound == Outbound::Loaded);
                }
                Action::Continue
                | Action::Memory(_)
                | Action::Page(_)
                | Action::TransferBegins
                | Action::RamComplete
                | Action::OpenGate => {}
            }
        }
        self.buffer.copy_within(begin..self.filled, 0);
        self.filled -= begin;
        Ok(())
    }
}

/// Reads what has arrived: `None` if there is nothing, `Some(0)` at the end.
fn read_some(socket: &mut Socket, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match socket.read(buffer) {
            Ok(count) => return Ok(Some(count)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                // A primary that is killed resets its connections.
                io::ErrorKind::ConnectionReset => return Ok(Some(0)),
                _ => return Err(error),
            },
        }
    }
}
