//! Recordings made here, packet by packet, of a session that was really held.

use super::*;
use crate::primary::Version;
use crate::streams::Connection;
use crate::streams::tests::{CHECKPOINTS, options, recorded};
use etherparse::PacketBuilder;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use std::path::Path;
use std::time::Duration;

const PORT: u16 = 4444;

/// What the packets lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Ethernet,
    Cooked,
    Cooked2,
    Raw,
    Loopback,
}

impl Link {
    fn number(self) -> u32 {
        match self {
            Self::Ethernet => 1,
            Self::Cooked => 113,
            Self::Cooked2 => 276,
            Self::Raw => 101,
            Self::Loopback => 0,
        }
    }

    fn wrap(self, ip: &[u8]) -> Vec<u8> {
        let is_v6 = ip[0] >> 4 == 6;
        let protocol: [u8; 2] = if is_v6 { [0x86, 0xdd] } else { [8, 0] };
        let mut packet = match self {
            Self::Ethernet => [&[2; 12][..], &protocol].concat(),
            Self::Cooked => [&[0; 14][..], &protocol].concat(),
            Self::Cooked2 => [&protocol[..], &[0; 18]].concat(),
            Self::Raw => Vec::new(),
            Self::Loopback => vec![2, 0, 0, 0],
        };
        packet.extend_from_slice(ip);
        // Short frames are padded on an Ethernet.
        if self == Self::Ethernet && packet.len() < 60 {
            packet.resize(60, 0xaa);
        }
        packet
    }
}

/// A segment to be recorded.
#[derive(Clone, Debug)]
struct Sent {
    at: Duration,
    client: u16,
    to_secondary: bool,
    sequence: u32,
    acknowledged: Option<u32>,
    flags: &'static str,
    payload: Vec<u8>,
}

impl Sent {
    fn ip(&self, v6: bool) -> Vec<u8> {
        let (from, to) = match self.to_secondary {
            true => (self.client, PORT),
            false => (PORT, self.client),
        };
        let addresses = if self.to_secondary { [1, 2] } else { [2, 1] };
        let mut ip = Vec::new();
        let finish = |mut builder: etherparse::PacketBuilderStep<etherparse::TcpHeader>, ip: &mut Vec<u8>| {
            if let Some(acknowledged) = self.acknowledged {
                builder = builder.ack(acknowledged);
            }
            for flag in self.flags.chars() {
                builder = match flag {
                    'S' => builder.syn(),
                    'F' => builder.fin(),
                    _ => builder.rst(),
                };
            }
            builder.write(ip, &self.payload).unwrap();
        };
        if v6 {
            let address = |last| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
            let builder = PacketBuilder::ipv6(address(addresses[0]), address(addresses[1]), 64);
            finish(builder.tcp(from, to, self.sequence, 1024), &mut ip);
        } else {
            let builder = PacketBuilder::ipv4([10, 0, 0, addresses[0]], [10, 0, 0, addresses[1]], 64);
            finish(builder.tcp(from, to, self.sequence, 1024), &mut ip);
        }
        ip
    }
}

