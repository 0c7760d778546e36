//! Hostile sessions of every kind, one after the other, as the numbers of a generator say: strangers, parts of sessions, and sessions
//! of which something is changed, left out, repeated, cut or never comes. Each of them ends: nothing of it is left on this side.

use super::bytes::{
    answers_to_checkpoint, answers_to_precopy, block_list, commands, compressed_packet, device_state,
    end_of_body, header, message, packet, page_record, ram_start, record, section, sync_packet, vmdesc,
};
use super::{BLOCKS, Cut, PAGE, RAM};
use colo_ring::link::PREFACE;
use colo_ring::units::ChannelId;
use colo_ring::wire::codec::Method;
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::Init;
use colo_ring::wire::ram::{BlockRef, RamRecord};
use colo_ring::wire::stream::{Command, Section};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, RngExt};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// What a hostile peer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attack {
    /// A connection of something else.
    Stranger,
    /// A guard that makes no sense.
    Link,
    /// Some connections of a session.
    Part,
    /// All of them, and one more.
    Double,
    /// A session in which something is wrong.
    Wrong,
    /// A session without a fault that is cut somewhere.
    Cut,
}

const ATTACKS: [Attack; 12] = [
    Attack::Stranger,
    Attack::Link,
    Attack::Part,
    Attack::Double,
    Attack::Cut,
    Attack::Cut,
    Attack::Wrong,
    Attack::Wrong,
    Attack::Wrong,
    Attack::Wrong,
    Attack::Wrong,
    Attack::Wrong,
];

/// How long it waits for an answer: on a machine that is slower it goes on without.
const PATIENCE: Duration = Duration::from_millis(200);

/// Hosts that they come from.
const ORIGINS: u8 = 200;

/// How a session goes on.
#[derive(Clone)]
enum Step {
    /// On a connection: the main channel's is 0.
    Send(usize, Vec<u8>),
    /// So many bytes of answers.
    Await(usize),
}

/// Attacks a receiver.
pub struct Attacker {
    address: SocketAddrV4,
    channels: u8,
    rng: Xoshiro256PlusPlus,
    /// How many there were of each kind.
    pub attacks: BTreeMap<Attack, u64>,
}

/// A connection from a host of this machine's own network 127.0.0.0/8.
pub(super) fn connect_from(host: Ipv4Addr, to: SocketAddrV4) -> io::Result<TcpStream> {
    let made = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(made.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(host, 0)))?;
    connect(made.as_raw_fd(), &SockaddrIn::from(to))?;
    let stream = TcpStream::from(made);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

impl Attacker {
    /// One of a receiver that waits for so many channels.
    ///
    /// # Panics
    /// If that does not listen on IPv4.
    #[must_use]
    pub fn new(address: SocketAddr, channels: u8, rng: Xoshiro256PlusPlus) -> Self {
        let SocketAddr::V4(address) = address else {
            panic!("it listens on IPv4");
        };
        Self {
            address,
            channels,
            rng,
            attacks: BTreeMap::new(),
        }
    }

    /// Does one of them, to its end.
    ///
    /// # Errors
    /// If the receiver takes no connection.
    ///
    /// # Panics
    /// Never: there are kinds to choose from.
    pub fn attack(&mut self) -> io::Result<()> {
        let kind = *ATTACKS.choose(&mut self.rng).expect("some");
        *self.attacks.entry(kind).or_default() += 1;
        let host = self.rng.random_range(1..=ORIGINS);
        let mut connections = vec![connect_from(Ipv4Addr::new(127, 0, 1, host), self.address)?];
        match kind {
            Attack::Stranger => self.stranger(&mut connections[0]),
            Attack::Link => self.link(&mut connections[0]),
            Attack::Part => {
                let present = self.rng.random_range(0..=self.channels);
                let mut steps = self.session(present, 0);
                if self.rng.random_bool(0.5) {
                    // Without a main channel.
                    steps.retain(|step| matches!(step, Step::Send(1.., _)));
                }
                self.play(&mut connections, host, steps)?;
            }
            Attack::Double => {
                let mut steps = self.session(self.channels, 1);
                let id = self.rng.random_range(0..=self.channels);
                let again = Step::Send(usize::from(self.channels) + 1, self.init(id));
                let at = self.rng.random_range(0..steps.len());
                steps.insert(at, again);
                self.play(&mut connections, host, steps)?;
            }
            Attack::Cut => {
                let checkpoints = self.rng.random_range(0..4);
                let mut steps = self.session(self.channels, checkpoints);
                let end = self.rng.random_range(1..=steps.len());
                steps.truncate(end);
                if let Some(Step::Send(_, bytes)) = steps.last_mut() {
                    let length = self.rng.random_range(0..=bytes.len());
                    bytes.truncate(length);
                }
                self.play(&mut connections, host, steps)?;
            }
            Attack::Wrong => {
                let checkpoints = self.rng.random_range(0..4);
                let mut steps = self.session(self.channels, checkpoints);
                for _ in 0..self.rng.random_range(1..4) {
                    self.spoil(&mut steps);
                }
                self.play(&mut connections, host, steps)?;
            }
        }
        for connection in connections {
            [Cut::Fin, Cut::Rst]
                .choose(&mut self.rng)
                .expect("two")
                .apply(connection);
        }
        Ok(())
    }

