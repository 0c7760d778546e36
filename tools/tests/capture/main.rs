//! `colo-ring capture` as its users run it: what goes in comes out, the file has what went through, and nothing that
//! befalls the recording befalls the session.

mod bytes;
mod faults;
mod harness;
mod sessions;
