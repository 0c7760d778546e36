//! The guests that are present on one core.
//!
//! Contract: a tenant stays at least until the last of its connections has left the core, and its regions stay registered
//! until then, so a connection that is handed over to this core finds them registered. It is removed when its session has
//! ended and no connection of it is left here; its regions are taken out of the ring before it is dropped. Where a core fails, the
//! ring still has them: nothing is posted any more, and the kernel holds the pages of a registered buffer until the ring has ended.

use super::backend::Backend;
use super::core::Warn;
use super::registrations::Registration;
use std::collections::{HashMap, VecDeque};

/// Memory that a ring can register as one buffer.
pub(crate) trait Region {
    /// First byte.
    fn base(&self) -> *mut u8;

    /// Length.
    fn bytes(&self) -> usize;

    /// Whether rings should have it registered. If not, no receive is posted into it.
    fn is_wanted(&self) -> bool;

    /// A ring has registered it.
    fn registered(&self);

    /// A ring has unregistered it.
    fn unregistered(&self);
}

/// A guest's presence on one core.
pub(crate) trait Tenant: Send {
    /// Identifies the guest among all guests of the process.
    fn id(&self) -> u64;

    /// Most regions that the guest can ever have; 0 as long as it has no memory. Where it or a region changes, the core is
    /// woken for the tenant.
    fn region_limit(&self) -> usize;

    /// A region. The next one may come later; one that exists stays valid as long as the tenant lives.
    fn region(&self, position: u16) -> Option<&dyn Region>;

    /// Does a small part of the background work, when the core has nothing to receive. False if there is none: it is not called
    /// again before the core is woken for the tenant, or has received something of it.
    fn background(&mut self) -> bool;

    /// Whether the guest's session has ended.
    fn has_ended(&self) -> bool;
}

struct Entry {
    id: u64,
    tenant: Box<dyn Tenant>,
    /// The slots of those of its connections that this core drives.
    connections: Vec<usize>,
    /// Whether a panic has left it in an unknown state: it is only kept for its connections.
    is_closing: bool,
    registration: Registration,
}

/// Tenants that may have something to do, each once, in turn.
#[derive(Default)]
struct Active {
    queue: VecDeque<usize>,
    /// By index: whether it is in the queue.
    is_in: Vec<bool>,
}

impl Active {
    /// There are indices up to this number: pushing one of them allocates nothing.
    fn reserve(&mut self, indices: usize) {
        self.is_in.resize(indices, false);
        self.queue.reserve(indices);
    }

    fn push(&mut self, index: usize) {
        if !std::mem::replace(&mut self.is_in[index], true) {
            self.queue.push_back(index);
        }
    }

    /// Calls `act` with those that are in, until it has done something for one, which is then the last in turn. The others
    /// are out. False if it has done nothing.
    fn any(&mut self, mut act: impl FnMut(usize) -> bool) -> bool {
        while let Some(&index) = self.queue.front() {
            if act(index) {
                self.queue.rotate_left(1);
                return true;
            }
            self.queue.pop_front();
            self.is_in[index] = false;
        }
        false
    }
}

/// All tenants of a core. An index stays valid as long as the tenant has connections here.
///
/// A turn looks only at tenants that are **active**: after something has happened to one, until it is found to have nothing to
/// register and nothing to do.
#[derive(Default)]
pub(super) struct Tenants {
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
    /// By their ids, which this process has chosen.
    by_id: HashMap<u64, usize>,
    /// Those that may have regions to register, and those that may have background work.
    registering: Active,
    working: Active,
}

impl Tenants {
    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Returns its index.
    pub(super) fn admit(&mut self, tenant: Box<dyn Tenant>) -> usize {
        let id = tenant.id();
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[index] = Some(Entry {
            id,
            tenant,
            connections: Vec::new(),
            is_closing: false,
            registration: Registration::default(),
        });
        self.by_id.insert(id, index);
        let indices = self.entries.len();
        self.free.reserve(indices);
        self.registering.reserve(indices);
        self.working.reserve(indices);
        self.activate(index);
        index
    }