    fn stranger(&mut self, connection: &mut TcpStream) {
        let mut random = vec![0; self.rng.random_range(1..2000)];
        self.rng.fill_bytes(&mut random);
        let wrong_init = self.init(255);
        let choices: [&[u8]; 6] = [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"",
            b"\x11\x22",
            &random,
            &wrong_init,
        ];
        // The receiver may have closed already.
        let _ = connection.write_all(choices.choose(&mut self.rng).expect("some"));
    }

    fn link(&mut self, connection: &mut TcpStream) {
        let hello =
            r#"{"type":"hello","version":2,"name":"x","uuid":null,"releases_in_pause":false,"timeout_ms":1}"#;
        let lines = [
            hello,
            r#"{"type":"placed","checkpoint":0}"#,
            r#"{"type":"primary_ended"}"#,
            r#"{"type":"leaving"}"#,
            "{",
            "[[[[[[[[[[",
        ];
        let mut bytes = PREFACE.to_vec();
        for _ in 0..self.rng.random_range(1..4) {
            bytes.extend_from_slice(lines.choose(&mut self.rng).expect("some").as_bytes());
            bytes.push(b'\n');
        }
        if self.rng.random_bool(0.2) {
            bytes.resize(9000, b'a');
        }
        let _ = connection.write_all(&bytes);
        let _ = connection.read(&mut [0; 200]);
    }

    fn init(&mut self, id: u8) -> Vec<u8> {
        let channel = ChannelId(id);
        Init {
            uuid: [7; 16],
            channel,
        }
        .encode()
        .to_vec()
    }

    /// A session with so many of its channels, up to so many checkpoints.
    fn session(&mut self, present: u8, checkpoints: u8) -> Vec<Step> {
        let is_plain = self.channels == 0;
        let marker = if is_plain {
            Vec::new()
        } else {
            record(RamRecord::MultifdFlush)
        };
        let main = |bytes: Vec<u8>| Step::Send(0, bytes);
        let all = |bytes: Vec<u8>| {
            (1..=usize::from(present)).map(move |channel| Step::Send(channel, bytes.clone()))
        };
        let mut steps = vec![main(header())];
        for id in 0..present {
            let init = self.init(id);
            steps.push(Step::Send(usize::from(id) + 1, init));
        }
        steps.push(main(commands(&[Command::OpenReturnPath, Command::Ping(1)])));
        steps.push(main(
            [ram_start(), block_list(), marker.clone(), end_of_body()].concat(),
        ));
        steps.extend(all(sync_packet()));
        steps.push(main(
            [section(Section::Part { id: RAM }), self.records(), end_of_body()].concat(),
        ));
        steps.extend(self.packets(present));
        steps.push(main(
            [section(Section::End { id: RAM }), marker.clone(), end_of_body()].concat(),
        ));
        steps.extend(all(sync_packet()));
        steps.push(main(device_state(0)));
        steps.push(main(vmdesc()));
        steps.push(Step::Await(answers_to_precopy().len()));
        for moment in 0..checkpoints {
            steps.push(main(message(Message::CheckpointRequest)));
            steps.push(Step::Await(message(Message::CheckpointReply).len()));
            steps.push(main(message(Message::VmstateSend)));
            steps.extend(self.packets(present));
            let records = self.records();
            steps.push(main(
                [
                    section(Section::End { id: RAM }),
                    records,
                    marker.clone(),
                    end_of_body(),
                ]
                .concat(),
            ));
            steps.extend(all(sync_packet()));
            let state = device_state(moment);
            steps.push(main(section(Section::Eof)));
            steps.push(main(message(Message::VmstateSize(state.len() as u64))));
            steps.push(main(state));
            steps.push(Step::Await(answers_to_checkpoint().len()));
        }
        steps
    }

