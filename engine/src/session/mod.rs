//! The protocol as state machines that do no I/O and read no clock: the main channel's, [`Session`], and one for each
//! multifd channel, [`MultifdChannel`]. [`Rendezvous`] is where they meet.
//!
//! A driver feeds a machine with what has arrived and carries out the actions that it returns. Everything that does I/O,
//! waits, or touches guest memory is the driver's.

mod action;
mod channel;
mod error;
mod guest_description;
mod limits;
mod main_channel;
mod ram_records;
mod rendezvous;

pub use action::{Action, Outbound, Page, PageContent};
pub use channel::{ChannelTraffic, MultifdChannel, PacketAction, SessionMethod};
pub use error::{ChannelError, Ending, SessionError};
pub use guest_description::GuestDescription;
pub use limits::SessionLimits;
pub use main_channel::{DeviceStates, Session};
pub use rendezvous::{GateClosed, Rendezvous, Ticket};

#[cfg(test)]
mod tests;
