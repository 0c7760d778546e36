//! One direction of a TCP connection, put in order again from the segments that were seen.
//!
//! What was seen twice counts once; what came out of order waits until the gap is filled. At most [`WAITING_MAX`] bytes
//! wait: behind a gap that long nothing will fill it, because the segment was lost by the recorder, not by the network.
//! No crate does this alone; those that do it come with analysers of protocols that are not needed here.

use std::collections::BTreeMap;
use std::ops::Range;

/// Most bytes that wait behind a gap, what it takes to keep them included.
const WAITING_MAX: usize = 64 << 20;

/// What a waiting segment takes beside its bytes, roughly.
const SEGMENT_OVERHEAD: usize = 64;

/// One direction. Positions are in bytes since its begin.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    /// The sequence number of the next byte; None until the begin is known.
    next: Option<u32>,
    delivered: u64,
    /// Segments behind a gap, by position.
    waiting: BTreeMap<u64, Vec<u8>>,
    waiting_cost: usize,
    /// Where it ends, once its FIN was seen.
    end: Option<u64>,
    /// Up to where the other side has acknowledged it.
    acknowledged: u64,
}

impl Reassembly {
    /// The direction's first byte has this sequence number. Only the first call counts.
    pub(super) fn begin(&mut self, sequence: u32) {
        self.next.get_or_insert(sequence);
    }

    /// Bytes delivered so far.
    #[cfg(test)]
    fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Takes a segment and gives to `deliver` what is next in order. A direction whose begin was not seen takes nothing.
    ///
    /// # Errors
    /// That of `deliver`; and [`Reassembly::missing`] if too much waits.
    pub(super) fn take<E>(
        &mut self,
        sequence: u32,
        payload: &[u8],
        mut deliver: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(position) = self.position(sequence) else {
            return Ok(());
        };
        let Some(ahead) = position.checked_sub(self.delivered) else {
            // It begins with what was delivered already.
            let known = usize::try_from(self.delivered - position).unwrap_or(usize::MAX);
            return self.deliver(payload.get(known..).unwrap_or_default(), &mut deliver);
        };
        if ahead == 0 {
            return self.deliver(payload, &mut deliver);
        }
        let known = self.waiting.get(&position).map_or(0, Vec::len);
        if !payload.is_empty() && known < payload.len() {
            self.waiting_cost += SEGMENT_OVERHEAD + payload.len();
            self.waiting.insert(position, payload.to_vec());
        }
        Ok(())
    }

    fn deliver<E>(
        &mut self,
        bytes: &[u8],
        deliver: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.advance(bytes, deliver)?;
        while let Some(entry) = self.waiting.first_entry() {
            if *entry.key() > self.delivered {
                break;
            }
            let (position, segment) = entry.remove_entry();
            let known = usize::try_from(self.delivered - position).unwrap_or(usize::MAX);
            self.advance(segment.get(known..).unwrap_or_default(), deliver)?;
        }
        if self.waiting.is_empty() {
            self.waiting_cost = 0;
        }
        Ok(())
    }

    fn advance<E>(
        &mut self,
        bytes: &[u8],
        deliver: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.delivered += bytes.len() as u64;
        let [a, b, c, d, ..] = (bytes.len() as u64).to_le_bytes();
        let length = u32::from_le_bytes([a, b, c, d]);
        self.next = self.next.map(|next| next.wrapping_add(length));
        deliver(bytes)
    }

    /// The direction ends behind a segment with this sequence number and length.
    pub(super) fn end(&mut self, sequence: u32, length: usize) {
        self.end = self.position(sequence).map(|position| position + length as u64);
    }

    /// Whether all bytes up to its end are delivered.
    pub(super) fn is_complete(&self) -> bool {
        self.end == Some(self.delivered)
    }

    /// The other side has acknowledged everything before this sequence number.
    pub(super) fn acknowledge(&mut self, sequence: u32) {
        if let Some(position) = self.position(sequence) {
            // A FIN counts as one byte.
            let position = position.min(self.end.unwrap_or(u64::MAX));
            self.acknowledged = self.acknowledged.max(position);
        }
    }

    /// Bytes that were sent and are missing here, as far as that is known.
    pub(super) fn missing(&self) -> Option<Range<u64>> {
        let first_waiting = self.waiting.first_key_value().map(|(position, _)| *position);
        let end = first_waiting.or(self.end).unwrap_or(self.acknowledged);
        (end > self.delivered).then_some(self.delivered..end)
    }

