//! Why a QEMU that has loaded a guest does not run it, in QEMU's own words.

use crate::qmp::Qmp;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Lines of QEMU's own words in an error.
const LINES: usize = 10;

/// Most bytes of them that are looked at.
const BYTES_MAX: u64 = 64 << 10;

/// What a QEMU writes to its standard error.
#[derive(Debug)]
pub(super) enum OwnWords {
    /// The log of one that was started here.
    Log(PathBuf),
    /// The operator's file, and how much of it was said before.
    File(File, u64),
    /// Somewhere else.
    Elsewhere,
}

impl OwnWords {
    /// Of a QEMU that was started here.
    pub(super) fn log(path: &Path) -> Self {
        Self::Log(path.to_owned())
    }

    /// Of the operator's own, from now on.
    pub(super) fn of(qmp: &Qmp) -> Self {
        let opened = qmp.standard_error();
        let opened = opened.and_then(|file| Some((file.metadata().ok()?.len(), file)));
        match opened {
            Some((length, file)) => Self::File(file, length),
            None => Self::Elsewhere,
        }
    }

    /// The last of them, to be appended to an error.
    pub(super) fn last(&self) -> String {
        let text = match self {
            Self::Log(path) => File::open(path).map_or_else(|_| Vec::new(), |file| end_of(&file, 0)),
            Self::File(file, from) => end_of(file, *from),
            Self::Elsewhere => return "; its own standard error says more".to_owned(),
        };
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        match &lines[lines.len().saturating_sub(LINES)..] {
            [] => String::new(),
            last => format!("; it said:\n  {}", last.join("\n  ")),
        }
    }
}

/// What a file has behind `from`, of much the end.
fn end_of(file: &File, from: u64) -> Vec<u8> {
    let length = file.metadata().map_or(0, |about| about.len());
    let from = from.max(length.saturating_sub(BYTES_MAX));
    let bytes = usize::try_from(length.saturating_sub(from)).unwrap_or(0);
    let mut text = vec![0; bytes];
    match file.read_exact_at(&mut text, from) {
        Ok(()) => text,
        // It has become shorter meanwhile.
        Err(_) => Vec::new(),
    }
}

/// Why a QEMU has loaded a guest and does not run it. It does that when it cannot lock one of its disks: their locks are taken after
/// the last byte of the stream, and QEMU reports that to its standard error alone. Asked to take them now it says why not.
pub(super) fn why_it_stands(qmp: &mut Qmp) -> String {
    let blocks = qmp.execute("query-block", &json!({})).unwrap_or_default();
    let inactive = |block: &Value| (block["inserted"]["active"] == false).then(|| block["inserted"].clone());
    let inactive: Vec<_> = (blocks.as_array().into_iter().flatten())
        .filter_map(inactive)
        .collect();
    for node in &inactive {
        let file = node["file"].as_str().unwrap_or("a disk");
        let mut activate = |active: bool| {
            let arguments = json!({"node-name": node["node-name"], "active": active});
            qmp.execute("blockdev-set-active", &arguments)
        };
        match activate(true) {
            Err(error) if error.refusal().is_some() => {
                let said = error.refusal().unwrap_or_default();
                return format!(
                    "QEMU has loaded the guest and cannot run it, because it cannot lock {file}: {said}. Whatever uses it, the \
                     primary perhaps, must be off; and this QEMU cannot be used again: start another one"
                );
            }
            // It is free now. That comes too late for this QEMU, which must not keep it from the next one.
            Ok(_) => drop(activate(false)),
            Err(_) => {}
        }
    }
    "QEMU has loaded the guest and does not run it; it cannot be used again: start another one".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::tests::{Responder, monitor};
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn the_last_words_are_those_since_then() {
        let mut file = tempfile::tempfile().unwrap();
        writeln!(file, "an older failure").unwrap();
        let words = OwnWords::File(file.try_clone().unwrap(), file.metadata().unwrap().len());
        assert_eq!(words.last(), "");
        (0..LINES + 1).for_each(|line| writeln!(file, "line {line}\n").unwrap());
        let last = words.last();
        assert!(
            last.starts_with("; it said:\n  line 1\n") && last.ends_with("line 10"),
            "{last}"
        );
        file.set_len(0).unwrap();
        assert_eq!(words.last(), "");
    }

    fn standing(activation: Result<Value, String>) -> String {
        let respond: Responder = Box::new(move |command, _| match command {
            "query-block" => Ok(json!([
                {"device": "cd"},
                {"device": "d0", "inserted": {"active": false, "node-name": "#block1", "file": "/srv/web3.raw"}},
            ])),
            "blockdev-set-active" => activation.clone(),
            other => Err(format!("{other} was not expected")),
        });
        let path = monitor((11, 1, 3), respond);
        why_it_stands(&mut Qmp::connect(&path.0, Duration::from_secs(30)).unwrap())
    }

    #[test]
    fn the_disk_that_cannot_be_locked_is_named() {
        let why = standing(Err("Failed to get \"write\" lock".to_owned()));
        assert!(
            why.contains("cannot lock /srv/web3.raw: Failed to get \"write\" lock"),
            "{why}"
        );
        let why = standing(Ok(json!({})));
        assert!(
            why.contains("start another one") && !why.contains("web3"),
            "{why}"
        );
    }
}
