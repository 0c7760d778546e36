//! Bytes to types and back: the wire format of a migration to a COLO secondary (spec §2 to §12). No I/O, no
//! unsafe, no clock.
//!
//! **Main channel.** Every element has a pure parser `parse(input) -> Parsed<T>` over the bytes that have arrived
//! so far: `Ok(None)` asks for more bytes, `Ok(Some((value, consumed)))` is the element and its length. Nothing is
//! kept between calls; the caller starts again at the element's first byte. That costs little, because every such
//! element is small: the largest is a page record of [`ram::RECORD_MAX`] bytes. Two elements are not small, and have
//! types that take bytes as they arrive: the initial device state ([`vmdesc::EndFinder`]) and a checkpoint's blob,
//! whose length is announced.
//!
//! **Multifd channels** are read in pieces of fixed length ([`multifd::INIT_LEN`], [`multifd::HEADER_LEN`], then a
//! payload of [`multifd::PacketHeader::payload_len`]), so their decoders take arrays.
//!
//! **Promises.** Nothing is allocated by a number that the peer sent; values borrow the input where they can. Every
//! number is checked here against spec §21 before it is returned. What takes the session's state (is this message
//! expected now, is the channel id below N) is not checked here. Encoders exist for every type: for tests, for the
//! synthetic primary and for the stream that restarts a guest.

pub mod codec;
pub mod colo;
pub mod cursor;
mod error;
pub mod limits;
pub mod multifd;
pub mod ram;
pub mod return_path;
pub mod run_state;
pub(crate) mod state_buffer;
pub mod stream;
pub mod vmdesc;
pub mod xbzrle;

pub use cursor::Parsed;
pub use error::WireError;

#[cfg(test)]
mod tests;
