//! The guests that are present on one core.
//!
//! Contract: a tenant stays at least until the last of its connections has left the core, and its regions stay registered
//! until then, so a connection that is handed over to this core finds them registered. It is removed when its session has
//! ended and no connection of it is left here; its regions are taken out of the ring before it is dropped. Where a core fails, the
//! ring still has them: nothing is posted any more, and the kernel holds the pages of a registered buffer until the ring has ended.

use super::backend::Backend;
use super::core::Warn;
use super::registrations::Registration;

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

    /// Most regions that the guest can ever have; 0 as long as it has no memory.
    fn region_limit(&self) -> usize;

    /// A region. The next one may come later; one that exists stays valid as long as the tenant lives.
    fn region(&self, position: u16) -> Option<&dyn Region>;

    /// Does a small part of the background work, when the core has nothing to receive. False if there is none.
    fn background(&mut self) -> bool;

    /// Whether the guest's session has ended.
    fn has_ended(&self) -> bool;
}

struct Entry {
    tenant: Box<dyn Tenant>,
    /// Those that this core drives.
    connections: usize,
    /// Whether a panic has left it in an unknown state: it is only kept for its connections.
    is_closing: bool,
    registration: Registration,
}

/// All tenants of a core. An index stays valid as long as the tenant has connections here.
#[derive(Default)]
pub(super) struct Tenants {
    entries: Vec<Option<Entry>>,
    /// The entry that is asked first for background work.
    turn: usize,
}

impl Tenants {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.iter().all(Option::is_none)
    }

    pub(super) fn admit(&mut self, tenant: Box<dyn Tenant>) {
        let entry = Some(Entry {
            tenant,
            connections: 0,
            is_closing: false,
            registration: Registration::default(),
        });
        match self.entries.iter_mut().find(|entry| entry.is_none()) {
            Some(free) => *free = entry,
            None => self.entries.push(entry),
        }
    }

    /// A connection of that guest comes to this core. None if the guest is not present: its session has ended.
    pub(super) fn attach(&mut self, id: u64) -> Option<usize> {
        let of_guest = |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.tenant.id() == id);
        let index = self.entries.iter().position(of_guest)?;
        self.entries[index].as_mut()?.connections += 1;
        Some(index)
    }

    /// A connection of that tenant is taken off this core; nothing is posted on it.
    pub(super) fn detach(&mut self, index: usize, backend: &mut impl Backend) {
        if let Some(entry) = &mut self.entries[index] {
            entry.connections -= 1;
        }
        self.remove_if_over(index, backend);
    }

    /// Removes the tenants that are over.
    pub(super) fn remove_ended(&mut self, backend: &mut impl Backend) {
        for index in 0..self.entries.len() {
            self.remove_if_over(index, backend);
        }
    }

    fn remove_if_over(&mut self, index: usize, backend: &mut impl Backend) {
        let is_over =
            |entry: &mut Entry| entry.connections == 0 && (entry.is_closing || entry.tenant.has_ended());
        if let Some(mut entry) = self.entries[index].take_if(is_over) {
            entry.registration.release(&*entry.tenant, backend);
        }
    }

    /// No tenant is called any more but to take it out of the ring. Those without connections are removed.
    pub(super) fn close_all(&mut self, backend: &mut impl Backend) {
        for entry in self.entries.iter_mut().flatten() {
            entry.is_closing = true;
        }
        self.remove_ended(backend);
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

    /// Registers or unregisters one region of one tenant, if there is anything to do: a large guest's registration must not
    /// delay the other guests of this core.
    pub(super) fn register_one(&mut self, backend: &mut impl Backend, warn: &Warn) -> bool {
        let mut entries = self.entries.iter_mut().flatten();
        entries.any(|entry| !entry.is_closing && entry.registration.step(&*entry.tenant, backend, warn))
    }

    /// Lets the next tenant that has background work do a small part of it. False if none has any.
    pub(super) fn background_one(&mut self) -> bool {
        let count = self.entries.len();
        for turn in self.turn..self.turn + count {
            if let Some(entry) = &mut self.entries[turn % count]
                && !entry.is_closing
                && entry.tenant.background()
            {
                self.turn = (turn + 1) % count;
                return true;
            }
        }
        false
    }
}