/// The segments of a session, in the order in which they were sent: handshakes, data in pieces, ends.
fn segments(connections: &[Connection], rng: &mut SmallRng) -> Vec<Sent> {
    let mut all = Vec::new();
    for (connection, client) in connections.iter().zip(50_000..) {
        // One of them wraps around in the middle of precopy.
        let isns = [rng.random(), u32::MAX - 1000];
        let mut next = isns.map(|isn: u32| isn.wrapping_add(1));
        let begin = connection.to_secondary.at(0).unwrap_or_default();
        let sent = |at, to_secondary: bool, sequence, acknowledged, flags, payload: &[u8]| Sent {
            at,
            client,
            to_secondary,
            sequence,
            acknowledged,
            flags,
            payload: payload.to_vec(),
        };
        all.push(sent(begin, true, isns[0], None, "S", b""));
        all.push(sent(begin, false, isns[1], Some(next[0]), "S", b""));
        let mut chunks = Vec::new();
        for (flow, to_secondary) in [(&connection.to_secondary, true), (&connection.to_primary, false)] {
            let mut first = 0;
            for chunk in flow.chunks() {
                chunks.push((chunk.at, to_secondary, first..chunk.end));
                first = chunk.end;
            }
        }
        chunks.sort_by_key(|(at, ..)| *at);
        for (at, to_secondary, range) in chunks {
            let (flow, own, other) = if to_secondary {
                (&connection.to_secondary, 0, 1)
            } else {
                (&connection.to_primary, 1, 0)
            };
            let mut rest = &flow.bytes()[range];
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rng.random_range(1..=9000).min(rest.len()));
                all.push(sent(at, to_secondary, next[own], Some(next[other]), "", piece));
                next[own] = next[own].wrapping_add(u32::try_from(piece.len()).unwrap());
                rest = more;
            }
        }
        let last = all.last().unwrap().at;
        all.push(sent(last, true, next[0], Some(next[1]), "F", b""));
        all.push(sent(
            last,
            false,
            next[1],
            Some(next[0].wrapping_add(1)),
            "F",
            b"",
        ));
    }
    all.sort_by_key(|sent| sent.at);
    all
}

fn classic(link: Link, nanoseconds: bool, packets: &[(Duration, Vec<u8>)]) -> Vec<u8> {
    let magic: u32 = if nanoseconds { 0xa1b2_3c4d } else { 0xa1b2_c3d4 };
    let head = [magic, 0x0004_0002, 0, 0, 262_144, link.number()];
    let mut file: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
    for (at, packet) in packets {
        let fraction = if nanoseconds {
            at.subsec_nanos()
        } else {
            at.subsec_micros()
        };
        let length = u32::try_from(packet.len()).unwrap();
        let head = [u32::try_from(at.as_secs()).unwrap(), fraction, length, length];
        file.extend(head.iter().flat_map(|word| word.to_le_bytes()));
        file.extend_from_slice(packet);
    }
    file
}

fn next_generation(link: Link, packets: &[(Duration, Vec<u8>)]) -> Vec<u8> {
    let block = |kind: u32, body: &[u8]| {
        let length = u32::try_from(12 + body.len()).unwrap().to_le_bytes();
        [&kind.to_le_bytes()[..], &length, body, &length].concat()
    };
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let mut file = block(
        0x0a0d_0d0a,
        &words(&[0x1a2b_3c4d, 0x0000_0001, u32::MAX, u32::MAX]),
    );
    // Nanoseconds: option if_tsresol, then the end of options.
    let interface = words(&[link.number(), 0, 0x0001_0009, 9, 0]);
    file.extend(block(1, &interface));
    for (at, packet) in packets {
        let ticks = u64::try_from(at.as_nanos()).unwrap();
        let (high, low) = (
            u32::try_from(ticks >> 32).unwrap(),
            u32::try_from(ticks & 0xffff_ffff).unwrap(),
        );
        let length = u32::try_from(packet.len()).unwrap();
        let mut body = words(&[0, high, low, length, length]);
        body.extend_from_slice(packet);
        body.resize(body.len().next_multiple_of(4), 0);
        file.extend(block(6, &body));
    }
    file
}

fn packets(segments: &[Sent], link: Link, v6: bool) -> Vec<(Duration, Vec<u8>)> {
    let since = Duration::from_secs(1_700_000_000);
    segments
        .iter()
        .map(|sent| (since + sent.at, link.wrap(&sent.ip(v6))))
        .collect()
}

/// The options for a recording with these bytes, in this directory.
fn import_of(directory: &Path, file: &[u8]) -> ImportArgs {
    std::fs::write(directory.join("in"), file).unwrap();
    ImportArgs {
        file: directory.join("in"),
        port: PORT,
        out: directory.join("out"),
        force: true,
        compress: Compression::None,
        json: false,
    }
}

/// By how much a packet's time is behind that of another one before it, at most.
fn disorder(packets: &[(Duration, Vec<u8>)]) -> Duration {
    let mut newest = Duration::ZERO;
    let behind = packets.iter().map(|(at, _)| {
        newest = newest.max(*at);
        newest - *at
    });
    behind.max().unwrap_or_default()
}

