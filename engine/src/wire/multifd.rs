//! The multifd channels: the init packet and the packets with pages and syncs (spec §8).
//!
//! A channel is [`INIT_LEN`] bytes once, then packets: [`HEADER_LEN`] bytes and a payload of
//! [`PacketHeader::payload_len`]. A header is decoded as a view of its bytes: nothing is copied or allocated, and
//! every rule about counts and sizes holds once [`PacketHeader::decode`] has returned. Addresses are checked by
//! [`PacketHeader::resolve`], which needs the block list.
//!
//! Not checked here, because it takes more than one packet: that a channel's first packet is a SYNC without pages,
//! and that a packet without pages and without SYNC (QEMU 7.2 sends some) is to be ignored.

use super::WireError;
use super::codec::{METHOD_MASK, Method};
use super::stream::MULTIFD_MAGIC;
use crate::blocks::{BlockTable, RamBlock};
use crate::units::{BlockId, ChannelId, PACKET_PAGES, PAGE_BYTES, PageIndex};

/// Bytes of the init packet, the first on each channel.
pub const INIT_LEN: usize = 64;
/// Bytes of a packet's header, however many pages it carries.
pub const HEADER_LEN: usize = 1344;
/// Bytes of a header that suffice for [`check_start`].
pub const START_LEN: usize = 12;

const VERSION: u32 = 1;
const BLOCK_LEN: usize = 256;

const FLAG_SYNC: u32 = 0x01;
const FLAG_DEVICE_STATE: u32 = 0x40;

/// Offsets in the init packet.
mod init_at {
    pub(super) const VERSION: usize = 4;
    pub(super) const UUID: usize = 8;
    pub(super) const CHANNEL: usize = 24;
    pub(super) const RESERVED: usize = 25;
}

/// Offsets in a packet's header.
mod at {
    pub(super) const VERSION: usize = 4;
    pub(super) const FLAGS: usize = 8;
    pub(super) const PAGES_ALLOC: usize = 12;
    pub(super) const NORMAL: usize = 16;
    pub(super) const PAYLOAD: usize = 20;
    pub(super) const PACKET_NUM: usize = 24;
    pub(super) const ZERO: usize = 32;
    pub(super) const RESERVED: usize = 36;
    pub(super) const BLOCK: usize = 64;
    pub(super) const OFFSETS: usize = 320;
}

const _: () = {
    assert!(init_at::UUID + 16 == init_at::CHANNEL);
    assert!(init_at::CHANNEL + 1 == init_at::RESERVED);
    assert!(init_at::RESERVED + 7 + 32 == INIT_LEN);
    assert!(at::FLAGS + 4 == START_LEN && at::PAGES_ALLOC == START_LEN);
    assert!(at::PACKET_NUM + 8 == at::ZERO);
    assert!(at::RESERVED + 4 + 3 * 8 == at::BLOCK);
    assert!(at::BLOCK + BLOCK_LEN == at::OFFSETS);
    assert!(at::OFFSETS + 8 * PACKET_PAGES == HEADER_LEN);
    assert!(PACKET_PAGES * crate::units::PAGE_SIZE == 512 << 10);
};

fn be32<const AT: usize, const LEN: usize>(bytes: &[u8; LEN]) -> u32 {
    u32::from_be_bytes([bytes[AT], bytes[AT + 1], bytes[AT + 2], bytes[AT + 3]])
}

fn check_magic(magic: &[u8], version: u32) -> Result<(), WireError> {
    if magic != MULTIFD_MAGIC {
        let seen = magic
            .iter()
            .fold(0, |number, &byte| number << 8 | u64::from(byte));
        return Err(WireError::value(
            "the magic of a multifd packet",
            seen,
            "0x11223344",
        ));
    }
    if version != VERSION {
        return Err(WireError::value(
            "the version of a multifd packet",
            version,
            "0x1",
        ));
    }
    Ok(())
}

fn check_reserved(bytes: &[u8]) -> Result<(), WireError> {
    match bytes.iter().find(|&&byte| byte != 0) {
        None => Ok(()),
        Some(&byte) => Err(WireError::value(
            "a reserved byte of a multifd packet",
            byte,
            "0x0",
        )),
    }
}

/// The init packet: names the guest and the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// The guest's UUID, zero if it has none. Equal on all channels of a session.
    pub uuid: [u8; 16],
    /// The channel's number. The assembler of the session checks that it is below N and not taken.
    pub channel: ChannelId,
}

