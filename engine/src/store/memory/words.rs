//! Words that several threads, or a later process, use as atomics: in a box or in a mapping.
#![expect(unsafe_code, reason = "atomic words in mapped memory")]

use crate::store::StoreError;
use crate::store::memory::mapping::Mapping;
#[cfg(not(loom))]
use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
#[cfg(not(loom))]
use std::sync::atomic::AtomicU64;

/// Words of zero that loom watches.
#[cfg(loom)]
pub(crate) fn zeroed_words(count: usize) -> Result<Box<[crate::sync::AtomicU64]>, StoreError> {
    Ok((0..count).map(|_| crate::sync::AtomicU64::new(0)).collect())
}

/// `count` words of zero. The operating system gives the memory on first touch, so words that are never written
/// cost address space only.
///
/// # Errors
/// If there is no memory for them.
#[cfg(not(loom))]
pub(crate) fn zeroed_words(count: usize) -> Result<Box<[AtomicU64]>, StoreError> {
    let layout = Layout::array::<AtomicU64>(count).map_err(|_| StoreError::no_tables::<AtomicU64>(count))?;
    if layout.size() == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout's size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    let first = NonNull::new(memory.cast()).ok_or_else(|| StoreError::no_tables::<AtomicU64>(count))?;
    let words = NonNull::slice_from_raw_parts(first, count);
    // SAFETY: allocated by the global allocator with the layout of `count` atomics, whose zeros are valid (documented by std),
    // and handed over whole.
    Ok(unsafe { Box::from_raw(words.as_ptr()) })
}

/// `count` values that `make` makes.
///
/// # Errors
/// If there is no memory for them.
pub(crate) fn boxed<T>(count: usize, make: impl FnMut(usize) -> T) -> Result<Box<[T]>, StoreError> {
    let mut values = Vec::new();
    let reserved = values.try_reserve_exact(count);
    reserved.map_err(|_| StoreError::no_tables::<T>(count))?;
    values.extend((0..count).map(make));
    Ok(values.into_boxed_slice())
}

/// A table of words, in memory of its own or in a mapping. Both are read in the same way.
pub(crate) struct Words {
    first: NonNull<crate::sync::AtomicU64>,
    count: usize,
    /// What the words lie in; without one they are a box.
    mapping: Option<Mapping>,
}

// SAFETY: the words are owned, by the box or the mapping, and atomics may be used by any thread.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// `count` words of zero in memory of their own.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub(crate) fn zeroed(count: usize) -> Result<Self, StoreError> {
        let words = Box::into_raw(zeroed_words(count)?);
        Ok(Self {
            first: NonNull::new(words.cast()).expect("a box is somewhere"),
            count,
            mapping: None,
        })
    }
}

#[cfg(not(loom))]
impl Words {
    /// The first `count` words of a mapping, which is used for nothing else.
    pub(crate) fn mapped(mapping: Mapping, count: usize) -> Self {
        let first = mapping.bytes(0, count * size_of::<AtomicU64>());
        Self {
            // A mapping begins at a page.
            first: NonNull::new(first.cast()).expect("a mapping is somewhere"),
            count,
            mapping: Some(mapping),
        }
    }
}

#[cfg(loom)]
impl Words {
    /// What loom watches is no memory that could be mapped; its tests map none.
    pub(crate) fn mapped(_: Mapping, _: usize) -> Self {
        unreachable!("loom tests map nothing")
    }
}

impl std::ops::Deref for Words {
    type Target = [crate::sync::AtomicU64];

    fn deref(&self) -> &Self::Target {
        // SAFETY: `count` atomics from there on, in a box or a mapping (`bytes` checked the length) that this owns and that
        // goes with it; they are only accessed atomically.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.mapping.is_none() {
            // SAFETY: made by `Box::into_raw` of a box of that many words, and given back once.
            drop(unsafe {
                Box::from_raw(std::ptr::slice_from_raw_parts_mut(
                    self.first.as_ptr(),
                    self.count,
                ))
            });
        }
    }
}
