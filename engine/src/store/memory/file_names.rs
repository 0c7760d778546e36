//! File names for RAM blocks, whose own names are bytes of the primary's choice.

use std::collections::HashSet;

/// Longest name made here: file systems allow 255 bytes, of which a label or a suffix may need some.
const NAME_MAX: usize = 160;

/// One file name for each of these blocks, in their order: the block's name with everything but letters, digits, `-`, `_`
/// and `.` replaced by `_`. A name that would then be long, hidden, double or in `reserved` gets `~` and the block's
/// position appended, which no other name can have.
pub(crate) fn file_names<'a>(blocks: impl Iterator<Item = &'a [u8]>, reserved: &[&str]) -> Vec<String> {
    let mut seen: HashSet<String> = reserved.iter().map(|name| (*name).to_owned()).collect();
    let plain = |byte: &u8| match byte {
        b'-' | b'_' | b'.' => char::from(*byte),
        _ if byte.is_ascii_alphanumeric() => char::from(*byte),
        _ => '_',
    };
    let name = |(position, block): (usize, &[u8])| {
        let mut name: String = block.iter().take(NAME_MAX).map(plain).collect();
        let clear = block.len() <= NAME_MAX && !name.is_empty() && !name.starts_with('.');
        if !clear || seen.contains(&name) {
            name = format!("{}~{position}", name.trim_start_matches('.'));
        }
        seen.insert(name.clone());
        name
    };
    blocks.enumerate().map(name).collect()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_and_all_different() {
        let long = "x".repeat(255);
        let names = [
            "pc.ram",
            "/rom@etc/acpi",
            "_rom_etc_acpi",
            "..",
            ".hidden",
            "taken",
            &long,
            "a\0b",
            "\u{e9}",
            "",
        ];
        let made = file_names(names.iter().map(|name| name.as_bytes()), &["taken"]);
        assert_eq!(
            made[..6],
            [
                "pc.ram",
                "_rom_etc_acpi",
                "_rom_etc_acpi~2",
                "~3",
                "hidden~4",
                "taken~5"
            ]
        );
        assert_eq!(made[6], format!("{}~6", "x".repeat(NAME_MAX)));
        assert_eq!(made[7..], ["a_b", "__", "~9"]);
        assert_eq!(made.iter().collect::<HashSet<_>>().len(), made.len());
    }
}
