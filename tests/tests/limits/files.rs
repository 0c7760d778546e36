//! What a receiver writes: nobody else can read a guest's memory, and nothing is written through a link.

use colo_ring_tests::command::{RunningReceiver, Scratch, as_user, guest, wrapped};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tools::primary::SynthPrimary;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// A guest with a committed checkpoint.
fn protected(receiver: &RunningReceiver) -> SynthPrimary {
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    primary
}

#[test]
fn a_dump_is_its_owners_alone_and_follows_no_link() {
    let receiver = RunningReceiver::start(wrapped(&[]), &[]);
    let _primary = protected(&receiver);
    let scratch = Scratch::new();
    let victim = scratch.file("victim");
    std::fs::write(&victim, "precious").unwrap();
    let dump = |out: &str| receiver.command(&["dump", "--session", "1", "--out", out]);
    for name in ["vmdesc.json", "stream-header.bin", "pc.ram", "device-state.bin"] {
        let out = scratch.file(&format!("dump-{name}"));
        std::fs::create_dir(&out).unwrap();
        symlink(&victim, Path::new(&out).join(name)).unwrap();
        let refused = dump(&out);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && text.contains("is not replaced"),
            "{name}: {text}"
        );
        assert!(!Path::new(&out).join("checkpoint.json").exists(), "{name}");
    }
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    let out = scratch.file("dump");
    // Twice: files of an earlier dump are replaced.
    for _ in 0..2 {
        let dumped = dump(&out);
        assert!(
            dumped.status.success(),
            "{}",
            String::from_utf8_lossy(&dumped.stderr)
        );
    }
    let files = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let modes: Vec<_> = files
        .map(|path| {
            (
                std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                path,
            )
        })
        .collect();
    assert!(
        modes.len() >= 5 && modes.iter().all(|(mode, _)| *mode == 0o600),
        "{modes:?}"
    );
}

#[test]
fn measurements_follow_no_link() {
    let scratch = Scratch::new();
    let victim = scratch.file("victim");
    std::fs::write(&victim, "precious").unwrap();
    symlink(&victim, scratch.file("h.pause.hlog")).unwrap();
    let prefix = scratch.file("h");
    // A receiver that did start would not end.
    let mut command = wrapped(&["timeout", "60"]);
    command.args(["receive", "--listen", "tcp:127.0.0.1:0", "--hist", &prefix]);
    let refused = command.output().expect("the command");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains("is not replaced"),
        "{text}"
    );
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

/// A guest that finds no place for its memory is too late a notice. What was in /dev/shm is gone after each reboot.
#[test]
fn a_directory_for_memory_must_be_there_or_be_asked_for() {
    let shared = SharedDirectory::new().expect("a directory");
    let missing = shared.path().join("colo").display().to_string();
    let receive = |more: &[&str]| {
        let mut command = wrapped(&["timeout", "60"]);
        command.args(["receive", "--listen", "tcp:127.0.0.1:0", "--ram-dir", &missing]);
        command.args(more).output().expect("the command")
    };
    let refused = receive(&[]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    let offer = format!("install -d -m 0700 {missing}");
    assert!(
        text.contains(&offer) && text.contains("--create-ram-dir"),
        "{text}"
    );
    assert!(!text.contains("listening"), "{text}");
    assert!(!Path::new(&missing).exists());
    let args = ["--ram-dir", &missing, "--create-ram-dir"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let mode = std::fs::metadata(&missing).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    drop(protected(&receiver));
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let scratch = Scratch::new();
    let mut other = as_user(65534, &scratch);
    other.args(["receive", "--listen", "tcp:127.0.0.1:0", "--ram-dir", &missing]);
    let refused = other.output().expect("the command");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains("cannot be used by this user (uid 65534)"),
        "{text}"
    );
}

/// A mapping of a process: its first line of `smaps`, its kilobytes, and whether it stays out of core dumps.
struct MappedArea {
    name: String,
    kib: u64,
    is_left_out: bool,
}

fn mapped_areas(pid: u32) -> Vec<MappedArea> {
    let mut areas: Vec<MappedArea> = Vec::new();
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a kernel with smaps");
    for line in smaps.lines() {
        let (key, value) = line.split_once(char::is_whitespace).expect("two words");
        match (key, areas.last_mut()) {
            ("Size:", Some(area)) => area.kib = value.trim().trim_end_matches(" kB").parse().unwrap(),
            ("VmFlags:", Some(area)) => area.is_left_out = value.split(' ').any(|flag| flag == "dd"),
            _ if !key.ends_with(':') => areas.push(MappedArea {
                name: line.to_owned(),
                kib: 0,
                is_left_out: false,
            }),
            _ => {}
        }
    }
    areas
}

/// A core of a receiver that crashes has none of the memory that it holds for guests: image, cache, tables.
#[test]
fn guest_memory_stays_out_of_core_dumps() {
    let named = SharedDirectory::new().expect("a directory");
    let directory = named.path().display().to_string();
    for more in [
        &[][..],
        &["--ram-dir", directory.as_str()],
        &["--cache", "mirror"],
    ] {
        let receiver = RunningReceiver::start(wrapped(&[]), more);
        let _primary = protected(&receiver);
        let areas = mapped_areas(receiver.pid());
        let left_out = areas.iter().filter(|area| area.is_left_out);
        let kib: u64 = left_out.map(|area| area.kib).sum();
        let status = receiver.protected();
        let ram_kib = status["ram_bytes"].as_u64().expect("its memory") >> 10;
        assert!(kib >= ram_kib, "{more:?}: {kib} of {ram_kib} KiB");
        for area in &areas {
            let is_guests = area.name.contains("colo-ring-ram") || area.name.contains("session-1.");
            assert!(!is_guests || area.is_left_out, "{more:?}: {}", area.name);
        }
    }
}
