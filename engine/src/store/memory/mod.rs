//! Mapped memory and its files: what is mapped, how it is copied, on which pages and nodes it lies.

pub(crate) mod copy;
pub(crate) mod directory_lock;
pub(crate) mod file_names;
pub(crate) mod huge;
pub(crate) mod image;
pub(crate) mod mapping;
pub(crate) mod mlock;
pub(crate) mod numa;
pub(crate) mod populate;
pub(crate) mod ram_dir;
pub(crate) mod slab;
pub(crate) mod span;
pub(crate) mod words;

/// A position in memory as `usize`. The store addresses guest memory, which only a 64-bit host can hold.
pub(crate) fn index(position: u64) -> usize {
    usize::try_from(position).expect("positions in mapped memory fit the address space")
}
