//! One direction of one connection: its bytes and the times of their arrival.

use std::time::Duration;

/// One direction of one connection.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    bytes: Vec<u8>,
    chunks: Vec<Chunk>,
}

/// Bytes that arrived together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Where it ends in the flow.
    pub end: usize,
    /// When it arrived, since the start of the capture.
    pub at: Duration,
}

impl Flow {
    /// Appends bytes that arrived together.
    pub fn push(&mut self, at: Duration, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.extend_from_slice(bytes);
        let end = self.bytes.len();
        self.chunks.push(Chunk { end, at });
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The chunks, in order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// When a byte arrived; `None` after the end.
    pub fn at(&self, byte: usize) -> Option<Duration> {
        let chunk = self.chunks.partition_point(|chunk| chunk.end <= byte);
        self.chunks.get(chunk).map(|chunk| chunk.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_the_time_of_its_chunk() {
        let mut flow = Flow::default();
        flow.push(Duration::from_millis(1), b"ab");
        flow.push(Duration::from_millis(2), b"");
        flow.push(Duration::from_millis(3), b"c");
        let times: Vec<_> = (0..4).map(|byte| flow.at(byte)).collect();
        let (first, second) = (Some(Duration::from_millis(1)), Some(Duration::from_millis(3)));
        assert_eq!(times, [first, first, second, None]);
        assert_eq!(flow.bytes(), b"abc");
        assert_eq!(flow.chunks().len(), 2);
    }
}
