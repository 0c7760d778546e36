//! Deliberate breaks, each of which the simulation must find: a simulation that never fails proves nothing.
//!
//! In every build but a test's there are none: [`is_set`] is a constant no.

/// A break of one promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Canary {
    /// A sync is taken as complete before its last channel has arrived.
    EarlySync,
    /// A channel may write while a commit is under way or done.
    OpenGate,
    /// A channel that arrives last at a sync does not wake the main channel.
    LostWake,
    /// The last page of a packet is not marked dirty.
    LostMark,
    /// Pages reach the image before they are committed.
    EarlyImage,
    /// A checkpoint is acknowledged before its device state is here.
    EarlyAcknowledge,
    /// The thread that ends a flush does not wake the main channel, which waits for that.
    SilentFlushEnd,
    /// A flush leaves out a page.
    SkippedPage,
    /// A commit keeps the device state of the checkpoint before.
    StaleDeviceState,
    /// A record does not say that a flush has ended.
    EndlessFlush,
    /// A record says that a flush has ended before it has begun.
    EarlyFlushed,
    /// A commit writes the device state over that of the checkpoint before.
    OneDeviceState,
    /// A device state that is written before its commit is not written.
    UnwrittenState,
    /// A channel that has ended is not counted out.
    LostPart,
    /// A checkpoint request is answered while the flush is in progress.
    EarlyReply,
    /// The main channel takes a flush for finished that is in progress.
    EarlyFlushEnd,
    /// The gate opens while the flush is in progress, before the answer.
    EarlyGate,
    /// A disk takes writes after its epoch was cut.
    LateCut,
    /// An epoch is cut and committed although its disk is lost.
    IgnoredLoss,
    /// The open epoch of a disk is applied when its session ends.
    AppliedEarly,
    /// A commit leaves out the last disk.
    ForgottenDisk,
    /// Applying a log leaves out a block.
    SkippedBlock,
    /// A log is given up before it is in the base.
    FreedEarly,
    /// A channel arrives at a sync while payloads of it are not decoded.
    EarlyArrival,
    /// A packet's zero pages are applied before the payloads of the packets before it.
    EarlyZero,
    /// A worker that decodes the payload a channel waits for does not wake the channel.
    LostDecodeWake,
    /// A checkpoint is acknowledged before the guard has drawn its line.
    EarlyLoaded,
    /// The receiver sends the guard a commit before it is made.
    EarlyCommitted,
    /// A guest that is handed over is acknowledged its last checkpoint.
    TwoGuests,
    /// A request that the guard keeps is not answered when its time is over.
    EndlessKeep,
    /// The main channel, which keeps a request, is not woken when it may be answered.
    SilentBegin,
    /// A session goes on whose guard was lost before it held anything.
    UnguardedBeginning,
    /// A guard lets go of frames when their line is drawn.
    EarlyRelease,
    /// A budget gives more than it has.
    Overdraft,
    /// What a guest has of a budget is not given back.
    LostLease,
    /// A session whose memory cannot be made does not end.
    SilentLack,
    /// A session commits before it is known that no connection contradicts its channels.
    EarlyAdmission,
    /// What looks like the end of a device state is taken for it at once.
    EarlyEnd,
}

#[cfg(test)]
thread_local! {
    static SET: std::cell::Cell<Option<Canary>> = const { std::cell::Cell::new(None) };
}

/// Sets the break of this thread.
#[cfg(test)]
pub(crate) fn set(canary: Option<Canary>) {
    SET.set(canary);
}

/// Whether this thread is to break that promise.
#[cfg(test)]
pub(crate) fn is_set(canary: Canary) -> bool {
    SET.get() == Some(canary)
}

/// Whether this thread is to break that promise: never.
#[cfg(not(test))]
pub(crate) const fn is_set(_: Canary) -> bool {
    false
}
