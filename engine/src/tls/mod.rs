//! TLS on the channels of migrations and the links of guards (spec §17): the receiver is the server, and every connection is TLS from its
//! first byte.
//!
//! # Where what happens
//!
//! ```text
//!  control thread          colo-tls (one thread)                     a core
//!  accept ───────────────► handshake, certificate, --tls-allow
//!         ◄─────────────── first bytes opened: main channel, multifd channel or link
//!  assemble, begin ─────────────────────────────────────────────────► Encrypted<MainChannel>, Encrypted<PageChannel>
//! ```
//!
//! **Handshakes** are done by a thread of their own, with less of the processor than the receiving cores (a niceness of 10): each costs about
//! a millisecond, and a thousand of them would be a second in which the control thread could answer no failover. They are tasks there:
//! one that stands still costs memory alone. A handshake is a part of identifying a connection, so that what bounds that bounds it: at most
//! 1,024 connections at a time and 512 of one origin, the oldest silent one makes room, `--accept-timeout` from the accepted
//! connection to its first bytes; and its own bounds, `HANDSHAKE_BYTES_MAX` to be read, and `HANDSHAKE_MEMORY` of the budget. There are
//! no tickets, no resumption, no early data. A client's certificates are counted before they are verified. The private key is used by that
//! thread alone. Links of guards are on the way of checkpoints: the control thread, which serves them, opens their records, too.
//!
//! **Records** are opened by the core that receives them. After the handshake rustls gives the traffic keys away, as for a kernel that has
//! TLS (`rustls::kernel`), and `record` opens records with rustls' own record code: the buffered interfaces of rustls copy each record
//! twice and allocate for it. `Encrypted` is a `Connection` around a channel: it receives into a buffer of
//! 128 KiB, opens each record there, and copies what it holds to the places that the channel has planned, the pages' slots. That is one copy
//! in user space; the cipher writes its output over its input. QEMU makes a record of each page, but their places in memory
//! are one byte shorter than what the cipher writes in TLS 1.3 (the type of the record comes last), so that even this copy cannot be
//! left out. Only bytes whose record was whole and authentic are handed on. Nothing is allocated after the handshake, but for answers
//! to the primary.
//!
//! A channel that waits takes no records from its socket: what is in the buffer stays there, and the peer is held up by its window as
//! without TLS. A turn of the core opens at most 128 KiB of one connection. A core falls behind earlier than without TLS, and so a channel
//! goes to a core of its own at half the backlog (`ring`).
//!
//! **The provider** is aws-lc-rs, rustls' default: of the two that rustls' maintainers keep it is the faster for AES-GCM, and it builds with a C
//! compiler alone. Its AES-256-GCM opens 10 GB/s of pages on one core with AVX-512, ring's 8.3 GB/s.
//!
//! # The ends of a connection
//!
//! | what comes | what it is |
//! |---|---|
//! | close_notify | the end of the stream. What follows it is not read |
//! | the socket's end without it, also in the middle of a record | the same: QEMU's main channel ends so. A checkpoint that is not whole is not committed, whatever ended the stream |
//! | KeyUpdate (1.3) | the next key; this end's too if asked, by an answer that never waits. 65,536 of them at most |
//! | any other alert | the channel broke, with the alert's name |
//! | a handshake in TLS 1.2 (renegotiation), anything else that is no data | the channel broke; the peer is sent an alert |
//! | a record that does not decrypt | the same |
//!
//! This end sends no close_notify: sessions end by the loss of one side, and a primary takes the end of the stream for the loss
//! of its secondary either way.
//!
//! # Who may connect
//!
//! A client must have a certificate that `ca-cert.pem` has signed and `ca-crl.pem` does not revoke, unless `--tls-verify-peer off`; with
//! `--tls-allow` also one of these identities. All connections of a session must have one identity (`Identity`), which its status shows.
//! The files are read again at SIGHUP, for new connections.
//!
//! # What there is not
//!
//! Kernel TLS: the handshake already ends in keys for it, and `KernelTls` says what a kernel can, but no receive path uses it. PSK (`tls-creds-psk`): rustls has no external
//! PSKs, and a second TLS library on the way of pages is not worth it.

mod connection;
mod credentials;
mod handshake;
mod identity;
mod kernel;
mod record;
mod relay;
#[cfg(all(test, not(loom), not(miri)))]
mod tests;
mod verifier;

pub(crate) use connection::{CONNECTION_BYTES, Encrypted, Receiving};
pub(crate) use credentials::begin_random_numbers;
pub use credentials::{CredentialsError, ServerCredentials, Validity, client_config, client_validity};
pub use handshake::HandshakeError;
pub(crate) use handshake::{About, Channel, accept};
pub use identity::{Allowed, Identity, UnreadableCertificate};
pub use kernel::{KernelLack, KernelTls};
pub(crate) use record::Outgoing;
pub use record::RecordError;
pub(crate) use relay::relay;

/// Bytes of a record's header.
const RECORD_HEADER: usize = 5;

/// Most bytes that a client may send in its handshake: some certificates.
pub(crate) const HANDSHAKE_BYTES_MAX: usize = 32 << 10;

/// What a handshake takes of the memory budget: its records, and rustls' state.
pub(crate) const HANDSHAKE_MEMORY: u64 = 96 << 10;
