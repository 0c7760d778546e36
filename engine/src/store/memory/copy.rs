//! Copies to, from and within guest memory. Nothing else in the store reads or writes its content, except what the receive
//! buffer of a pool moves (`cache/pool_buffer.rs`) and what the kernel writes to a file (`PageSpan::write_to`).
//!
//! # Why this is sound
//! The same guest page may be written by several writers at the same time: two channels may carry it in one epoch (spec §10:
//! QEMU 7.2 does, and a hostile primary can at will), one of them through the kernel and one through [`zero`]. A plain Rust
//! access that races with such a write is undefined behaviour, whatever the value is used for. Therefore:
//!
//! * No reference to guest memory is made: it is known as a [`PageSpan`] or a [`ReadSpan`], raw pointers with bounds and a
//!   lifetime, whose types carry what the functions here need: alignment, at least one page, the right to write. The one
//!   exception is the slice that a pool's receive buffer lends. Nothing writes those bytes while the slice lives, and what is
//!   here only reads them.
//! * On x86-64 every access is inline assembly (or a call of the C library made in inline assembly). To the compiler such a block
//!   is opaque: it may touch memory whose address has escaped, and races inside of it are a matter of the machine, not of the
//!   language. On the machine a race has one outcome, a page that is a mix of both writers' bytes; the protocol then replaces
//!   it (the page comes again) or does not care (both writers wrote the same).
//! * On other targets, and under Miri, which executes no assembly, accesses are loops of relaxed atomics.
//!
//! The Rust side of a copy (`&[u8; PAGE_SIZE]`, `&mut [u8]`) is ordinary memory of the caller.
//!
//! # Order
//! A release does not order non-temporal stores: after [`CopyMethod::NonTemporal`], [`fence`] must be called before another
//! thread is notified.
#![expect(
    unsafe_code,
    reason = "guest memory is copied by address, with vector instructions"
)]

use crate::store::memory::mapping::Mapping;
use crate::store::memory::span::{PageSpan, ReadSpan};
use crate::units::PAGE_SIZE;

/// How pages are copied to the RAM image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMethod {
    /// Stores that bypass the caches, with the widest registers that the processor has: the image's lines are not read only to be
    /// overwritten, and what the cache holds is not evicted for them.
    NonTemporal,
    /// The C library's `memcpy`, as QEMU flushes: the baseline.
    Memcpy,
}

/// Copies `source` to `target`.
///
/// # Panics
/// If they are not of one length, or overlap.
pub(crate) fn copy<'a>(target: PageSpan<'_>, source: impl Into<ReadSpan<'a>>, method: CopyMethod) {
    let source = source.into();
    assert_eq!(
        target.pages(),
        source.pages(),
        "a copy is between spans of one length"
    );
    let (to, from, length) = (target.start(), source.start(), target.bytes());
    assert!(
        to.addr().abs_diff(from.addr()) >= length,
        "a copy is between spans that do not overlap"
    );
    // SAFETY: `length` bytes can be read there and written here, at least a page, and `to` is aligned to one: the spans' types
    // promise it. They do not overlap, which was checked.
    unsafe {
        match method {
            CopyMethod::NonTemporal => arch::copy_non_temporal(to, from, length),
            CopyMethod::Memcpy => arch::copy(to, from, length),
        }
    }
}

/// Orders the non-temporal stores of this thread before everything it stores afterwards.
pub(crate) fn fence() {
    arch::fence();
}

/// Fills the first page of a span from ordinary memory.
pub(crate) fn fill(target: PageSpan<'_>, bytes: &[u8; PAGE_SIZE]) {
    // SAFETY: the span has a page that can be written, aligned.
    unsafe { arch::fill(target.start(), bytes) }
}

/// Fills a span from ordinary memory, with stores that bypass the caches: [`fence`] must be called before another thread is
/// notified.
///
/// # Panics
/// If they are not of one length.
pub(crate) fn fill_all(target: PageSpan<'_>, pages: &[[u8; PAGE_SIZE]]) {
    let bytes = pages.as_flattened();
    assert_eq!(
        target.bytes(),
        bytes.len(),
        "a copy is between spans of one length"
    );
    let (to, from) = (target.start(), bytes.as_ptr());
    // SAFETY: the span can be written, is at least a page, and aligned to one; `bytes` is as long, and ordinary memory.
    unsafe { arch::copy_non_temporal(to, from, bytes.len()) }
}

