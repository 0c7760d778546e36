//! The main channel as a state machine: bytes in, actions out (spec §3 to §7, §10 to §12).
//!
//! ```text
//! Header ─► Setup ─► BlockList ─► Records ◄─► Footer ─► Precopy ─► Devices ─► Committing
//!           commands   START        │                  PART, END    vmdesc        │ committed()
//!                                   ▼                                             ▼
//!                                 Marker              ┌────── REQUEST ◄─────────  Idle ◄────────┐
//!                                                     ▼                                         │
//!          Reply ◄── OpenGate ◄─ flush_finished() ─ Flushing                                    │
//!            ▼                                                                                  │
//!          WaitSend ─► Live ◄─► Records, Footer                                                 │
//!                       │ EOF byte                                                              │
//!                       ▼                                                                       │
//!                      WaitSize ─► DeviceState ─► Committing ───────────────────────────────────┘
//! ```
//!
//! The driver calls [`Session::step`] with what has arrived, consumes what the step says, and carries out the
//! action, before it calls again. Three actions take time: [`Action::Marker`] must not be followed by another step
//! until all channels have arrived and were released, [`Action::Commit`] not until [`Session::committed`], and
//! [`Action::FinishFlush`] not until [`Session::flush_finished`].

use super::action::{Action, Outbound};
use super::error::{Ending, SessionError};
use super::guest_description::GuestDescription;
use super::limits::{PINGS_MAX, SessionLimits};
use super::ram_records::{Continued, SyncMode};
use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::units::CheckpointId;
use crate::wire::WireError;
use crate::wire::colo::{self, Message};
use crate::wire::ram::{BlockEntry, BlockList};
use crate::wire::stream::{Command, Section, StreamHeader, parse_footer};
use crate::wire::vmdesc::EndFinder;
use std::sync::Arc;

/// Which part of the RAM section is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SectionPart {
    Start,
    Part,
    End,
}

#[derive(Debug)]
pub(super) enum Stage {
    Header,
    Setup,
    BlockList(BlockList),
    Records(SectionPart),
    Footer(SectionPart),
    Precopy,
    Devices(EndFinder),
    Committing,
    /// Committed; the acknowledgement goes out next.
    Committed,
    Idle,
    /// Requested; the pages of the last checkpoint are on their way to the RAM image.
    Flushing,
    /// Flushed; the gate opens next.
    OpenGate,
    /// The gate is open; CHECKPOINT_REPLY goes out next.
    Reply,
    WaitSend,
    Live {
        ram_seen: bool,
    },
    WaitSize,
    DeviceState {
        missing: u64,
    },
}

/// The state of one session's main channel.
#[derive(Debug)]
pub struct Session {
    pub(super) limits: SessionLimits,
    pub(super) stage: Stage,
    position: u64,
    header: Vec<u8>,
    machine_type: String,
    return_path: bool,
    colo_announced: bool,
    pings: u32,
    ram_section: u32,
    pub(super) blocks: Option<Arc<BlockTable>>,
    pub(super) sync_mode: Option<SyncMode>,
    pub(super) marker_last: bool,
    pub(super) continued: Continued,
    device_state: Vec<u8>,
    description: Option<Arc<GuestDescription>>,
    /// The last committed checkpoint.
    checkpoint: Option<CheckpointId>,
    /// Whether the primary has asked for a checkpoint: before that it may be one without COLO.
    colo_seen: bool,
}

impl Session {
    /// A session whose first byte has not been read.
    pub fn new(limits: SessionLimits) -> Self {
        Self {
            limits,
            stage: Stage::Header,
            position: 0,
            header: Vec::new(),
            machine_type: String::new(),
            return_path: false,
            colo_announced: false,
            pings: 0,
            ram_section: 0,
            blocks: None,
            sync_mode: None,
            marker_last: false,
            continued: Continued::default(),
            device_state: Vec::new(),
            description: None,
            checkpoint: None,
            colo_seen: false,
        }
    }

