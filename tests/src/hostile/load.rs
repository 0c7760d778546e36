//! What a hostile primary does to the guests beside it: each is a session that works as hard as it can, for as long as it may.

use super::{
    Destination, HostilePrimary, Link, PAGE, RAM, commands, end_of_body, header, message, packet, ram_start,
    record, section, sync_packet,
};
use colo_ring::blocks::{BLOCK_NAME_MAX, BLOCKS_MAX, BlockTable};
use colo_ring::wire::colo::Message;
use colo_ring::wire::ram::{BlockRef, RamRecord, encode_block_list};
use colo_ring::wire::stream::{Command, Section, encode_footer};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Bytes that are sent in one write.
const PORTION: usize = 1 << 20;

/// What a hostile primary does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// Checkpoints with as much device state as the receiver takes, one after the other
    States,
    /// Pages of zeros on the main channel, each with a long name of a block that differs from the others' in its last bytes
    Names,
    /// Pages of zeros on the main channel, as short as a record can be
    Records,
    /// Packets of pages on all channels
    Pages,
    /// Packets of pages of zeros on all channels: much memory to write for few bytes
    Zeros,
    /// Sessions that end as soon as they have memory
    Sessions,
}

impl Load {
    /// Runs until `is_over`, as a new session whenever one was ended.
    pub fn run(self, to: Destination, channels: u8, state_bytes: usize, is_over: &AtomicBool) {
        while !is_over.load(Ordering::Relaxed) {
            // That the receiver ends the session is to be expected.
            let _ = match self {
                Self::States => states(to, channels, state_bytes, is_over),
                Self::Names => records(to, channels, &named(), is_over),
                Self::Records => records(to, channels, &continued(), is_over),
                Self::Pages => packets(to, channels, &full_packet(), is_over),
                Self::Zeros => packets(to, channels, &zero_packet(), is_over),
                Self::Sessions => session(to, channels),
            };
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Names of the most and longest blocks that there can be, equal but for their ends.
fn names() -> impl Iterator<Item = Vec<u8>> {
    (0..BLOCKS_MAX).map(|number| {
        let mut name = vec![b'x'; BLOCK_NAME_MAX];
        let digits = format!("{number:04}");
        name[BLOCK_NAME_MAX - digits.len()..].copy_from_slice(digits.as_bytes());
        name
    })
}

fn portion_of(records: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut portion = Vec::new();
    for record in records {
        portion.extend_from_slice(&record);
        if portion.len() >= PORTION {
            break;
        }
    }
    portion
}

/// The blocks that come last are the ones that a search from the beginning finds last.
fn named() -> Vec<u8> {
    let last: Vec<_> = names().skip(BLOCKS_MAX / 2).collect();
    portion_of((0..).map(|turn: usize| {
        let block = BlockRef::Named(&last[turn % last.len()]);
        record(RamRecord::Zero { block, offset: 0 })
    }))
}

fn continued() -> Vec<u8> {
    let first = names().next().expect("there are some");
    let block = BlockRef::Named(&first);
    let first = record(RamRecord::Zero { block, offset: 0 });
    let again = record(RamRecord::Zero {
        block: BlockRef::Continue,
        offset: 0,
    });
    portion_of(std::iter::once(first).chain(std::iter::repeat(again)))
}

const PACKET_PAGES: u64 = 128;

fn full_packet() -> Vec<u8> {
    let name = names().next().expect("there are some");
    let pages: Vec<_> = (0..PACKET_PAGES).map(|page| (page * PAGE, 0x55)).collect();
    packet(std::str::from_utf8(&name).expect("text"), &pages, &[])
}

fn zero_packet() -> Vec<u8> {
    let name = names().next().expect("there are some");
    let pages: Vec<_> = (0..PACKET_PAGES).map(|page| page * PAGE).collect();
    packet(std::str::from_utf8(&name).expect("text"), &[], &pages)
}

/// A session that has its memory: of as many blocks as there can be, of which the first has room for a packet.
fn with_memory(to: Destination, channels: u8) -> io::Result<HostilePrimary> {
    let mut primary = HostilePrimary::connect(to, channels);
    let lengths = std::iter::once(PACKET_PAGES * PAGE).chain(std::iter::repeat(PAGE));
    let entries: Vec<_> = names().map(Vec::into_boxed_slice).zip(lengths).collect();
    let total = entries.iter().map(|(_, bytes)| bytes).sum();
    let mut list = Vec::new();
    encode_block_list(&mut list, &BlockTable::new(entries, total).expect("a good list"));
    let start = [
        header(),
        commands(&[Command::OpenReturnPath, Command::Ping(1)]),
        ram_start(),
        list,
        primary.marker(),
        end_of_body(),
    ]
    .concat();
    primary.main.try_send(&start)?;
    for channel in &mut primary.channels {
        channel.try_send(&sync_packet())?;
    }
    Ok(primary)
}

fn session(to: Destination, channels: u8) -> io::Result<()> {
    with_memory(to, channels).map(drop)
}

/// Sends the same until the session ends.
fn flood(link: &mut Link, portion: &[u8], is_over: &AtomicBool) -> io::Result<()> {
    while !is_over.load(Ordering::Relaxed) {
        link.try_send(portion)?;
    }
    Ok(())
}

fn records(to: Destination, channels: u8, portion: &[u8], is_over: &AtomicBool) -> io::Result<()> {
    let mut primary = with_memory(to, channels)?;
    primary.main.try_send(&section(Section::Part { id: RAM }))?;
    flood(&mut primary.main, portion, is_over)
}

fn packets(to: Destination, channels: u8, packet: &[u8], is_over: &AtomicBool) -> io::Result<()> {
    let portion = packet.repeat(PORTION.div_ceil(packet.len()));
    let mut primary = with_memory(to, channels)?;
    if primary.channels.is_empty() {
        let error = "without channels there are no packets";
        return Err(io::Error::other(error));
    }
    std::thread::scope(|scope| {
        for channel in &mut primary.channels {
            scope.spawn(|| flood(channel, &portion, is_over));
        }
    });
    Ok(())
}

fn states(to: Destination, channels: u8, bytes: usize, is_over: &AtomicBool) -> io::Result<()> {
    let mut primary = HostilePrimary::protected(to, channels);
    let mut state = section(Section::Full {
        id: 5,
        idstr: b"cpu",
        instance: 0,
        version: 1,
    });
    state.resize(bytes.saturating_sub(6), 0x77);
    encode_footer(&mut state, 5);
    Section::Eof.encode(&mut state);
    while !is_over.load(Ordering::Relaxed) {
        primary.main.try_send(&message(Message::CheckpointRequest))?;
        primary.main.try_expect(&message(Message::CheckpointReply))?;
        let size = Message::VmstateSize(state.len() as u64);
        let before = [
            message(Message::VmstateSend),
            primary.round(&[]),
            section(Section::Eof),
            message(size),
        ];
        primary.main.try_send(&before.concat())?;
        for channel in &mut primary.channels {
            channel.try_send(&sync_packet())?;
        }
        primary.main.try_send(&state)?;
        primary.main.try_expect(&super::answers_to_checkpoint())?;
    }
    Ok(())
}