impl Init {
    /// Decodes the packet.
    ///
    /// # Errors
    /// If magic, version or a reserved byte is wrong.
    pub fn decode(bytes: &[u8; INIT_LEN]) -> Result<Self, WireError> {
        check_magic(&bytes[..4], be32::<{ init_at::VERSION }, _>(bytes))?;
        check_reserved(&bytes[init_at::RESERVED..])?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[init_at::UUID..init_at::CHANNEL]);
        let channel = ChannelId(bytes[init_at::CHANNEL]);
        Ok(Self { uuid, channel })
    }

    /// Encodes the packet.
    pub fn encode(&self) -> [u8; INIT_LEN] {
        let mut bytes = [0; INIT_LEN];
        bytes[..4].copy_from_slice(&MULTIFD_MAGIC);
        bytes[init_at::VERSION..init_at::UUID].copy_from_slice(&VERSION.to_be_bytes());
        bytes[init_at::UUID..init_at::CHANNEL].copy_from_slice(&self.uuid);
        bytes[init_at::CHANNEL] = self.channel.0;
        bytes
    }
}

/// Checks the first bytes of a header, for a receiver that waits for the rest: a device-state packet has a shorter
/// header, so that wait would not end.
///
/// # Errors
/// As [`PacketHeader::decode`].
pub fn check_start(bytes: &[u8; START_LEN]) -> Result<(), WireError> {
    check_magic(&bytes[..4], be32::<{ at::VERSION }, _>(bytes))?;
    check_flags(be32::<{ at::FLAGS }, _>(bytes)).map(drop)
}

fn check_flags(flags: u32) -> Result<Method, WireError> {
    if flags & FLAG_DEVICE_STATE != 0 {
        let remedy = "remove its VFIO devices, or set their x-migration-multifd-transfer to off";
        return Err(WireError::refused("device state on a multifd channel", remedy));
    }
    let unknown = flags & !(FLAG_SYNC | METHOD_MASK);
    if unknown != 0 {
        let expected = "SYNC 0x1 and one method of 0x3e";
        return Err(WireError::value("the flags of a multifd packet", flags, expected));
    }
    Method::from_flags(flags)
}

/// A packet's header, decoded in place.
#[derive(Clone, Copy, Debug)]
pub struct PacketHeader<'a> {
    bytes: &'a [u8; HEADER_LEN],
    sync: bool,
    method: Method,
    normal: u16,
    zero: u16,
    payload_len: u32,
}

impl<'a> PacketHeader<'a> {
    /// Decodes a header.
    ///
    /// # Errors
    /// If a field breaks a rule of spec §8 or §21, or the packet is of a kind that cannot be received.
    pub fn decode(bytes: &'a [u8; HEADER_LEN]) -> Result<Self, WireError> {
        check_magic(&bytes[..4], be32::<{ at::VERSION }, _>(bytes))?;
        let flags = be32::<{ at::FLAGS }, _>(bytes);
        let method = check_flags(flags)?;
        check_reserved(&bytes[at::RESERVED..at::BLOCK])?;
        let room = u16::try_from(PACKET_PAGES).expect("128 pages");
        let pages_alloc = count("pages_alloc", be32::<{ at::PAGES_ALLOC }, _>(bytes), room)?;
        let normal = count("normal_pages", be32::<{ at::NORMAL }, _>(bytes), pages_alloc)?;
        let zero = count("zero_pages", be32::<{ at::ZERO }, _>(bytes), pages_alloc - normal)?;
        let announced = be32::<{ at::PAYLOAD }, _>(bytes);
        if normal > 0 {
            method.check_payload(normal, announced)?;
        }
        Ok(Self {
            bytes,
            sync: flags & FLAG_SYNC != 0,
            method,
            normal,
            zero,
            // 7.2 leaves a stale size in packets without pages; nothing follows them.
            payload_len: if normal > 0 { announced } else { 0 },
        })
    }

    /// Whether the channel has reached a sync point once this packet's pages are applied.
    pub fn is_sync(&self) -> bool {
        self.sync
    }

    /// How the payload is compressed. Meaningful only with normal pages.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Pages whose content is in the payload, up to [`PACKET_PAGES`].
    pub fn normal_pages(&self) -> u16 {
        self.normal
    }