/// `disorder` is by how much the time of a byte may not be its own.
fn assert_same(out: &Path, connections: &[Connection], disorder: Duration) {
    let imported = Streams::load(out).unwrap();
    let direct = Streams::new(connections.to_vec()).unwrap();
    assert_eq!(imported.notes, [] as [&str; 0]);
    assert_eq!(imported.checkpoints.len(), CHECKPOINTS);
    assert!(imported.main.to_secondary.bytes() == direct.main.to_secondary.bytes());
    assert!(imported.main.to_primary.bytes() == direct.main.to_primary.bytes());
    for (imported, direct) in imported.channels.iter().zip(&direct.channels) {
        assert!(imported.connection.to_secondary.bytes() == direct.connection.to_secondary.bytes());
    }
    for (imported, direct) in imported.checkpoints.iter().zip(&direct.checkpoints) {
        assert_eq!(imported.transfer, direct.transfer);
        assert_eq!(imported.packets, direct.packets);
        assert_eq!(imported.pages, direct.pages);
    }
    // The times of the session are the recording's, which may be in whole microseconds.
    let between = |streams: &Streams| streams.checkpoints[CHECKPOINTS - 1].at - streams.began();
    let difference = between(&imported).abs_diff(between(&direct));
    assert!(
        difference <= 2 * disorder + Duration::from_micros(1),
        "{difference:?}"
    );
}

#[test]
fn every_kind_of_recording_gives_the_session() {
    let connections = recorded(&options(Version::V11_1, 2));
    let mut rng = SmallRng::seed_from_u64(1);
    let segments = segments(&connections, &mut rng);
    for (number, link) in [
        Link::Ethernet,
        Link::Cooked,
        Link::Cooked2,
        Link::Raw,
        Link::Loopback,
    ]
    .into_iter()
    .enumerate()
    {
        let packets = packets(&segments, link, number % 2 == 1 && link != Link::Loopback);
        for file in [
            classic(link, false, &packets),
            classic(link, true, &packets),
            next_generation(link, &packets),
        ] {
            let scratch = tempfile::tempdir().unwrap();
            let args = import_of(scratch.path(), &file);
            let (totals, count, notes, missing) = import(&args).unwrap();
            assert!(missing.is_none(), "{link:?}: {missing:?}");
            assert_eq!(
                (totals.connections, count, notes.len()),
                (3, packets.len() as u64, 0)
            );
            assert_same(&args.out, &connections, Duration::ZERO);
        }
    }
}

#[test]
fn disorder_and_repetition_are_put_right() {
    let connections = recorded(&options(Version::V11_1, 1));
    for seed in 0..5 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut segments = segments(&connections, &mut rng);
        // A tenth is seen twice, as with -i any; neighbours change places; other traffic is between them.
        for position in (0..segments.len()).rev().filter(|position| position % 10 == 0) {
            let again = segments[position].clone();
            let later = (position + rng.random_range(1..20)).min(segments.len());
            segments.insert(later, again);
        }
        // No data overtakes its handshake, which takes a round trip.
        let (handshakes, mut data): (Vec<_>, Vec<_>) =
            segments.into_iter().partition(|sent| sent.flags.contains('S'));
        data.chunks_mut(7).for_each(|some| some.shuffle(&mut rng));
        let mut packets = packets(&[handshakes, data].concat(), Link::Ethernet, false);
        let disorder = disorder(&packets);
        let stranger = [0xff; 80].to_vec();
        packets.insert(packets.len() / 2, (packets[0].0, stranger));
        let scratch = tempfile::tempdir().unwrap();
        let args = import_of(scratch.path(), &classic(Link::Ethernet, true, &packets));
        let (_, _, _, missing) = import(&args).unwrap();
        assert!(missing.is_none(), "seed {seed}: {missing:?}");
        assert_same(&args.out, &connections, disorder);
    }
}

