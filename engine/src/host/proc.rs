//! Single values of /proc and /sys.

use std::path::Path;

/// The trimmed text of a file, if it exists and can be read.
pub(super) fn text(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// A file that holds one number.
pub(super) fn number(path: impl AsRef<Path>) -> Option<u64> {
    text(path)?.parse().ok()
}

/// The value of `kernel.io_uring_disabled`, where the kernel has it (Linux 6.6).
pub(crate) fn io_uring_disabled() -> Option<u64> {
    number("/proc/sys/kernel/io_uring_disabled")
}

/// Most memory mappings of a process: `vm.max_map_count`, or the kernel's default where it cannot be read.
pub(crate) fn max_mappings() -> u64 {
    number("/proc/sys/vm/max_map_count").unwrap_or(65_530)
}

/// The value behind `key:` in a text of `key: value` lines.
pub(super) fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then_some(value.trim())
    })
}

/// The word in brackets of a line like `always [madvise] never`.
pub(super) fn chosen(line: &str) -> Option<&str> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_choices_are_found() {
        let meminfo = "MemTotal:       24653420 kB\nMemFree:  1 kB\n";
        assert_eq!(field(meminfo, "MemTotal"), Some("24653420 kB"));
        assert_eq!(field(meminfo, "Mem"), None);
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always madvise"), None);
    }
}
