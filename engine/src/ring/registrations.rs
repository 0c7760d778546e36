//! A tenant's regions among the registered buffers of one ring.
//!
//! As many consecutive buffer indices are reserved as the tenant can ever have regions; region `n` is buffer `first + n`.
//! The registered regions are always the first `count` ones.

use super::backend::Backend;
use super::core::Warn;
use super::tenants::Tenant;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Registration {
    /// Whether indices were reserved, or tried to be. Before that the tenant has no memory.
    is_reserved: bool,
    first: u16,
    reserved: u16,
    count: u16,
    /// Whether the kernel has refused one: no more are tried.
    has_failed: bool,
}

impl Registration {
    /// The buffer that this region is registered as.
    pub(super) fn buffer(&self, region: u16) -> Option<u16> {
        (region < self.count).then(|| self.first + region)
    }

    /// Registers the next region, or unregisters the last one if it is not wanted any more. False if there was nothing to do.
    pub(super) fn step(&mut self, tenant: &dyn Tenant, backend: &mut impl Backend, warn: &Warn) -> bool {
        self.reserve(tenant, backend, warn);
        if let Some(last) = self.count.checked_sub(1)
            && let Some(unwanted) = tenant.region(last).filter(|region| !region.is_wanted())
        {
            backend.unregister(self.first + last);
            unwanted.unregistered();
            self.count = last;
            return true;
        }
        if self.has_failed || self.count == self.reserved {
            return false;
        }
        let Some(next) = tenant.region(self.count).filter(|region| region.is_wanted()) else {
            return false;
        };
        match backend.register(self.first + self.count, next) {
            Ok(()) => {
                next.registered();
                self.count += 1;
            }
            Err(error) => {
                self.has_failed = true;
                warn(format!(
                    "guest {}: registering cache slab {} with io_uring failed ({error}); pages are received there without \
                     registered buffers. With \"cannot allocate memory\": raise `ulimit -l`",
                    tenant.id(),
                    self.count
                ));
            }
        }
        true
    }

    fn reserve(&mut self, tenant: &dyn Tenant, backend: &mut impl Backend, warn: &Warn) {
        if self.is_reserved {
            return;
        }
        let (limit, buffers) = (tenant.region_limit(), backend.buffers());
        if limit == 0 {
            return;
        }
        self.is_reserved = true;
        // By choice, or the start has said why.
        if buffers == 0 {
            return;
        }
        let count = u16::try_from(limit).ok();
        match count.and_then(|count| Some((backend.reserve_buffers(count)?, count))) {
            Some(reserved) => (self.first, self.reserved) = reserved,
            None => warn(format!(
                "guest {}: its cache may have {limit} slabs, for which a ring of {buffers} registered buffers has no room: pages are received \
                 without them",
                tenant.id()
            )),
        }
    }

    /// Unregisters all regions and gives the indices back. No receive into a region is posted.
    pub(super) fn release(&mut self, tenant: &dyn Tenant, backend: &mut impl Backend) {
        for position in 0..self.count {
            backend.unregister(self.first + position);
            if let Some(region) = tenant.region(position) {
                region.unregistered();
            }
        }
        if self.reserved > 0 {
            backend.release_buffers(self.first, self.reserved);
        }
        *self = Self::default();
    }
}
