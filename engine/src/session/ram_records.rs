//! The records of the RAM section: pages that travel on the main channel, and the markers of the sync points with the
//! multifd channels (spec §7.1, §10).

use super::action::{Action, Page, PageContent};
use super::main_channel::{SectionPart, Session, Stage, Step, unexpected};
use crate::units::BlockId;
use crate::wire::WireError;
use crate::wire::ram::{BlockList, BlockRef, RamRecord};

/// Where the primary puts the markers. A property of its machine type, seen from the START section (spec §10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncMode {
    /// MULTIFD_FLUSH records: machine types from 8.1 on.
    PerRound,
    /// The EOS of every section: up to 8.0.
    PerSection,
}

/// The block of the last page record, which records with CONTINUE refer to: for the whole session.
#[derive(Debug, Default)]
pub(super) struct Continued(Option<BlockId>);

impl Session {
    pub(super) fn read_record<'a>(&mut self, body: SectionPart, input: &'a [u8]) -> Step<'a> {
        let Some((record, consumed)) = RamRecord::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        let after_marker = std::mem::replace(&mut self.marker_last, false);
        let action = match record {
            RamRecord::MemSize { total } => {
                if body != SectionPart::Start || self.blocks.is_some() {
                    return Err(unexpected("a second block list"));
                }
                self.stage = Stage::BlockList(BlockList::new(total)?);
                Action::Continue
            }
            RamRecord::Eos => self.end_of_body(body, after_marker)?,
            RamRecord::MultifdFlush => self.flush_marker(body)?,
            RamRecord::Zero { block, offset } => self.page(block, offset, PageContent::Zero)?,
            RamRecord::Page {
                block,
                offset,
                content,
            } => self.page(block, offset, PageContent::Bytes(content))?,
            RamRecord::Xbzrle { block, offset, delta } => {
                if self.limits.channels > 0 {
                    return Err(WireError::refused(
                        "XBZRLE pages beside multifd",
                        "switch its capability xbzrle off",
                    ));
                }
                crate::wire::xbzrle::check(delta)?;
                self.page(block, offset, PageContent::Xbzrle(delta))?
            }
        };
        Ok((consumed, action))
    }

    fn page<'a>(
        &mut self,
        block: BlockRef<'_>,
        offset: u64,
        content: PageContent<'a>,
    ) -> Result<Action<'a>, WireError> {
        let table = self
            .blocks
            .as_ref()
            .ok_or_else(|| unexpected("a page before the block list"))?;
        let block = match block {
            BlockRef::Continue => self.continued.0.ok_or(WireError::NothingToContinue)?,
            BlockRef::Named(name) => table
                .by_name(name)
                .ok_or_else(|| WireError::unknown_block(name))?,
        };
        self.continued = Continued(Some(block));
        Ok(Action::Page(Page {
            page: table.page(block, offset)?,
            content,
        }))
    }

    fn flush_marker(&mut self, body: SectionPart) -> Result<Action<'static>, WireError> {
        if self.limits.channels == 0 {
            return Err(WireError::refused(
                "multifd's sync markers to a receiver set up for plain migration",
                "switch its capability multifd off, or start the receiver with --channels as its multifd-channels",
            ));
        }
        if self.blocks.is_none() {
            return Err(unexpected("a sync marker before the block list"));
        }
        match self.sync_mode {
            None if body == SectionPart::Start => self.sync_mode = Some(SyncMode::PerRound),
            Some(SyncMode::PerRound) => {}
            _ => {
                return Err(unexpected(
                    "MULTIFD_FLUSH after sections that were synced at their end",
                ));
            }
        }
        self.marker_last = true;
        Ok(Action::Marker)
    }

    fn end_of_body(&mut self, body: SectionPart, after_marker: bool) -> Result<Action<'static>, WireError> {
        if self.blocks.is_none() {
            return Err(unexpected("the end of RAM START before the block list"));
        }
        self.stage = Stage::Footer(body);
        if self.limits.channels == 0 {
            return Ok(Action::Continue);
        }
        match *self.sync_mode.get_or_insert(SyncMode::PerSection) {
            SyncMode::PerSection => Ok(Action::Marker),
            SyncMode::PerRound if body == SectionPart::End && !after_marker => Err(unexpected(
                "the end of a RAM round without a MULTIFD_FLUSH before it",
            )),
            SyncMode::PerRound => Ok(Action::Continue),
        }
    }
}
