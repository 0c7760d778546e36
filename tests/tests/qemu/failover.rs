//! The guest lives on: primaries are killed, and their guests are resumed in fresh QEMUs from the last committed
//! checkpoint, by the commands as an operator runs them.
//!
//! `COLO_RING_FAILOVER_RUNS` makes more runs of every kind (1 otherwise), `COLO_RING_FAILOVER_SEED` kills at the
//! instants of an earlier run.

use colo_ring::host;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::command::until;
use std::path::Path;
use std::time::{Duration, Instant};

use colo_ring_tests::lab::{
    Address, Disk, DiskBus, Distribution, Dump, Guest, Kills, Lab, LabError, Machine, Moment, Qemu, Qmp,
    Secondary, SharedDirectory, TestGuest, Transport, Way, check_continues, experiment, experiment_alone,
    failover_runs, huge_pages,
};
use serde_json::{Value, json};

const INTERVAL_MS: u32 = 300;

fn load() -> TestGuest {
    TestGuest::random(5_000, 48)
}

pub(super) fn test_guest(machine: &str) -> Machine {
    Machine::bare(machine, 96, Guest::Test(load()))
}

pub(super) fn start_primary(lab: &Lab, name: &str, machine: &Machine) -> Result<Qemu, LabError> {
    let primary = Qemu::start(lab, name, machine)?;
    primary.wait_serial("tick 2 ", HANG_LIMIT)?;
    Ok(primary)
}

fn every_kind(machine: &str, channels: u8) {
    experiment(|lab| {
        let machine = test_guest(machine);
        let secondary = Secondary::start(lab, channels)?;
        let mut kills = Kills::new(lab, &machine);
        let kinds = [
            (Way::Shared, Moment::Idle),
            (Way::Stream, Moment::MidTransfer),
            (Way::Shared, Moment::MidTransfer),
            (Way::Stream, Moment::Idle),
        ];
        for run in 0..failover_runs() {
            for (number, (way, moment)) in (0..).zip(kinds) {
                let name = format!("primary{}", run * 4 + number);
                let primary = start_primary(lab, &name, &machine)?;
                kills.kill_primary(&secondary, primary, way, moment)?;
            }
            let primary = start_primary(lab, &format!("precopy{run}"), &machine)?;
            kills.kill_in_precopy(&secondary, primary)?;
        }
        assert_eq!(secondary.files(), 0, "images are given up");
        Ok(())
    });
}

#[test]
fn pc_with_multifd_lives_on() {
    every_kind("pc", 4);
}

#[test]
fn pc_plain_lives_on() {
    every_kind("pc", 0);
}

#[test]
fn q35_with_multifd_lives_on() {
    every_kind("q35", 4);
}

#[test]
fn q35_plain_lives_on() {
    every_kind("q35", 0);
}

/// Resumed with shared memory, protected again, resumed by a stream, protected again, resumed.
#[test]
fn a_resumed_guest_is_protected_and_resumed_again() {
    experiment(|lab| {
        let machine = test_guest("pc");
        let secondary = Secondary::start(lab, 4)?;
        let mut kills = Kills::new(lab, &machine);
        let mut running = start_primary(lab, "first", &machine)?;
        for way in [Way::Shared, Way::Stream, Way::Shared] {
            running = kills.kill_primary(&secondary, running, way, Moment::MidTransfer)?;
        }
        // Left on by the resume with shared memory.
        let report = secondary.protect_by_command(&running, &[])?;
        let changed = report["changed"].as_array().expect("a list");
        assert!(changed.contains(&json!("x-ignore-shared off")), "{report}");
        Ok(())
    });
}

/// The receiver is killed, and another one with its directory resumes the guest: every time another receiver.
fn lives_on_from_the_next_receiver(machine: &str, channels: u8, kinds: [(Way, Moment); 2]) {
    experiment(|lab| {
        let machine = test_guest(machine);
        let mut secondary = Secondary::start(lab, channels)?;
        let mut kills = Kills::new(lab, &machine);
        let mut running = start_primary(lab, "first", &machine)?;
        for (way, moment) in (0..failover_runs()).flat_map(|_| kinds) {
            running = kills.kill_receiver(&mut secondary, running, way, moment)?;
        }
        assert_eq!(secondary.files(), 0, "images are given up");
        Ok(())
    });
}