    /// Pages that become all zero, up to [`PACKET_PAGES`] less the normal ones.
    pub fn zero_pages(&self) -> u16 {
        self.zero
    }

    /// Whether the packet carries pages of either kind. Without, its block name and offsets mean nothing.
    pub fn has_pages(&self) -> bool {
        self.normal + self.zero > 0
    }

    /// Bytes that follow the header.
    pub fn payload_len(&self) -> u32 {
        self.payload_len
    }

    /// The primary's count of packets over all channels. For messages only: 7.2 repeats numbers.
    pub fn packet_num(&self) -> u64 {
        let high = be32::<{ at::PACKET_NUM }, _>(self.bytes);
        let low = be32::<{ at::PACKET_NUM + 4 }, _>(self.bytes);
        u64::from(high) << 32 | u64::from(low)
    }

    /// Name of the block that all pages of the packet belong to.
    ///
    /// # Errors
    /// If its field has no terminating zero.
    pub fn block_name(&self) -> Result<&'a [u8], WireError> {
        let field = &self.bytes[at::BLOCK..at::OFFSETS];
        match field.iter().position(|&byte| byte == 0) {
            Some(end) => Ok(&field[..end]),
            None => Err(WireError::Limit {
                field: "the length of a multifd packet's block name",
                seen: BLOCK_LEN as u64,
                limit: BLOCK_LEN as u64 - 1,
            }),
        }
    }

    /// Byte offsets of the normal pages in their block, in the payload's order. Not checked.
    pub fn normal_offsets(&self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.offsets(0, self.normal)
    }

    /// Byte offsets of the zero pages in their block. Not checked.
    pub fn zero_offsets(&self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.offsets(self.normal, self.normal + self.zero)
    }

    fn offsets(&self, from: u16, to: u16) -> impl ExactSizeIterator<Item = u64> + 'a {
        let (offsets, _) = self.bytes[at::OFFSETS..].as_chunks::<8>();
        let used = &offsets[usize::from(from)..usize::from(to)];
        used.iter().map(|offset| u64::from_be_bytes(*offset))
    }

    /// Looks the block up and turns all offsets into pages of the guest; `normal` and `zero` are replaced. Returns
    /// the block, or `None` for a packet without pages, whose name is not read.
    ///
    /// # Errors
    /// If the block is unknown, an offset is not a page of it, or one occurs twice. The lists are then empty.
    pub fn resolve(
        &self,
        table: &BlockTable,
        normal: &mut PageList,
        zero: &mut PageList,
    ) -> Result<Option<BlockId>, WireError> {
        (normal.count, zero.count) = (0, 0);
        if !self.has_pages() {
            return Ok(None);
        }
        let name = self.block_name()?;
        let id = table
            .by_name(name)
            .ok_or_else(|| WireError::unknown_block(name))?;
        let filled = self.fill(table, id, normal, zero);
        if filled.is_err() {
            (normal.count, zero.count) = (0, 0);
        }
        filled.map(|()| Some(id))
    }

    fn fill(
        &self,
        table: &BlockTable,
        id: BlockId,
        normal: &mut PageList,
        zero: &mut PageList,
    ) -> Result<(), WireError> {
        let mut seen = Seen::default();
        for offset in self.normal_offsets() {
            let page = table.page(id, offset)?;
            if seen.maybe(page) && normal.contains(page) {
                return Err(page_twice(table.block(id), offset));
            }
            normal.push(page);
        }
        for offset in self.zero_offsets() {
            let page = table.page(id, offset)?;
            if seen.maybe(page) && (normal.contains(page) || zero.contains(page)) {
                return Err(page_twice(table.block(id), offset));
            }
            zero.push(page);
        }
        Ok(())
    }
}

fn page_twice(block: &RamBlock, offset: u64) -> WireError {
    let name = block.name.escape_ascii().to_string();
    WireError::PageTwice { name, offset }
}

fn count(field: &'static str, seen: u32, limit: u16) -> Result<u16, WireError> {
    match u16::try_from(seen) {
        Ok(number) if number <= limit => Ok(number),
        _ => Err(WireError::Limit {
            field,
            seen: seen.into(),
            limit: limit.into(),
        }),
    }
}

