//! What the tests of the whole share: the laboratory with real QEMU, captures, the command under test.
#![forbid(unsafe_code)]

pub mod lab;
