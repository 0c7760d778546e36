//! The protocol of one multifd channel as a state machine: packet headers in, actions out (spec §8, §10). It does no
//! I/O and holds no page.
//!
//! ```text
//! First ── SYNC without pages ──► AtSync ◄───────────── SYNC ──────────────┐
//!                                   │ on_release()                         │
//!                                   ▼                                      │
//!                                 Header ── pages ──► Pages ── on_pages() ─┤
//!                                   ▲                                      │
//!                                   └───────────── no SYNC ────────────────┘
//! ```
//!
//! The driver reads a header, calls [`MultifdChannel::on_header`], and carries out the action before it reads on:
//!
//! * [`PacketAction::Zero`], [`PacketAction::Place`] and [`PacketAction::Decode`]: apply the packet's pages, then call
//!   [`MultifdChannel::on_pages`] and carry out what that returns;
//! * [`PacketAction::Arrive`]: report the sync point and read nothing more until the main channel has released the
//!   channel; then call [`MultifdChannel::on_release`].
//!
//! How a payload becomes pages is the action's variant. The method of the first packet with a payload, on whichever
//! channel, is that of the whole session (spec §9): its channels share a [`SessionMethod`]. With its own first payload a
//! channel's driver opens a [`Decoder`], and keeps it as long as the channel.
//!
//! [`Decoder`]: crate::wire::codec::Decoder

use super::ChannelError;
use crate::wire::codec::Method;
use crate::wire::multifd::{HEADER_LEN, INIT_LEN, PacketHeader};
use std::sync::OnceLock;

/// How the payloads of a session are compressed: as its first one is. All channels of the session share it.
#[derive(Debug, Default)]
pub struct SessionMethod(OnceLock<Method>);

impl SessionMethod {
    /// The method; none before the first payload.
    pub fn get(&self) -> Option<Method> {
        self.0.get().copied()
    }

    /// The method of a packet with a payload.
    fn pin(&self, seen: Method) -> Result<Method, ChannelError> {
        let pinned = *self.0.get_or_init(|| seen);
        if pinned == seen {
            return Ok(pinned);
        }
        Err(ChannelError::OtherMethod {
            seen: seen.name(),
            pinned: pinned.name(),
        })
    }
}

/// What the driver does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketAction {
    /// Read the next header.
    ReadHeader,
    /// Set the packet's zero pages to zero. It has no others, and no payload.
    Zero,
    /// Set the packet's zero pages, if any, to zero, and receive its payload: the normal pages, in the order of the
    /// header's offsets.
    Place {
        /// Bytes of payload.
        payload_len: u32,
        /// Whether the next header may be received together with the payload. Not at a SYNC: nothing follows it
        /// before the release.
        then_header: bool,
    },
    /// Set the packet's zero pages, if any, to zero, and receive its payload, which decodes to the normal pages.
    Decode {
        /// How it is compressed: the same in all packets of the session.
        method: Method,
        /// Bytes of payload.
        payload_len: u32,
    },
    /// The channel has reached a sync point.
    Arrive,
}

/// What a channel has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelTraffic {
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Bytes of headers and payloads.
    pub bytes: u64,
}

/// A packet whose pages are being applied.
#[derive(Clone, Copy, Debug)]
struct Packet {
    sync: bool,
    traffic: ChannelTraffic,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// No packet was read.
    First,
    Header,
    Pages(Packet),
    AtSync,
}

/// The state of one multifd channel, from behind its init packet on.
#[derive(Debug)]
pub struct MultifdChannel {
    stage: Stage,
    packets: u64,
    position: u64,
    since_sync: ChannelTraffic,
}

impl Default for MultifdChannel {
    fn default() -> Self {
        Self {
            stage: Stage::First,
            packets: 0,
            position: INIT_LEN as u64,
            since_sync: ChannelTraffic::default(),
        }
    }
}

