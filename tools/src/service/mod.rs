//! What a service manager such as systemd and this process say to each other: that it is ready, that it is alive, and the sockets that pass from
//! one process to the next. Without a service manager all of it is nothing.

mod notify;
mod sockets;

pub(crate) use notify::ServiceManager;
pub(crate) use sockets::passed_sockets;
