//! What the tests of the whole share: the laboratory with real QEMU, captures, the command under test.

pub mod capture;
pub mod command;
pub mod hostile;
pub mod lab;
pub mod model;
pub mod shrink;
pub mod versus;