impl MultifdChannel {
    /// The next packet's header was read.
    ///
    /// # Errors
    /// If it is the channel's first packet and not a SYNC without pages (spec §8.2), or its payload is compressed by
    /// another method than the session's payloads before it.
    ///
    /// # Panics
    /// If the last action was not carried out.
    pub fn on_header(
        &mut self,
        header: &PacketHeader<'_>,
        method: &SessionMethod,
    ) -> Result<PacketAction, ChannelError> {
        let (sync, payload_len) = (header.is_sync(), header.payload_len());
        match self.stage {
            Stage::First if header.has_pages() || !sync => return Err(ChannelError::NoFirstSync),
            Stage::First | Stage::Header => {}
            Stage::Pages(_) | Stage::AtSync => panic!("a header is read only after the last action"),
        }
        let packet = Packet {
            sync,
            traffic: ChannelTraffic {
                pages: header.normal_pages().into(),
                zero_pages: header.zero_pages().into(),
                bytes: HEADER_LEN as u64 + u64::from(payload_len),
            },
        };
        if !header.has_pages() {
            // Without SYNC it means nothing: QEMU 7.2 sends such packets after a SYNC with pages (spec §8.5).
            return Ok(self.end_packet(packet));
        }
        let action = if payload_len == 0 {
            PacketAction::Zero
        } else {
            match method.pin(header.method())? {
                Method::None => PacketAction::Place {
                    payload_len,
                    then_header: !sync,
                },
                method => PacketAction::Decode { method, payload_len },
            }
        };
        self.stage = Stage::Pages(packet);
        Ok(action)
    }

    /// The packet's pages are applied.
    ///
    /// # Panics
    /// If no packet with pages was begun.
    pub fn on_pages(&mut self) -> PacketAction {
        let Stage::Pages(packet) = self.stage else {
            panic!("called once for every packet with pages");
        };
        self.end_packet(packet)
    }

    /// The main channel has released the channel from its sync point.
    ///
    /// # Panics
    /// If it was at none.
    pub fn on_release(&mut self) {
        assert!(
            matches!(self.stage, Stage::AtSync),
            "only a channel at a sync point is released"
        );
        self.stage = Stage::Header;
    }

    fn end_packet(&mut self, packet: Packet) -> PacketAction {
        self.packets += 1;
        self.position += packet.traffic.bytes;
        self.since_sync.pages += packet.traffic.pages;
        self.since_sync.zero_pages += packet.traffic.zero_pages;
        self.since_sync.bytes += packet.traffic.bytes;
        if packet.sync {
            self.stage = Stage::AtSync;
            PacketAction::Arrive
        } else {
            self.stage = Stage::Header;
            PacketAction::ReadHeader
        }
    }

    /// Complete packets; in an error, the number of the packet that is wrong, counted from 0.
    pub fn packets(&self) -> u64 {
        self.packets
    }

    /// Where the first incomplete packet begins, counted from the channel's first byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Pages with content in the complete packets since the last [`Self::take_traffic`].
    pub fn pages_since_sync(&self) -> u64 {
        self.since_sync.pages
    }

    /// What the complete packets since the last call carried; to be called at sync points.
    pub fn take_traffic(&mut self) -> ChannelTraffic {
        std::mem::take(&mut self.since_sync)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_BYTES;
    use crate::wire::codec::Method;
    use crate::wire::multifd::{PacketFields, raw_payload_len};

    const OFFSETS: [u64; 3] = [0, PAGE_BYTES, 7 * PAGE_BYTES];

    /// A packet with so many normal and zero pages.
    fn packet(sync: bool, normal: usize, zero: usize) -> PacketFields<'static> {
        PacketFields {
            sync,
            method: Method::None,
            pages_alloc: 128,
            payload_len: raw_payload_len(normal),
            packet_num: 0,
            block: b"pc.ram",
            normal: &OFFSETS[..normal],
            zero: &OFFSETS[normal..normal + zero],
        }
    }

    /// Of a session whose payloads have had no method.
    fn header(channel: &mut MultifdChannel, fields: &PacketFields<'_>) -> Result<PacketAction, ChannelError> {
        header_in(&SessionMethod::default(), channel, fields)
    }

    fn header_in(
        method: &SessionMethod,
        channel: &mut MultifdChannel,
        fields: &PacketFields<'_>,
    ) -> Result<PacketAction, ChannelError> {
        let mut bytes = [0; HEADER_LEN];
        fields.encode(&mut bytes);
        channel.on_header(&PacketHeader::decode(&bytes).unwrap(), method)
    }

    /// A channel that was released from its first sync point.
    fn open() -> MultifdChannel {
        let mut channel = MultifdChannel::default();
        let first = header(&mut channel, &PacketFields::sync(0)).unwrap();
        assert_eq!(first, PacketAction::Arrive);
        channel.on_release();
        channel.take_traffic();
        channel
    }