#[test]
fn what_is_lost_is_reported_and_what_came_before_is_kept() {
    let connections = recorded(&options(Version::V11_1, 1));
    let segments = segments(&connections, &mut SmallRng::seed_from_u64(1));
    let scratch = tempfile::tempdir().unwrap();
    // The last segment of the channel with anything in it.
    let lost = segments
        .iter()
        .rposition(|sent| sent.client == 50_001 && sent.payload.len() > 1)
        .unwrap();
    let length = segments[lost].payload.len();
    let end = connections[1].to_secondary.bytes().len();
    let mut rest = segments.clone();
    rest.remove(lost);
    let args = import_of(
        scratch.path(),
        &classic(Link::Raw, true, &packets(&rest, Link::Raw, false)),
    );
    let (_, _, _, missing) = import(&args).unwrap();
    let text = missing.unwrap().to_string();
    let expected = format!(
        "(10.0.0.1:50001), to the secondary: bytes {} to {end}",
        end - length
    );
    assert!(text.contains(&expected), "{text}");
    let imported = Streams::load(&args.out).unwrap();
    assert!(imported.checkpoints.len() >= CHECKPOINTS - 1);
    assert!(
        imported.notes[0].contains("were not recorded"),
        "{:?}",
        imported.notes
    );

    // Cut by a short snap length.
    let mut packets = packets(&segments, Link::Raw, false);
    let whole = classic(Link::Raw, true, &packets);
    let cut = packets.iter().position(|(_, packet)| packet.len() > 200).unwrap();
    packets[cut].1.truncate(96);
    let mut file = classic(Link::Raw, true, &packets[..=cut]);
    let original = file.len() - 96 - 4;
    file[original..original + 4].copy_from_slice(&5000u32.to_le_bytes());
    let (_, _, _, missing) = import(&import_of(scratch.path(), &file)).unwrap();
    let text = missing.unwrap().to_string();
    assert!(
        text.starts_with(&format!(
            "packet {} was recorded without its last 4904 bytes",
            cut + 1
        )),
        "{text}"
    );

    // A file that ends in the middle of a packet is as good as one that ends before it.
    let (_, _, notes, _) = import(&import_of(scratch.path(), &whole[..whole.len() - 5])).unwrap();
    assert!(notes[0].contains("ends inside a packet"), "{notes:?}");
}

#[test]
fn what_is_no_recording_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let error = |file: &[u8]| import(&import_of(scratch.path(), file)).unwrap_err().to_string();
    assert!(error(b"").contains("neither pcap nor pcapng"));
    assert!(error(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0]).contains("neither pcap nor pcapng"));
    let one = |link: u32| {
        let head = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, link, 1, 0, 40, 40];
        let mut file: Vec<u8> = head.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        file.extend([0x45; 40]);
        file
    };
    assert!(error(&one(147)).contains("link type 147"));
    assert!(error(&one(1)).contains("no connection to TCP port 4444"));
    // A recording that was begun too late.
    let connections = recorded(&options(Version::V11_1, 1));
    let segments = segments(&connections, &mut SmallRng::seed_from_u64(1));
    let late: Vec<_> = segments
        .into_iter()
        .filter(|sent| !sent.flags.contains('S'))
        .collect();
    let late = classic(Link::Raw, true, &packets(&late, Link::Raw, false));
    assert!(error(&late).contains("from its begin on"));
}

/// Whatever the bytes, an answer and no panic.
#[test]
fn damaged_recordings_are_survived() {
    let connections = recorded(&options(Version::V11_1, 1));
    let mut rng = SmallRng::seed_from_u64(7);
    let mut segments = segments(&connections, &mut rng);
    segments.truncate(60);
    let scratch = tempfile::tempdir().unwrap();
    for link in [Link::Ethernet, Link::Cooked2] {
        let packets = packets(&segments, link, false);
        for whole in [classic(link, false, &packets), next_generation(link, &packets)] {
            for _ in 0..50 {
                let mut file = whole.clone();
                for _ in 0..rng.random_range(1..20) {
                    let position = rng.random_range(0..file.len());
                    file[position] = rng.random();
                }
                file.truncate(rng.random_range(1..=file.len()));
                let _ = import(&import_of(scratch.path(), &file));
            }
        }
    }
}