#[test]
fn pc_with_multifd_lives_on_from_the_next_receiver() {
    let kinds = [
        (Way::Shared, Moment::MidTransfer),
        (Way::Stream, Moment::MidTransfer),
    ];
    lives_on_from_the_next_receiver("pc", 4, kinds);
}

#[test]
fn q35_plain_lives_on_from_the_next_receiver() {
    let kinds = [(Way::Stream, Moment::Idle), (Way::Shared, Moment::Idle)];
    lives_on_from_the_next_receiver("q35", 0, kinds);
}

/// Huge pages of 2 MiB for a guest of 96 MiB that runs on an image, the image that protects it, the slabs of the pool, and
/// the small files beside them, of one page each; with room for a pool that grows.
const HUGE_PAGES: u64 = 224;

/// Images on a hugetlbfs: the guest runs on one, which is protected by another.
#[test]
fn a_guest_in_huge_pages_lives_on() {
    if !nix::unistd::geteuid().is_root() {
        colo_ring_skip::skip(
            "a_guest_in_huge_pages_lives_on",
            "a pool of huge pages and a hugetlbfs need root",
        );
        return;
    }
    let before = huge_pages().expect("a pool of huge pages");
    experiment_alone(|lab| {
        let machine = test_guest("pc");
        let ram = SharedDirectory::of_huge_pages(HUGE_PAGES)?;
        let mut secondary = Secondary::start_in(lab, 4, ram)?;
        let mut kills = Kills::new(lab, &machine);
        let first = start_primary(lab, "first", &machine)?;
        let on_image = kills.kill_primary(&secondary, first, Way::Shared, Moment::MidTransfer)?;
        let bytes = on_image.huge_bytes()?;
        println!("{} MiB of the resumed guest's memory are huge pages", bytes >> 20);
        assert!(bytes >= u64::from(load().region_mib) << 20, "{bytes} bytes");
        let by_stream = kills.kill_primary(&secondary, on_image, Way::Stream, Moment::Idle)?;
        assert_eq!(by_stream.huge_bytes()?, 0);
        let recovered = kills.kill_receiver(&mut secondary, by_stream, Way::Shared, Moment::MidTransfer)?;
        assert!(recovered.huge_bytes()? >= u64::from(load().region_mib) << 20);
        assert_eq!(secondary.files(), 0, "images are given up");
        Ok(())
    });
    assert_eq!(huge_pages().expect("a pool of huge pages"), before);
}

/// The primary lives on: between checkpoints and during one its secondary is killed.
#[test]
fn the_primary_lives_on_without_its_secondary() {
    experiment(|lab| {
        for (channels, moment) in [
            (4, Moment::Idle),
            (0, Moment::MidTransfer),
            (0, Moment::Idle),
            (4, Moment::MidTransfer),
        ] {
            let secondary = Secondary::start(lab, channels)?;
            let mut primary = start_primary(lab, "primary", &test_guest("pc"))?;
            secondary.protect(&mut primary, INTERVAL_MS)?;
            primary.wait_checkpoints(2, HANG_LIMIT)?;
            if let Moment::MidTransfer = moment {
                primary.wait_paused(HANG_LIMIT)?;
            }
            drop(secondary);
            until("the primary to notice", || {
                let events = primary.qmp().events();
                events.iter().any(|event| event.name == "COLO_EXIT").then_some(())
            });
            primary.qmp().execute("x-colo-lost-heartbeat", &json!({}))?;
            let tick = primary.ticks();
            primary.wait_serial(&format!("tick {} ", tick + 3), HANG_LIMIT)?;
            primary.check_guest()?;
        }
        Ok(())
    });
}

/// A secondary and the guest that it protects as its session 1, with two checkpoints.
fn protected(lab: &Lab, machine: &Machine) -> Result<(Secondary, Qemu), LabError> {
    let secondary = Secondary::start(lab, 4)?;
    let mut primary = start_primary(lab, "primary", machine)?;
    secondary.protect(&mut primary, INTERVAL_MS)?;
    primary.wait_checkpoints(2, HANG_LIMIT)?;
    Ok((secondary, primary))
}

/// The same, after its primary was lost.
fn lost(lab: &Lab, machine: &Machine) -> Result<Secondary, LabError> {
    let (secondary, primary) = protected(lab, machine)?;
    drop(primary);
    secondary.wait_state(1, "ended")?;
    Ok(secondary)
}

