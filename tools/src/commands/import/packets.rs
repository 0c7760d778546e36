//! TCP segments out of a pcap or pcapng file.

use super::ImportError;
use etherparse::{EtherType, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Bytes of the file that are held: enough for some packets, and at most for one of this length.
const BUFFER_BYTES: usize = 1 << 20;
const PACKET_MAX: usize = 16 << 20;

/// Nanoseconds in a second.
const SECOND_NS: u128 = 1_000_000_000;

/// One TCP segment as it was recorded.
#[derive(Debug)]
pub(super) struct Segment<'a> {
    /// Since 1970.
    pub at: Duration,
    /// Number of the packet in the file, from 1.
    pub packet: u64,
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub sequence: u32,
    pub acknowledged: Option<u32>,
    pub syn: bool,
    pub fin: bool,
    pub reset: bool,
    pub payload: &'a [u8],
    /// Bytes that the recorder has cut off.
    pub cut: u32,
}

/// What the file was.
#[derive(Debug, Default)]
pub(super) struct FileSummary {
    pub packets: u64,
    /// IP fragments, which are not put together.
    pub fragments: u64,
    /// Whether it ends inside a packet.
    pub is_torn: bool,
}

/// An interface of the file.
#[derive(Clone, Copy, Debug)]
struct Interface {
    link: Linktype,
    ticks_per_second: u64,
    offset_s: i64,
}

/// Reads all TCP segments, in the order of the file.
///
/// # Errors
/// If the file cannot be read or is none of the two, and what `take` says.
pub(super) fn read(
    file: impl Read + Send,
    mut take: impl FnMut(Segment<'_>) -> Result<(), ImportError>,
) -> Result<FileSummary, ImportError> {
    let mut reader = create_reader(BUFFER_BYTES, file).map_err(|error| match error {
        PcapError::ReadError => ImportError::Damaged {
            offset: 0,
            what: "it cannot be read".to_owned(),
        },
        _ => ImportError::Foreign,
    })?;
    let mut capacity = BUFFER_BYTES;
    let mut summary = FileSummary::default();
    let mut interfaces = Vec::new();
    loop {
        let damaged = |offset: usize, error: &PcapError<&[u8]>| ImportError::Damaged {
            offset: offset as u64,
            what: error.to_string(),
        };
        let consumed = reader.consumed();
        match reader.next() {
            Ok((length, block)) => {
                if let Some(packet) = understand(block, &mut interfaces)? {
                    summary.packets += 1;
                    segment(&packet, &mut summary, &mut take)?;
                }
                reader.consume(length);
            }
            Err(PcapError::Eof) => return Ok(summary),
            Err(PcapError::UnexpectedEof) => {
                summary.is_torn = true;
                return Ok(summary);
            }
            Err(PcapError::BufferTooSmall) if capacity < PACKET_MAX => {
                capacity *= 2;
                reader.grow(capacity);
            }
            Err(PcapError::Incomplete(_)) => {
                if reader.reader_exhausted() {
                    summary.is_torn = true;
                    return Ok(summary);
                }
                reader.refill().map_err(|error| damaged(consumed, &error))?;
            }
            Err(error) => return Err(damaged(consumed, &error)),
        }
    }
}

/// A packet with what is known of it.
struct Packet<'a> {
    at: Duration,
    link: Linktype,
    bytes: &'a [u8],
    length: u32,
}

