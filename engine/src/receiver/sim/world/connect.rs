//! The beginning of a session: a primary has connected all its channels.

use super::super::FIRST_LEN;
use super::super::primary::{Kind, Primary};
use super::super::session::SimSession;
use super::World;
use crate::receiver::guest::{ChannelSocket, Guest};
use crate::receiver::main_channel::MainChannel;
use crate::receiver::page_channel::{Cores, PageChannel};
use crate::receiver::presence::{FlushPart, Presence};
use crate::ring::ReceiveStyle;
use crate::ring::sim::Wire;
use crate::session::SessionLimits;
use crate::units::ChannelId;
use crate::wire::stream::MAIN_MAGIC;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Cores by what they do for a session.
struct Drivers {
    /// The main channel's, then each channel's.
    connections: Vec<usize>,
    helpers: Vec<usize>,
}

impl World {
    /// A primary connects all its channels.
    pub(super) fn begin(&mut self, kind: Kind, style: ReceiveStyle, pages_max: usize, no_memory: bool) {
        self.note(|| format!("session {}: {kind:?}", self.sessions.len()));
        let primary = Primary::new(&mut self.rng, kind, pages_max);
        let first_wire = self.net.borrow().wires.len();
        let wires = first_wire..first_wire + kind.channels + 1;
        let drivers = if self.is_threads {
            // A core for each connection stands for a thread.
            let (connections, helpers) = (wires.clone().collect(), Vec::new());
            Drivers { connections, helpers }
        } else {
            let (first, count) = (self.rng.below(self.cores.len()), self.cores.len());
            let connections = vec![first; kind.channels + 1];
            let helpers = (1..count).map(|core| (first + core) % count).collect();
            Drivers { connections, helpers }
        };
        let mut peers = Vec::new();
        let mut connections = Vec::new();
        for core in &drivers.connections {
            let flags = SockFlag::SOCK_CLOEXEC;
            let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, flags);
            let (socket, peer) = pair.expect("two descriptors");
            self.net.borrow_mut().wires.push(Wire::new(socket.as_raw_fd()));
            peers.push(peer);
            let waker = self.cores[*core].waker();
            connections.push(ChannelSocket { socket, waker });
        }
        let main = connections.remove(0);
        let id = u32::try_from(self.sessions.len()).expect("few");
        let helpers = drivers.helpers.iter();
        let wakers = helpers.map(|core| self.cores[*core].waker()).collect();
        let services = self.services.clone();
        let guest = Guest::new(id, "model".into(), services, main, connections, wakers);
        self.attach(&guest, kind, style, &drivers);
        let session = SimSession::new(guest, primary, peers, wires, no_memory);
        self.sessions.push(session);
        self.tally.sessions += 1;
    }

    /// Hands a guest's connections and presences to the cores, as the control thread does.
    fn attach(&self, guest: &Arc<Guest>, kind: Kind, style: ReceiveStyle, drivers: &Drivers) {
        let channels = u8::try_from(kind.channels).expect("few");
        let limits = SessionLimits {
            channels,
            ram_limit_bytes: 1 << 40,
        };
        let first = MAIN_MAGIC.first_chunk::<FIRST_LEN>().expect("four bytes");
        let (main_core, homes) = drivers.connections.split_first().expect("a main channel");
        self.cores[*main_core].admit(Presence::new(guest.clone(), FlushPart::Main));
        for core in &drivers.helpers {
            self.cores[*core].admit(Presence::new(guest.clone(), FlushPart::Help));
        }
        let main = MainChannel::new(guest.clone(), limits, *main_core, style, false, first);
        self.cores[*main_core].attach(Box::new(main));
        for (channel, home) in (0..channels).zip(homes) {
            let beside = if self.is_threads { 0 } else { usize::from(channel) };
            let cores = Cores {
                home: *home,
                away: (home + beside) % self.cores.len(),
            };
            let channel = PageChannel::new(guest.clone(), ChannelId(channel), *home, style, cores);
            self.cores[*home].attach(Box::new(channel));
        }
    }
}
