//! Output commit: the protocol between a receiver and the guard of its primary, without I/O.
//!
//! The guard holds what the guest sends until the checkpoint that contains the sending is committed. Then the outside world
//! has never seen anything that a failover unmakes. For each checkpoint *n*:
//!
//! ```text
//!  primary              receiver                           guard
//!     │ stops its guest    │                                 │ holds every frame that it reads
//!     ├── VMSTATE_SEND ───►│── barrier n ───────────────────►│ takes what the guest has sent up to here, and
//!     │── pages, state ───►│◄─────────────────── placed n ───┤ draws a line behind it
//!     │                    │ commits n                       │
//!     │                    │── committed n ─────────────────►│ lets go of what is before the line
//!     │◄─ RECEIVED, LOADED ┤                                 │
//!     │ its guest runs     │                                 │
//! ```
//!
//! When a checkpoint begins, the guard may say, too. QEMU asks for one (CHECKPOINT_REQUEST) and runs its guest until it is answered. A guard that
//! has said `keep` has QEMU ask as soon as its guest runs again; the receiver keeps that request, and answers it at `begin`, so that from a frame that waits
//! to the guest's stop there is one message on the link:
//!
//! ```text
//!     ├─ CHECKPOINT_REQUEST ►│ keeps it                      │
//!     │ its guest runs     │                                 │ holds a frame
//!     │◄─ CHECKPOINT_REPLY ┤◄─────────────────────── begin ──┤
//!     │ stops its guest    │                                 │
//! ```
//!
//! # Invariants
//! 1. A line is drawn while the guest is stopped: the receiver acknowledges checkpoint *n* (LOADED, or READY for the first) only
//!    after `placed n`. [`Barriers::may_acknowledge`]
//! 2. Nothing is let go that is behind the last committed line: the guard lets go up to line *n* only after `committed n`, which
//!    the receiver sends after its commit, and after `placed n`: so a guard that the receiver has given up, since it did not answer,
//!    has no word that would let go what is behind a line drawn too late. [`Barriers::next_message`]
//! 3. A commit lets go only up to lines that were drawn on the same link: a guard that has lost its link drops its lines
//!    ([`HeldOutput::forget_barriers`]), since the guest may have run on before a line that arrives late was drawn.
//! 4. A guest that is handed over runs in one place: once its last checkpoint has begun, the receiver acknowledges nothing any more
//!    ([`Barriers::begin_handover`]), and resumes it only after the guard's `primary_ended`. A guard that cannot end its QEMU
//!    refuses, and a link that is lost before the guard was told to do so leaves the guest where it is.
//! 5. A request is kept only while the guest runs, and never for ever: it is answered at `begin`, when the time is over that came with `keep`
//!    (since the last commit on this link, and by as much later as a message takes that is being written to a guard which does not read), when
//!    the link is lost or replaced, and when the guest is handed over ([`Barriers::may_begin`]). `begin` is for one checkpoint, and names the one before
//!    it: one that crosses a barrier asks for nothing. QEMU's own interval is no shorter than without all this, so where nobody keeps
//!    its requests any more, it sends no more of them than it would to a receiver without a guard.
//! 6. A receiver without a link acknowledges at once. Nothing is released meanwhile: a guard without a link holds everything until it
//!    has a link again, or has ended the protection.
//! 7. That is so from a guard's first line on. One that has the guest protected holds nothing before it: if its link is lost by then,
//!    nothing is acknowledged, and the receiver ends the session ([`Barriers::is_unguarded`]); and no session gets that link but one that has begun
//!    after it ([`Wanted::Next`]): an older one, whose primary's end the receiver has not seen, would leave the new one without a guard.
//!
//! So: *what the world has seen is in the last committed checkpoint*. `model.rs` explores every order of events within small bounds, the
//! receiver's simulation long runs. Barrier and transfer go on at the same time, so the barrier costs
//! the pause nothing unless the checkpoint is nearly empty.
//!
//! # On the wire
//! The guard connects to an address of the receiver's `--listen` and sends [`PREFACE`]; from then on both send one JSON
//! object a line, of at most [`LINE_MAX`] bytes: [`ToReceiver`], [`ToGuard`]. The first is [`ToReceiver::Hello`], which is answered
//! by [`ToGuard::Welcome`] or [`ToGuard::Refused`]. The receiver binds the link to the session that the guard wants ([`Wanted`]), of those whose stream
//! has the guest's UUID; of guests without one an origin may have one at a time.
//!
//! `colo-ring protect`, which does not stay, sends [`ToReceiver::Call`] as its first and only message instead. It is answered by
//! [`ToGuard::Welcome`], and once the guest is protected by [`ToGuard::Called`].

mod barriers;
mod held_output;
mod message;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use barriers::{Barriers, HandoverError, LinkError};
pub use held_output::{Held, HeldOutput};
pub use message::{Call, Hello, LINE_MAX, LINK_VERSION, PREFACE, ToGuard, ToReceiver, Wanted};
