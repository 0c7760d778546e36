//! Attaches a session to the cores that drive it: the main channel and every multifd channel as a connection, and the
//! guest as a tenant of each core that may drive one of them.

use super::live_session::{About, ChannelSocket, LiveSession, PrimaryId};
use super::main_buffer::MainBuffer;
use super::main_channel::MainChannel;
use super::page_channel::{Cores, PageChannel};
use super::services::Services;
use super::tenant::{FlushPart, GuestTenant};
use crate::budget::Lease;
use crate::receiver::end::SessionEnd;
use crate::ring::{Connection, ReceiveStyle, Tenant, Waker};
use crate::session::SessionLimits;
use crate::tls::{self, Encrypted};
use crate::units::ChannelId;
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

    /// What wakes a driver for a guest.
    fn waker(&self, driver: &Self::Driver, guest: u64) -> Waker;

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

/// A socket, and what its connection receives with if it has TLS.
pub(super) type NewConnection = (OwnedFd, Option<tls::Receiving>);

/// A session whose connections are complete.
pub(super) struct NewSession {
    pub(super) id: u32,
    pub(super) primary: PrimaryId,
    pub(super) is_tcp: bool,
    /// The main channel, of which the magic was read, and what it receives with if it has TLS.
    pub(super) main: NewConnection,
    /// Begins with the magic.
    pub(super) main_buffer: MainBuffer,
    /// What the session has of the memory budget beside its guest's memory.
    pub(super) lease: Lease,
    /// The multifd channels after their init packets, in the order of their ids.
    pub(super) channels: Vec<NewConnection>,
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
    let waker = |driver| cores.waker(driver, u64::from(new.id));
    let (main, main_tls) = new.main;
    let main = ChannelSocket::new(
        main,
        main_tls.as_ref().map(|tls| tls.outgoing().clone()),
        waker(&main_driver),
    );
    let (channels, channels_tls): (Vec<_>, Vec<_>) = new.channels.into_iter().unzip();
    let channels = channels.into_iter().zip(&drivers);
    let channels = channels
        .map(|(channel, driver)| ChannelSocket::new(channel, None, waker(driver)))
        .collect();
    let wakers = helpers.iter().map(waker).collect();
    let about = About {
        id: new.id,
        primary: new.primary,
        lease: new.lease,
    };
    let session = LiveSession::new(about, services, main, channels, wakers);
    let parts = Parts {
        session: &session,
        cores,
        style: new.style,
    };
    parts.admit(&main_driver, FlushPart::Main);
    for driver in &helpers {
        parts.admit(driver, FlushPart::Help);
    }
    parts.attach_main(&main_driver, new.limits, (new.is_tcp, main_tls), new.main_buffer);
    for ((driver, channel), tls) in drivers.iter().zip(0..new.limits.channels).zip(channels_tls) {
        parts.attach_channel(driver, ChannelId(channel), tls);
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

    fn attach_main(
        &self,
        driver: &D::Driver,
        limits: SessionLimits,
        (is_tcp, tls): (bool, Option<tls::Receiving>),
        buffer: MainBuffer,
    ) {
        let main = MainChannel::new(
            self.session.clone(),
            limits,
            self.shard(driver, 0),
            self.style,
            is_tcp,
            buffer,
        );
        self.attach(driver, main, tls);
    }

    fn attach<C: Connection + 'static>(
        &self,
        driver: &D::Driver,
        connection: C,
        tls: Option<tls::Receiving>,
    ) {
        let connection: Box<dyn Connection> = match tls {
            None => Box::new(connection),
            Some(tls) => Box::new(Encrypted::new(connection, tls)),
        };
        self.finish_if_err(self.cores.attach(driver, connection));
    }

    fn attach_channel(&self, driver: &D::Driver, id: ChannelId, tls: Option<tls::Receiving>) {
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
        self.attach(driver, channel, tls);
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
