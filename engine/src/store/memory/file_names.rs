//! File names for RAM blocks, whose own names are bytes of the primary's choice.

use crate::blocks::BlockTable;
use std::collections::HashSet;

/// Longest name made here: file systems allow 255 bytes, of which a label or a suffix may need some.
const NAME_MAX: usize = 160;

/// One file name per block, in the table's order: the block's name with everything but letters, digits, `-`, `_`
/// and `.` replaced by `_`. A name that would then be long, hidden, double or in `reserved` gets `~` and the block's
/// position appended, which no other name can have.
pub(crate) fn file_names(table: &BlockTable, reserved: &[&str]) -> Vec<String> {
    let mut seen: HashSet<String> = reserved.iter().map(|name| (*name).to_owned()).collect();
    let plain = |byte: &u8| match byte {
        b'-' | b'_' | b'.' => char::from(*byte),
        _ if byte.is_ascii_alphanumeric() => char::from(*byte),
        _ => '_',
    };
    let name = |(id, block): (crate::units::BlockId, &crate::blocks::RamBlock)| {
        let mut name: String = block.name.iter().take(NAME_MAX).map(plain).collect();
        let clear = block.name.len() <= NAME_MAX && !name.starts_with('.');
        if !clear || seen.contains(&name) {
            name = format!("{}~{}", name.trim_start_matches('.'), id.0);
        }
        seen.insert(name.clone());
        name
    };
    table.iter().map(name).collect()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::units::PAGE_BYTES;

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
        ];
        let entries = names
            .iter()
            .map(|name| (name.as_bytes().into(), PAGE_BYTES))
            .collect();
        let total = u64::try_from(names.len()).unwrap() * PAGE_BYTES;
        let made = file_names(&BlockTable::new(entries, total).unwrap(), &["taken"]);
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
        assert_eq!(made[7..], ["a_b", "__"]);
        assert_eq!(made.iter().collect::<HashSet<_>>().len(), made.len());
    }
}