    pub(super) fn find(&self, id: u64) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    fn entry(&mut self, index: usize) -> Option<&mut Entry> {
        self.entries.get_mut(index)?.as_mut()
    }

    /// A connection of that guest comes to this core, in that slot. None if the guest is not present: its session has ended.
    pub(super) fn attach(&mut self, id: u64, slot: usize) -> Option<usize> {
        let index = self.find(id)?;
        self.entry(index)?.connections.push(slot);
        self.activate(index);
        Some(index)
    }

    /// The connection in that slot is taken off this core; nothing is posted on it.
    pub(super) fn detach(&mut self, index: usize, slot: usize, backend: &mut impl Backend) {
        if let Some(entry) = self.entry(index)
            && let Some(position) = entry.connections.iter().position(|other| *other == slot)
        {
            entry.connections.swap_remove(position);
        }
        self.remove_if_over(index, backend);
    }

    /// How many connections of a tenant this core drives.
    pub(super) fn connections(&self, index: usize) -> usize {
        let entry = self.entries.get(index).and_then(Option::as_ref);
        entry.map_or(0, |entry| entry.connections.len())
    }

    /// The slot of one of them.
    pub(super) fn connection(&self, index: usize, position: usize) -> Option<usize> {
        let entry = self.entries.get(index)?.as_ref()?;
        entry.connections.get(position).copied()
    }

    /// Removes a tenant if it is over.
    pub(super) fn remove_if_over(&mut self, index: usize, backend: &mut impl Backend) {
        let is_over = |entry: &mut Entry| {
            entry.connections.is_empty() && (entry.is_closing || entry.tenant.has_ended())
        };
        let taken = self
            .entries
            .get_mut(index)
            .and_then(|entry| entry.take_if(is_over));
        if let Some(mut entry) = taken {
            self.by_id.remove(&entry.id);
            self.free.push(index);
            entry.registration.release(&*entry.tenant, backend);
        }
    }

    /// No tenant is called any more but to take it out of the ring. Those without connections are removed.
    pub(super) fn close_all(&mut self, backend: &mut impl Backend) {
        for entry in self.entries.iter_mut().flatten() {
            entry.is_closing = true;
        }
        for index in 0..self.entries.len() {
            self.remove_if_over(index, backend);
        }
    }

    /// Every tenant's index is below this.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes a tenant away whose ring is about to end.
    pub(super) fn pop(&mut self) -> Option<Box<dyn Tenant>> {
        while let Some(entry) = self.entries.pop() {
            if let Some(entry) = entry {
                return Some(entry.tenant);
            }
        }
        None
    }

    /// The ring's buffer that this region of a tenant is registered as.
    pub(super) fn buffer(&self, index: usize, region: u16) -> Option<u16> {
        self.entries[index].as_ref()?.registration.buffer(region)
    }

    /// Something has happened to a tenant: it may have something to register or to do.
    pub(super) fn activate(&mut self, index: usize) {
        self.registering.push(index);
        self.working.push(index);
    }

    /// Registers or unregisters one region of one active tenant, if there is anything to do: a large guest's registration must
    /// not delay the other guests of this core.
    pub(super) fn register_one(&mut self, backend: &mut impl Backend, warn: &Warn) -> bool {
        let entries = &mut self.entries;
        self.registering.any(|index| {
            let mut entry = entries[index].iter_mut();
            entry.any(|entry| !entry.is_closing && entry.registration.step(&*entry.tenant, backend, warn))
        })
    }

    /// Lets the next active tenant that has background work do a small part of it. False if none has any.
    pub(super) fn background_one(&mut self) -> bool {
        let entries = &mut self.entries;
        self.working.any(|index| {
            let mut entry = entries[index].iter_mut();
            entry.any(|entry| !entry.is_closing && entry.tenant.background())
        })
    }
}
