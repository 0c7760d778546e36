//! The memory that slots lie in: slabs, each of which a ring registers as one buffer.

use crate::budget::{Account, BudgetError};
use crate::store::StoreError;
use crate::store::memory::huge::{self, Fallback, HUGE_2M, HugePages, PoolError};
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::numa::{NodeIndex, NumaNodes};
use crate::store::memory::ram_dir::RamFiles;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::units::{ChannelId, PAGE_BYTES};
use nix::errno::Errno;
use std::sync::Arc;

/// Position of a slab among the store's slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabId(pub u16);

pub(crate) fn slab_id(position: usize) -> SlabId {
    SlabId(u16::try_from(position).expect("64 Ki slabs are 32 TiB"))
}

/// Bytes of the header area of one channel at the end of a slab. A packet header is 320 + 8 · 128 = 1344 bytes (spec §8.2).
pub const HEADER_BYTES: u64 = 2048;

/// Headers that a slab has room for: one for each possible [`ChannelId`].
const HEADERS: u64 = 256;

const HEADER_AREA: u64 = HEADERS * HEADER_BYTES;

/// A piece of cache memory that a ring registers as one buffer. In a mirror a header area lies
/// behind the slots, so that one read may fill the slots of a packet and take the next packet's header.
pub struct Slab {
    memory: Mapping,
    slot_bytes: u64,
    header_bytes: u64,
    node: NodeIndex,
    /// Whether rings should have it registered.
    wanted: AtomicBool,
    /// Rings that have it registered.
    registrations: AtomicU32,
    /// Whether the host has its memory back, and the budget its part.
    is_returned: AtomicBool,
}

impl Slab {
    /// Slots alone, for the shards of a node.
    pub(crate) fn of_slots(
        memory: &mut SlabMemory,
        slot_bytes: u64,
        node: NodeIndex,
    ) -> Result<Self, StoreError> {
        let slots = memory.map(slot_bytes)?;
        memory.place(&slots, |nodes, slots| nodes.place(slots, node));
        Ok(Self::new(slots, slot_bytes, 0, node))
    }

    /// Slots, and a header area, for all shards.
    pub(crate) fn with_headers(memory: &mut SlabMemory, slot_bytes: u64) -> Result<Self, StoreError> {
        let slots = memory.map(bytes_with_headers(slot_bytes))?;
        memory.place(&slots, NumaNodes::spread);
        Ok(Self::new(slots, slot_bytes, HEADER_AREA, NodeIndex::default()))
    }

    fn new(memory: Mapping, slot_bytes: u64, header_bytes: u64, node: NodeIndex) -> Self {
        Self {
            memory,
            slot_bytes,
            header_bytes,
            node,
            wanted: AtomicBool::new(true),
            registrations: AtomicU32::new(0),
            is_returned: AtomicBool::new(false),
        }
    }

    pub(crate) fn want(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Release);
    }

    /// Whether a ring that receives into it should have it registered. If not, no receive is posted there.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.registrations.load(Ordering::Acquire) > 0
    }

    /// A ring has registered it.
    pub fn registered(&self) {
        self.registrations.fetch_add(1, Ordering::AcqRel);
    }

    /// A ring has unregistered it.
    pub fn unregistered(&self) {
        self.registrations.fetch_sub(1, Ordering::AcqRel);
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    /// Bytes from there on: slots and headers.
    pub fn bytes(&self) -> usize {
        index(self.slot_bytes + self.header_bytes)
    }

    pub(crate) fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// The node it belongs to.
    pub(crate) fn node(&self) -> NodeIndex {
        self.node
    }

    /// Bytes that were asked for.
    fn mapped_bytes(&self) -> u64 {
        self.slot_bytes + self.header_bytes
    }

    /// Bytes of slots.
    pub(crate) fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Returns the memory to the host. False where the kernel does not support it: then it is freed with the slab.
    pub(crate) fn give_back(&self) -> bool {
        self.memory.give_back().is_ok()
    }

    /// Where the headers of that channel go, aligned to [`HEADER_BYTES`] and that long: byte offset in the slab. The store
    /// never touches them; by convention the channel's own receiver alone does.
    pub(crate) fn header(&self, channel: ChannelId) -> u64 {
        debug_assert!(self.header_bytes > 0, "this slab has a header area");
        self.slot_bytes + u64::from(channel.0) * HEADER_BYTES
    }
}

/// The source of slabs' memory: the huge page pool until it is empty, then ordinary memory.
pub(crate) struct SlabMemory {
    asked: HugePages,
    nodes: NumaNodes,
    /// Why the kernel refused to bind memory to its node.
    misplaced: Option<Errno>,
    transparent: Option<Fallback>,
    /// Why the pool gave nothing, and how many slabs and bytes went without.
    lack: Option<PoolError>,
    slabs_without: usize,
    bytes_without: u64,
    files: Option<Arc<RamFiles>>,
    mapped: usize,
    /// What slabs have of the budget.
    account: Account,
}

/// What a slab of so many bytes has of the budget: it may be of whole huge pages, or else needs page tables.
pub(crate) fn charge(slab_bytes: u64) -> u64 {
    with_page_tables(slab_bytes.next_multiple_of(HUGE_2M))
}

/// A mapping's memory with what the kernel takes to map its pages: a word for each.
pub(crate) fn with_page_tables(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / PAGE_BYTES * 8)
}

/// Bytes of the slab of a mirror with so many bytes of slots.
pub(crate) fn bytes_with_headers(slot_bytes: u64) -> u64 {
    slot_bytes + HEADER_AREA
}

