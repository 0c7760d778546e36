//! What a commit takes and how it is flushed: the dirty pages, and the threads that copy them.

pub(crate) mod bitmap;
pub(crate) mod flusher;
mod fork_join;
mod work_queue;