/// Reads the first page of a span to ordinary memory.
pub(crate) fn read<'a>(source: impl Into<ReadSpan<'a>>, bytes: &mut [u8; PAGE_SIZE]) {
    // SAFETY: the span has the bytes of a page that can be read.
    unsafe { arch::read(source.into().start(), bytes) }
}

/// Copies bytes at `offset` of a mapping out; they need not be pages.
///
/// # Panics
/// Unless they lie inside the mapping.
pub(crate) fn read_bytes(memory: &Mapping, offset: usize, out: &mut [u8]) {
    let from = memory.bytes(offset, out.len());
    // SAFETY: `bytes` has checked that they lie inside the mapping, which is readable; `out` is the caller's own.
    unsafe { arch::read_bytes(from, out) }
}

/// Copies bytes to `offset` of a mapping; they need not be pages.
///
/// # Panics
/// Unless they lie inside the mapping.
pub(crate) fn write_bytes(memory: &Mapping, offset: usize, bytes: &[u8]) {
    let to = memory.bytes(offset, bytes.len());
    // SAFETY: `bytes` has checked that they lie inside the mapping, which is writable.
    unsafe { arch::write_bytes(to, bytes) }
}

/// Makes a span all zeros. Writes only if it is not yet.
pub(crate) fn zero(target: PageSpan<'_>) {
    if !is_zero(target) {
        // SAFETY: the span can be written, and is whole pages.
        unsafe { arch::zero(target.start(), target.bytes()) }
    }
}

