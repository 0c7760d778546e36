//! The main channel as a state machine: bytes in, actions out (spec §3 to §7, §10 to §12).
//!
//! ```text
//! Header ─► Setup ─► BlockList ─► Records ◄─► Footer ─► Precopy ─► Devices ─► Ended ─► Committing
//!           commands   START        │                  PART, END   silence()             │ committed()
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
//! [`Action::FinishFlush`] not until [`Session::flush_finished`]. After [`Action::LooksEnded`] either nothing arrives for
//! a while, which [`Session::silence`] says, or what arrives is stepped over as before.

mod checkpoint;

use super::action::{Action, Outbound};
use super::error::{Ending, SessionError};
use super::guest_description::GuestDescription;
use super::limits::{PINGS_MAX, SessionLimits};
use super::ram_records::{Continued, SyncMode};
use crate::blocks::BlockTable;
use crate::units::CheckpointId;
use crate::wire::colo::{self, Message};
use crate::wire::limits::INITIAL_STATE_MAX;
use crate::wire::ram::{BlockEntry, BlockList};
use crate::wire::stream::{Command, Section, StreamHeader, parse_footer};
use crate::wire::vmdesc::EndFinder;
use crate::wire::{WireError, state_buffer};
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
    /// The initial device state is whole.
    Ended(EndFinder),
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

/// Device states of a session that has ended, to be freed where that delays no other.
#[derive(Debug)]
pub struct DeviceStates {
    _initial: EndFinder,
    _last: Vec<u8>,
}

/// Most bytes of a device state that are copied in one step.
const STATE_STEP_BYTES: usize = 64 << 10;

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

    /// Takes what it has of device states: for a session that has ended.
    pub fn take_device_states(&mut self) -> DeviceStates {
        let initial = match &mut self.stage {
            Stage::Devices(finder) | Stage::Ended(finder) => std::mem::take(finder),
            _ => EndFinder::default(),
        };
        DeviceStates {
            _initial: initial,
            _last: std::mem::take(&mut self.device_state),
        }
    }

    /// What is constant for the session: known from the commit of the initial state on.
    pub fn description(&self) -> Option<&Arc<GuestDescription>> {
        self.description.as_ref()
    }

    /// The machine type, once the configuration was read; else empty.
    pub fn machine_type(&self) -> &str {
        &self.machine_type
    }

    /// Most bytes of a device state.
    pub fn device_state_max(&self) -> u64 {
        self.limits.device_state_max_bytes
    }

    /// Bytes consumed on the main channel.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Memory that a buffer for device state has here after [`Self::step`] with so many bytes of input.
    pub fn state_bytes_after(&self, input: usize) -> u64 {
        let bytes = match &self.stage {
            Stage::Devices(finder) => finder.capacity_after(input),
            Stage::Ended(finder) => finder.capacity_after(0),
            Stage::DeviceState { missing } => {
                let most = self.state_length(*missing);
                let more = input.min(most - self.device_state.len());
                state_buffer::capacity_after(&self.device_state, more, most)
            }
            _ => self.device_state.capacity(),
        };
        bytes as u64
    }

    /// Bytes of the device state that is being received, as they were announced.
    fn state_length(&self, missing: u64) -> usize {
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        self.device_state.len().saturating_add(missing)
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

    /// Nothing has arrived for long enough since [`Action::LooksEnded`]: the initial device state ends there.
    ///
    /// # Panics
    /// If that was not the last action.
    pub fn silence(&mut self) {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Committing) {
            Stage::Devices(finder) if finder.looks_ended() => Stage::Ended(finder),
            _ => panic!("only after Action::LooksEnded"),
        };
    }

    /// Whether the end of the initial device state could still turn out to be none. The primary is silent behind it up to CHECKPOINT_READY,
    /// then sends one request, and is silent again: whatever else comes belongs to the device state.
    pub fn is_end_in_doubt(&self) -> bool {
        let before_reply = matches!(
            self.stage,
            Stage::Committed | Stage::Idle | Stage::Flushing | Stage::OpenGate | Stage::Reply
        );
        self.checkpoint == Some(CheckpointId(0)) && before_reply
    }

    /// What the end of the main channel means at this point.
    pub fn ending(&self) -> Ending {
        match (&self.stage, self.checkpoint) {
            (_, None) => Ending::InPrecopy,
            (Stage::Idle, Some(_)) if !self.colo_seen && self.return_path => Ending::PlainMigration,
            // Up to the answer to its request, its guest runs.
            (Stage::Idle | Stage::Flushing | Stage::OpenGate | Stage::Reply, Some(last)) => {
                Ending::BetweenCheckpoints { last }
            }
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
            Stage::Ended(_) => self.end_devices(),
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
            (SectionPart::End, false) => {
                let most = self.limits.device_state_max().min(INITIAL_STATE_MAX);
                (Stage::Devices(EndFinder::with_limit(most)), Action::RamComplete)
            }
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
        let action = finder.push(input)?.map_or(Action::NeedMore, Action::LooksEnded);
        Ok((input.len(), action))
    }

    fn end_devices<'a>(&mut self) -> Step<'a> {
        let (Stage::Ended(finder), Some(blocks)) = (&mut self.stage, self.blocks.clone()) else {
            return Err(unexpected("device state before the block list"));
        };
        let Some(initial) = finder.finish()? else {
            return Err(unexpected("device state without an end"));
        };
        colo::check_device_state(&initial.device_state)?;
        self.description = Some(Arc::new(GuestDescription {
            header: std::mem::take(&mut self.header),
            machine_type: self.machine_type.clone(),
            ram_section: self.ram_section,
            blocks,
            vmdesc: initial.vmdesc,
        }));
        self.device_state = initial.device_state;
        self.stage = Stage::Committing;
        Ok((0, Action::Commit(self.next_checkpoint())))
    }

    fn read_command_before_devices<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        match Section::parse(input)? {
            None => Ok((0, Action::NeedMore)),
            Some((Section::Command(Command::SwitchoverStart), consumed)) => Ok((consumed, Action::Continue)),
            Some((other, _)) => Err(unexpected(format!("{other:?} before the device state"))),
        }
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
