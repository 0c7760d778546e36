//! Text that others have chosen, made harmless where it is shown: on a terminal, in a log, in JSON that somebody looks at.
//!
//! Names of RAM blocks, guests and disks, and whatever else comes from a peer, are bytes of its choice. Inside the program they stay
//! as they are. Where one becomes part of a message it is [`printable`]; a message that may have several lines is [`printable_lines`];
//! a JSON text is [`json`], which loses nothing.

use serde::Serialize;
use std::fmt::Write;

/// Makes a type that is written as a text one in serde's formats, too: `#[serde(try_from = "String", into = "String")]` by its `FromStr` and
/// `Display`.
macro_rules! written_as_text {
    ($type:ty, $error:ty) => {
        impl TryFrom<String> for $type {
            type Error = $error;

            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}

pub(crate) use written_as_text;

/// Whether a character is a command to a terminal, or changes how the text around it is read: control characters (C0, DEL, C1), the
/// separators that end a line, and the invisible ones that order text from right to left or join it.
fn is_harmful(letter: char) -> bool {
    letter.is_control()
        || matches!(
            letter,
            '\u{61c}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

fn escape(text: &str, is_kept: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match is_harmful(letter) && !is_kept(letter) {
            true => escaped.extend(letter.escape_default()),
            false => escaped.push(letter),
        }
    }
    escaped
}

/// A text as part of a line.
pub fn printable(text: &str) -> String {
    escape(text, |_| false)
}

/// A text of several lines, which may have tabs.
pub fn printable_lines(text: &str) -> String {
    escape(text, |letter| matches!(letter, '\n' | '\t'))
}

/// A name as part of a line: also one that is no UTF-8.
pub fn printable_bytes(name: &[u8]) -> String {
    printable(&from_bytes(name))
}

/// A name as text, with nothing lost if it is UTF-8; other bytes become `\xNN`.
pub fn from_bytes(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// A value as JSON on several lines, in which every harmful character is an escape of JSON.
///
/// # Errors
/// If the value has no JSON.
pub fn json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value).map(escape_json)
}

/// The same on one line.
///
/// # Errors
/// If the value has no JSON.
pub fn json_line(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value).map(escape_json)
}

/// What is left to escape is inside strings: outside of them JSON has nothing but ASCII, and in them no control characters below
/// U+0020.
fn escape_json(text: String) -> String {
    let is_left = |letter: char| letter != '\n' && is_harmful(letter);
    if !text.contains(is_left) {
        return text;
    }
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if !is_left(letter) {
            escaped.push(letter);
            continue;
        }
        for unit in letter.encode_utf16(&mut [0; 2]) {
            let _ = write!(escaped, "\\u{unit:04x}");
        }
    }
    escaped
}

/// A number of bytes for people. Always in MiB, so that values of one line can be compared; a little is not nothing.
pub fn mebibytes(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    let tenths = (u128::from(bytes) * 10 + u128::from(MIB / 2)) / u128::from(MIB);
    let tenths = tenths.max(u128::from(bytes > 0));
    match tenths {
        0..1000 if !tenths.is_multiple_of(10) => format!("{}.{} MiB", tenths / 10, tenths % 10),
        _ => format!("{} MiB", (bytes / MIB) + u64::from(bytes % MIB >= MIB / 2)),
    }
}

/// An age or another time of that many milliseconds for people: in seconds, from a minute on in the two largest units.
pub fn seconds(ms: u64) -> String {
    match ms {
        0..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => duration(ms / 1000),
    }
}

/// A time for people: below a second in milliseconds, otherwise as [`seconds`] has it.
pub fn elapsed(time: std::time::Duration) -> String {
    match u64::try_from(time.as_millis()).unwrap_or(u64::MAX) {
        ms @ 0..1000 => format!("{ms} ms"),
        ms => seconds(ms),
    }
}

/// Whole seconds for people, in the two largest units.
pub fn duration(seconds: u64) -> String {
    match (
        seconds / 86_400,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_have_one_unit() {
        const MIB: u64 = 1 << 20;
        for (bytes, shown) in [
            (0, "0 MiB"),
            (6, "0.1 MiB"),
            (MIB - 1, "1 MiB"),
            (MIB, "1 MiB"),
            (102_007_808, "97.3 MiB"),
            (537_665_536, "513 MiB"),
            (12 << 30, "12288 MiB"),
            (u64::MAX, "17592186044416 MiB"),
        ] {
            assert_eq!(mebibytes(bytes), shown, "{bytes}");
        }
        assert_eq!(seconds(12_345), "12.3 s");
        assert_eq!(seconds(61_999), "1 min 1 s");
        let shown = [50, 999, 1000, 61_999].map(|ms| elapsed(std::time::Duration::from_millis(ms)));
        assert_eq!(shown, ["50 ms", "999 ms", "1.0 s", "1 min 1 s"]);
        assert_eq!(
            [59, 61, 3_700, 90_000].map(duration),
            ["59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]
        );
    }

    const HOSTILE: &str = "x\u{1b}]0;owned\u{7}\nsession 1 ended\r\u{7f}\u{9b}2J\u{202e}\u{2066}\u{e0041}é";

    #[test]
    fn nothing_in_a_text_commands_a_terminal() {
        let shown = printable(HOSTILE);
        assert_eq!(
            shown,
            "x\\u{1b}]0;owned\\u{7}\\nsession 1 ended\\r\\u{7f}\\u{9b}2J\\u{202e}\\u{2066}\\u{e0041}é"
        );
        assert_eq!(printable(&shown), shown);
        assert_eq!(printable_lines("a\n\tb\u{1b}"), "a\n\tb\\u{1b}");
    }

    #[test]
    fn names_need_not_be_text() {
        assert_eq!(from_bytes("pc.ram é\n".as_bytes()), "pc.ram é\n");
        assert_eq!(printable_bytes(b"a\xff\xc3\n\x9b"), "a\\xff\\xc3\\n\\x9b");
    }

    #[test]
    fn json_loses_nothing_and_commands_nothing() {
        let value = serde_json::json!({ HOSTILE: [HOSTILE, "plain"] });
        for text in [json(&value).unwrap(), json_line(&value).unwrap()] {
            assert!(
                !text.contains(|letter: char| letter != '\n' && is_harmful(letter)),
                "{text}"
            );
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
        }
    }
}
