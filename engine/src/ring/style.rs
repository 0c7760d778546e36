//! How connections shape their plans: what a backend is good at.

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReceiveStyle {
    /// A packet's header in two reads, as QEMU does it.
    pub split_header: bool,
    /// The next packet's header in one receive with the payload.
    pub chain_header: bool,
    /// Adjacent pages as one piece.
    pub merge_adjacent: bool,
    /// The main channel reads on while it waits at a marker.
    pub read_ahead: bool,
    /// Each channel that arrives at a sync wakes the main channel, not the last one alone.
    pub wake_each: bool,
    /// When a channel goes to a core of its own.
    pub offload: OffloadThreshold,
    /// Pages of one round from which on receives are [bulk](super::ReceivePlan::bulk).
    pub bulk_from_pages: u64,
}

/// When one core cannot keep up with a guest's channels: both must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OffloadThreshold {
    /// Pages of one round that the channel has carried.
    pub from_pages: u64,
    /// Bytes that wait in its socket.
    pub from_queued: u64,
}

impl OffloadThreshold {
    /// A core that keeps up with its senders finds little in its sockets, and a second one then only takes the pages out of
    /// its cache: on two cores that made checkpoints of 30 MiB a third slower. A core that falls behind finds what the
    /// kernel queues, some MiB. Fewer pages are received before another core is awake.
    const WHEN_BEHIND: Self = Self {
        from_pages: 128,
        from_queued: 1 << 20,
    };

    /// Each channel has a thread of its own.
    const NEVER: Self = Self {
        from_pages: u64::MAX,
        from_queued: u64::MAX,
    };
}

impl ReceiveStyle {
    /// For the rings and epoll: as few operations as possible.
    pub const RING: Self = Self {
        split_header: false,
        chain_header: true,
        merge_adjacent: true,
        read_ahead: true,
        wake_each: false,
        offload: OffloadThreshold::WHEN_BEHIND,
        bulk_from_pages: 64,
    };

    /// For a thread per channel: what QEMU's receiver does.
    pub const THREADS: Self = Self {
        split_header: true,
        chain_header: false,
        merge_adjacent: false,
        read_ahead: false,
        wake_each: true,
        offload: OffloadThreshold::NEVER,
        bulk_from_pages: u64::MAX,
    };
}