/// Up to [`PACKET_PAGES`] pages, in place. Made once per channel and filled again by each packet.
#[derive(Clone, Debug)]
pub struct PageList {
    pages: [PageIndex; PACKET_PAGES],
    count: u16,
}

impl Default for PageList {
    fn default() -> Self {
        Self {
            pages: [PageIndex::new(0); PACKET_PAGES],
            count: 0,
        }
    }
}

impl PageList {
    /// The pages, in the packet's order.
    pub fn as_slice(&self) -> &[PageIndex] {
        &self.pages[..usize::from(self.count)]
    }

    /// How many they are.
    pub fn count(&self) -> u16 {
        self.count
    }

    fn contains(&self, page: PageIndex) -> bool {
        self.as_slice().contains(&page)
    }

    fn push(&mut self, page: PageIndex) {
        self.pages[usize::from(self.count)] = page;
        self.count += 1;
    }
}

/// A filter that excludes most repetitions: a bit for each page number modulo 4096. Pages that share a bit are
/// compared exactly, which happens about twice per packet for 128 random pages, and never for adjacent pages.
struct Seen([u64; Self::WORDS]);

impl Default for Seen {
    fn default() -> Self {
        Self([0; Self::WORDS])
    }
}

impl Seen {
    const WORDS: usize = 64;

    /// Whether `page` may have occurred before; from now on it has.
    fn maybe(&mut self, page: PageIndex) -> bool {
        let bits = page.get();
        let word = &mut self.0[usize::from((bits >> 6).to_le_bytes()[0]) % Self::WORDS];
        let mask = 1 << (bits % 64);
        let before = *word & mask != 0;
        *word |= mask;
        before
    }
}

/// The fields of a packet's header, as a primary writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketFields<'a> {
    /// Set SYNC.
    pub sync: bool,
    /// The method bits.
    pub method: Method,
    /// Room for pages that the primary has: 128 in packets with pages.
    pub pages_alloc: u32,
    /// Bytes of payload that follow.
    pub payload_len: u32,
    /// Count of packets over all channels.
    pub packet_num: u64,
    /// The block's name; empty in a pure SYNC.
    pub block: &'a [u8],
    /// Byte offsets of the normal pages.
    pub normal: &'a [u64],
    /// Byte offsets of the zero pages.
    pub zero: &'a [u64],
}

impl PacketFields<'static> {
    /// A pure SYNC packet as 9.0 and later send it.
    pub fn sync(packet_num: u64) -> Self {
        Self {
            sync: true,
            method: Method::None,
            pages_alloc: 0,
            payload_len: 0,
            packet_num,
            block: b"",
            normal: &[],
            zero: &[],
        }
    }
}

impl PacketFields<'_> {
    /// Writes the header.
    ///
    /// # Panics
    /// With more than [`PACKET_PAGES`] pages or a block name of more than 255 bytes: a primary has neither.
    pub fn encode(&self, header: &mut [u8; HEADER_LEN]) {
        let pages = |list: &[u64]| u32::try_from(list.len()).expect("at most 128 pages");
        let flags = self.method.flags() | if self.sync { FLAG_SYNC } else { 0 };
        assert!(
            self.block.len() < BLOCK_LEN,
            "a block's name has at most 255 bytes"
        );
        header.fill(0);
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MULTIFD_MAGIC);
        put(at::VERSION, &VERSION.to_be_bytes());
        put(at::FLAGS, &flags.to_be_bytes());
        put(at::PAGES_ALLOC, &self.pages_alloc.to_be_bytes());
        put(at::NORMAL, &pages(self.normal).to_be_bytes());
        put(at::PAYLOAD, &self.payload_len.to_be_bytes());
        put(at::PACKET_NUM, &self.packet_num.to_be_bytes());
        put(at::ZERO, &pages(self.zero).to_be_bytes());
        put(at::BLOCK, self.block);
        for (slot, offset) in self.normal.iter().chain(self.zero).enumerate() {
            put(at::OFFSETS + 8 * slot, &offset.to_be_bytes());
        }
    }
}

/// Bytes of payload of this many uncompressed pages.
///
/// # Panics
/// With more than [`PACKET_PAGES`] pages.
pub fn raw_payload_len(pages: usize) -> u32 {
    assert!(pages <= PACKET_PAGES, "a packet has at most 128 pages");
    u32::try_from(pages as u64 * PAGE_BYTES).expect("at most 512 KiB")
}
