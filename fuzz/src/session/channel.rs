//! One multifd channel.

use super::super::pieces::Piece;
use super::{Over, check_text};
use colo_ring::blocks::BlockTable;
use colo_ring::session::{ChannelError, MultifdChannel, PacketAction, Rendezvous, SessionMethod, Ticket};
use colo_ring::units::{ChannelId, PAGE_SIZE};
use colo_ring::wire::codec::{Decoder, Method, PageBuffer, stream_bytes};
use colo_ring::wire::multifd::{self, HEADER_LEN, PacketHeader, PageList, START_LEN};
use std::cell::RefCell;
use std::fmt::Display;

thread_local!(static BUFFER: RefCell<PageBuffer> = RefCell::default());

/// What it waits for.
enum State {
    Header,
    /// Anything that arrives: then its payload is here, which is not in the input.
    Payload,
    /// A compressed payload of so many bytes, for so many pages.
    Compressed(Method, usize, u16),
    Released(Ticket),
}

/// See the module.
pub(super) struct Channel {
    id: ChannelId,
    protocol: MultifdChannel,
    input: Vec<u8>,
    consumed: usize,
    state: State,
    decoder: Option<Decoder>,
    lists: Box<(PageList, PageList)>,
    pages: usize,
}

fn over(error: impl Display) -> Over {
    check_text(&error.to_string());
    Over
}

impl Channel {
    pub(super) fn new(id: u8) -> Self {
        Self {
            id: ChannelId(id),
            protocol: MultifdChannel::default(),
            input: Vec::new(),
            consumed: 0,
            state: State::Header,
            decoder: None,
            lists: Box::default(),
            pages: 0,
        }
    }

    /// Pages that it has brought.
    pub(super) fn pages(&self) -> usize {
        self.pages + usize::try_from(self.protocol.pages_since_sync()).unwrap_or(0)
    }

    pub(super) fn arrive(&mut self, piece: Piece<'_>) {
        piece.append_to(&mut self.input);
    }

    /// Takes as many steps as there can be now. Whether there was one.
    pub(super) fn drive(
        &mut self,
        table: Option<&BlockTable>,
        rendezvous: &Rendezvous,
        method: &SessionMethod,
    ) -> Result<bool, Over> {
        let mut goes_on = false;
        while self.step(table, rendezvous, method)? {
            goes_on = true;
        }
        Ok(goes_on)
    }

    fn step(
        &mut self,
        table: Option<&BlockTable>,
        rendezvous: &Rendezvous,
        method: &SessionMethod,
    ) -> Result<bool, Over> {
        let rest = &self.input[self.consumed..];
        match self.state {
            State::Header => {
                if let Some(start) = rest.first_chunk::<START_LEN>() {
                    multifd::check_start(start).map_err(over)?;
                }
                let Some(header) = rest.first_chunk::<HEADER_LEN>().copied() else {
                    return Ok(false);
                };
                self.consumed += HEADER_LEN;
                self.header(&header, table, rendezvous, method)?;
            }
            State::Payload => {
                if rest.is_empty() {
                    return Ok(false);
                }
                self.applied(rendezvous);
            }
            State::Compressed(method, length, normal) => {
                let Some(payload) = rest.get(..length) else {
                    return Ok(false);
                };
                self.consumed += length;
                let payload = payload.to_vec();
                self.decode(method, &payload, normal)?;
                self.applied(rendezvous);
            }
            State::Released(ticket) => {
                if !rendezvous.is_released(ticket) {
                    return Ok(false);
                }
                self.protocol.on_release();
                self.state = State::Header;
            }
        }
        Ok(true)
    }

    fn header(
        &mut self,
        bytes: &[u8; HEADER_LEN],
        table: Option<&BlockTable>,
        rendezvous: &Rendezvous,
        method: &SessionMethod,
    ) -> Result<(), Over> {
        let header = PacketHeader::decode(bytes).map_err(over)?;
        let action = self.protocol.on_header(&header, method).map_err(over)?;
        let (normal, payload) = match action {
            PacketAction::ReadHeader | PacketAction::Arrive => {
                self.carry_out(action, rendezvous);
                return Ok(());
            }
            PacketAction::Zero => (0, State::Payload),
            PacketAction::Place { payload_len, .. } => {
                assert_eq!(
                    payload_len as usize,
                    usize::from(header.normal_pages()) * PAGE_SIZE
                );
                (header.normal_pages(), State::Payload)
            }
            PacketAction::Decode { method, payload_len } => {
                let normal = header.normal_pages();
                (normal, State::Compressed(method, payload_len as usize, normal))
            }
        };
        let table = table.expect("the guest's memory is known before a channel is released the first time");
        self.resolve(&header, table, normal)?;
        let begun = rendezvous.begin_packet(self.id);
        begun.map_err(|closed| over(ChannelError::from(closed)))?;
        if let PacketAction::Zero = action {
            self.applied(rendezvous);
        } else {
            self.state = payload;
        }
        Ok(())
    }

    /// The pages of a packet are of one block, and each is there once.
    fn resolve(&mut self, header: &PacketHeader<'_>, table: &BlockTable, count: u16) -> Result<(), Over> {
        let (normal, zero) = &mut *self.lists;
        let block = header.resolve(table, normal, zero).map_err(over)?;
        let block = table.block(block.expect("it has pages"));
        assert_eq!((normal.count(), zero.count()), (count, header.zero_pages()));
        let first = block.first_page.get();
        let mut pages: Vec<u64> = normal
            .as_slice()
            .iter()
            .chain(zero.as_slice())
            .map(|page| page.get())
            .collect();
        assert!(
            pages
                .iter()
                .all(|page| (first..first + block.pages()).contains(page))
        );
        pages.sort_unstable();
        assert!(pages.windows(2).all(|pair| pair[0] < pair[1]));
        Ok(())
    }

    fn decode(&mut self, method: Method, payload: &[u8], normal: u16) -> Result<(), Over> {
        stream_bytes(method, payload).map_err(over)?;
        if self.decoder.is_none() {
            self.decoder = Decoder::open(method).map_err(over)?;
        }
        let decoder = self.decoder.as_mut().expect("a method that compresses");
        assert_eq!(decoder.method(), method);
        BUFFER.with_borrow_mut(|buffer| {
            let pages = decoder.decode(payload, normal, buffer).map_err(over)?;
            assert_eq!(pages.len(), usize::from(normal));
            Ok(())
        })
    }

    fn applied(&mut self, rendezvous: &Rendezvous) {
        rendezvous.end_packet(self.id);
        let action = self.protocol.on_pages();
        self.carry_out(action, rendezvous);
    }

    fn carry_out(&mut self, action: PacketAction, rendezvous: &Rendezvous) {
        self.state = match action {
            PacketAction::Arrive => {
                let traffic = self.protocol.take_traffic();
                self.pages += usize::try_from(traffic.pages + traffic.zero_pages).unwrap_or(0);
                State::Released(rendezvous.arrive().0)
            }
            _ => State::Header,
        };
    }
}
