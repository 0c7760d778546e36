//! How a multifd channel's pages are compressed, from the headers of its packets up to the first one with a payload.

use colo_ring::wire::codec::Method;
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, Init, PacketHeader};
use std::ops::ControlFlow;

/// Looks for the method of one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct MethodSearch {
    is_initiated: bool,
    /// A part of the init packet or of a header. Packets up to the one that is looked for have nothing else.
    part: Vec<u8>,
}

impl MethodSearch {
    /// The connection's next bytes. Breaks with the method, or with none where it is no multifd channel.
    pub(super) fn look(&mut self, mut bytes: &[u8]) -> ControlFlow<Option<Method>> {
        loop {
            let length = if self.is_initiated { HEADER_LEN } else { INIT_LEN };
            let taken = bytes.len().min(length - self.part.len());
            let (more, rest) = bytes.split_at(taken);
            self.part.extend_from_slice(more);
            bytes = rest;
            if self.part.len() < length {
                return ControlFlow::Continue(());
            }
            if self.is_initiated {
                self.header()?;
            } else if self
                .part
                .first_chunk()
                .map(Init::decode)
                .is_none_or(|init| init.is_err())
            {
                return ControlFlow::Break(None);
            }
            self.is_initiated = true;
            self.part.clear();
        }
    }

    /// A header is complete.
    fn header(&self) -> ControlFlow<Option<Method>> {
        match self.part.first_chunk().map(PacketHeader::decode) {
            Some(Ok(header)) if header.payload_len() > 0 => ControlFlow::Break(Some(header.method())),
            Some(Ok(_)) => ControlFlow::Continue(()),
            Some(Err(_)) | None => ControlFlow::Break(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring::units::ChannelId;
    use colo_ring::wire::multifd::PacketFields;

    /// The method of a connection with an init packet, a SYNC and these packets, which comes in pieces of `piece` bytes.
    fn found(packets: &[PacketFields<'_>], piece: usize) -> ControlFlow<Option<Method>> {
        let init = Init {
            uuid: [0; 16],
            channel: ChannelId(3),
        };
        let mut bytes = init.encode().to_vec();
        for fields in [&PacketFields::sync(0)].into_iter().chain(packets) {
            let mut header = [0; HEADER_LEN];
            fields.encode(&mut header);
            bytes.extend_from_slice(&header);
        }
        bytes.extend([7; 100]);
        let mut search = MethodSearch::default();
        bytes.chunks(piece).try_for_each(|piece| search.look(piece))
    }

    fn packet(method: Method, normal: &[u64], payload_len: u32) -> PacketFields<'_> {
        PacketFields {
            sync: false,
            method,
            pages_alloc: 128,
            payload_len,
            packet_num: 1,
            block: b"pc.ram",
            normal,
            zero: &[4096],
        }
    }

    #[test]
    fn the_first_payload_decides() {
        for piece in [1, 63, 64, 65, 4096, 1 << 20] {
            for (method, length) in [(Method::None, 4096), (Method::Zlib, 100), (Method::Zstd, 100)] {
                let zero = packet(Method::Zlib, &[], 0);
                let first = packet(method, &[0], length);
                let seen = found(&[zero, first], piece);
                assert_eq!(seen, ControlFlow::Break(Some(method)), "{piece}");
            }
            assert_eq!(
                found(&[packet(Method::Zstd, &[], 0)], piece),
                ControlFlow::Continue(())
            );
        }
    }

    #[test]
    fn other_connections_have_none() {
        for bytes in [
            [0x16; 2 * INIT_LEN],
            *b"QEVM\0\0\0\x03".repeat(16).first_chunk().unwrap(),
        ] {
            assert_eq!(MethodSearch::default().look(&bytes), ControlFlow::Break(None));
        }
    }
}
