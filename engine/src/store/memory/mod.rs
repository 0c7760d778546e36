//! Mapped memory and its files: what is mapped, how it is copied, where it lies.

pub(crate) mod copy;
pub(crate) mod file_names;
pub(crate) mod huge;
pub(crate) mod image;
pub(crate) mod map;
pub(crate) mod mlock;
pub(crate) mod numa;
pub(crate) mod ram_dir;
pub(crate) mod slab;