/// Whether a span was all zeros when it was looked at.
pub(crate) fn is_zero(span: PageSpan<'_>) -> bool {
    // SAFETY: the span can be read, is at least a page, and aligned to one.
    unsafe { arch::is_zero(span.start(), span.bytes()) }
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
use portable as arch;
#[cfg(all(target_arch = "x86_64", not(miri)))]
use x86_64 as arch;

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod x86_64 {
    use crate::units::PAGE_SIZE;
    use std::arch::asm;

    /// # Safety
    /// A page at `to` can be written.
    pub(crate) unsafe fn fill(to: *mut u8, bytes: &[u8; PAGE_SIZE]) {
        // SAFETY: the caller vouches for `to`; `bytes` is as long and ordinary memory.
        unsafe { copy(to, bytes.as_ptr(), PAGE_SIZE) }
    }

    /// # Safety
    /// A page at `from` can be read.
    pub(crate) unsafe fn read(from: *const u8, bytes: &mut [u8; PAGE_SIZE]) {
        // SAFETY: the caller vouches for `from`; `bytes` is as long and the caller's alone.
        unsafe { copy(bytes.as_mut_ptr(), from, PAGE_SIZE) }
    }

    /// # Safety
    /// As many bytes at `from` can be read.
    pub(crate) unsafe fn read_bytes(from: *const u8, out: &mut [u8]) {
        // SAFETY: the caller vouches for `from`; `out` is as long and the caller's alone.
        unsafe { copy(out.as_mut_ptr(), from, out.len()) }
    }

    pub(crate) use crate::opaque::{copy, write_bytes};

    /// # Safety
    /// As [`copy`]; `length` is a positive multiple of 256, and `to` is aligned to 64.
    pub(crate) unsafe fn copy_non_temporal(to: *mut u8, from: *const u8, length: usize) {
        // SAFETY: handed on; the instruction set asked for was found.
        unsafe {
            if is_x86_feature_detected!("avx512f") {
                copy_avx512(to, from, length);
            } else if is_x86_feature_detected!("avx2") {
                copy_avx2(to, from, length);
            } else {
                copy_sse2(to, from, length);
            }
        }
    }

    /// A loop that copies 256 bytes a turn with four registers of a kind.
    macro_rules! streaming_copy {
        ($name:ident, $step:literal, $load:literal, $store:literal, $register:literal, $last:literal) => {
            /// # Safety
            /// As [`copy_non_temporal`], on a processor with these registers.
            unsafe fn $name(to: *mut u8, from: *const u8, length: usize) {
                // SAFETY: the loop reads and writes `length` bytes, which the caller vouches for.
                unsafe {
                    asm!(
                        "2:",
                        concat!($load, " ", $register, "0, [rsi]"),
                        concat!($load, " ", $register, "1, [rsi + ", $step, "]"),
                        concat!($load, " ", $register, "2, [rsi + 2*", $step, "]"),
                        concat!($load, " ", $register, "3, [rsi + 3*", $step, "]"),
                        concat!($store, " [rdi], ", $register, "0"),
                        concat!($store, " [rdi + ", $step, "], ", $register, "1"),
                        concat!($store, " [rdi + 2*", $step, "], ", $register, "2"),
                        concat!($store, " [rdi + 3*", $step, "], ", $register, "3"),
                        concat!("add rsi, 4*", $step),
                        concat!("add rdi, 4*", $step),
                        concat!("sub rdx, 4*", $step),
                        "jnz 2b",
                        $last,
                        inout("rdi") to => _,
                        inout("rsi") from => _,
                        inout("rdx") length => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        // `vzeroupper` clears the upper halves of these too, which a caller that is compiled for
                        // AVX may be using.
                        out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                        out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                        options(nostack),
                    );
                }
            }
        };
    }

    streaming_copy!(copy_avx512, "64", "vmovdqu64", "vmovntdq", "zmm", "vzeroupper");
    streaming_copy!(copy_avx2, "32", "vmovdqu", "vmovntdq", "ymm", "vzeroupper");
    streaming_copy!(copy_sse2, "16", "movdqu", "movntdq", "xmm", "");

    pub(crate) fn fence() {
        // SAFETY: orders stores, nothing else.
        unsafe { asm!("sfence", options(nostack, preserves_flags)) }
    }

    /// # Safety
    /// `length` bytes at `to` can be written.
    pub(crate) unsafe fn zero(to: *mut u8, length: usize) {
        // SAFETY: the direction flag is clear on entry to an asm block; the caller vouches for the memory.
        unsafe {
            asm!(
                "rep stosb",
                inout("rdi") to => _,
                inout("rcx") length => _,
                in("al") 0u8,
                options(nostack, preserves_flags),
            );
        }
    }

    /// # Safety
    /// `length` bytes at `from` can be read; `length` is a positive multiple of 64, `from` is aligned to 16.
    pub(crate) unsafe fn is_zero(from: *const u8, length: usize) -> bool {
        let equal_bytes: u32;
        // SAFETY: the loop reads at most `length` bytes, which the caller vouches for; SSE2 is part of x86-64.
        unsafe {
            asm!(
                "pxor xmm1, xmm1",
                "2:",
                "movdqa xmm0, [{from}]",
                "por xmm0, [{from} + 16]",
                "por xmm0, [{from} + 32]",
                "por xmm0, [{from} + 48]",
                "pcmpeqb xmm0, xmm1",
                "pmovmskb {equal:e}, xmm0",
                "cmp {equal:e}, 0xffff",
                "jne 3f",
                "add {from}, 64",
                "sub {length}, 64",
                "jnz 2b",
                "3:",
                from = inout(reg) from => _,
                length = inout(reg) length => _,
                equal = out(reg) equal_bytes,
                out("xmm0") _, out("xmm1") _,
                options(nostack, readonly),
            );
        }
        equal_bytes == 0xffff
    }

    #[cfg(test)]
    mod tests {
        use crate::store::memory::mapping::Mapping;
        use crate::units::{PAGE_BYTES, PAGE_SIZE};

        #[test]
        fn each_instruction_set_that_the_processor_has_copies_every_byte() {
            type Copy = unsafe fn(*mut u8, *const u8, usize);
            let mut sets: Vec<(&str, Copy)> = vec![("sse2", super::copy_sse2), ("memcpy", super::copy)];
            match is_x86_feature_detected!("avx2") {
                true => sets.push(("avx2", super::copy_avx2)),
                false => println!("this processor has no AVX2"),
            }
            match is_x86_feature_detected!("avx512f") {
                true => sets.push(("avx512", super::copy_avx512)),
                false => println!("this processor has no AVX-512"),
            }
            let bytes: [u8; PAGE_SIZE] = std::array::from_fn(|at| (at % 251).to_le_bytes()[0]);
            for (name, copy) in sets {
                let memory = Mapping::anonymous(3 * PAGE_BYTES).unwrap();
                let (source, target) = (memory.span(0, 1), memory.span(PAGE_BYTES, 1));
                super::super::fill(source, &bytes);
                let mut seen = [0; PAGE_SIZE];
                // SAFETY: two mapped pages that do not overlap, aligned, on a processor that has the set.
                unsafe { copy(target.start(), source.start(), PAGE_SIZE) };
                super::fence();
                super::super::read(target, &mut seen);
                assert!(seen == bytes, "{name}");
                // From any address, as in plain mode: the page after five bytes.
                let loose = memory.read_span(5, 1);
                // SAFETY: as above, but for the alignment of what is read.
                unsafe { copy(target.start(), loose.start(), PAGE_SIZE - 256) };
                super::fence();
                super::super::read(target, &mut seen);
                assert!(seen[..PAGE_SIZE - 256] == bytes[5..PAGE_SIZE - 251], "{name}");
                assert!(
                    super::super::is_zero(memory.span(2 * PAGE_BYTES, 1)),
                    "{name} wrote behind its page"
                );
            }
        }
    }
}

#[cfg(any(not(target_arch = "x86_64"), miri, test))]
mod portable {
    use crate::units::PAGE_SIZE;
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence as memory_fence};

    const WORD: usize = size_of::<u64>();

    /// # Safety
    /// `at` is an aligned word of guest memory.
    unsafe fn word<'a>(at: *const u8) -> &'a AtomicU64 {
        // SAFETY: the caller vouches for the word, and all accesses of this module are atomic.
        unsafe { AtomicU64::from_ptr(at.cast_mut().cast()) }
    }

    /// # Safety
    /// A page at `to` can be written.
    pub(crate) unsafe fn fill(to: *mut u8, bytes: &[u8; PAGE_SIZE]) {
        for (at, chunk) in bytes.as_chunks::<WORD>().0.iter().enumerate() {
            // SAFETY: a word of that page.
            unsafe { word(to.add(at * WORD)) }.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
        }
    }

    /// A word of guest memory that may lie at any address.
    ///
    /// # Safety
    /// Eight bytes at `at` can be read.
    unsafe fn load(at: *const u8) -> u64 {
        if at.addr().is_multiple_of(WORD) {
            // SAFETY: an aligned word.
            return unsafe { word(at) }.load(Ordering::Relaxed);
        }
        let mut bytes = [0; WORD];
        // SAFETY: the eight bytes.
        unsafe { read_bytes(at, &mut bytes) };
        u64::from_ne_bytes(bytes)
    }

    /// # Safety
    /// As many bytes at `from` can be read.
    pub(crate) unsafe fn read_bytes(from: *const u8, out: &mut [u8]) {
        for (at, byte) in out.iter_mut().enumerate() {
            // SAFETY: one of those bytes, read atomically as everything else here.
            *byte = unsafe { AtomicU8::from_ptr(from.add(at).cast_mut()) }.load(Ordering::Relaxed);
        }
    }

    pub(crate) use crate::opaque::write_each as write_bytes;

    /// # Safety
    /// A page at `from` can be read.
    pub(crate) unsafe fn read(from: *const u8, bytes: &mut [u8; PAGE_SIZE]) {
        for (at, chunk) in bytes.as_chunks_mut::<WORD>().0.iter_mut().enumerate() {
            // SAFETY: a word of that page.
            *chunk = unsafe { load(from.add(at * WORD)) }.to_ne_bytes();
        }
    }

    /// # Safety
    /// `length` bytes at `from` can be read and at `to` be written; both are guest memory of whole words, and `to` is
    /// aligned to them.
    pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, length: usize) {
        for at in (0..length).step_by(WORD) {
            // SAFETY: inside of what the caller vouches for.
            let (to, value) = unsafe { (word(to.add(at)), load(from.add(at))) };
            to.store(value, Ordering::Relaxed);
        }
    }

    pub(crate) use copy as copy_non_temporal;

    pub(crate) fn fence() {
        memory_fence(Ordering::Release);
    }

    /// # Safety
    /// `length` bytes at `to` can be written; `length` is a multiple of 8.
    pub(crate) unsafe fn zero(to: *mut u8, length: usize) {
        for at in (0..length).step_by(WORD) {
            // SAFETY: inside of what the caller vouches for.
            unsafe { word(to.add(at)) }.store(0, Ordering::Relaxed);
        }
    }

    /// # Safety
    /// `length` bytes at `from` can be read; `length` is a multiple of 8.
    pub(crate) unsafe fn is_zero(from: *const u8, length: usize) -> bool {
        // SAFETY: inside of what the caller vouches for.
        let read = |at| unsafe { word(from.add(at)) }.load(Ordering::Relaxed);
        (0..length).step_by(WORD).all(|at| read(at) == 0)
    }

    /// Elsewhere than on x86-64 and under Miri these are what all other tests use.
    #[cfg(test)]
    #[test]
    fn they_do_what_their_names_say() {
        use crate::store::memory::mapping::Mapping;
        use crate::units::PAGE_BYTES;

        let memory = Mapping::anonymous(3 * PAGE_BYTES).unwrap();
        let pages = [0, 1, 2].map(|at| memory.span(at * PAGE_BYTES, 1).start());
        let bytes: [u8; PAGE_SIZE] = std::array::from_fn(|at| (at % 251).to_le_bytes()[0]);
        let mut seen = [0; PAGE_SIZE];
        // SAFETY: mapped pages, which this thread alone uses.
        unsafe {
            fill(pages[0], &bytes);
            copy_non_temporal(pages[1], pages[0], PAGE_SIZE);
            fence();
            read(pages[1], &mut seen);
            assert!(seen == bytes);
            assert!(!is_zero(pages[1], PAGE_SIZE) && is_zero(pages[2], PAGE_SIZE));
            zero(pages[1], PAGE_SIZE);
            assert!(is_zero(pages[1], PAGE_SIZE) && !is_zero(pages[0], PAGE_SIZE));
            write_bytes(pages[1].add(3), &bytes[..11]);
            let mut some = [0; 13];
            read_bytes(pages[1].add(2), &mut some);
            assert!(some[0] == 0 && some[1..12] == bytes[..11] && some[12] == 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::mapping::Mapping;
    use crate::units::PAGE_BYTES;

    #[test]
    fn zero_and_is_zero_see_every_byte() {
        let memory = Mapping::anonymous(2 * PAGE_BYTES).unwrap();
        let page = memory.span(PAGE_BYTES, 1);
        let step = if cfg!(miri) { 1021 } else { 7 };
        for at in (0..PAGE_SIZE).step_by(step).chain([PAGE_SIZE - 1]) {
            let mut bytes = [0; PAGE_SIZE];
            bytes[at] = 1;
            fill(page, &bytes);
            assert!(!is_zero(page), "byte {at}");
            assert!(is_zero(memory.span(0, 1)), "byte {at} spilled");
            zero(page);
            assert!(is_zero(page), "byte {at}");
        }
    }

    #[test]
    fn copies_do_not_mix_pages_up() {
        let memory = Mapping::anonymous(8 * PAGE_BYTES).unwrap();
        let tags = 1..=4u8;
        for method in [CopyMethod::NonTemporal, CopyMethod::Memcpy] {
            for tag in tags.clone() {
                fill(memory.span(u64::from(tag - 1) * PAGE_BYTES, 1), &[tag; PAGE_SIZE]);
            }
            copy(memory.span(4 * PAGE_BYTES, 4), memory.span(0, 4), method);
            fence();
            for tag in tags.clone() {
                let mut seen = [0; PAGE_SIZE];
                read(memory.span(u64::from(tag + 3) * PAGE_BYTES, 1), &mut seen);
                assert!(seen == [tag; PAGE_SIZE], "{method:?}");
            }
            zero(memory.span(0, 8));
        }
    }
}
