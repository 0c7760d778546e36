//! The initial device state: where it ends (spec §11).
//!
//! Device sections have no lengths, and their bodies may hold any bytes: a guest can put the end of a device state into the buffer of one
//! of its devices. Three things together are the end, and no guest can make the last of them:
//!
//! 1. **Its form.** The EOF byte, and the vmdesc behind it: a JSON text with a list of devices, whose declared length ends exactly at the
//!    last byte received.
//! 2. **What the text says.** The sections before it are the ones that it lists, one after the other, each as long as it says
//!    ([`Evidence`]).
//! 3. **Silence.** The primary sends nothing more until it is answered. [`EndFinder::push`] says what looks like the end; who
//!    has a clock decides how long nothing may follow before it is one, and then calls [`EndFinder::finish`]. If more is pushed instead,
//!    it was none.

use super::limits::{INITIAL_STATE_MAX, VMDESC_MAX};
use super::stream::{SECTION_EOF, SECTION_FOOTER, SECTION_VMDESC};
use super::{WireError, state_buffer};

mod json;
mod sections;

pub use sections::{Evidence, Mismatch, MismatchKind};

/// Bytes from the EOF byte to the text: EOF, section type, be32 length.
const HEAD_LEN: usize = 6;

/// The two parts that [`EndFinder`] tells apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitialState {
    /// The device sections and their EOF byte: what a restarting QEMU gets.
    pub device_state: Vec<u8>,
    /// The JSON text.
    pub vmdesc: Vec<u8>,
}

/// Buffers the initial device state and finds its end.
///
/// The cost of the search depends on what arrives, not on what is buffered: JSON text holds no zero byte, and the six bytes before
/// it begin with one, so the last zero byte received is among those six. Only there a text can begin.
#[derive(Debug)]
pub struct EndFinder {
    buffer: Vec<u8>,
    last_zero: Option<usize>,
    /// Position of the EOF byte, if what has arrived looks like the end.
    eof: Option<usize>,
    most: usize,
}

impl Default for EndFinder {
    fn default() -> Self {
        Self::with_limit(INITIAL_STATE_MAX)
    }
}

impl EndFinder {
    /// Of at most so many bytes of both.
    pub fn with_limit(most: usize) -> Self {
        Self {
            buffer: Vec::new(),
            last_zero: None,
            eof: None,
            most,
        }
    }

    /// Appends what arrived, from the first section's type byte on. If that looks like the end, says what speaks for it.
    ///
    /// # Errors
    /// If more than the limit has arrived without an end, what ends it is longer than [`VMDESC_MAX`], or there is no memory for it.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Evidence>, WireError> {
        let before = self.buffer.len();
        if bytes.len() > self.most - before {
            return Err(WireError::Limit {
                field: "the length of initial device state and vmdesc (the receiver's --device-state-max)",
                seen: before as u64 + bytes.len() as u64,
                limit: self.most as u64,
            });
        }
        state_buffer::extend(&mut self.buffer, bytes, self.most)?;
        if let Some(zero) = bytes.iter().rposition(|&byte| byte == 0) {
            self.last_zero = Some(before + zero);
        }
        let end = self.find_end()?;
        self.eof = end.map(|(eof, _)| eof);
        Ok(end.map(|(_, evidence)| evidence))
    }

    /// Both parts, if what was pushed last looks like the end. The finder is empty then.
    ///
    /// # Errors
    /// If there is no memory for a copy of the text.
    pub fn finish(&mut self) -> Result<Option<InitialState>, WireError> {
        let Some(eof) = self.eof else {
            return Ok(None);
        };
        let vmdesc = state_buffer::copy(&self.buffer[eof + HEAD_LEN..])?;
        let mut device_state = std::mem::take(&mut self.buffer);
        device_state.truncate(eof + 1);
        *self = Self::with_limit(self.most);
        Ok(Some(InitialState { device_state, vmdesc }))
    }

    /// Bytes buffered so far.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Memory that the buffer has after so many bytes more.
    pub(crate) fn capacity_after(&self, more: usize) -> usize {
        state_buffer::capacity_after(&self.buffer, more, self.most)
    }

    /// Whether what has arrived looks like the end.
    pub fn looks_ended(&self) -> bool {
        self.eof.is_some()
    }

    /// Whether what has arrived could be a whole state without vmdesc: a footer and the EOF byte at its end. If then
    /// nothing follows for some time, that is what it is: see [`EndFinder::suppressed`].
    pub fn looks_suppressed(&self) -> bool {
        matches!(
            self.buffer.last_chunk(),
            Some([SECTION_FOOTER, _, _, _, _, SECTION_EOF])
        )
    }

    /// The error for a primary that sends no vmdesc.
    pub fn suppressed() -> WireError {
        let remedy = "start it without -machine suppress-vmdesc=on";
        WireError::refused("device state without vmdesc", remedy)
    }

    /// Position of the EOF byte, and what speaks for it, if the state may end here.
    fn find_end(&self) -> Result<Option<(usize, Evidence)>, WireError> {
        let ends = self.buffer.last() == Some(&b'}');
        let Some(last_zero) = self.last_zero.filter(|_| ends) else {
            return Ok(None);
        };
        for eof in last_zero.saturating_sub(HEAD_LEN - 1)..=last_zero {
            let Some(text) = self.text_of(eof) else { continue };
            if text.len() > VMDESC_MAX {
                return Err(WireError::Limit {
                    field: "the length of the vmdesc",
                    seen: text.len() as u64,
                    limit: VMDESC_MAX as u64,
                });
            }
            if let Some(evidence) = json::describes(text, &self.buffer[..=eof]) {
                return Ok(Some((eof, evidence)));
            }
        }
        Ok(None)
    }

    /// What follows an EOF byte at this position, if its length and its first byte are those of a vmdesc.
    fn text_of(&self, eof: usize) -> Option<&[u8]> {
        let (head, text) = self.buffer[eof..].split_first_chunk::<HEAD_LEN>()?;
        let [SECTION_EOF, SECTION_VMDESC, length @ ..] = *head else {
            return None;
        };
        let is_whole = u64::from(u32::from_be_bytes(length)) == text.len() as u64;
        (is_whole && text.first() == Some(&b'{')).then_some(text)
    }
}
