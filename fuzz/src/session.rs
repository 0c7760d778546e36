//! Whole primaries, main channel and multifd channels, and single channels, against the protocol's state machines.
//!
//! The first byte says how many multifd channels there are; the pieces behind it are what comes on the main channel (stream 0) and on
//! them. Uncompressed payloads are not in the input: their bytes mean nothing to the protocol.

mod channel;

use super::pieces::Pieces;
use channel::Channel;
use colo_ring::blocks::BlockTable;
use colo_ring::failover::{Form, write_stream};
use colo_ring::session::{Action, Outbound, PageContent, Rendezvous, Session, SessionLimits, SessionMethod};
use colo_ring::units::{PAGE_SIZE, PageIndex};
use colo_ring::wire::vmdesc::Evidence;
use colo_ring::wire::xbzrle;
use std::sync::Arc;

/// Bytes that a primary sends, at most.
const BYTES_MAX: usize = 1 << 20;

/// Multifd channels, at most.
const CHANNELS_MAX: u8 = 4;

/// Guests of at most so many pages are given to a fresh QEMU when they are committed.
const RESTORED_PAGES_MAX: u64 = 16;

/// Bytes of buffers that do not depend on what has arrived.
const BUFFERED_MIN: u64 = 64 << 10;

/// A text that an operator reads has something in it, and commands no terminal.
fn check_text(text: &str) {
    assert!(
        !text.is_empty() && !text.chars().any(char::is_control),
        "{text:?}"
    );
}

/// The main channel.
struct Main {
    protocol: Session,
    input: Vec<u8>,
    consumed: usize,
    is_at_marker: bool,
    table: Option<Arc<BlockTable>>,
    commits: u64,
    pages: usize,
    outbound: Vec<u8>,
}

/// A session that is over.
struct Over;

impl Main {
    fn new(channels: u8) -> Self {
        Self {
            protocol: Session::new(SessionLimits::of_protocol(channels)),
            input: Vec::new(),
            consumed: 0,
            is_at_marker: false,
            table: None,
            commits: 0,
            pages: 0,
            outbound: Vec::new(),
        }
    }

    /// Takes as many steps as there can be now.
    fn drive(&mut self, rendezvous: &Rendezvous) -> Result<(), Over> {
        loop {
            if self.is_at_marker {
                if !rendezvous.all_arrived() {
                    return Ok(());
                }
                rendezvous.release();
                self.is_at_marker = false;
            }
            if !self.step(rendezvous)? {
                return Ok(());
            }
        }
    }

    /// One step, and what it asks for. False if it needs more bytes.
    fn step(&mut self, rendezvous: &Rendezvous) -> Result<bool, Over> {
        let rest = &self.input[self.consumed..];
        let before = self.protocol.position();
        let (consumed, action) = self.protocol.step(rest).map_err(|error| {
            check_text(&error.to_string());
            Over
        })?;
        assert!(consumed <= rest.len());
        assert_eq!(self.protocol.position(), before + consumed as u64);
        self.consumed += consumed;
        match action {
            Action::NeedMore => {
                let buffered = self.protocol.state_bytes_after(0);
                assert!(
                    buffered <= 2 * self.input.len() as u64 + BUFFERED_MIN,
                    "{buffered} bytes"
                );
                return Ok(false);
            }
            Action::Continue | Action::TransferBegins => {}
            // A piece is followed by silence, or by the next one, which shows that it was no end.
            Action::LooksEnded(Evidence::Described) => self.protocol.silence(),
            Action::LooksEnded(Evidence::Undescribed(mismatch)) => {
                check_text(&mismatch.to_string());
                if self.protocol.position().is_multiple_of(2) {
                    self.protocol.silence();
                }
            }
            Action::Send(outbound) => {
                outbound.encode(&mut self.outbound);
                assert!((1..=Outbound::LEN_MAX).contains(&self.outbound.len()));
            }
            Action::Memory(table) => {
                assert!(self.table.is_none());
                self.table = Some(table);
            }
            Action::Page(page) => {
                let table = self.table.as_ref().expect("the block list is known");
                assert!(page.page.get() < table.total_pages());
                if let PageContent::Xbzrle(delta) = page.content {
                    xbzrle::apply(delta, &mut [0; PAGE_SIZE]).expect("it was checked");
                }
                self.pages += 1;
            }
            Action::Marker => self.is_at_marker = true,
            Action::RamComplete => rendezvous.close_gate().map_err(|_| Over)?,
            Action::OpenGate => rendezvous.open_gate(),
            Action::FinishFlush => self.protocol.flush_finished(),
            Action::Commit(checkpoint) => {
                assert_eq!(checkpoint.0, self.commits);
                self.commits += 1;
                self.commit();
            }
        }
        Ok(true)
    }