/// What the names of slabs' files begin with.
pub(crate) const SLAB_FILES: &str = "~slab-";

/// The name of a slab's file: its position decides where an extent is.
pub(crate) fn slab_file(position: usize) -> String {
    format!("{SLAB_FILES}{position}")
}

impl SlabMemory {
    pub(crate) fn new(asked: HugePages, nodes: NumaNodes, account: Account) -> Self {
        Self {
            asked,
            account,
            nodes,
            misplaced: None,
            transparent: huge::transparent_private(),
            lack: None,
            slabs_without: 0,
            bytes_without: 0,
            files: None,
            mapped: 0,
        }
    }

    fn from_pool(length: u64) -> Result<Mapping, PoolError> {
        huge::default_is_2m()?;
        // Whole huge pages: the kernel takes advice on nothing less.
        let length = length.next_multiple_of(HUGE_2M);
        Mapping::huge(length).map_err(PoolError::Kernel)
    }

    pub(crate) fn nodes(&self) -> &NumaNodes {
        &self.nodes
    }

    fn place(&mut self, memory: &Mapping, place: impl FnOnce(&NumaNodes, &Mapping) -> Result<(), Errno>) {
        if let Err(errno) = place(&self.nodes, memory) {
            self.misplaced.get_or_insert(errno);
        }
    }

    /// From files: a checkpoint's pages outlive this process in them.
    pub(crate) fn in_files(self, files: Arc<RamFiles>) -> Self {
        Self {
            asked: HugePages::Off,
            files: Some(files),
            ..self
        }
    }

    /// What the slabs have of the budget, when all are mapped.
    pub(crate) fn into_account(self) -> Account {
        self.account
    }

    /// A slab that was given back is used again.
    ///
    /// # Errors
    /// If the budget does not allow it.
    pub(crate) fn use_again(&mut self, slab: &Slab) -> Result<(), BudgetError> {
        if slab.is_returned.load(Ordering::Relaxed) {
            self.account.take(charge(slab.mapped_bytes()))?;
            slab.is_returned.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Returns the memory of a slab to the host, and its part of the budget.
    pub(crate) fn give_back(&mut self, slab: &Slab) {
        if slab.give_back() {
            slab.is_returned.store(true, Ordering::Relaxed);
            self.account.give_back(charge(slab.mapped_bytes()));
        }
    }

    /// Maps the memory of a slab, which is taken of the budget first.
    fn map(&mut self, length: u64) -> Result<Mapping, StoreError> {
        self.account.take(charge(length))?;
        let mapping = self.map_charged(length);
        if mapping.is_err() {
            self.account.give_back(charge(length));
        }
        mapping
    }

    fn map_charged(&mut self, length: u64) -> Result<Mapping, StoreError> {
        let shield = |mapping: Mapping| mapping.keep_from_children().map(|()| mapping);
        let mapping = match &self.files {
            Some(files) => {
                files.check_room(length)?;
                let name = slab_file(self.mapped);
                let file = files.create(&name, length)?;
                // The next slab that is asked for has this name again.
                let mapping = file.map().and_then(shield);
                mapping.inspect_err(|_| files.remove_one(&name))
            }
            None => self.map_private(length).and_then(shield),
        };
        let mapping = mapping.map_err(|errno| self.refused(length, errno))?;
        self.mapped += 1;
        Ok(mapping)
    }

    /// Whether there is room for a slab of so many bytes, where a directory limits that.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<(), StoreError> {
        let files = self.files.as_ref();
        files.map_or(Ok(()), |files| files.check_room(bytes))
    }

    /// Why memory for so many bytes was refused.
    pub(crate) fn refused(&self, bytes: u64, errno: Errno) -> StoreError {
        let lack = self.files.as_ref().and_then(|files| files.lack(bytes, errno));
        lack.unwrap_or_else(|| StoreError::NoCacheMemory {
            bytes,
            source: errno.into(),
        })
    }

    fn map_private(&mut self, length: u64) -> Result<Mapping, Errno> {
        match self.asked {
            HugePages::Huge2M | HugePages::Huge1G => match Self::from_pool(length) {
                Ok(mapping) => Ok(mapping),
                Err(reason) => {
                    self.lack.get_or_insert(reason);
                    self.slabs_without += 1;
                    self.bytes_without += length;
                    self.map_transparent(length)
                }
            },
            HugePages::Thp => self.map_transparent(length),
            HugePages::Off => Mapping::anonymous(length),
        }
    }

    fn map_transparent(&self, length: u64) -> Result<Mapping, Errno> {
        let mapping = Mapping::anonymous(length)?;
        if self.transparent.is_none() {
            // Advice: where the kernel declines it, pages are ordinary ones, as they would be without it.
            let _ = mapping.advise_huge();
        }
        Ok(mapping)
    }

    /// What `slabs_all` slabs had to do without.
    pub(crate) fn notes(&self, slabs_all: usize) -> impl Iterator<Item = Fallback> {
        let misplaced = self.misplaced.map(|errno| self.nodes.refused("the cache", errno));
        self.huge_note(slabs_all).into_iter().chain(misplaced)
    }

    fn huge_note(&self, slabs_all: usize) -> Option<Fallback> {
        let Some(reason) = &self.lack else {
            return self.transparent.clone().filter(|_| self.asked == HugePages::Thp);
        };
        let needed = self.bytes_without.div_ceil(HUGE_2M);
        Some(Fallback::Cache {
            slabs: self.slabs_without,
            slabs_all,
            needed,
            got: huge::instead(&self.transparent),
            reason: reason.to_string(),
            remedy: huge::pool_remedy(HUGE_2M >> 10, needed),
        })
    }
}
