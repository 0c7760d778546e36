//! A primary whose names are commands to a terminal: wherever they are shown they are text.

use crate::socket_address;
use colo_ring::wire::ram::BlockRef;
use colo_ring_tests::command::{RunningReceiver, Scratch, until, wrapped};
use colo_ring_tests::hostile::{HostilePrimary, PAGE, answers_to_precopy, page_record};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::schema;
use std::process::Output;

/// Takes the place of `pc.ram`, byte by byte: an escape sequence's begin, a change of direction, a new line, a bell.
const NAME: &str = "\u{1b}\u{202e}\n\u{7}";

/// As it is shown.
const SHOWN: &str = r"\u{1b}\u{202e}\n\u{7}";

const PLAIN: &[u8] = b"pc.ram";

/// The same bytes with the other name.
fn renamed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for at in 0..bytes.len().saturating_sub(PLAIN.len() - 1) {
        if bytes[at..].starts_with(PLAIN) {
            bytes[at..at + PLAIN.len()].copy_from_slice(NAME.as_bytes());
        }
    }
    bytes
}

fn assert_harmless(what: &str, text: &str) {
    let is_harmful = |letter: char| letter.is_control() && letter != '\n' || letter == '\u{202e}';
    assert!(!text.contains(is_harmful), "{what}: {text:?}");
    // What follows the name's new line would begin a line of its own.
    assert!(!text.contains("\n\\u{7}"), "{what}: {text:?}");
}

fn harmless(what: &str, output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{what}: {err}");
    assert_harmless(what, &out);
    assert_harmless(what, &err);
    out
}

#[test]
fn names_of_a_peer_command_no_terminal() {
    assert_eq!(NAME.len(), PLAIN.len());
    let (scratch, ram) = (Scratch::new(), SharedDirectory::new().expect("a directory"));
    let (part, told) = (scratch.file("part"), scratch.file("told"));
    let hook = format!("env | grep -a -A 3 ^COLO_RING_REASON > {part} && mv {part} {told}");
    let directory = ram.path().display().to_string();
    let more = ["--ram-dir", &directory, "--on-loss", &hook];
    let receiver = RunningReceiver::with_channels(wrapped(&[]), 0, &more);
    let mut primary = HostilePrimary::connect(socket_address(&receiver), 0);
    for (_, bytes) in primary.precopy_parts() {
        primary.main.send(&renamed(&bytes));
    }
    primary.main.expect(&answers_to_precopy());
    primary.checkpoint(&[]);

    let shown = harmless("status", &receiver.command(&["status"]));
    assert!(shown.contains(SHOWN), "{shown}");
    let json = harmless("status --json", &receiver.command(&["status", "--json"]));
    let status = schema::document(json.as_bytes());
    assert_eq!(
        status["sessions"][0]["blocks"][0]["name"], NAME,
        "nothing is lost"
    );

    let out = scratch.file("dump");
    let shown = harmless(
        "dump",
        &receiver.command(&["dump", "--session", "1", "--out", &out]),
    );
    assert!(shown.contains(SHOWN), "{shown}");
    let index = std::fs::read_to_string(scratch.path().join("dump/checkpoint.json")).unwrap();
    assert_harmless("checkpoint.json", &index);
    let index = schema::document(index.as_bytes());
    assert_eq!(index["blocks"][0]["name"], NAME);
    for directory in [scratch.path().join("dump"), ram.path().to_owned()] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(
                name.as_encoded_bytes().iter().all(u8::is_ascii_graphic),
                "{name:?}"
            );
        }
    }

    // An error that names the block ends the session: in the log, in the status, in what the hook gets.
    primary.request();
    let record = page_record(BlockRef::Named(NAME.as_bytes()), 1000 * PAGE, 1);
    let bytes = primary.checkpoint_bytes(9, &record);
    primary.main.send(&bytes);
    receiver.wait_for_log("is not a page of block");
    let reason = until("the hook", || std::fs::read_to_string(&told).ok());
    assert!(reason.contains(SHOWN), "{reason}");
    assert_harmless("the hook's reason", &reason);
    assert!(receiver.log().contains(SHOWN));
    assert_harmless("the log", &receiver.log());
    let shown = harmless("status of the ended session", &receiver.command(&["status"]));
    assert!(shown.contains(SHOWN), "{shown}");
}