    /// A checkpoint is committed, and could be given to a fresh QEMU.
    fn commit(&mut self) {
        let device_state = std::mem::take(self.protocol.device_state());
        self.protocol.committed();
        let description = self
            .protocol
            .description()
            .expect("it is known from the first commit on");
        if description.blocks.total_pages() > RESTORED_PAGES_MAX {
            return;
        }
        let read = |_: PageIndex, content: &mut [u8; PAGE_SIZE]| content[0] ^= 1;
        let mut stream = Vec::new();
        let report = write_stream(description, &device_state, read, Form::Complete, &mut stream);
        assert_eq!(
            report.expect("a vector takes everything").bytes,
            stream.len() as u64
        );
    }
}

/// A primary with all its channels. Counts pages and commits.
pub fn session(input: &[u8]) -> usize {
    let Some((channels, pieces)) = input.split_first() else {
        return 0;
    };
    let channels = channels % (CHANNELS_MAX + 1);
    let rendezvous = Rendezvous::new(channels);
    let method = SessionMethod::default();
    let mut main = Main::new(channels);
    let mut pages: Vec<Channel> = (0..channels).map(Channel::new).collect();
    for (stream, piece) in Pieces::new(pieces, BYTES_MAX) {
        match stream.checked_sub(1) {
            None => piece.append_to(&mut main.input),
            Some(channel) => match pages.get_mut(channel) {
                Some(channel) => channel.arrive(piece),
                None => continue,
            },
        }
        if drive(&mut main, &mut pages, &rendezvous, &method).is_err() {
            break;
        }
    }
    check_text(&main.protocol.ending().to_string());
    main.pages + usize::try_from(main.commits).unwrap_or(0) + pages.iter().map(Channel::pages).sum::<usize>()
}

/// Lets all channels go on until none of them can.
fn drive(
    main: &mut Main,
    channels: &mut [Channel],
    rendezvous: &Rendezvous,
    method: &SessionMethod,
) -> Result<(), Over> {
    loop {
        main.drive(rendezvous)?;
        let mut goes_on = false;
        for channel in &mut *channels {
            goes_on |= channel.drive(main.table.as_deref(), rendezvous, method)?;
        }
        if !goes_on {
            return Ok(());
        }
    }
}

/// One channel of a guest with a few blocks, which is released at every sync. Counts pages.
pub fn channel(input: &[u8]) -> usize {
    let blocks = [
        (&b"pc.ram"[..], 1 << 27),
        (b"pc.ram2", 0x3000),
        (b"/rom@etc/acpi/tables", 0x20_0000),
    ];
    let total = blocks.iter().map(|(_, bytes)| bytes).sum();
    let blocks = blocks.map(|(name, bytes)| (name.into(), bytes));
    let table = BlockTable::new(blocks.into(), total).expect("a good list");
    let (rendezvous, method) = (Rendezvous::new(1), SessionMethod::default());
    let mut channel = Channel::new(0);
    for (_, piece) in Pieces::new(input, BYTES_MAX) {
        channel.arrive(piece);
        loop {
            match channel.drive(Some(&table), &rendezvous, &method) {
                Err(Over) => return channel.pages(),
                Ok(_) if rendezvous.all_arrived() => rendezvous.release(),
                Ok(_) => break,
            }
        }
    }
    channel.pages()
}
