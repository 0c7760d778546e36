//! Compressed payloads: received into buffers of their channel, decoded by worker threads while the channel receives the
//! next ones.
//!
//! ```text
//!                      ┌──────────── free: packets without content ◄──────────────┐
//!                      ▼                                                          │
//!  socket ─► PageChannel, Compressed ── pending: whole packets, in order ──► a worker ─► cache slots, dirty bitmap
//!                      │                                                          ▲
//!                      └── the queue itself, when it was empty ──► run queue ─────┘ ── again, while packets are left ──┐
//!                                                                     ▲                                                │
//!                                                                     └────────────────────────────────────────────────┘
//! ```
//!
//! # Parts
//! * A [`Packet`](queue::Packet) is a payload's buffer and the lists of the pages that it changes. A channel has
//!   [`PACKETS`](queue::PACKETS) of them, which go round between it and the workers.
//! * A [`DecodeQueue`](queue::DecodeQueue) is what a channel shares with the workers: its free and its pending packets, its
//!   decoder, and the [`Backlog`](backlog::Backlog) that counts the packets that are not applied yet. It is made
//!   when the channel's first compressed packet is announced. The first one of a session charges the budget of the guest's RAM
//!   for all channels ([`DecodeMemory`](memory::DecodeMemory)).
//! * The [`Workers`] have one [`RunQueue`](run_queue::RunQueue) of decode queues for all guests. A worker takes a queue,
//!   applies its oldest packet, and puts it back behind the others if more are pending: no guest and no channel waits for
//!   another's whole checkpoint.
//! * [`Compressed`] is the channel's end.
//!
//! # Contract
//! * A queue is in the run queue or in the hands of one worker exactly as long as its backlog is not 0. The thread that raises
//!   it from 0 hands the queue over, the one that lowers it to 0 releases it. So the packets of a channel are applied in order, one
//!   at a time, and nothing needs a lock. While the backlog is 0 the queue is the channel's alone, and the thread that drives
//!   the channel may use its decoder: it does so for packets of few pages, for which a worker's wake-up would cost more than
//!   it saves, and for all packets where there is no worker.
//! * Zero pages of a packet are applied with it, once its payload is decoded, because payloads of the packets before it may have
//!   the same pages.
//! * A channel without a free packet is parked, and its socket fills: that is the limit of what is in flight. It arrives at a
//!   sync when its backlog is 0, and only then ends its packets for the gate ([`crate::session::Rendezvous`]): a commit never
//!   runs beside a worker that writes to the store.
//! * A queue is a part of its session: a session is not over before its last queue is dropped. After the session's end, workers
//!   drop the packets that are pending.

mod backlog;
mod channel;
mod memory;
mod queue;
mod run_queue;
mod workers;

pub(super) use channel::Compressed;
pub(super) use memory::SharedDecodeMemory;
pub(super) use queue::PacketPlace;
pub(super) use workers::{WorkerThreads, Workers};
#[cfg(all(test, not(loom), not(miri)))]
pub(super) use {queue::DecodeQueue, workers::Worker};
