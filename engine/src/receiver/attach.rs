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
    let NewSession { style, home_core, .. } = new;
    // The channels share the core of the main channel, and are handed over to others while it falls behind. Without driving
    // cores each connection has a thread of its own.
    let main_driver = cores.driver(home_core, 0);
    let drivers: Vec<_> = (1..=new.channels.len())
        .map(|connection| cores.driver(home_core, connection))
        .collect();
    let helpers: Vec<_> = (1..cores.driving_cores())
        .map(|n| cores.driver(home_core + n, 0))
        .collect();
    let socket = |socket, driver| ChannelSocket {
        socket,
        waker: cores.waker(driver),
    };
    let main = socket(new.main, &main_driver);
    let channels = new.channels.into_iter().zip(&drivers);
    let channels = channels
        .map(|(channel, driver)| socket(channel, driver))
        .collect();
    let wakers = helpers.iter().map(|driver| cores.waker(driver)).collect();
    let session = LiveSession::new(new.id, new.peer, new.origin, services, main, channels, wakers);

    let attached = |done: io::Result<()>| {
        if let Err(error) = done {
            session.finish(SessionEnd::NotDriven(error));
        }
    };
    let tenant = |part| GuestTenant::new(session.clone(), part);
    attached(cores.admit(&main_driver, tenant(FlushPart::Main)));
    for driver in &helpers {
        attached(cores.admit(driver, tenant(FlushPart::Help)));
    }
    // A shard for every thread that receives: a core's, or a connection's own.
    let has_threads = cores.driving_cores() == 0;
    let shard = |driver, connection| {
        if has_threads {
            connection
        } else {
            cores.core(driver)
        }
    };
    let main = MainChannel::new(
        session.clone(),
        new.limits,
        shard(&main_driver, 0),
        style,
        new.is_tcp,
        &MAIN_MAGIC,
    );
    attached(cores.attach(&main_driver, Box::new(main)));
    for (driver, channel) in drivers.iter().zip(0..new.limits.channels) {
        let shard = shard(driver, usize::from(channel) + 1);
        let home = cores.core(driver);
        let offload = (home + usize::from(channel)) % cores.cores();
        let channel = PageChannel::new(
            session.clone(),
            ChannelId(channel),
            shard,
            style,
            Cores { home, offload },
        );
        attached(cores.attach(driver, Box::new(channel)));
    }
    session
}
