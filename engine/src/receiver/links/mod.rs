//! Links to the guards of primaries ([`crate::link`]): a session waits for its guard before it acknowledges a checkpoint.

mod registry;
mod server;
mod session_output;

pub(super) use registry::{GuardIsGone, GuestMarks, Links};
pub(super) use server::serve;
pub use session_output::GuardStatus;
pub(super) use session_output::SessionOutput;
#[cfg(all(test, not(loom), not(miri)))]
pub(super) use session_output::{LinkNumber, Next};
