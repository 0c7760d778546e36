//! Attaches a session to the cores that drive it: the main channel and every multifd channel as a connection, and the
//! guest as a tenant of each core that may drive one of them.

use super::live_session::{ChannelSocket, LiveSession};
use super::main_channel::MainChannel;
use super::page_channel::{Cores, PageChannel};
use super::services::Services;
use super::tenant::{FlushPart, GuestTenant};
use crate::net::Origin;
use crate::receiver::end::SessionEnd;
use crate::ring::{Connection, ReceiveStyle, Tenant, Waker};
use crate::session::SessionLimits;
use crate::units::ChannelId;
use crate::wire::stream::MAIN_MAGIC;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What drives connections: the data plane, or the simulated cores.
pub(super) trait DrivingCores {
    /// The driver of one connection.
    type Driver;

    /// How many cores there are to receive on.
    fn cores(&self) -> usize;

    /// How many of them drive connections: all, or none if each connection has a thread of its own.
    fn driving_cores(&self) -> usize;

    /// The driver of a session's `connection`, counted from the main channel's 0, at a core, counted around.
    fn driver(&self, core: usize, connection: usize) -> Self::Driver;

    /// The core of a driver.
    fn core(&self, driver: &Self::Driver) -> usize;

    fn waker(&self, driver: &Self::Driver) -> Waker;

    /// A guest is present at a driver from now on.
    ///
    /// # Errors
    /// If its core has failed.
    fn admit(&self, driver: &Self::Driver, tenant: Box<dyn Tenant>) -> io::Result<()>;

    /// Hands a connection over, to be driven to its end.
    ///
    /// # Errors
    /// If its core has failed, or there is no thread for it.
    fn attach(&self, driver: &Self::Driver, connection: Box<dyn Connection>) -> io::Result<()>;
}

/// A session whose connections are complete.
pub(super) struct NewSession {
    pub(super) id: u32,
    /// Where its main channel comes from.
    pub(super) peer: String,
    pub(super) origin: Origin,
    pub(super) is_tcp: bool,
    /// The main channel, of which the magic was read.
    pub(super) main: OwnedFd,
    /// The multifd channels after their init packets, in the order of their ids.
    pub(super) channels: Vec<OwnedFd>,
    pub(super) limits: SessionLimits,
    pub(super) style: ReceiveStyle,
    /// The core that drives the main channel.
    pub(super) home_core: usize,
}

/// Begins a session. If a connection cannot be attached, the session ends by that.
pub(super) fn attach<D: DrivingCores>(
    new: NewSession,
    services: Arc<dyn Services>,
    cores: &D,
) -> Arc<LiveSession> {
    let home_core = new.home_core;
    // The channels share the core of the main channel, and are handed over to others while it falls behind. Without driving
    // cores each connection has a thread of its own.
    let main_driver = cores.driver(home_core, 0);
    let drivers: Vec<_> = (1..=new.channels.len())
        .map(|connection| cores.driver(home_core, connection))
        .collect();
    let helpers: Vec<_> = (1..cores.driving_cores())
        .map(|n| cores.driver(home_core + n, 0))
        .collect();
    let socket = |socket, driver| ChannelSocket::new(socket, cores.waker(driver));
    let main = socket(new.main, &main_driver);
    let channels = new.channels.into_iter().zip(&drivers);
    let channels = channels
        .map(|(channel, driver)| socket(channel, driver))
        .collect();
    let wakers = helpers.iter().map(|driver| cores.waker(driver)).collect();
    let session = LiveSession::new(new.id, new.peer, new.origin, services, main, channels, wakers);
    let parts = Parts {
        session: &session,
        cores,
        style: new.style,
    };
    parts.admit(&main_driver, FlushPart::Main);
    for driver in &helpers {
        parts.admit(driver, FlushPart::Help);
    }
    parts.attach_main(&main_driver, new.limits, new.is_tcp);
    for (driver, channel) in drivers.iter().zip(0..new.limits.channels) {
        parts.attach_channel(driver, ChannelId(channel));
    }
    session
}

/// The parts of a new session that cores drive. All of them are made, also after one could not be handed over: the session
/// counts them out.
struct Parts<'a, D> {
    session: &'a Arc<LiveSession>,
    cores: &'a D,
    style: ReceiveStyle,
}

impl<D: DrivingCores> Parts<'_, D> {
    fn admit(&self, driver: &D::Driver, part: FlushPart) {
        let tenant = GuestTenant::new(self.session.clone(), part);
        self.finish_if_err(self.cores.admit(driver, tenant));
    }

    fn attach_main(&self, driver: &D::Driver, limits: SessionLimits, is_tcp: bool) {
        let main = MainChannel::new(
            self.session.clone(),
            limits,
            self.shard(driver, 0),
            self.style,
            is_tcp,
            &MAIN_MAGIC,
        );
        self.finish_if_err(self.cores.attach(driver, Box::new(main)));
    }

    fn attach_channel(&self, driver: &D::Driver, id: ChannelId) {
        let number = usize::from(id.0);
        let home = self.cores.core(driver);
        let offload = (home + number) % self.cores.cores();
        let channel = PageChannel::new(
            self.session.clone(),
            id,
            self.shard(driver, number + 1),
            self.style,
            Cores { home, offload },
        );
        self.finish_if_err(self.cores.attach(driver, Box::new(channel)));
    }

    /// A shard for every thread that receives: a core's, or a connection's own.
    fn shard(&self, driver: &D::Driver, connection: usize) -> usize {
        match self.cores.driving_cores() {
            0 => connection,
            _ => self.cores.core(driver),
        }
    }

    fn finish_if_err(&self, done: io::Result<()>) {
        if let Err(error) = done {
            self.session.finish(SessionEnd::NotDriven(error));
        }
    }
}
