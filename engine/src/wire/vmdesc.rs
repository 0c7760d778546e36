//! The initial device state: where it ends (spec §11).
//!
//! Device sections have no lengths. What ends them is the EOF byte and the vmdesc, a JSON text with a length, after
//! which the primary sends nothing until it has its answer. So the end is where a declared length ends exactly at the
//! last byte received, and the text there is JSON with a list of devices.

use super::WireError;
use super::limits::INITIAL_STATE_MAX;
use super::stream::{SECTION_EOF, SECTION_FOOTER, SECTION_VMDESC};

mod json;

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
#[derive(Debug, Default)]
pub struct EndFinder {
    buffer: Vec<u8>,
    last_zero: Option<usize>,
}

impl EndFinder {
    /// Appends what arrived, from the first section's type byte on, and returns both parts if it was the end.
    ///
    /// # Errors
    /// If more than [`INITIAL_STATE_MAX`] bytes have arrived without an end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<InitialState>, WireError> {
        let before = self.buffer.len();
        if bytes.len() > INITIAL_STATE_MAX - before {
            return Err(WireError::Limit {
                field: "the length of initial device state and vmdesc",
                seen: before as u64 + bytes.len() as u64,
                limit: INITIAL_STATE_MAX as u64,
            });
        }
        self.buffer.extend_from_slice(bytes);
        if let Some(zero) = bytes.iter().rposition(|&byte| byte == 0) {
            self.last_zero = Some(before + zero);
        }
        let Some(eof) = self.find_end() else {
            return Ok(None);
        };
        let vmdesc = self.buffer.split_off(eof + HEAD_LEN);
        let mut device_state = std::mem::take(&mut self.buffer);
        device_state.truncate(eof + 1);
        *self = Self::default();
        Ok(Some(InitialState { device_state, vmdesc }))
    }

    /// Bytes buffered so far.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
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

    /// Position of the EOF byte, if the state ends here.
    fn find_end(&self) -> Option<usize> {
        if self.buffer.last() != Some(&b'}') {
            return None;
        }
        let last_zero = self.last_zero?;
        let first = last_zero.saturating_sub(HEAD_LEN - 1);
        (first..=last_zero).find(|&eof| self.ends_with_text_of(eof))
    }

    fn ends_with_text_of(&self, eof: usize) -> bool {
        let Some((head, text)) = self.buffer[eof..].split_first_chunk::<HEAD_LEN>() else {
            return false;
        };
        let [SECTION_EOF, SECTION_VMDESC, length @ ..] = *head else {
            return false;
        };
        u64::from(u32::from_be_bytes(length)) == text.len() as u64
            && text.first() == Some(&b'{')
            && json::is_vmdesc(text)
    }
}
