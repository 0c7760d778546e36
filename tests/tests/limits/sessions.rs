//! What sessions of strangers may take, and how they end.

use super::socket_address;
use colo_ring::blocks::{BLOCK_NAME_MAX, BLOCKS_MAX};
use colo_ring::wire::stream::Command;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::hostile::{
    Cut, HostilePrimary, Link, commands, end_of_body, header, list_of_tiny_blocks, ram_start,
};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::receiver::{LocalReceiver, options_with_files};
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::SynthPrimary;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;

/// Each with as many blocks as a guest may have, of one page each, and in plain mode.
fn guest_of_tiny_blocks(address: SocketAddr) -> Link {
    let mut main = Link::connect(address);
    let list = list_of_tiny_blocks(BLOCKS_MAX);
    main.send(
        &[
            header(),
            commands(&[Command::OpenReturnPath, Command::Ping(1)]),
            ram_start(),
            list,
            end_of_body(),
        ]
        .concat(),
    );
    main
}

/// How many sessions have memory.
pub(super) fn with_memory(receiver: &RunningReceiver) -> usize {
    let status = receiver.status();
    let sessions = status["sessions"].as_array().expect("a list");
    sessions
        .iter()
        .filter(|session| session["ram_bytes"].is_u64())
        .count()
}

/// The kernel allows a process 65,530 of them, and without one its allocator fails.
#[test]
fn tiny_ram_blocks_share_a_mapping() {
    const SESSIONS: usize = 16;
    let receiver = RunningReceiver::with_channels(wrapped(&[]), 0, &["--hugepages", "off"]);
    let mappings = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", receiver.pid()));
        maps.expect("it runs").lines().count()
    };
    let before = mappings();
    let address = socket_address(&receiver);
    let guests: Vec<_> = (0..SESSIONS).map(|_| guest_of_tiny_blocks(address)).collect();
    until("memory of all guests", || {
        (with_memory(&receiver) == SESSIONS).then_some(())
    });
    let each = (mappings() - before) / SESSIONS;
    println!("{each} mappings for each guest of {BLOCKS_MAX} blocks");
    assert!(each < 32, "{each}");
    // Its status is readable, too, and small: names that are no text take four times as much there.
    let blocks = receiver.status()["sessions"][0]["blocks"]
        .as_array()
        .map(Vec::len);
    assert_eq!(blocks, Some((8 << 10) / (4 * BLOCK_NAME_MAX)));
    drop(guests);
}

#[test]
fn ended_sessions_keep_a_line() {
    const SESSIONS: usize = 400;
    let receiver = RunningReceiver::with_channels(wrapped(&[]), 0, &["--hugepages", "off"]);
    let address = socket_address(&receiver);
    let end_some = |sessions: usize| {
        for number in 1..=sessions {
            let mut guest = guest_of_tiny_blocks(address);
            until("its memory", || (with_memory(&receiver) == 1).then_some(()));
            guest.cut(Cut::Fin);
            until("its end", || {
                (receiver.status()["sessions"].as_array()?.is_empty()).then_some(())
            });
            println!("session {number} has ended");
        }
    };
    end_some(20);
    let before = receiver.resident_bytes();
    end_some(SESSIONS);
    let grown = receiver.resident_bytes().saturating_sub(before);
    println!("{} KiB for each ended session", (grown >> 10) / SESSIONS as u64);
    // The names alone would be some 400 KiB each. The allocator keeps up to 16 MiB of what was freed, or does not.
    assert!(grown < SESSIONS as u64 * (64 << 10), "{grown} bytes");
}

#[test]
fn an_operator_ends_a_session_at_any_time() {
    let scratch = Scratch::new();
    let told = scratch.file("told");
    let hook = format!("echo $COLO_RING_SESSION >> {told}");
    let args = ["--hugepages", "off", "--on-loss", &hook, "--on-loss-unprotected"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    // In precopy.
    let mut primary = HostilePrimary::connect(socket_address(&receiver), 2);
    for (_, bytes) in &primary.precopy_parts()[..3] {
        primary.main.send(bytes);
    }
    until("its memory", || (with_memory(&receiver) == 1).then_some(()));
    let ended = receiver.ask(&["end", "--json", "--session", "1"]);
    assert_eq!((&ended["ended"], &ended["checkpoint"]), (&1.into(), &Value::Null));
    assert!(primary.is_closed());
    until("its memory's return", || {
        (receiver.status()["ram_held_bytes"] == 0).then_some(())
    });
    // Protected: its checkpoint is kept, and can be given up at once.
    let mut primary = HostilePrimary::protected(socket_address(&receiver), 2);
    let said = receiver.command(&["discard", "--session", "2"]).stderr;
    assert!(String::from_utf8_lossy(&said).contains("`colo-ring end` ends it"));
    let ended = receiver.ask(&["end", "--json", "--session", "2"]);
    assert_eq!((&ended["ended"], &ended["checkpoint"]), (&2.into(), &1.into()));
    assert!(primary.is_closed());
    let again = receiver.command(&["end", "--session", "2"]).stderr;
    assert!(String::from_utf8_lossy(&again).contains("session 2 has ended already"));
    assert_eq!(
        receiver.ask(&["discard", "--json", "--session", "2"])["discarded"],
        2
    );
    let unknown = receiver.command(&["end", "--session", "77"]).stderr;
    assert!(String::from_utf8_lossy(&unknown).contains("there is no session 77"));
    // It was no loss.
    receiver.signal(nix::sys::signal::Signal::SIGTERM);
    let ended = receiver.wait();
    assert!(ended.status.success(), "{}", ended.log);
    assert!(!std::path::Path::new(&told).exists(), "{}", ended.log);
}

#[test]
fn a_first_copy_that_stands_still_ends() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off", "--precopy-timeout", "2"]);
    let mut primary = HostilePrimary::connect(socket_address(&receiver), 2);
    for (_, bytes) in &primary.precopy_parts()[..3] {
        primary.main.send(bytes);
    }
    receiver.wait_for_log("in its first copy the primary sent next to nothing for 2s");
    assert!(primary.is_closed());
    assert_eq!(receiver.protect()["checkpoint"], 5);
    // A protected one may be silent for as long as it likes.
    let mut quiet = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    quiet.checkpoint().expect("a checkpoint");
    std::thread::sleep(Duration::from_secs(4));
    quiet.checkpoint().expect("another one");
}

