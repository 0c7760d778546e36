//! `colo-ring capture` as its users run it: what goes in comes out, what went through stands in the file, and nothing that
//! befalls the recording befalls the session.

mod bytes;
mod faults;
mod harness;
mod sessions;
