//! Nothing is allocated on the data plane once a session is in steady state: counted, not argued.
//!
//! The receiver and the synthetic primary run in this process; what counts is the thread, by the names that the data
//! plane gives its own.
#![expect(unsafe_code, reason = "a global allocator that counts")]

use colo_ring::receiver::{Event, Receiver};
use colo_ring::ring::BackendKind;
use colo_ring::wire::codec::Method;
use colo_ring_tests::receiver_options;
use colo_ring_tools::page_compression::PageCompression;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Names of the threads that packets pass through.
const RECEIVING: [&[u8]; 4] = [b"colo-core-", b"colo-channel", b"colo-decode-", b"flush-"];

/// Checkpoints until every buffer has the size that it keeps.
const WARM_UP: u64 = 5;

/// Checkpoints that are counted.
const COUNTED: u64 = 20;

/// The system's allocator, which counts what receiving threads ask it for while [`COUNTING`].
struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// One count at a time, whatever the test runner does.
static TURN: Mutex<()> = Mutex::new(());

thread_local! {
    /// Whether this thread receives, once that was looked up. Without a destructor, so that it costs no allocation.
    static RECEIVES: Cell<Option<bool>> = const { Cell::new(None) };
}

fn count() {
    if !COUNTING.load(Ordering::Relaxed) {
        return;
    }
    // A thread that is just ending has no such variable any more, and receives nothing.
    let receives = RECEIVES.try_with(|known| {
        known.get().unwrap_or_else(|| {
            let found = is_receiving_thread();
            known.set(Some(found));
            found
        })
    });
    if receives == Ok(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

/// By the kernel's name for the thread: asking the standard library for it could allocate.
fn is_receiving_thread() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, and `name` is that long and alive during the call.
    let result = unsafe { nix::libc::prctl(nix::libc::PR_GET_NAME, name.as_mut_ptr()) };
    result == 0 && RECEIVING.iter().any(|prefix| name.starts_with(prefix))
}

// SAFETY: every method passes its arguments unchanged to the system's allocator and returns what that returns; the
// counting beside it neither allocates nor unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as in `alloc`; the pointer came from `System`, as all of this allocator's do.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What receiving threads allocate while `work` is done.
fn allocations_during(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    COUNTING.store(true, Ordering::SeqCst);
    work();
    COUNTING.store(false, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// A session of `channels` channels of this version.
fn shape(channels: u8, version: Version, method: Method) -> SynthOptions {
    SynthOptions {
        ram_bytes: 16 << 20,
        channels,
        dirty_pages: Distribution::Fixed(600),
        interval: Duration::ZERO,
        compression: PageCompression {
            method,
            level: (method != Method::None).then_some(1),
        },
        ..SynthOptions::new(version)
    }
}

/// What is allocated in a session of this shape.
fn in_steady_state(backend: BackendKind, shape: &SynthOptions) -> u64 {
    let channels = shape.channels;
    let receiver = Receiver::start(receiver_options(backend, channels), |event| {
        if let Event::Warning(remark) = event {
            println!("{remark}");
        }
    });
    let receiver = receiver.unwrap();
    let address = receiver.addresses()[0].to_string().parse().unwrap();
    let mut primary = SynthPrimary::connect(&address, shape).unwrap();
    let mut pages = 0;
    let mut take = |checkpoints| {
        for _ in 0..checkpoints {
            pages += primary.checkpoint().unwrap().pages;
        }
    };
    take(WARM_UP);
    let allocations = allocations_during(|| take(COUNTED));
    assert!(pages > (WARM_UP + COUNTED) * 500, "only {pages} pages were sent");
    primary.close().unwrap();
    receiver.stop_handle().stop();
    let outcome = receiver.wait().unwrap();
    assert_eq!(outcome.sessions[0].checkpoint, Some(WARM_UP + COUNTED));
    allocations
}

#[test]
fn the_count_sees_an_allocation_of_a_receiving_thread_and_no_other() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, expected) in [
        ("colo-core-7", true),
        ("colo-channel", true),
        ("colo-decode-3", true),
        ("synth-0", false),
    ] {
        let (go, wait) = std::sync::mpsc::sync_channel(0);
        let thread = std::thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || {
            wait.recv().unwrap();
            std::hint::black_box(Box::new(7u64));
        });
        let counted = allocations_during(|| {
            go.send(()).unwrap();
            thread.unwrap().join().unwrap();
        });
        assert_eq!(counted > 0, expected, "{name}: {counted}");
    }
}

#[test]
fn nothing_is_allocated_per_packet_or_checkpoint() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut table = Vec::new();
    for backend in [BackendKind::Uring, BackendKind::Epoll, BackendKind::Threads] {
        for channels in [4, 0] {
            for version in [Version::V11_1, Version::V7_2] {
                let allocations = in_steady_state(backend, &shape(channels, version, Method::None));
                table.push((backend.name(), channels, version, "none", allocations));
            }
        }
        for method in [Method::Zlib, Method::Zstd] {
            let allocations = in_steady_state(backend, &shape(4, Version::V11_1, method));
            table.push((backend.name(), 4, Version::V11_1, method.name(), allocations));
        }
        let deltas = SynthOptions {
            xbzrle: true,
            ..shape(0, Version::V11_1, Method::None)
        };
        let allocations = in_steady_state(backend, &deltas);
        table.push((backend.name(), 0, Version::V11_1, "xbzrle", allocations));
    }
    assert!(
        table.iter().all(|(.., allocations)| *allocations == 0),
        "{table:?}"
    );
}