#[test]
fn a_guest_may_have_less_time_for_its_first_copy_than_others() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.file("guests.d")).expect("a directory");
    let file = "name = \"lab\"\npeer = \"127.0.0.1\"\nprecopy-timeout = 2\n";
    std::fs::write(scratch.file("guests.d/lab.toml"), file).expect("a file");
    std::fs::write(scratch.file("receive.toml"), "precopy-timeout = 86400\n").expect("a file");
    let config = scratch.file("receive.toml");
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off", "--config", &config]);
    let mut primary = HostilePrimary::connect(socket_address(&receiver), 2);
    for (_, bytes) in &primary.precopy_parts()[..3] {
        primary.main.send(bytes);
    }
    receiver.wait_for_log("in its first copy the primary sent next to nothing for 2s");
    assert!(primary.is_closed());
}

#[test]
fn an_origin_cannot_fill_all_places() {
    let scratch = Scratch::new();
    let listen = format!("unix:{}", scratch.file("listen"));
    let args = [
        "--hugepages",
        "off",
        "--sessions-per-origin",
        "2",
        "--listen",
        &listen,
    ];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    assert_eq!(receiver.protect()["checkpoint"], 5);
    let _second = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    // One is kept, one runs.
    assert!(SynthPrimary::connect(receiver.address(), &guest()).is_err());
    receiver.wait_for_log("2 sessions of its origin are running or kept");
    let address: Address = listen.parse().expect("an address");
    let mut other = SynthPrimary::connect(&address, &guest()).expect("precopy");
    other.checkpoint().expect("a checkpoint");
    assert_eq!(
        receiver.ask(&["discard", "--json", "--session", "1"])["discarded"],
        1
    );
    let mut third = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    third.checkpoint().expect("a checkpoint");
}

#[test]
fn a_first_copy_that_stands_gives_up_its_place() {
    let args = ["--hugepages", "off", "--sessions-per-origin", "1"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let mut standing = HostilePrimary::connect(socket_address(&receiver), 2);
    for (_, bytes) in &standing.precopy_parts()[..3] {
        standing.main.send(bytes);
    }
    until("its memory", || (with_memory(&receiver) == 1).then_some(()));
    // Not at once.
    let connect = || SynthPrimary::connect(receiver.address(), &guest());
    assert!(connect().is_err());
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(with_memory(&receiver), 1);
    assert!(connect().is_err());
    receiver.wait_for_log("and there was no place for another guest");
    assert!(standing.is_closed());
    receiver.wait_for_log("session 1 ended");
    let mut other = until("its place", || connect().ok());
    other.checkpoint().expect("a checkpoint");
}

/// Anyone can begin such migrations, and nothing else would give up what they leave.
#[test]
fn tiny_guests_without_colo_do_not_fill_all_places() {
    let ram = SharedDirectory::new().expect("a directory");
    let receiver = LocalReceiver::start(options_with_files(2, &ram));
    let migrate = || {
        let mut migrated = receiver.connected();
        migrated.precopy();
        migrated.cut(Cut::Fin);
        receiver.ended();
    };
    (0..8).for_each(|_| migrate());
    let is_kept = |session: u32| ram.path().join(format!("session-{session}.pc.ram")).exists();
    assert!((1..=8).all(is_kept));
    migrate();
    receiver.warned("session 1: its checkpoint is given up, because its guest has only");
    until("the files to go", || (!is_kept(1)).then_some(()));
    assert!((2..=9).all(is_kept));
}

/// Also of an earlier receiver.
#[test]
fn kept_checkpoints_of_tiny_guests_make_room() {
    const PLACES: usize = 256;
    let ram = SharedDirectory::new().expect("a directory");
    {
        let receiver = LocalReceiver::start(options_with_files(2, &ram));
        // It may have been migrated without COLO, and exist nowhere else.
        let mut migrated = receiver.connected();
        migrated.precopy();
        migrated.cut(Cut::Fin);
        receiver.ended();
        for _ in 1..PLACES {
            receiver.protected().cut(Cut::Fin);
            receiver.ended();
        }
    }
    let receiver = LocalReceiver::start(options_with_files(2, &ram));
    let mut primary = receiver.protected();
    receiver.warned("session 2: its checkpoint is given up, because all 256 places are taken");
    primary.checkpoint(&[(0, 5, 0x55)]);
    assert!(!ram.path().join("session-2.pc.ram").exists());
    for kept in [1, 3] {
        assert!(ram.path().join(format!("session-{kept}.pc.ram")).exists());
    }
}