/// Takes in a block; returns the packet, if it is one.
fn understand<'a>(
    block: PcapBlockOwned<'a>,
    interfaces: &mut Vec<Interface>,
) -> Result<Option<Packet<'a>>, ImportError> {
    match block {
        PcapBlockOwned::LegacyHeader(header) => {
            let ticks_per_second = if header.is_nanosecond_precision() {
                1_000_000_000
            } else {
                1_000_000
            };
            *interfaces = vec![Interface {
                link: header.network,
                ticks_per_second,
                offset_s: 0,
            }];
            Ok(None)
        }
        PcapBlockOwned::Legacy(packet) => {
            let interface = interface(interfaces, 0)?;
            let ticks = u128::from(packet.ts_usec) * SECOND_NS / u128::from(interface.ticks_per_second);
            let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
            Ok(Some(Packet {
                at: Duration::from_secs(packet.ts_sec.into()) + Duration::from_nanos(ticks),
                link: interface.link,
                bytes: packet.data,
                length: packet.origlen,
            }))
        }
        PcapBlockOwned::NG(Block::SectionHeader(_)) => {
            interfaces.clear();
            Ok(None)
        }
        PcapBlockOwned::NG(Block::InterfaceDescription(description)) => {
            let ticks_per_second = description.ts_resolution().filter(|ticks| *ticks > 0);
            interfaces.push(Interface {
                link: description.linktype,
                ticks_per_second: ticks_per_second.ok_or(ImportError::Resolution(description.if_tsresol))?,
                offset_s: description.if_tsoffset,
            });
            Ok(None)
        }
        PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
            let interface = interface(interfaces, packet.if_id)?;
            let ticks = u128::from(packet.ts_high) << 32 | u128::from(packet.ts_low);
            let nanoseconds = ticks * SECOND_NS / u128::from(interface.ticks_per_second);
            let since = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
            let offset = Duration::from_secs(interface.offset_s.unsigned_abs());
            let at = if interface.offset_s < 0 {
                since.saturating_sub(offset)
            } else {
                since.saturating_add(offset)
            };
            let whole = usize::try_from(packet.caplen).unwrap_or(usize::MAX);
            Ok(Some(Packet {
                at,
                link: interface.link,
                // The block's data is padded.
                bytes: &packet.data[..whole.min(packet.data.len())],
                length: packet.orig_len(),
            }))
        }
        PcapBlockOwned::NG(Block::SimplePacket(_)) => Err(ImportError::NoTimes),
        PcapBlockOwned::NG(_) => Ok(None),
    }
}

fn interface(interfaces: &[Interface], id: u32) -> Result<Interface, ImportError> {
    let position = usize::try_from(id).unwrap_or(usize::MAX);
    interfaces
        .get(position)
        .copied()
        .ok_or(ImportError::Interface(id))
}

/// Finds the TCP segment in a packet, if there is one.
fn segment(
    packet: &Packet<'_>,
    summary: &mut FileSummary,
    take: &mut impl FnMut(Segment<'_>) -> Result<(), ImportError>,
) -> Result<(), ImportError> {
    let Some(sliced) = slice(packet)? else {
        return Ok(());
    };
    let (from, to) = match &sliced.net {
        Some(LaxNetSlice::Ipv4(ip)) => (
            IpAddr::from(ip.header().source_addr()),
            IpAddr::from(ip.header().destination_addr()),
        ),
        Some(LaxNetSlice::Ipv6(ip)) => (
            IpAddr::from(ip.header().source_addr()),
            IpAddr::from(ip.header().destination_addr()),
        ),
        _ => return Ok(()),
    };
    summary.fragments += u64::from(sliced.ip_payload().is_some_and(|payload| payload.fragmented));
    let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else {
        return Ok(());
    };
    let seen = u32::try_from(packet.bytes.len()).unwrap_or(u32::MAX);
    take(Segment {
        at: packet.at,
        packet: summary.packets,
        from: SocketAddr::new(from, tcp.source_port()),
        to: SocketAddr::new(to, tcp.destination_port()),
        sequence: tcp.sequence_number(),
        acknowledged: tcp.ack().then(|| tcp.acknowledgment_number()),
        syn: tcp.syn(),
        fin: tcp.fin(),
        reset: tcp.rst(),
        payload: tcp.payload(),
        cut: packet.length.saturating_sub(seen),
    })
}

/// Cuts a packet into its layers; None if it is not IP.
fn slice<'a>(packet: &Packet<'a>) -> Result<Option<LaxSlicedPacket<'a>>, ImportError> {
    /// The protocol's offset in Linux's cooked headers, and their length.
    const COOKED: (usize, usize) = (14, 16);
    const COOKED_2: (usize, usize) = (0, 20);
    /// Length of the address family before packets of BSD's loopback.
    const FAMILY_LEN: usize = 4;
    let bytes = packet.bytes;
    let ip = |bytes: &'a [u8]| LaxSlicedPacket::from_ip(bytes).ok();
    let cooked = |(protocol, length): (usize, usize)| {
        let protocol = u16::from_be_bytes(*bytes.get(protocol..)?.first_chunk()?);
        let rest = bytes.get(length..)?;
        matches!(EtherType(protocol), EtherType::IPV4 | EtherType::IPV6)
            .then(|| ip(rest))
            .flatten()
    };
    Ok(match packet.link {
        Linktype::ETHERNET => LaxSlicedPacket::from_ethernet(bytes).ok(),
        Linktype::RAW | Linktype::IPV4 | Linktype::IPV6 => ip(bytes),
        Linktype::NULL | Linktype::LOOP => bytes.get(FAMILY_LEN..).and_then(ip),
        Linktype::LINUX_SLL => cooked(COOKED),
        Linktype::LINUX_SLL2 => cooked(COOKED_2),
        Linktype(other) => return Err(ImportError::Link(other)),
    })
}