    /// Whether so much waits that the gap will not be filled.
    pub(super) fn is_lost(&self) -> bool {
        self.waiting_cost > WAITING_MAX
    }

    /// Where a byte with this sequence number lies, within half of the number space around the next one.
    fn position(&self, sequence: u32) -> Option<u64> {
        let ahead = sequence.wrapping_sub(self.next?).cast_signed();
        self.delivered.checked_add_signed(ahead.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(direction: &mut Reassembly, sequence: u32, payload: &[u8], out: &mut Vec<u8>) {
        let deliver = |bytes: &[u8]| {
            out.extend_from_slice(bytes);
            Ok::<_, std::convert::Infallible>(())
        };
        direction.take(sequence, payload, deliver).unwrap();
    }

    fn begun(sequence: u32) -> Reassembly {
        let mut direction = Reassembly::default();
        direction.begin(sequence);
        direction
    }

    #[test]
    fn retransmissions_and_disorder_are_resolved() {
        let mut direction = begun(u32::MAX - 2);
        let mut out = Vec::new();
        take(&mut direction, u32::MAX - 2, b"ab", &mut out);
        take(&mut direction, 2, b"fgh", &mut out);
        assert_eq!(direction.missing(), Some(2..5));
        take(&mut direction, u32::MAX - 2, b"abc", &mut out);
        take(&mut direction, 1, b"ef", &mut out);
        take(&mut direction, 0, b"d", &mut out);
        assert_eq!((&out[..], direction.missing()), (&b"abcdefgh"[..], None));
        direction.end(5, 0);
        assert!(direction.is_complete());
    }

    #[test]
    fn what_is_lost_is_known() {
        let mut direction = begun(1000);
        let mut out = Vec::new();
        take(&mut direction, 1000, b"abc", &mut out);
        assert_eq!(direction.missing(), None);
        // Acknowledged and never seen.
        direction.acknowledge(1010);
        assert_eq!(direction.missing(), Some(3..10));
        direction.end(1020, 5);
        assert_eq!(direction.missing(), Some(3..25));
        assert!(!direction.is_complete());
        // A FIN's own number is no byte.
        let mut direction = begun(1000);
        direction.end(1000, 0);
        direction.acknowledge(1001);
        assert_eq!(direction.missing(), None);
        // A begin that was not seen: nothing is known.
        let mut direction = Reassembly::default();
        take(&mut direction, 5, b"abc", &mut out);
        assert_eq!((direction.delivered(), direction.missing()), (0, None));
    }

    #[test]
    fn memory_behind_a_gap_is_bounded() {
        let mut direction = begun(0);
        let mut out = Vec::new();
        let mut sequence = 1;
        while !direction.is_lost() {
            take(&mut direction, sequence, &[0; 60_000], &mut out);
            sequence += 60_000;
            assert!(sequence < 70 << 20);
        }
        // Single bytes cost more than themselves.
        let mut direction = begun(0);
        for sequence in (2..).step_by(2).take(1 << 20) {
            take(&mut direction, sequence, b"x", &mut out);
        }
        assert!(direction.is_lost());
    }

    proptest! {
        /// Any cuts, any order, any repetition: the stream comes out once.
        #[test]
        fn any_order_gives_the_stream(
            isn: u32,
            stream in prop::collection::vec(any::<u8>(), 1..500),
            mut pieces in prop::collection::vec((0usize..500, 1usize..80), 0..60),
            shuffle in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            // Everything is there at least once.
            pieces.extend((0..stream.len()).step_by(50).map(|begin| (begin, 50)));
            for (position, index) in shuffle.iter().enumerate() {
                let other = index.index(pieces.len());
                let count = pieces.len();
                pieces.swap(position % count, other);
            }
            let mut direction = begun(isn);
            let mut out = Vec::new();
            for (begin, length) in pieces {
                let begin = begin.min(stream.len());
                let end = (begin + length).min(stream.len());
                let sequence = isn.wrapping_add(u32::try_from(begin).unwrap());
                take(&mut direction, sequence, &stream[begin..end], &mut out);
            }
            prop_assert_eq!(out, stream);
            prop_assert_eq!(direction.missing(), None);
        }
    }
}