    /// Takes the next element off `input`. Returns how many bytes it took and what to do.
    ///
    /// # Errors
    /// The session is over: see [`SessionError`], which names the byte on the main channel.
    pub fn step<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), SessionError> {
        let position = self.position;
        let (consumed, action) = self
            .advance(input)
            .map_err(|error| SessionError::at(position, error))?;
        self.position += consumed as u64;
        Ok((consumed, action))
    }

    /// The checkpoint of [`Action::Commit`] is committed.
    ///
    /// # Panics
    /// If the last action was not [`Action::Commit`].
    pub fn committed(&mut self) {
        assert!(
            matches!(self.stage, Stage::Committing),
            "only after Action::Commit"
        );
        self.checkpoint = Some(self.next_checkpoint());
        self.stage = Stage::Committed;
    }

    /// The pages of the last checkpoint are in the RAM image, as [`Action::FinishFlush`] asked.
    ///
    /// # Panics
    /// If the last action was not that one.
    pub fn flush_finished(&mut self) {
        assert!(
            matches!(self.stage, Stage::Flushing),
            "only after Action::FinishFlush"
        );
        self.stage = Stage::OpenGate;
    }

    /// The device state of the checkpoint that is to be committed; the caller may take it, leaving a buffer whose
    /// memory is used for the next.
    pub fn device_state(&mut self) -> &mut Vec<u8> {
        &mut self.device_state
    }

    /// What is constant for the session: known from the commit of the initial state on.
    pub fn description(&self) -> Option<&Arc<GuestDescription>> {
        self.description.as_ref()
    }

    /// The machine type, once the configuration was read; else empty.
    pub fn machine_type(&self) -> &str {
        &self.machine_type
    }

    /// Bytes consumed on the main channel.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of device state that are allocated here.
    pub fn buffered_bytes(&self) -> u64 {
        match &self.stage {
            Stage::Devices(finder) => finder.buffered() as u64,
            _ => self.device_state.capacity() as u64,
        }
    }

    /// An error that was found while an action was carried out, at that byte.
    pub fn error_at(&self, position: u64, error: WireError) -> SessionError {
        SessionError::at(position, error)
    }

    /// Whether what has arrived looks like device state whose vmdesc is suppressed. If nothing follows for some
    /// time, [`EndFinder::suppressed`] is the reason to end the session.
    pub fn looks_suppressed(&self) -> bool {
        matches!(&self.stage, Stage::Devices(finder) if finder.looks_suppressed())
    }

    /// What the end of the main channel means at this point.
    pub fn ending(&self) -> Ending {
        match (&self.stage, self.checkpoint) {
            (_, None) => Ending::InPrecopy,
            (Stage::Idle, Some(_)) if !self.colo_seen && self.return_path => Ending::PlainMigration,
            (Stage::Idle, Some(last)) => Ending::BetweenCheckpoints { last },
            (_, Some(last)) => Ending::DuringCheckpoint { last },
        }
    }

    /// The checkpoint after the last committed one.
    pub(crate) fn next_checkpoint(&self) -> CheckpointId {
        CheckpointId(self.checkpoint.map_or(0, |last| last.0 + 1))
    }

    fn advance<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        match self.stage {
            Stage::Header => self.read_header(input),
            Stage::Setup => self.read_setup(input),
            Stage::BlockList(_) => self.read_block_list(input),
            Stage::Records(body) => self.read_record(body, input),
            Stage::Footer(body) => self.read_footer(body, input),
            Stage::Precopy => self.read_precopy(input),
            Stage::Devices(_) => self.read_devices(input),
            Stage::Committing => unreachable!("the driver commits before it steps again"),
            Stage::Committed => Ok((0, self.acknowledge_commit())),
            Stage::Flushing => unreachable!("the driver finishes the flush before it steps again"),
            Stage::OpenGate => {
                self.stage = Stage::Reply;
                Ok((0, Action::OpenGate))
            }
            Stage::Reply => {
                self.stage = Stage::WaitSend;
                Ok((0, Action::Send(Outbound::Reply)))
            }
            Stage::Idle => self.read_message(input, Message::CheckpointRequest),
            Stage::WaitSend => self.read_message(input, Message::VmstateSend),
            Stage::Live { ram_seen } => self.read_live(ram_seen, input),
            Stage::WaitSize => self.read_size(input),
            Stage::DeviceState { missing } => self.read_device_state(missing, input),
        }
    }

    fn read_header<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        let Some((header, consumed)) = StreamHeader::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        self.header = input[..consumed].to_vec();
        self.machine_type = header.machine_type;
        self.stage = Stage::Setup;
        Ok((consumed, Action::Continue))
    }

    /// Between the configuration and RAM START: what is sent here decides which kind of primary this is (spec §5).
    fn read_setup<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        let Some((section, consumed)) = Section::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        let mut action = Action::Continue;
        match section {
            Section::Command(Command::OpenReturnPath) => self.return_path = true,
            Section::Command(Command::EnableColo) => self.colo_announced = true,
            Section::Command(Command::Ping(value)) => {
                if !self.return_path {
                    return Err(WireError::refused(
                        "PING before OPEN_RETURN_PATH",
                        "use QEMU 7.2 to 11 as the primary",
                    ));
                }
                self.pings += 1;
                if self.pings > PINGS_MAX {
                    let (seen, limit) = (u64::from(self.pings), u64::from(PINGS_MAX));
                    return Err(WireError::Limit {
                        field: "the number of PINGs",
                        seen,
                        limit,
                    });
                }
                action = Action::Send(Outbound::Pong(value));
            }
            Section::Command(Command::SwitchoverStart) => {
                return Err(unexpected("SWITCHOVER_START before the RAM section"));
            }
            Section::RamStart { id } => {
                self.check_kind_of_primary()?;
                self.ram_section = id;
                self.stage = Stage::Records(SectionPart::Start);
            }
            Section::Full { idstr, .. } => {
                let what = format!("the state of device \"{}\" before RAM", idstr.escape_ascii());
                return Err(WireError::refused(
                    what,
                    "remove this device (virtio-mem, for example)",
                ));
            }
            other => return Err(unexpected(format!("{other:?} before the RAM section"))),
        }
        Ok((consumed, action))
    }

    fn check_kind_of_primary(&self) -> Result<(), WireError> {
        match (self.return_path, self.colo_announced) {
            (true, false) | (false, true) => Ok(()),
            (true, true) => Err(WireError::refused(
                "both the return path and ENABLE_COLO, as QEMU up to 10.0 does with return-path on",
                "switch its capability return-path off: with it, these versions cannot do COLO",
            )),
            (false, false) => Err(WireError::refused(
                "a migration without COLO",
                "switch its capability x-colo on, and from QEMU 11 on return-path too",
            )),
        }
    }

    fn read_block_list<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        let Stage::BlockList(list) = &mut self.stage else {
            return Ok((0, Action::Continue));
        };
        let Some((entry, consumed)) = BlockEntry::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        let Some(table) = list.push(entry)? else {
            return Ok((consumed, Action::Continue));
        };
        let table = Arc::new(table);
        self.blocks = Some(table.clone());
        self.stage = Stage::Records(SectionPart::Start);
        Ok((consumed, Action::Memory(table)))
    }

    fn read_footer<'a>(
        &mut self,
        body: SectionPart,
        input: &'a [u8],
    ) -> Result<(usize, Action<'a>), WireError> {
        let Some(((), consumed)) = parse_footer(input, self.ram_section)? else {
            return Ok((0, Action::NeedMore));
        };
        let live = self.checkpoint.is_some();
        let (stage, action) = match (body, live) {
            (SectionPart::Part, true) => (Stage::Live { ram_seen: false }, Action::Continue),
            (_, true) => (Stage::Live { ram_seen: true }, Action::Continue),
            (SectionPart::End, false) => (Stage::Devices(EndFinder::default()), Action::RamComplete),
            (_, false) => (Stage::Precopy, Action::Continue),
        };
        self.stage = stage;
        Ok((consumed, action))
    }

    fn read_precopy<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        let Some((section, consumed)) = Section::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        match section {
            Section::Part { id } => self.begin_body(SectionPart::Part, id)?,
            Section::End { id } => self.begin_body(SectionPart::End, id)?,
            Section::Command(Command::SwitchoverStart) => {}
            other => {
                return Err(unexpected(format!(
                    "{other:?} between the parts of the RAM section"
                )));
            }
        }
        Ok((consumed, Action::Continue))
    }

    fn begin_body(&mut self, body: SectionPart, id: u32) -> Result<(), WireError> {
        if id != self.ram_section {
            let (seen, expected) = (u64::from(id), u64::from(self.ram_section));
            return Err(WireError::Mismatch {
                field: "the id of a section part",
                seen,
                expected,
            });
        }
        self.marker_last = false;
        self.stage = Stage::Records(body);
        Ok(())
    }

    fn read_devices<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        let Stage::Devices(finder) = &mut self.stage else {
            return Ok((0, Action::Continue));
        };
        if finder.buffered() == 0 {
            // Commands may come first; the first device section begins the part that has no lengths.
            match input.first() {
                None => return Ok((0, Action::NeedMore)),
                Some(&crate::wire::stream::SECTION_FULL) => {}
                Some(_) => return self.read_command_before_devices(input),
            }
        }
        if input.is_empty() {
            return Ok((0, Action::NeedMore));
        }
        let Some(initial) = finder.push(input)? else {
            return Ok((input.len(), Action::NeedMore));
        };
        colo::check_device_state(&initial.device_state)?;
        let blocks = self
            .blocks
            .clone()
            .ok_or_else(|| unexpected("device state before the block list"))?;
        self.description = Some(Arc::new(GuestDescription {
            header: std::mem::take(&mut self.header),
            machine_type: self.machine_type.clone(),
            ram_section: self.ram_section,
            blocks,
            vmdesc: initial.vmdesc,
        }));
        self.device_state = initial.device_state;
        self.stage = Stage::Committing;
        Ok((input.len(), Action::Commit(self.next_checkpoint())))
    }

    fn read_command_before_devices<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        match Section::parse(input)? {
            None => Ok((0, Action::NeedMore)),
            Some((Section::Command(Command::SwitchoverStart), consumed)) => Ok((consumed, Action::Continue)),
            Some((other, _)) => Err(unexpected(format!("{other:?} before the device state"))),
        }
    }

    fn acknowledge_commit(&mut self) -> Action<'static> {
        self.stage = Stage::Idle;
        Action::Send(match self.checkpoint {
            Some(CheckpointId(0)) | None => Outbound::Ready {
                return_path: self.return_path,
            },
            Some(_) => Outbound::Loaded,
        })
    }

    fn read_message<'a>(
        &mut self,
        input: &'a [u8],
        expected: Message,
    ) -> Result<(usize, Action<'a>), WireError> {
        let Some((message, consumed)) = Message::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        if message != expected {
            return Err(unexpected(format!("{message:?} instead of {expected:?}")));
        }
        self.colo_seen = true;
        if expected == Message::CheckpointRequest {
            if canary::is_set(Canary::EarlyReply) {
                self.stage = Stage::OpenGate;
                return Ok((consumed, Action::Continue));
            }
            self.stage = Stage::Flushing;
            return Ok((consumed, Action::FinishFlush));
        }
        self.stage = Stage::Live { ram_seen: false };
        Ok((consumed, Action::TransferBegins))
    }

    fn read_live<'a>(&mut self, ram_seen: bool, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        let Some((section, consumed)) = Section::parse(input)? else {
            return Ok((0, Action::NeedMore));
        };
        let action = match section {
            Section::Command(Command::SwitchoverStart) => Action::Continue,
            Section::Part { id } if !ram_seen => {
                self.begin_body(SectionPart::Part, id)?;
                Action::Continue
            }
            Section::End { id } if !ram_seen => {
                self.begin_body(SectionPart::End, id)?;
                Action::Continue
            }
            Section::Eof if ram_seen => {
                self.stage = Stage::WaitSize;
                Action::RamComplete
            }
            other => return Err(unexpected(format!("{other:?} in the RAM part of a checkpoint"))),
        };
        Ok((consumed, action))
    }

    fn read_size<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        match Message::parse(input)? {
            None => Ok((0, Action::NeedMore)),
            Some((Message::VmstateSize(missing), consumed)) => {
                self.device_state.clear();
                self.stage = Stage::DeviceState { missing };
                Ok((consumed, Action::Continue))
            }
            Some((other, _)) => Err(unexpected(format!("{other:?} instead of VMSTATE_SIZE"))),
        }
    }

    fn read_device_state<'a>(
        &mut self,
        missing: u64,
        input: &'a [u8],
    ) -> Result<(usize, Action<'a>), WireError> {
        let taken = usize::try_from(missing).unwrap_or(usize::MAX).min(input.len());
        // Grows by what has arrived, never by what was announced.
        self.device_state.extend_from_slice(&input[..taken]);
        let missing = missing - taken as u64;
        if missing > 0 {
            self.stage = Stage::DeviceState { missing };
            return Ok((taken, Action::NeedMore));
        }
        colo::check_device_state(&self.device_state)?;
        self.stage = Stage::Committing;
        Ok((taken, Action::Commit(self.next_checkpoint())))
    }
}

pub(super) fn unexpected(what: impl Into<std::borrow::Cow<'static, str>>) -> WireError {
    WireError::refused(
        what,
        "QEMU's COLO protocol does not allow that here: use QEMU 7.2 to 11 as the primary",
    )
}

/// The shape of every step that waits for one parsed element.
pub(super) type Step<'a> = Result<(usize, Action<'a>), WireError>;
