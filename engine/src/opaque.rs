//! Copies that the compiler does not see into, for memory that others may write at the same time: see `store::memory::copy`, which says
//! why this is sound.
#![expect(unsafe_code, reason = "guest memory is written by address")]

/// Writes ordinary memory to where others may write, too.
///
/// # Safety
/// As many bytes at `to` can be written; nothing of `bytes` is there.
pub(crate) unsafe fn write_bytes(to: *mut u8, bytes: &[u8]) {
    // SAFETY: the caller vouches for `to`; `bytes` is as long and ordinary memory.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        copy(to, bytes.as_ptr(), bytes.len());
    }
    // SAFETY: the same.
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    unsafe {
        write_each(to, bytes);
    }
}

/// # Safety
/// `length` bytes at `from` can be read and at `to` be written; they do not overlap.
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, length: usize) {
    // SAFETY: memcpy by the C calling convention, all of whose scratch registers are given as clobbered; the
    // caller upholds memcpy's own rules.
    unsafe {
        std::arch::asm!(
            "call {memcpy}",
            memcpy = sym libc::memcpy,
            inout("rdi") to => _,
            inout("rsi") from => _,
            inout("rdx") length => _,
            clobber_abi("C"),
        );
    }
}

/// Byte by byte, each atomically.
///
/// # Safety
/// As many bytes at `to` can be written.
#[cfg(any(not(target_arch = "x86_64"), miri, test))]
pub(crate) unsafe fn write_each(to: *mut u8, bytes: &[u8]) {
    use std::sync::atomic::{AtomicU8, Ordering};
    for (at, byte) in bytes.iter().enumerate() {
        // SAFETY: one of those bytes.
        unsafe { AtomicU8::from_ptr(to.add(at)) }.store(*byte, Ordering::Relaxed);
    }
}