    #[test]
    fn a_channel_begins_with_a_sync_without_pages() {
        for wrong in [
            packet(false, 0, 0),
            packet(false, 1, 0),
            packet(true, 1, 0),
            packet(true, 0, 1),
        ] {
            let mut channel = MultifdChannel::default();
            let error = header(&mut channel, &wrong).unwrap_err();
            assert_eq!(error, ChannelError::NoFirstSync);
            assert_eq!((channel.packets(), channel.position()), (0, INIT_LEN as u64));
        }
        open();
    }

    #[test]
    fn pages_are_applied_before_the_next_header() {
        let mut channel = open();
        let place = PacketAction::Place {
            payload_len: raw_payload_len(2),
            then_header: true,
        };
        assert_eq!(header(&mut channel, &packet(false, 2, 1)), Ok(place));
        assert_eq!(channel.on_pages(), PacketAction::ReadHeader);
        assert_eq!(header(&mut channel, &packet(false, 0, 3)), Ok(PacketAction::Zero));
        assert_eq!(channel.on_pages(), PacketAction::ReadHeader);
    }

    #[test]
    fn pages_of_a_sync_are_applied_before_it() {
        for (fields, action) in [
            (
                packet(true, 1, 0),
                PacketAction::Place {
                    payload_len: raw_payload_len(1),
                    then_header: false,
                },
            ),
            (packet(true, 0, 1), PacketAction::Zero),
        ] {
            let mut channel = open();
            assert_eq!(header(&mut channel, &fields), Ok(action));
            assert_eq!(channel.on_pages(), PacketAction::Arrive);
            channel.on_release();
            let next = header(&mut channel, &PacketFields::sync(1));
            assert_eq!(next, Ok(PacketAction::Arrive));
        }
    }

    #[test]
    fn an_empty_packet_of_7_2_is_ignored_with_its_stale_size() {
        let mut channel = open();
        let stale = PacketFields {
            payload_len: raw_payload_len(128),
            ..packet(false, 0, 0)
        };
        let before = channel.position();
        assert_eq!(header(&mut channel, &stale), Ok(PacketAction::ReadHeader));
        assert_eq!(channel.position() - before, HEADER_LEN as u64);
    }

    #[test]
    fn a_compressed_payload_is_decoded_by_the_method_of_the_session_s_first() {
        let (method, mut channel, mut other) = (SessionMethod::default(), open(), open());
        let header =
            |channel: &mut MultifdChannel, fields: &PacketFields<'_>| header_in(&method, channel, fields);
        let compressed = |method, payload_len| PacketFields {
            method,
            payload_len,
            ..packet(false, 2, 1)
        };
        for payload_len in [1, 1 << 20] {
            let decode = PacketAction::Decode {
                method: Method::Zstd,
                payload_len,
            };
            let action = header(&mut channel, &compressed(Method::Zstd, payload_len));
            assert_eq!(action, Ok(decode));
            assert_eq!(channel.on_pages(), PacketAction::ReadHeader);
            // Without a payload a packet has no method, whatever its flags say.
            let zero = PacketFields {
                method: Method::Zlib,
                ..packet(false, 0, 3)
            };
            assert_eq!(header(&mut channel, &zero), Ok(PacketAction::Zero));
            channel.on_pages();
        }
        for fields in [compressed(Method::Zlib, 5), packet(false, 2, 0)] {
            for channel in [&mut channel, &mut other] {
                let error = header(channel, &fields).unwrap_err();
                assert!(error.to_string().contains("zstd"), "{error}");
            }
        }
    }

    #[test]
    fn packets_and_bytes_are_counted_when_they_are_complete() {
        let mut channel = open();
        let (packets, position) = (channel.packets(), channel.position());
        header(&mut channel, &packet(true, 2, 1)).unwrap();
        assert_eq!((channel.packets(), channel.position()), (packets, position));
        channel.on_pages();
        let bytes = HEADER_LEN as u64 + 2 * PAGE_BYTES;
        assert_eq!(
            (channel.packets(), channel.position()),
            (packets + 1, position + bytes)
        );
        assert_eq!(channel.pages_since_sync(), 2);
        let traffic = ChannelTraffic {
            pages: 2,
            zero_pages: 1,
            bytes,
        };
        assert_eq!(channel.take_traffic(), traffic);
        assert_eq!(channel.take_traffic(), ChannelTraffic::default());
    }

    #[test]
    #[should_panic(expected = "after the last action")]
    fn nothing_is_read_at_a_sync_point() {
        let mut channel = open();
        header(&mut channel, &PacketFields::sync(1)).unwrap();
        let _ = header(&mut channel, &PacketFields::sync(2));
    }
}
