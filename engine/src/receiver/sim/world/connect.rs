//! The beginning of a session: a primary has connected all its channels.

use super::super::disks::SimDisks;
use super::super::guard::SimGuard;
use super::super::hostile::Hostility;
use super::super::primary::{Kind, Primary};
use super::super::rng::Rng;
use super::super::session::SimSession;
use super::World;
use super::slow_flush::{Attached, SlowFlush};
use crate::net::Origin;
use crate::receiver::attach::{DrivingCores, NewSession, attach};
use crate::receiver::guest::{GuestIdentity, StoredGuest};
use crate::receiver::live_session::PrimaryId;
use crate::receiver::main_buffer::MainBuffer;
use crate::ring::sim::{Pipe, SimCore};
use crate::ring::{Connection, ReceiveStyle, Tenant, Waker};
use crate::session::SessionLimits;
use crate::wire::stream::MAIN_MAGIC;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::cell::RefCell;
use std::io;
use std::sync::Arc;

impl World {
    /// A primary connects all its channels.
    pub(super) fn begin(
        &mut self,
        kind: Kind,
        style: ReceiveStyle,
        pages_max: usize,
        may_lack: bool,
        hostility: Option<Hostility>,
    ) {
        self.note(|| format!("session {}: {kind:?}", self.sessions.len()));
        let primary = Primary::new(&mut self.rng, kind, pages_max);
        let first_pipe = self.net.borrow().pipes.len();
        let pipes = first_pipe..first_pipe + kind.channels + 1;
        // A core for each connection stands for a thread.
        let home_core = match self.is_threads {
            true => first_pipe,
            false => self.rng.below(self.cores.len()),
        };
        let (mut peers, mut sockets) = (Vec::new(), Vec::new());
        for _ in pipes.clone() {
            let flags = SockFlag::SOCK_CLOEXEC;
            let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, flags);
            let (socket, peer) = pair.expect("two descriptors");
            let pipe = Pipe::new(&socket).expect("a descriptor");
            self.net.borrow_mut().pipes.push(pipe);
            peers.push(peer);
            sockets.push(socket);
        }
        let new = NewSession {
            id: u32::try_from(self.sessions.len()).expect("few"),
            primary: PrimaryId {
                guest: Arc::new(GuestIdentity::recovered(0, StoredGuest::default())),
                origin: Origin::Process(1),
                channels_uuid: None,
                tls: None,
            },
            is_tcp: false,
            main: (sockets.remove(0), None),
            main_buffer: MainBuffer::new(&MAIN_MAGIC).expect("memory"),
            lease: self.budgets.memory.take(0).expect("nothing"),
            channels: sockets.into_iter().map(|socket| (socket, None)).collect(),
            limits: SessionLimits::of_protocol(u8::try_from(kind.channels).expect("few")),
            style,
            home_core,
        };
        let cores = SimCores {
            cores: &self.cores,
            is_threads: self.is_threads,
            session: Attached::default(),
            flush_turns: self.flush_turns,
            rng: RefCell::new(Rng::new(self.rng.next())),
        };
        let session = attach(new, self.services.clone(), &cores);
        let weak = Arc::downgrade(&session);
        cores.session.set(weak).expect("attached once");
        let mut session = SimSession::new(session, primary, peers, pipes, may_lack);
        session.is_touched = hostility.is_some();
        session.hostility = hostility;
        if !session.is_touched {
            session.stranger = self.strangers.one(kind.channels);
            session.is_touched = session.stranger.is_some();
        }
        if let Some(bases) = self.disks.bases.as_ref().filter(|_| !session.is_touched) {
            let disks = SimDisks::new(&mut self.disks.rng, bases, self.sessions.len());
            let segments_in_ram = self.disks.rng.below(8);
            self.services
                .add_disks(session.live.id, disks.all(), segments_in_ram);
            session.disks = Some(disks);
        }
        if !session.is_touched && self.guards.one_in(2) {
            session.guard = Some(SimGuard::new(&mut self.guards, &session.live.output));
        }
        self.sessions.push(session);
        self.tally.sessions += 1;
    }
}

/// The simulated cores as a data plane.
struct SimCores<'a> {
    cores: &'a [SimCore],
    is_threads: bool,
    session: Attached,
    flush_turns: usize,
    rng: RefCell<Rng>,
}

impl DrivingCores for SimCores<'_> {
    type Driver = usize;

    fn cores(&self) -> usize {
        self.cores.len()
    }

    fn driving_cores(&self) -> usize {
        if self.is_threads { 0 } else { self.cores.len() }
    }

    fn driver(&self, core: usize, connection: usize) -> usize {
        match self.is_threads {
            true => core + connection,
            false => core % self.cores.len(),
        }
    }

    fn core(&self, driver: &usize) -> usize {
        *driver
    }

    fn waker(&self, driver: &usize, guest: u64) -> Waker {
        self.cores[*driver].waker(guest)
    }

    fn admit(&self, driver: &usize, tenant: Box<dyn Tenant>) -> io::Result<()> {
        self.cores[*driver].admit(Box::new(SlowFlush {
            tenant,
            session: self.session.clone(),
            turns: self.flush_turns,
            rng: Rng::new(self.rng.borrow_mut().next()),
        }));
        Ok(())
    }

    fn attach(&self, driver: &usize, connection: Box<dyn Connection>) -> io::Result<()> {
        self.cores[*driver].attach(connection);
        Ok(())
    }
}
