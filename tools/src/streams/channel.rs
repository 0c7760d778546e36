//! A captured multifd channel, packet by packet.

use super::Connection;
use colo_ring::session::{ChannelError, MultifdChannel, PacketAction, SessionMethod};
use colo_ring::units::ChannelId;
use colo_ring::wire::WireError;
use colo_ring::wire::codec::Method;
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, Init, PacketHeader};
use std::ops::Range;
use thiserror::Error;

/// A multifd channel.
#[derive(Clone, Debug)]
pub struct Channel {
    /// Its connection.
    pub connection: Connection,
    /// What its init packet says.
    pub init: Init,
    packets: Vec<Packet>,
    /// For each SYNC, the number of the packet after it and after the empty packets that belong to it.
    syncs: Vec<usize>,
    /// How the pages of its first packet with pages are compressed.
    method: Option<Method>,
    stopped: Option<String>,
}

/// Why a connection is no multifd channel, although it begins as one.
#[derive(Debug, Error)]
pub enum InitError {
    /// The capture ends in its init packet.
    #[error("its init packet is not complete")]
    Incomplete,
    /// Its init packet is wrong.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// One packet on a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it ends on its channel.
    pub end: usize,
    /// Pages with content.
    pub normal: u16,
    /// Zero pages.
    pub zero: u16,
    /// Whether it is a sync point.
    pub sync: bool,
}

impl Channel {
    /// Reads the packets of a connection that begins with an init packet, up to its end or the first wrong packet.
    /// `method` is shared by the session's channels.
    ///
    /// # Errors
    /// If it does not begin with a valid init packet.
    pub(super) fn new(connection: Connection, method: &SessionMethod) -> Result<Self, InitError> {
        let init = connection
            .to_secondary
            .bytes()
            .first_chunk()
            .ok_or(InitError::Incomplete)?;
        let init = Init::decode(init)?;
        let mut channel = Self {
            connection,
            init,
            packets: Vec::new(),
            syncs: Vec::new(),
            method: None,
            stopped: None,
        };
        channel.walk(method);
        Ok(channel)
    }

    fn walk(&mut self, method: &SessionMethod) {
        let bytes = self.connection.to_secondary.bytes();
        let mut protocol = MultifdChannel::default();
        let mut position = INIT_LEN;
        while let Some(header) = bytes[position..].first_chunk::<HEADER_LEN>() {
            let decoded = PacketHeader::decode(header).map_err(ChannelError::from);
            let (header, action) =
                match decoded.and_then(|header| Ok((header, protocol.on_header(&header, method)?))) {
                    Ok(packet) => packet,
                    Err(error) => {
                        let name = self.init.channel;
                        self.stopped = Some(format!("{name}, byte {position}: {error}"));
                        return;
                    }
                };
            let payload = usize::try_from(header.payload_len()).unwrap_or(usize::MAX);
            let Some(end) = (position + HEADER_LEN)
                .checked_add(payload)
                .filter(|end| *end <= bytes.len())
            else {
                break;
            };
            position = end;
            self.packets.push(Packet {
                end,
                normal: header.normal_pages(),
                zero: header.zero_pages(),
                sync: header.is_sync(),
            });
            if header.normal_pages() > 0 {
                self.method.get_or_insert(header.method());
            }
            let number = self.packets.len();
            match action {
                // QEMU 7.2 sends an empty packet directly after a SYNC with pages.
                PacketAction::ReadHeader => {
                    if let Some(last) = self.syncs.last_mut().filter(|last| **last + 1 == number) {
                        *last = number;
                    }
                }
                PacketAction::Zero | PacketAction::Place { .. } | PacketAction::Decode { .. } => {
                    if protocol.on_pages() == PacketAction::Arrive {
                        self.syncs.push(number);
                        protocol.on_release();
                    }
                }
                PacketAction::Arrive => {
                    self.syncs.push(number);
                    protocol.on_release();
                }
            }
        }
        if position < bytes.len() {
            let name = self.init.channel;
            self.stopped = Some(format!(
                "{name}, byte {position}: the capture ends inside a packet"
            ));
        }
    }

    /// Its number.
    pub fn id(&self) -> ChannelId {
        self.init.channel
    }

    /// All whole packets.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// SYNCs in whole packets.
    pub fn syncs(&self) -> u64 {
        self.syncs.len() as u64
    }

    /// How pages are compressed; `None` if the channel carries no page with content.
    pub fn method(&self) -> Option<Method> {
        self.method
    }

    /// Why reading ended after the last packet, if the channel has more bytes.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// The packets after SYNC `from`, up to and including SYNC `to`, counted from 1; 0 is the channel's start.
    ///
    /// # Panics
    /// With more than [`Self::syncs`].
    pub(super) fn between(&self, from: u64, to: u64) -> Range<usize> {
        let position = |syncs: u64| match usize::try_from(syncs) {
            Ok(0) => 0,
            Ok(number) => self.syncs[number - 1],
            Err(_) => panic!("fewer syncs than that"),
        };
        position(from)..position(to)
    }

    /// The bytes of the init packet.
    pub fn init_bytes(&self) -> &[u8] {
        &self.connection.to_secondary.bytes()[..INIT_LEN]
    }

    /// The payload of a packet.
    pub fn payload(&self, number: usize) -> &[u8] {
        &self.packet_bytes(number)[HEADER_LEN..]
    }

    /// The bytes of a packet.
    pub fn packet_bytes(&self, number: usize) -> &[u8] {
        let begin = number
            .checked_sub(1)
            .map_or(INIT_LEN, |before| self.packets[before].end);
        &self.connection.to_secondary.bytes()[begin..self.packets[number].end]
    }
}
