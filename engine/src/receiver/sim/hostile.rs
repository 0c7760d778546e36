//! A session of a primary that sends what none should, beside those whose promises are checked. It is a model primary whose packets,
//! records and messages are changed, left out, repeated and exchanged on their way, and which goes on whatever it is answered.
//!
//! Of its own checkpoints nothing is known but that a commit stays as it was until the next one.

use super::memory::PAGE;
use super::primary::{Kind, Primary, Stream};
use super::rng::Rng;
use crate::store::Store;
use crate::units::{PACKET_PAGES, PAGE_BYTES, PageIndex};
use crate::wire::codec::Method;
use crate::wire::colo::Message;
use crate::wire::multifd::{HEADER_LEN, PacketFields};

/// What the seed of hostile primaries differs by.
const HOSTILE: u64 = 0x0068_6f73_7469_6c65;

/// One element in so many is changed.
const RATES: [usize; 5] = [3, 10, 40, 150, 1000];

/// In one of how many steps a commit is looked at again.
const LOOKS: usize = 8;

/// Elements that may be sent again.
const KEPT: usize = 30;

/// Numbers that are at the edge of something.
const EDGES: [u64; 10] = [
    0,
    1,
    PACKET_PAGES as u64,
    PACKET_PAGES as u64 + 1,
    PAGE_BYTES - 1,
    PAGE_BYTES,
    1 << 20,
    u32::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Which hostile primaries a run has: none, in most runs.
pub(super) fn kinds(seed: u64) -> (Rng, Vec<Kind>) {
    let mut rng = Rng::new(seed ^ HOSTILE);
    let count = if rng.one_in(3) { rng.range(1, 2) } else { 0 };
    let kinds = (0..count).map(|_| Kind::random(&mut rng)).collect();
    (rng, kinds)
}

/// See the module.
pub(super) struct Hostility {
    rng: Rng,
    rate: usize,
    /// Does not wait for answers, in one of so many tries.
    haste: usize,
    kept: Vec<Vec<u8>>,
    /// The content of the last commit.
    committed: Option<(u64, u32)>,
}

/// Packets, records or messages.
pub(super) type Elements = Vec<Vec<u8>>;

/// Takes what is in `out`, packet by packet, record by record.
pub(super) fn elements(stream: &mut Stream) -> Elements {
    let out = std::mem::take(&mut stream.out);
    let base = stream.sent - out.len();
    let mut cuts: Vec<usize> = stream
        .starts
        .iter()
        .filter_map(|at| at.checked_sub(base))
        .collect();
    cuts.push(out.len());
    let mut cuts = cuts.into_iter().filter(|at| *at <= out.len());
    let mut elements = Vec::new();
    let mut from = cuts.next().unwrap_or(0);
    for to in cuts {
        elements.push(out[from..to].to_vec());
        from = to;
    }
    elements
}

impl Hostility {
    pub(super) fn new(rng: &mut Rng) -> Self {
        Self {
            rate: rng.pick(&RATES),
            haste: rng.pick(&[5, 50, 1_000_000]),
            kept: Vec::new(),
            committed: None,
            rng: Rng::new(rng.next()),
        }
    }

    /// Whether it goes on without an answer.
    pub(super) fn is_hasty(&mut self) -> bool {
        self.rng.one_in(self.haste)
    }

    /// Changes what its primary is about to send.
    pub(super) fn corrupt(&mut self, primary: &mut Primary) {
        let mut all: Vec<Elements> = primary.streams.iter_mut().map(elements).collect();
        for stream in 0..all.len() {
            let mut at = 0;
            while at < all[stream].len() {
                if self.rng.one_in(self.rate) {
                    self.change(&mut all, stream, at, primary);
                }
                at += 1;
            }
        }
        for (stream, elements) in primary.streams.iter_mut().zip(all) {
            stream.out = elements.concat();
        }
    }

    /// Does something to an element, or beside it.
    fn change(&mut self, all: &mut [Elements], stream: usize, at: usize, primary: &Primary) {
        let rng = &mut self.rng;
        match rng.below(11) {
            0 => flip(rng, &mut all[stream][at]),
            1 | 2 => set_number(rng, &mut all[stream][at]),
            3 => {
                let again = all[stream][at].clone();
                all[stream].insert(at, again);
            }
            4 => all[stream][at].clear(),
            5 => {
                let other = rng.below(all[stream].len());
                all[stream].swap(at, other);
            }
            6 => {
                let moved = std::mem::take(&mut all[stream][at]);
                let to = rng.below(all.len());
                let place = rng.below(all[to].len() + 1);
                all[to].insert(place, moved);
            }
            7 => {
                let length = rng.below(all[stream][at].len() + 1);
                all[stream][at].truncate(length);
            }
            8 => {
                if let Some(index) = self.kept.len().checked_sub(1).map(|last| rng.below(last + 1)) {
                    let again = self.kept[index].clone();
                    all[stream].insert(at, again);
                }
            }
            9 => {
                let message = random_message(rng);
                all[stream].insert(at, message);
            }
            _ => {
                let packet = wrong_packet(rng, primary);
                all[stream].insert(at, packet);
            }
        }
        if self.kept.len() == KEPT {
            self.kept.swap_remove(self.rng.below(KEPT));
        }
        self.kept.extend(all[stream].get(at).cloned());
    }

    /// What is committed stays as it is until the next commit.
    pub(super) fn check(&mut self, store: &Store) -> Result<(), String> {
        let Some(checkpoint) = store.committed().checkpoint() else {
            return match self.committed {
                None => Ok(()),
                Some((last, _)) => Err(format!("state {last} was committed, now none")),
            };
        };
        let is_known = self.committed.is_some_and(|(last, _)| last == checkpoint.0);
        if is_known && !self.rng.one_in(LOOKS) {
            return Ok(());
        }
        let mut checksum = crc32c::crc32c(&store.committed().device_state());
        let mut page = [0; PAGE];
        for at in 0..store.table().total_pages() {
            store.read_committed(PageIndex::new(at), &mut page);
            checksum = crc32c::crc32c_append(checksum, &page);
        }
        match self.committed.replace((checkpoint.0, checksum)) {
            Some((last, _)) if last > checkpoint.0 => {
                Err(format!("state {last} was committed, now {}", checkpoint.0))
            }
            Some((last, before)) if last == checkpoint.0 && before != checksum => Err(format!(
                "state {last} of a hostile primary is not what it was when it was committed"
            )),
            _ => Ok(()),
        }
    }
}

fn flip(rng: &mut Rng, element: &mut [u8]) {
    if !element.is_empty() {
        let at = rng.any_size(element.len()) - 1;
        element[at] ^= 1 << rng.below(8);
    }
}

/// Puts a number where one may be.
fn set_number(rng: &mut Rng, element: &mut [u8]) {
    let number = match rng.one_in(2) {
        true => rng.pick(&EDGES),
        false => PAGE_BYTES * rng.below(600) as u64,
    };
    let at = rng.any_size(element.len() + 1) - 1;
    let bytes = number.to_be_bytes();
    let bytes = if rng.one_in(2) { &bytes[..] } else { &bytes[4..] };
    for (to, from) in element[at..].iter_mut().zip(bytes) {
        *to = *from;
    }
}

fn random_message(rng: &mut Rng) -> Vec<u8> {
    let size = rng.pick(&EDGES);
    let message = rng.pick(&[
        Message::CheckpointReady,
        Message::CheckpointRequest,
        Message::CheckpointReply,
        Message::VmstateSend,
        Message::VmstateSize(size),
        Message::VmstateReceived,
        Message::VmstateLoaded,
    ]);
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// A packet that is well-formed, of any pages of any guest.
fn wrong_packet(rng: &mut Rng, primary: &Primary) -> Vec<u8> {
    let blocks = &primary.memory.blocks;
    let name = match rng.one_in(4) {
        true => "none",
        false => &blocks[rng.below(blocks.len())].0,
    };
    let pages = rng.any_size(PACKET_PAGES);
    let offsets: Vec<u64> = (0..pages)
        .map(|_| PAGE_BYTES * rng.any_size(300) as u64 - PAGE_BYTES)
        .collect();
    let (normal, zero) = offsets.split_at(rng.below(pages + 1));
    let method = rng.pick(&[Method::None, Method::None, Method::Zlib, Method::Zstd]);
    let payload = match method {
        Method::None => vec![0xee; normal.len() * PAGE],
        _ => (0..rng.any_size(2000))
            .map(|_| rng.next().to_le_bytes()[0])
            .collect(),
    };
    let mut header = [0; HEADER_LEN];
    PacketFields {
        sync: rng.one_in(4),
        method,
        pages_alloc: u32::try_from(PACKET_PAGES).expect("128"),
        payload_len: u32::try_from(payload.len()).expect("some pages"),
        packet_num: rng.next(),
        block: name.as_bytes(),
        normal,
        zero,
    }
    .encode(&mut header);
    [&header[..], &payload].concat()
}
