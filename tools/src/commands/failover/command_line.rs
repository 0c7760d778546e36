//! The operator's QEMU command line: what is read of it, and what is added.

use crate::output::printable;
use colo_ring::receiver::GuestBlock;
use serde_json::Value;
use std::path::Path;
use thiserror::Error;

/// QEMU's memory without `-m`.
const DEFAULT_MEMORY: u64 = 128 << 20;

/// What is wrong with a QEMU command line, for a failover or for this checkpoint.
#[derive(Debug, PartialEq, Eq, Error)]
pub(super) enum CommandLineError {
    #[error("a quote is not closed")]
    Quote,
    #[error("the QEMU command line begins with the program: qemu-system-x86_64 …")]
    Program,
    #[error("leave -incoming out of the QEMU command line: it is added")]
    Incoming,
    #[error("-loadvm starts another state than the checkpoint: leave it out")]
    Loadvm,
    #[error("leave -daemonize out of the QEMU command line: it is started in the background")]
    Daemonize,
    #[error("-m {0} is not understood; write it like -m 512M")]
    Memory(String),
    #[error(
        "the memory backend differs: it is called {name} there, and the checkpoint's ram blocks are {blocks}; give it the \
         block's name as its id, and to -machine memory-backend="
    )]
    Backend { name: String, blocks: String },
    #[error("the memory size differs: {mib} MiB there, and the checkpoint's ram blocks are {blocks}")]
    MemorySize { mib: u64, blocks: String },
}

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CommandLine(Vec<String>);

impl CommandLine {
    /// Takes words as they stand after `--`.
    ///
    /// # Errors
    /// If there are none, or one that does not fit a failover.
    pub(super) fn new(words: Vec<String>) -> Result<Self, CommandLineError> {
        let line = Self(words);
        if line.0.first().is_none_or(|program| program.starts_with('-')) {
            return Err(CommandLineError::Program);
        }
        if line.values(&["incoming"]).any(|(_, value)| value != "defer") {
            return Err(CommandLineError::Incoming);
        }
        if line.values(&["loadvm"]).next().is_some() {
            return Err(CommandLineError::Loadvm);
        }
        if line
            .0
            .iter()
            .any(|word| word.trim_start_matches('-') == "daemonize")
        {
            return Err(CommandLineError::Daemonize);
        }
        Ok(line)
    }

    /// Takes the words of a text as a shell reads them: quotes, backslashes, `#` comments; line ends are spaces.
    ///
    /// # Errors
    /// If a quote is not closed, and those of [`Self::new`].
    pub(super) fn parse(text: &str) -> Result<Self, CommandLineError> {
        // A backslash before a line's end continues the line.
        let text = text.replace("\\\n", " ");
        Self::new(shlex::split(&text).ok_or(CommandLineError::Quote)?)
    }

    pub(super) fn program(&self) -> &str {
        &self.0[0]
    }

    pub(super) fn arguments(&self) -> &[String] {
        &self.0[1..]
    }

    /// The values of an option by any of its names, each with its position.
    fn values<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = (usize, &'a str)> {
        let is_named = |word: &str| {
            let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
            name.is_some_and(|name| names.contains(&name))
        };
        let pairs = self.0.windows(2).enumerate().skip(1);
        pairs
            .filter(move |(_, pair)| is_named(&pair[0]))
            .map(|(position, pair)| (position + 1, pair[1].as_str()))
    }

    /// A property of the machine.
    pub(super) fn machine_property(&self, key: &str) -> Option<&str> {
        let all = self
            .values(&["machine", "M"])
            .flat_map(|(_, value)| value.split(','));
        all.filter_map(|part| part.split_once('='))
            .filter(|(name, _)| *name == key)
            .last()
            .map(|(_, value)| value)
    }

    /// The guest's memory in bytes, as `-m` has it.
    ///
    /// # Errors
    /// If it is not understood.
    pub(super) fn memory_bytes(&self) -> Result<u64, CommandLineError> {
        let Some((_, value)) = self.values(&["m"]).last() else {
            return Ok(DEFAULT_MEMORY);
        };
        let size = value.split(',').find_map(|part| match part.split_once('=') {
            None => Some(part),
            Some(("size", size)) => Some(size),
            Some(_) => None,
        });
        let bytes = size.and_then(|size| match size.bytes().all(|byte| byte.is_ascii_digit()) {
            // A bare number is MiB.
            true => size.parse::<u64>().ok()?.checked_mul(1 << 20),
            false => size.parse::<crate::options::Size>().ok().map(|size| size.0),
        });
        bytes.ok_or_else(|| CommandLineError::Memory(value.to_owned()))
    }

