//! What a commit takes and how it is flushed: dirty pages, the plan made of them, and the threads that copy them.

pub(crate) mod bitmap;
pub(crate) mod flusher;
mod fork_join;
pub(crate) mod plan;
mod work_queue;