/// A failover that must fail: its name, its arguments, and what its error says.
type Refused = (&'static str, Vec<String>, &'static [&'static str]);

/// The arguments that start a QEMU by these words, of which some are replaced.
fn with_words(words: &[String], changes: &[(&str, &str)]) -> Vec<String> {
    let changed = words.iter().map(|word| {
        let change = changes.iter().find(|(from, _)| from == word);
        change.map_or_else(|| word.clone(), |(_, to)| (*to).to_owned())
    });
    ["--".to_owned()].into_iter().chain(changed).collect()
}

/// What does not fit the checkpoint of a guest that was started by these words, and QEMUs that do not start or load.
fn refused_failovers(words: &[String]) -> Vec<Refused> {
    let unchanged = with_words(words, &[]);
    vec![
        (
            "memory",
            with_words(words, &[("96M", "128M")]),
            &["memory size differs", "128 MiB there", "pc.ram (96 MiB)"],
        ),
        (
            "machine",
            with_words(words, &[("pc", "q35")]),
            &["machine type differs", "pc-i440fx-"],
        ),
        (
            "program",
            with_words(words, &[(&words[0], "qemu-system-nowhere")]),
            &["cannot start qemu-system-nowhere"],
        ),
        (
            "option",
            [unchanged.clone(), vec!["-no-such-option".to_owned()]].concat(),
            &["QEMU does not start", "-no-such-option"],
        ),
        (
            "device",
            with_words(words, &[("virtio-rng-pci", "virtio-keyboard-pci")]),
            &["did not load the checkpoint", "another attempt can be made"],
        ),
        (
            "fence",
            [vec!["--fence".to_owned(), "exit 7".to_owned()], unchanged].concat(),
            &["--fence 'exit 7' failed"],
        ),
    ]
}

fn assert_same(name: &str, before: &Dump, after: &Dump) -> Result<(), LabError> {
    let content = |dump: &Dump| Ok::<_, LabError>(std::fs::read(dump.block("pc.ram")?).expect("a dump"));
    assert!(
        content(before)? == content(after)?,
        "{name}: the image has changed"
    );
    assert_eq!(before.device_state()?, after.device_state()?, "{name}");
    Ok(())
}

/// What does not fit is reported before anything is changed; a QEMU that does not start or load leaves the checkpoint.
#[test]
fn what_fails_leaves_the_checkpoint_for_another_attempt() {
    experiment(|lab| {
        let machine = Machine::with_devices(96, Guest::Test(load()));
        let words = Qemu::command_line(lab, "fresh", &machine, None);
        let unchanged = with_words(&words, &[]);
        let (secondary, primary) = protected(lab, &machine)?;
        let receiver = secondary.receiver();
        let connected = receiver.failover_refused(1, &unchanged)?;
        assert!(connected.contains("--force"), "{connected}");
        drop(primary);
        secondary.wait_state(1, "ended")?;
        let before = receiver.dump(1, &lab.file("before"))?;

        for (name, arguments, says) in refused_failovers(&words) {
            let refused = receiver.failover_refused(1, &arguments)?;
            println!("{name}: {refused}");
            for part in says.iter().chain(&["still there"]) {
                assert!(
                    refused.contains(part),
                    "{name}: {part:?} is missing in: {refused}"
                );
            }
            assert_same(name, &before, &receiver.dump(1, &lab.file("after"))?)?;
        }

        // A guest that runs already is not run over.
        let idle = Machine::bare("pc", 96, Guest::Test(TestGuest::idle()));
        let other = Qemu::start(lab, "other", &idle)?;
        let monitor = other.free_monitor().display().to_string();
        let refused = receiver.failover_refused(1, ["--qmp", &monitor])?;
        assert!(refused.contains("does not wait for a guest"), "{refused}");

        let report = receiver.failover(1, &unchanged)?;
        assert_eq!(
            (&report["way"], &report["status"]),
            (&json!("shared"), &json!("running")),
            "{report}"
        );
        let serial = lab.file("fresh-serial.log");
        let tick = lab.tick_in(&before, &machine.guest)?;
        until("the guest's ticks", || {
            let text = std::fs::read_to_string(&serial).unwrap_or_default();
            assert!(!text.lines().any(|line| line.starts_with("error")), "{text}");
            text.contains(&format!("tick {} ", tick + 3)).then_some(())
        });
        quit(report["qmp"].as_str().expect("its monitor"))
    });
}

/// A stream on standard output or in a file, and the copy that is kept, start the guest by QEMU's own `-incoming`.
#[test]
fn streams_start_the_guest_anywhere() {
    experiment(|lab| {
        let machine = test_guest("pc");
        let secondary = lost(lab, &machine)?;
        let tick = lab.tick_in(&secondary.receiver().dump(1, &lab.file("dump"))?, &machine.guest)?;
        let [file, kept] = ["stream", "kept"].map(|name| lab.file(name));
        let to_file = format!("file:{}", file.display());
        let kept_name = kept.display().to_string();
        let report = secondary
            .receiver()
            .failover(1, ["--to", &to_file, "--keep", &kept_name])?;
        assert_eq!(
            (&report["way"], &report["status"]),
            (&json!("written"), &Value::Null)
        );
        let refused = secondary.receiver().failover_refused(1, ["--to", &to_file])?;
        assert!(
            refused.contains("--retry") && refused.contains("file:"),
            "{refused}"
        );
        let piped = lab.file("piped");
        secondary
            .receiver()
            .failover_to_stdout(1, &["--retry", "--to", "-"], &piped)?;
        let read =
            |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            read(&file) == read(&piped) && read(&file) == read(&kept),
            "the streams differ"
        );

        let mut resumed = Qemu::start_incoming(lab, "resumed", &machine)?;
        let uri = format!("exec:cat {}", piped.display());
        resumed.qmp().execute("migrate-incoming", &json!({"uri": uri}))?;
        check_continues(&resumed, &machine, tick)
    });
}

/// The receiver writes the stream to the address at which a QEMU listens by its own `-incoming`.
#[test]
fn a_stream_to_an_address_starts_the_guest_there() {
    experiment(|lab| {
        let machine = test_guest("pc");
        let secondary = lost(lab, &machine)?;
        let tick = lab.tick_in(&secondary.receiver().dump(1, &lab.file("dump"))?, &machine.guest)?;
        let mut again: &[&str] = &[];
        for transport in [Transport::Tcp, Transport::Unix] {
            let there = Address::free(lab, transport)?.to_string();
            let name = format!("{transport:?}").to_lowercase();
            let resumed = Qemu::start_incoming_at(lab, &name, &machine, &there)?;
            let arguments = [&["--to", &there], again].concat();
            let report = secondary.receiver().failover(1, arguments)?;
            assert_eq!(
                (&report["way"], &report["to"]),
                (&json!("written"), &json!(there)),
                "{report}"
            );
            check_continues(&resumed, &machine, tick)?;
            let kept = secondary.session(1)?;
            assert!(
                kept["promotion"]
                    .as_str()
                    .is_some_and(|words| words.contains(&there)),
                "{kept}"
            );
            // That guest ends here, and so its checkpoint may be given once more.
            again = &["--retry"];
        }
        secondary.receiver().discard(1)?;
        assert_eq!(secondary.session(1)?, Value::Null);
        assert_eq!(secondary.files(), 0, "its image is given up");
        Ok(())
    });
}

/// From the command to the guest's first new tick, with a warm standby.
#[test]
fn a_warm_standby_goes_on_at_once() {
    const MEMORY_MIB: u32 = 512;
    experiment(|lab| {
        let guest = TestGuest {
            interrupts_per_tick: 1,
            fill: true,
            ..TestGuest::random(2_000, 384)
        };
        let machine = Machine::bare("pc", MEMORY_MIB, Guest::Test(guest));
        let secondary = Secondary::start(lab, 4)?;
        let (mut until_tick, mut own, mut loading) = (Vec::new(), Vec::new(), Vec::new());
        for session in 1..=u64::from(failover_runs().max(3)) {
            let mut primary = Qemu::start(lab, &format!("primary{session}"), &machine)?;
            primary.wait_serial("tick 10 ", HANG_LIMIT)?;
            secondary.protect(&mut primary, INTERVAL_MS)?;
            primary.wait_checkpoints(3, HANG_LIMIT)?;
            let standby =
                secondary.standby(lab, &format!("standby{session}"), &machine, Way::Shared, session)?;
            drop(primary);
            secondary.wait_state(session, "ended")?;
            let (began, serial) = (Instant::now(), lab.file(&format!("standby{session}-serial.log")));
            let first = std::thread::spawn(move || {
                until("the first tick", || {
                    let text = std::fs::read_to_string(&serial).ok()?;
                    text.contains("\ntick ").then(|| began.elapsed())
                })
            });
            let report = secondary.failover(session, &standby, Way::Shared)?;
            let microseconds = |time: Duration| u64::try_from(time.as_micros()).expect("a short time");
            until_tick.push(microseconds(first.join().expect("the watching thread")));
            let step = |name: &str| report["steps"][name].as_u64().expect("a time") / 1000;
            own.push(step("claim_ns") + step("check_ns") + step("restore_ns"));
            loading.push(step("load_ns"));
            standby.check_guest()?;
        }
        println!("{MEMORY_MIB} MiB on {}", host::Machine::read());
        println!(
            "from the command to the first new tick: {}",
            Distribution::of_us(&until_tick)
        );
        println!("claim, check and stream: {}", Distribution::of_us(&own));
        println!(
            "QEMU's loading after the last byte: {}",
            Distribution::of_us(&loading)
        );
        Ok(())
    });
}

/// A receiver that is replaced when it keeps nothing gives a session the number of an earlier one, and its file that name. A standby that
/// has mapped the earlier file has none of the guest's memory.
#[test]
fn a_standby_on_an_earlier_file_of_that_name_gets_the_guest_whole() {
    experiment(|lab| {
        let machine = test_guest("pc");
        let (mut secondary, primary) = protected(lab, &machine)?;
        let standby = secondary.standby(lab, "standby", &machine, Way::Shared, 1)?;
        let earlier = secondary.ram_file(1)?;
        drop(primary);
        secondary.wait_state(1, "ended")?;
        secondary.receiver().discard(1)?;
        secondary.kill_and_restart(lab)?;
        let mut primary = start_primary(lab, "next", &machine)?;
        secondary.protect(&mut primary, INTERVAL_MS)?;
        primary.wait_checkpoints(2, HANG_LIMIT)?;
        assert_eq!(secondary.ram_file(1)?, earlier);
        drop(primary);
        secondary.wait_state(1, "ended")?;
        let monitor = standby.free_monitor().display().to_string();
        let report = secondary.receiver().failover(1, ["--qmp", &monitor])?;
        assert_eq!(report["way"], "stream", "{report}");
        assert_eq!(report["status"], "running", "{report}");
        standby.check_guest()
    });
}

/// Its disk is locked by the primary that was not fenced: that is found out at once, and costs no checkpoint.
#[test]
fn a_standby_without_its_disk_fails_at_once() {
    experiment(|lab| {
        let image = lab.file("disk.raw");
        let file = std::fs::File::create(&image).and_then(|file| file.set_len(1 << 20));
        file.map_err(|source| LabError::Io {
            what: format!("make {}", image.display()),
            source,
        })?;
        let machine = Machine {
            disk: Some(Disk {
                bus: DiskBus::VirtioBlk,
                file: image.clone(),
            }),
            ..test_guest("pc")
        };
        let (secondary, primary) = protected(lab, &machine)?;
        let receiver = secondary.receiver();
        let standby = Qemu::start_incoming(lab, "standby", &machine)?;
        let monitor = standby.free_monitor().display().to_string();
        let began = Instant::now();
        let unfenced = ["--force", "--unfenced", "--stream"];
        let refused = receiver.failover_refused(1, ["--qmp", &monitor].iter().chain(&unfenced))?;
        println!("after {:?}: {refused}", began.elapsed());
        // It would be a minute.
        assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
        for part in [
            "Failed to get \"write\" lock",
            &image.display().to_string(),
            "another attempt can be made",
        ] {
            assert!(refused.contains(part), "{part:?} is missing in: {refused}");
        }
        drop((primary, standby));
        let next = Qemu::start_incoming(lab, "next", &machine)?;
        secondary.failover(1, &next, Way::Stream)?;
        Ok(())
    });
}

/// Ends a QEMU that the command has started, and with it its directory.
fn quit(monitor: &str) -> Result<(), LabError> {
    let path = Path::new(monitor);
    Qmp::connect(path, HANG_LIMIT)?.execute("quit", &json!({}))?;
    let directory = path.parent().expect("a directory");
    std::fs::remove_dir_all(directory).map_err(|source| LabError::Io {
        what: format!("remove {}", directory.display()),
        source,
    })
}