    /// Whether the guest's memory is several backends, one for each NUMA node.
    pub(super) fn has_memory_by_node(&self) -> bool {
        self.values(&["numa"]).any(|(_, value)| value.contains("memdev="))
    }

    /// Makes `file` the guest's main memory: `block` of the checkpoint. Returns the object that it takes the place of.
    pub(super) fn share(&mut self, block: &GuestBlock, file: &Path) -> Option<String> {
        let object = format!(
            "memory-backend-file,id={},mem-path={},size={},share=on",
            escape(&block.name),
            escape(&file.display().to_string()),
            block.used_length
        );
        let there = self
            .values(&["object"])
            .find(|(_, value)| object_id(value).as_deref() == Some(&block.name));
        let replaced = match there.map(|(position, _)| position) {
            Some(position) => Some(std::mem::replace(&mut self.0[position], object)),
            None => {
                self.0.extend(["-object".to_owned(), object]);
                None
            }
        };
        if self.machine_property("memory-backend").is_none() {
            self.0.extend([
                "-machine".to_owned(),
                format!("memory-backend={}", escape(&block.name)),
            ]);
        }
        replaced
    }

    /// Leaves the guest paused once it is loaded. False if the operator wants that anyway.
    pub(super) fn start_paused(&mut self) -> bool {
        let is_paused = self.arguments().iter().any(|word| word == "-S" || word == "--S");
        if !is_paused {
            self.0.push("-S".to_owned());
        }
        !is_paused
    }