    fn page(&mut self) -> (&'static str, u64) {
        let (name, bytes) = *BLOCKS.choose(&mut self.rng).expect("some");
        (name, PAGE * self.rng.random_range(0..bytes / PAGE))
    }

    /// Records of pages on the main channel, of a primary without multifd.
    fn records(&mut self) -> Vec<u8> {
        let count = if self.channels == 0 {
            self.rng.random_range(0..6)
        } else {
            0
        };
        let mut out = Vec::new();
        for _ in 0..count {
            let (name, offset) = self.page();
            let block = BlockRef::Named(name.as_bytes());
            out.extend(match self.rng.random_bool(0.5) {
                true => page_record(block, offset, self.rng.random()),
                false => record(RamRecord::Zero { block, offset }),
            });
        }
        out
    }

    fn packets(&mut self, present: u8) -> Vec<Step> {
        if present == 0 {
            return Vec::new();
        }
        let packets = 0..self.rng.random_range(0..6);
        let packet = |_| {
            let (name, offset) = self.page();
            let fill = self.rng.random();
            let channel = usize::from(self.rng.random_range(1..=present));
            Step::Send(channel, packet(name, &[(offset, fill)], &[]))
        };
        packets.map(packet).collect()
    }

    /// Does something to a session that none should.
    fn spoil(&mut self, steps: &mut Vec<Step>) {
        let at = self.rng.random_range(0..steps.len());
        let other = self.rng.random_range(0..steps.len());
        let number = *[0, 1, 127, 128, 129, PAGE - 1, PAGE, 1 << 20, 1 << 32, u64::MAX]
            .choose(&mut self.rng)
            .expect("some");
        match self.rng.random_range(0..9) {
            0 => steps.swap(at, other),
            1 => drop(steps.remove(at)),
            2 => {
                let again = steps[other].clone();
                steps.insert(at, again);
            }
            3 => {
                let wrong = self.wrong_packet();
                steps.insert(at, wrong);
            }
            4 => {
                let messages = [
                    Message::CheckpointRequest,
                    Message::VmstateSend,
                    Message::VmstateSize(number),
                    Message::VmstateLoaded,
                ];
                let wrong = message(*messages.choose(&mut self.rng).expect("some"));
                steps.insert(at, Step::Send(0, wrong));
            }
            5 => steps[at..].shuffle(&mut self.rng),
            _ => {
                let Step::Send(_, bytes) = &mut steps[at] else {
                    return;
                };
                if bytes.is_empty() {
                    return;
                }
                let at = self.rng.random_range(0..bytes.len());
                match self.rng.random_range(0..3) {
                    0 => bytes[at] ^= 1 << self.rng.random_range(0..8),
                    1 => bytes.truncate(at),
                    _ => bytes[at..]
                        .iter_mut()
                        .zip(number.to_be_bytes())
                        .for_each(|(to, from)| *to = from),
                }
            }
        }
    }

    /// A packet that is well-formed, and wrong.
    fn wrong_packet(&mut self) -> Step {
        let channel = usize::from(self.rng.random_range(0..=self.channels));
        let offset = PAGE * self.rng.random_range(0..100);
        let bytes = match self.rng.random_range(0..4) {
            0 => packet("none", &[(0, 1)], &[]),
            1 => packet("pc.ram", &[(offset, 1), (offset, 2)], &[offset]),
            2 => packet("pc.ram2", &[], &[offset, offset + 1]),
            _ => {
                let method = *[Method::Zlib, Method::Zstd, Method::Qpl, Method::Qatzip]
                    .choose(&mut self.rng)
                    .expect("some");
                let mut payload = vec![0; self.rng.random_range(1..300)];
                self.rng.fill_bytes(&mut payload);
                compressed_packet(method, "pc.ram", &[0, PAGE], &payload)
            }
        };
        Step::Send(channel, bytes)
    }

    /// Plays steps as far as the receiver lets it.
    fn play(&mut self, connections: &mut Vec<TcpStream>, host: u8, steps: Vec<Step>) -> io::Result<()> {
        for step in steps {
            match step {
                Step::Send(connection, bytes) => {
                    while connections.len() <= connection {
                        connections.push(connect_from(Ipv4Addr::new(127, 0, 1, host), self.address)?);
                    }
                    if connections[connection].write_all(&bytes).is_err() {
                        return Ok(());
                    }
                }
                Step::Await(count) => match connections[0].read_exact(&mut vec![0; count]) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return Ok(()),
                    Ok(()) => {}
                },
            }
        }
        Ok(())
    }
}
