//! A channel of a session that is not its primary's: a stranger on the primary's host has connected with that number while the primary's own
//! waits in the listener's queue. What it sends is well-formed, but other pages than the primary's.
//!
//! The control thread finds the contradiction when it comes to the primary's own channel, at the latest when the session asks for its
//! admission. Nothing may be committed before.

use super::hostile::elements;
use super::primary::Primary;
use super::rng::Rng;
use crate::units::ChannelId;
use crate::wire::multifd::HEADER_LEN;

/// What the seed of strangers differs by.
const STRANGERS: u64 = 0x0073_7472_616e_6765;

/// One session in so many has one.
const RATE: usize = 12;

/// Which sessions of a run have a stranger among their channels.
pub(super) struct Strangers(Option<Rng>);

impl Strangers {
    /// None in a run whose receiver is killed.
    pub(super) fn of(seed: u64, is_mortal: bool) -> Self {
        Self((!is_mortal).then(|| Rng::new(seed ^ STRANGERS)))
    }

    /// One for a session with so many channels, if it has one.
    pub(super) fn one(&mut self, channels: usize) -> Option<Stranger> {
        let rng = self.0.as_mut().filter(|_| channels > 0)?;
        let channel = u8::try_from(rng.below(channels)).ok()?;
        rng.one_in(RATE).then_some(Stranger(ChannelId(channel)))
    }
}

/// See the module.
pub(super) struct Stranger(pub(super) ChannelId);

impl Stranger {
    /// Puts its own pages in place of what the primary is about to send on that channel.
    pub(super) fn send(&self, primary: &mut Primary) {
        let stream = &mut primary.streams[1 + usize::from(self.0.0)];
        let mut packets = elements(stream);
        for packet in &mut packets {
            if let Some(first) = packet.get_mut(HEADER_LEN) {
                *first ^= 1;
            }
        }
        stream.out = packets.concat();
    }
}
