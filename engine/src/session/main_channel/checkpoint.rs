//! A checkpoint on the main channel: from CHECKPOINT_REQUEST to LOADED (spec §12).

use super::{STATE_STEP_BYTES, SectionPart, Session, Stage, unexpected};
use crate::canary::{self, Canary};
use crate::session::action::{Action, Outbound};
use crate::units::CheckpointId;
use crate::wire::colo::{self, Message};
use crate::wire::stream::{Command, Section};
use crate::wire::{WireError, state_buffer};

impl Session {
    pub(super) fn acknowledge_commit(&mut self) -> Action<'static> {
        self.stage = Stage::Idle;
        Action::Send(match self.checkpoint {
            Some(CheckpointId(0)) | None => Outbound::Ready {
                return_path: self.return_path,
            },
            Some(_) => Outbound::Loaded,
        })
    }

    pub(super) fn read_message<'a>(
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

    pub(super) fn read_live<'a>(
        &mut self,
        ram_seen: bool,
        input: &'a [u8],
    ) -> Result<(usize, Action<'a>), WireError> {
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

    pub(super) fn read_size<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Action<'a>), WireError> {
        match Message::parse(input)? {
            None => Ok((0, Action::NeedMore)),
            Some((Message::VmstateSize(missing), consumed)) => {
                let limit = self.limits.device_state_max_bytes;
                if missing > limit {
                    return Err(WireError::Limit {
                        field: "the length of the device state (the receiver's --device-state-max)",
                        seen: missing,
                        limit,
                    });
                }
                self.device_state.clear();
                self.stage = Stage::DeviceState { missing };
                Ok((consumed, Action::Continue))
            }
            Some((other, _)) => Err(unexpected(format!("{other:?} instead of VMSTATE_SIZE"))),
        }
    }

    pub(super) fn read_device_state<'a>(
        &mut self,
        missing: u64,
        input: &'a [u8],
    ) -> Result<(usize, Action<'a>), WireError> {
        if input.is_empty() {
            return Ok((0, Action::NeedMore));
        }
        let most = input.len().min(STATE_STEP_BYTES);
        let taken = usize::try_from(missing).map_or(most, |missing| missing.min(most));
        let length = self.state_length(missing);
        state_buffer::extend(&mut self.device_state, &input[..taken], length)?;
        let missing = missing - taken as u64;
        if missing > 0 {
            self.stage = Stage::DeviceState { missing };
            return Ok((taken, Action::Continue));
        }
        colo::check_device_state(&self.device_state)?;
        self.stage = Stage::Committing;
        Ok((taken, Action::Commit(self.next_checkpoint())))
    }
}
