//! Bytes to types and back: the wire format of a migration to a COLO secondary. No I/O, no unsafe.
#![forbid(unsafe_code)]
