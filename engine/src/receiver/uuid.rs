//! UUIDs of guests, as text.

/// A guest's UUID.
pub(in crate::receiver) type Uuid = [u8; 16];

/// A UUID as QEMU writes it: 36 characters.
pub(in crate::receiver) fn parse_uuid(text: &str) -> Option<Uuid> {
    let is_dash = |at: &usize| [8, 13, 18, 23].contains(at);
    let bytes = text.as_bytes();
    if bytes.len() != 36 || (0..36).any(|at| is_dash(&at) != (bytes[at] == b'-')) {
        return None;
    }
    let digits: Vec<u8> = (0..36)
        .filter(|at| !is_dash(at))
        .map(|at| {
            char::from(bytes[at])
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        })
        .collect::<Option<_>>()?;
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(uuid)
}

pub(in crate::receiver) fn format_uuid(uuid: &Uuid) -> String {
    let mut text = String::new();
    for (at, byte) in uuid.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
