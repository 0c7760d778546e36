//! The same captured sessions, replayed in turn into QEMU's own secondary, into `colo-ring` in all its ways, and into a
//! sink: what `scripts/bench-vs-qemu` does.
//!
//! What disturbs a measurement on a shared machine is fought in three ways: secondaries take turns in an order that
//! changes from round to round; checkpoints during which others had the processor are left out and counted; and
//! what is compared is a ratio within the same turns, with the interval in which it lies.

mod captures;
mod contest;
mod decoders;
mod figures;
mod live;
mod memory;
mod options;
mod page;
mod plan;
mod process;
mod published;
mod replays;
mod results;
mod run;
mod secondary;
mod shape;
mod table;

pub use live::pauses_us;
pub use options::Options;
pub use plan::{Cell, Plan};
pub use run::run;
pub use secondary::{Flushed, Secondary, StartOptions};
pub use shape::Shape;
