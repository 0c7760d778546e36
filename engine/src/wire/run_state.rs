//! What a guest did when its device state was taken: section `globalstate` (spec §16.1).
//!
//! QEMU enters it at the switch-over of a migration and keeps it in all checkpoints that follow, so a guest that was stopped
//! before it was protected has `paused` there for ever, although COLO has let it run since.

use super::{WireError, state_buffer};
use std::borrow::Cow;

const SECTION_FULL: u8 = 4;
const FOOTER: u8 = 0x7e;
/// Name with its length, instance 0, version 1.
const NAME: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
/// The text with its terminating zero, padded.
const TEXT_BYTES: usize = 100;
/// Before the text: its length with the zero, 32 bits.
const LENGTH_BYTES: usize = 4;
const RUNNING: &[u8] = b"running\0";

/// The device state of a guest that runs as soon as it is loaded. Unchanged if it runs already, or does not say.
///
/// # Errors
/// If there is no memory for a copy of it.
pub fn running(device_state: &[u8]) -> Result<Cow<'_, [u8]>, WireError> {
    let Some(at) = text(device_state) else {
        return Ok(Cow::Borrowed(device_state));
    };
    if device_state[at..].starts_with(RUNNING) {
        return Ok(Cow::Borrowed(device_state));
    }
    let mut changed = state_buffer::copy(device_state)?;
    changed[at..at + TEXT_BYTES].fill(0);
    changed[at..at + RUNNING.len()].copy_from_slice(RUNNING);
    let length = u32::try_from(RUNNING.len()).expect("eight bytes");
    changed[at - LENGTH_BYTES..at].copy_from_slice(&length.to_be_bytes());
    Ok(Cow::Owned(changed))
}

/// Where the text is. The name may be in a device's own state, too: only a whole section counts, with its number in head and
/// footer.
fn text(device_state: &[u8]) -> Option<usize> {
    let mut ends = device_state.len();
    while let Some(name) = device_state[..ends]
        .windows(NAME.len())
        .rposition(|bytes| bytes == NAME)
    {
        let text = name + NAME.len() + LENGTH_BYTES;
        let head = name.checked_sub(5).map(|from| &device_state[from..name]);
        let footer = device_state.get(text + TEXT_BYTES..text + TEXT_BYTES + 5);
        if let (Some([SECTION_FULL, number @ ..]), Some([FOOTER, repeated @ ..])) = (head, footer)
            && number == repeated
        {
            return Some(text);
        }
        ends = name + NAME.len() - 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 11.1.3 sends it: section 0x2c, the last before the end.
    fn device_state(text: &[u8], footer: u8) -> Vec<u8> {
        let mut bytes = b"\x04\0\0\0\x06\x04apic...\x7e\0\0\0\x06\x04\0\0\0\x2c".to_vec();
        bytes.extend_from_slice(NAME);
        let length = u32::try_from(text.len()).unwrap() + 1;
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(text);
        bytes.resize(bytes.len() + TEXT_BYTES - text.len(), 0);
        bytes.extend_from_slice(&[FOOTER, 0, 0, 0, footer, 0]);
        bytes
    }

    #[test]
    fn a_paused_guest_runs() {
        for text in ["paused", "prelaunch", "a-state-with-a-long-name"] {
            let paused = device_state(text.as_bytes(), 0x2c);
            assert_eq!(
                *running(&paused).unwrap(),
                device_state(b"running", 0x2c),
                "{text}"
            );
        }
    }

    #[test]
    fn a_running_guest_is_left_alone() {
        let state = device_state(b"running", 0x2c);
        assert!(matches!(running(&state).unwrap(), Cow::Borrowed(_)));
    }

    #[test]
    fn only_a_whole_section_counts() {
        let state = device_state(b"paused", 0x2c);
        let without = [
            device_state(b"paused", 0x2d),
            state[..state.len() - 6].to_vec(),
            NAME.to_vec(),
            Vec::new(),
        ];
        for state in without {
            assert_eq!(*running(&state).unwrap(), state);
        }
        let behind = [state, NAME.to_vec()].concat();
        let expected = [device_state(b"running", 0x2c), NAME.to_vec()].concat();
        assert_eq!(*running(&behind).unwrap(), expected);
    }
}