    /// Makes it wait for a migration and listen to a monitor of ours.
    pub(super) fn wait_for_migration(&mut self, monitor: &Path) {
        if self.values(&["incoming"]).next().is_none() {
            self.0.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        let monitor = format!(
            "unix:{},server=on,wait=off",
            escape(&monitor.display().to_string())
        );
        self.0.extend(["-qmp".to_owned(), monitor]);
    }
}

/// A comma in a value is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// The id of a `-object`, in either of its forms.
fn object_id(value: &str) -> Option<String> {
    if value.starts_with('{') {
        let object: Value = serde_json::from_str(value).ok()?;
        return object["id"].as_str().map(str::to_owned);
    }
    value
        .split(',')
        .find_map(|part| part.strip_prefix("id="))
        .map(str::to_owned)
}

/// The block that is the guest's main memory: that of its backend's name, or the one of its size.
///
/// # Errors
/// What differs.
pub(super) fn main_block<'a>(
    blocks: &'a [GuestBlock],
    backend: Option<&str>,
    bytes: u64,
) -> Result<&'a GuestBlock, CommandLineError> {
    const MIB: u64 = 1 << 20;
    let listed = || {
        let large = blocks.iter().filter(|block| block.used_length >= MIB);
        let large: Vec<_> = large
            .map(|block| format!("{} ({} MiB)", printable(&block.name), block.used_length / MIB))
            .collect();
        large.join(", ")
    };
    let block = match backend {
        Some(name) => {
            let found = blocks.iter().find(|block| block.name == name);
            found.ok_or_else(|| CommandLineError::Backend {
                name: name.to_owned(),
                blocks: listed(),
            })?
        }
        None => blocks
            .iter()
            .find(|block| block.used_length == bytes)
            .unwrap_or(&blocks[0]),
    };
    if block.used_length != bytes {
        return Err(CommandLineError::MemorySize {
            mib: bytes / MIB,
            blocks: listed(),
        });
    }
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(text).unwrap()
    }

    fn block(name: &str, mib: u64) -> GuestBlock {
        GuestBlock {
            name: name.into(),
            used_length: mib << 20,
            file: None,
        }
    }

    #[test]
    fn a_command_line_is_read_as_a_shell_does() {
        let text = "qemu-system-x86_64 -m 512M \\\n -name 'my guest' # a comment\n-append \"a b\"\n";
        let words = [
            "qemu-system-x86_64",
            "-m",
            "512M",
            "-name",
            "my guest",
            "-append",
            "a b",
        ];
        assert_eq!(line(text).0, words);
        for (text, says) in [
            ("qemu 'x", "quote"),
            ("", "begins with the program"),
            ("-m 512M", "begins with the program"),
            ("qemu -incoming tcp:0:4444", "leave -incoming out"),
            ("qemu -loadvm x", "-loadvm"),
            ("qemu -daemonize", "in the background"),
        ] {
            let refused = CommandLine::parse(text).unwrap_err().to_string();
            assert!(refused.contains(says), "{text}: {refused}");
        }
    }

    #[test]
    fn memory_is_what_qemu_takes_it_for() {
        for (text, mib) in [
            ("qemu", 128),
            ("qemu -m 256", 256),
            ("qemu --m 1G", 1024),
            ("qemu -m 64 -m size=512M,slots=2,maxmem=2G", 512),
        ] {
            assert_eq!(line(text).memory_bytes(), Ok(mib << 20), "{text}");
        }
        assert!(line("qemu -m lots").memory_bytes().is_err());
    }

    #[test]
    fn shared_memory_is_added_or_takes_the_place_of_what_was_there() {
        let file = Path::new("/dev/shm/a,b");
        let object = "memory-backend-file,id=pc.ram,mem-path=/dev/shm/a,,b,size=67108864,share=on";
        let mut added = line("qemu -M pc -m 64");
        assert_eq!(added.share(&block("pc.ram", 64), file), None);
        let words = [
            "-M",
            "pc",
            "-m",
            "64",
            "-object",
            object,
            "-machine",
            "memory-backend=pc.ram",
        ];
        assert_eq!(added.arguments(), words);
        for there in [
            "memory-backend-memfd,id=pc.ram,size=64M",
            r#"{"qom-type":"memory-backend-ram","id":"pc.ram"}"#,
        ] {
            let mut replaced = line(&format!(
                "qemu -object '{there}' -machine q35,memory-backend=pc.ram -object x,id=y"
            ));
            assert_eq!(replaced.share(&block("pc.ram", 64), file), Some(there.to_owned()));
            let words = [
                "-object",
                object,
                "-machine",
                "q35,memory-backend=pc.ram",
                "-object",
                "x,id=y",
            ];
            assert_eq!(replaced.arguments(), words);
        }
    }

    #[test]
    fn it_is_made_to_hold_the_guest_unless_it_does_already() {
        let mut added = line("qemu -m 64");
        assert!(added.start_paused());
        assert_eq!(added.arguments(), ["-m", "64", "-S"]);
        for text in ["qemu -S -m 64", "qemu --S"] {
            let mut paused = line(text);
            assert!(!paused.start_paused());
            assert_eq!(paused, line(text));
        }
    }

    #[test]
    fn it_is_made_to_wait() {
        let mut waits = line("qemu -m 64");
        waits.wait_for_migration(Path::new("/run/q"));
        assert_eq!(
            waits.arguments(),
            [
                "-m",
                "64",
                "-incoming",
                "defer",
                "-qmp",
                "unix:/run/q,server=on,wait=off"
            ]
        );
        let mut waits = line("qemu -incoming defer");
        waits.wait_for_migration(Path::new("/run/q"));
        assert_eq!(
            waits.arguments(),
            ["-incoming", "defer", "-qmp", "unix:/run/q,server=on,wait=off"]
        );
    }

    #[test]
    fn the_main_memory_is_found_or_what_differs_is_said() {
        let blocks = [block("pc.ram", 512), block("vga.vram", 16), block("mem1", 256)];
        let find =
            |backend, mib: u64| main_block(&blocks, backend, mib << 20).map(|block| block.name.as_str());
        assert_eq!(find(None, 512), Ok("pc.ram"));
        assert_eq!(find(None, 256), Ok("mem1"));
        assert_eq!(find(Some("mem1"), 256), Ok("mem1"));
        let size = find(None, 1024).unwrap_err().to_string();
        assert!(
            size.contains("1024 MiB there") && size.contains("pc.ram (512 MiB)"),
            "{size}"
        );
        assert!(
            find(Some("pc.ram"), 256)
                .unwrap_err()
                .to_string()
                .contains("memory size differs")
        );
        assert!(
            find(Some("m0"), 512)
                .unwrap_err()
                .to_string()
                .contains("called m0 there")
        );
    }
}
