//! The guest lives on: primaries are killed, and their guests are resumed in fresh QEMUs from the last committed
//! checkpoint, by the commands as an operator runs them.
//!
//! `COLO_RING_FAILOVER_RUNS` makes more runs of every kind (1 otherwise).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use colo_ring_tests::lab::{
    Address, Backend, Distribution, Guest, Lab, LabError, LinuxGuest, Machine, Protection, Qemu, Qmp,
    Receiver, ReceiverOptions, SharedDirectory, TestGuest, Transport, check_test_guest_image, experiment,
    host, protect_by_command,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const INTERVAL_MS: u32 = 300;

/// How the guest's memory gets to the fresh QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Shared,
    Stream,
}

/// When the primary is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Idle,
    MidTransfer,
}

fn runs() -> u32 {
    std::env::var("COLO_RING_FAILOVER_RUNS").map_or(1, |text| text.parse().expect("a number of runs"))
}

/// A receiver whose images are files, on an address of its own.
struct Secondary {
    receiver: Receiver,
    address: Address,
    channels: u8,
    ram: SharedDirectory,
}

impl Secondary {
    fn start(lab: &Lab, channels: u8) -> Result<Self, LabError> {
        let (address, ram) = (Address::free(lab, Transport::Tcp)?, lab.ram_directory()?);
        let options = ReceiverOptions {
            channels,
            backend: Backend::Uring,
            once: false,
            extra: vec!["--ram-dir".into(), ram.path().display().to_string()],
        };
        let receiver = Receiver::start(lab, &address, &options)?;
        Ok(Self {
            receiver,
            address,
            channels,
            ram,
        })
    }

    fn protect(&self, primary: &mut Qemu) -> Result<(), LabError> {
        let protection = Protection {
            channels: self.channels,
            checkpoint_delay_ms: INTERVAL_MS,
            zero_page_detection: None,
        };
        primary.protect(&self.address, &protection)
    }

    /// The file of a session's main memory, as `colo-ring status` names it.
    fn ram_file(&self, session: u64) -> Result<PathBuf, LabError> {
        let status = self.session(session)?;
        let blocks = status["blocks"].as_array().expect("a list of blocks");
        let block = blocks
            .iter()
            .find(|block| block["name"] == "pc.ram")
            .expect("pc.ram");
        Ok(block["file"].as_str().expect("a file with a name").into())
    }

    fn session(&self, session: u64) -> Result<Value, LabError> {
        let status = self.receiver.status()?;
        let sessions = status["sessions"].as_array().expect("a list of sessions");
        let found = sessions.iter().find(|entry| entry["session"] == session);
        Ok(found.unwrap_or(&Value::Null).clone())
    }

    fn wait_ended(&self, session: u64) -> Result<Value, LabError> {
        let since = Instant::now();
        loop {
            let status = self.session(session)?;
            if status["state"] == "ended" {
                return Ok(status);
            }
            assert!(since.elapsed() < LIMIT, "{status}");
        }
    }

    /// A QEMU that waits for the guest of a session.
    fn standby(
        &self,
        lab: &Lab,
        name: &str,
        machine: &Machine,
        way: Way,
        session: u64,
    ) -> Result<Qemu, LabError> {
        match way {
            Way::Shared => Qemu::start_standby(lab, name, machine, &self.ram_file(session)?),
            Way::Stream => Qemu::start_incoming(lab, name, machine),
        }
    }

    fn failover(&self, session: u64, standby: &Qemu, way: Way) -> Result<Value, LabError> {
        let monitor = standby.free_monitor().display().to_string();
        let mut arguments = vec!["--qmp", &monitor];
        if way == Way::Stream {
            arguments.push("--stream");
        }
        let report = self.receiver.failover(session, arguments)?;
        assert_eq!(report["status"], "running", "{report}");
        assert_eq!(
            report["way"],
            if way == Way::Shared { "shared" } else { "stream" }
        );
        Ok(report)
    }
}

fn kill(primary: Qemu) {
    // By SIGKILL.
    drop(primary);
}

/// The guest goes on from where the checkpoint has it, and finds its memory right.
fn check_continues(resumed: &Qemu, tick: u64) -> Result<(), LabError> {
    resumed.wait_serial(&format!("tick {} ", tick + 5), LIMIT)?;
    resumed.check_guest()?;
    let first = resumed.all_ticks()[0];
    // The checkpoint may be of a moment between the counting of a tick and its printing.
    assert!(
        (tick..=tick + 1).contains(&first),
        "its first tick is {first}, the checkpoint's was {tick}"
    );
    Ok(())
}

/// Kills a primary, whose guest was resumed so many times before, and resumes its guest. Returns the resumed guest.
fn kill_and_resume(
    lab: &Lab,
    secondary: &Secondary,
    (mut primary, resumed, machine): (Qemu, u64, &Machine),
    (way, moment): (Way, Moment),
    session: u64,
    name: &str,
) -> Result<Qemu, LabError> {
    let before = primary.checkpoints()?;
    primary.wait_checkpoints(before + 2, LIMIT)?;
    let standby = secondary.standby(lab, name, machine, way, session)?;
    let spread = u64::from(std::process::id())
        .wrapping_mul(0x9e37_79b9)
        .wrapping_add(session * 37)
        % 97;
    match moment {
        Moment::Idle => std::thread::sleep(Duration::from_millis(spread)),
        Moment::MidTransfer => {
            primary.wait_paused(LIMIT)?;
            std::thread::sleep(Duration::from_micros(spread * 60));
        }
    }
    // A resume shows as the same event as a checkpoint's end.
    let complete = u64::try_from(primary.checkpoints()?).expect("a count") - resumed;
    kill(primary);
    let status = secondary.wait_ended(session)?;
    let committed = status["checkpoint"].as_u64().expect("a checkpoint");
    assert!(
        committed >= complete,
        "{committed} is kept, {complete} were acknowledged"
    );
    let out = lab.file(&format!("{name}-dump"));
    let dump = secondary.receiver.dump(session, &out)?;
    assert_eq!(dump.checkpoint(), committed);
    let tick = lab.tick_in(&dump)?;
    if let Guest::Test(load) = &machine.guest {
        check_test_guest_image(&dump.block("pc.ram")?, load)?;
    }
    // A failure to remove it costs disk space only.
    let _ = std::fs::remove_dir_all(&out);
    let report = secondary.failover(session, &standby, way)?;
    assert_eq!(report["checkpoint"], committed);
    println!(
        "{name}: {way:?} {moment:?}, checkpoint {committed} of {complete}+, tick {tick}, {} KiB sent, feed {} µs, load {} µs",
        report["stream_bytes"].as_u64().unwrap_or(0) / 1024,
        report["steps"]["feed_ns"].as_u64().unwrap_or(0) / 1000,
        report["steps"]["load_ns"].as_u64().unwrap_or(0) / 1000,
    );
    check_continues(&standby, tick)?;
    // The guest's memory belongs to it alone, and one has won.
    assert_eq!(secondary.session(session)?, Value::Null);
    let refused = secondary
        .receiver
        .failover_refused(session, ["--force", "--retry", "--qmp", "/nonexistent"])?;
    assert!(refused.contains("was promoted"), "{refused}");
    Ok(standby)
}

fn load() -> TestGuest {
    TestGuest::random(5_000, 48)
}

fn every_kind(machine: &str, channels: u8) {
    experiment(|lab| {
        let machine = Machine::bare(machine, 96, Guest::Test(load()));
        let secondary = Secondary::start(lab, channels)?;
        let kinds = [
            (Way::Shared, Moment::Idle),
            (Way::Stream, Moment::MidTransfer),
            (Way::Shared, Moment::MidTransfer),
            (Way::Stream, Moment::Idle),
        ];
        let all = (0..runs()).flat_map(|_| kinds);
        for (session, kind) in (1..).zip(all) {
            let mut primary = Qemu::start(lab, &format!("primary{session}"), &machine)?;
            primary.wait_serial("tick 2 ", LIMIT)?;
            secondary.protect(&mut primary)?;
            let name = format!("resumed{session}");
            kill_and_resume(lab, &secondary, (primary, 0, &machine), kind, session, &name)?;
        }
        assert_eq!(secondary.ram.files(), 0, "images are given up");
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

/// Resumed with shared memory, protected again by the command, resumed by a stream, protected again, resumed.
#[test]
fn a_resumed_guest_is_protected_and_resumed_again() {
    experiment(|lab| {
        let machine = Machine::bare("pc", 96, Guest::Test(load()));
        let secondary = Secondary::start(lab, 4)?;
        let mut running = Qemu::start(lab, "first", &machine)?;
        running.wait_serial("tick 2 ", LIMIT)?;
        for (session, way) in (1..).zip([Way::Shared, Way::Stream, Way::Shared]) {
            let interval = INTERVAL_MS.to_string();
            let report = protect_by_command(
                running.free_monitor(),
                &secondary.address,
                &["--channels", "4", "--interval", &interval],
            )?;
            assert_eq!(report["status"], "colo", "{report}");
            // Left on by the resume with shared memory.
            let switched_off = report["changed"]
                .as_array()
                .expect("a list")
                .contains(&json!("x-ignore-shared off"));
            assert_eq!(switched_off, session == 2, "{report}");
            let name = format!("again{session}");
            let kind = (way, Moment::MidTransfer);
            let resumed = session.min(2) - 1;
            let primary = (running, resumed, &machine);
            running = kill_and_resume(lab, &secondary, primary, kind, session, &name)?;
        }
        Ok(())
    });
}

/// In precopy there is nothing to resume.
#[test]
fn a_primary_killed_in_precopy_leaves_nothing() {
    experiment(|lab| {
        let machine = Machine::bare("pc", 96, Guest::Test(load()));
        let secondary = Secondary::start(lab, 4)?;
        let primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 2 ", LIMIT)?;
        let slowly = ["--channels", "4", "--bandwidth", "1M", "--wait", "0"];
        protect_by_command(primary.free_monitor(), &secondary.address, &slowly)?;
        let since = Instant::now();
        while secondary.session(1)?["state"] != "precopy" {
            assert!(since.elapsed() < LIMIT, "no session in precopy");
        }
        let arguments = ["--qmp", "/nonexistent"];
        let refused = secondary.receiver.failover_refused(1, arguments)?;
        assert!(refused.contains("nothing to resume"), "{refused}");
        kill(primary);
        let since = Instant::now();
        loop {
            let refused = secondary.receiver.failover_refused(1, arguments)?;
            if refused.contains("left no checkpoint") {
                return Ok(());
            }
            assert!(since.elapsed() < LIMIT, "{refused}");
        }
    });
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
            let machine = Machine::bare("pc", 96, Guest::Test(load()));
            let secondary = Secondary::start(lab, channels)?;
            let mut primary = Qemu::start(lab, "primary", &machine)?;
            primary.wait_serial("tick 2 ", LIMIT)?;
            secondary.protect(&mut primary)?;
            primary.wait_checkpoints(2, LIMIT)?;
            if let Moment::MidTransfer = moment {
                primary.wait_paused(LIMIT)?;
            }
            drop(secondary);
            let since = Instant::now();
            while !primary
                .qmp()
                .events()
                .iter()
                .any(|event| event.name == "COLO_EXIT")
            {
                assert!(since.elapsed() < LIMIT, "the primary does not notice");
                std::thread::sleep(Duration::from_millis(5));
            }
            primary.qmp().execute("x-colo-lost-heartbeat", &json!({}))?;
            let tick = primary.ticks();
            primary.wait_serial(&format!("tick {} ", tick + 3), LIMIT)?;
            primary.check_guest()?;
        }
        Ok(())
    });
}

/// What does not fit is told before anything is touched; a QEMU that does not start or load leaves the checkpoint.
#[test]
fn what_fails_leaves_the_checkpoint_for_another_attempt() {
    experiment(|lab| {
        let machine = Machine::with_devices(96, Guest::Test(load()));
        let secondary = Secondary::start(lab, 4)?;
        let mut primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 2 ", LIMIT)?;
        secondary.protect(&mut primary)?;
        primary.wait_checkpoints(2, LIMIT)?;
        let words = Qemu::command_line(lab, "fresh", &machine, None);
        let with = |change: &dyn Fn(&str) -> Option<String>| {
            let changed = words.iter().filter_map(|word| change(word));
            ["--".to_owned()].into_iter().chain(changed).collect::<Vec<_>>()
        };
        let unchanged = with(&|word| Some(word.to_owned()));
        let connected = secondary.receiver.failover_refused(1, &unchanged)?;
        assert!(connected.contains("--force"), "{connected}");
        kill(primary);
        secondary.wait_ended(1)?;
        let before = secondary.receiver.dump(1, &lab.file("before"))?;

        let instead = |from: &'static str, to: &'static str| {
            with(&move |word| Some(if word == from { to } else { word }.to_owned()))
        };
        let without_random = with(&|word| match word {
            "virtio-rng-pci" => Some("virtio-keyboard-pci".to_owned()),
            _ => Some(word.to_owned()),
        });
        let program = words[0].clone();
        let no_program = with(&|word| {
            Some(
                if word == program {
                    "qemu-system-nowhere"
                } else {
                    word
                }
                .to_owned(),
            )
        });
        let mut bad_option = unchanged.clone();
        bad_option.push("-no-such-option".into());
        let cases: [(&str, Vec<String>, &[&str]); 6] = [
            (
                "memory",
                instead("96M", "128M"),
                &["memory size differs", "128 MiB there", "pc.ram (96 MiB)"],
            ),
            (
                "machine",
                instead("pc", "q35"),
                &["machine type differs", "pc-i440fx-"],
            ),
            ("program", no_program, &["cannot start qemu-system-nowhere"]),
            ("option", bad_option, &["QEMU does not start", "-no-such-option"]),
            (
                "device",
                without_random,
                &["did not load the checkpoint", "another attempt can be made"],
            ),
            (
                "fence",
                [vec!["--fence".to_owned(), "exit 7".to_owned()], unchanged.clone()].concat(),
                &["--fence 'exit 7' failed"],
            ),
        ];
        for (name, arguments, says) in cases {
            let refused = secondary.receiver.failover_refused(1, &arguments)?;
            println!("{name}: {refused}");
            assert!(refused.contains("still there"), "{name}: {refused}");
            for part in says {
                assert!(
                    refused.contains(part),
                    "{name}: {part:?} is missing in: {refused}"
                );
            }
            let after = secondary.receiver.dump(1, &lab.file("after"))?;
            let content =
                |dump: &colo_ring_tests::lab::Dump| std::fs::read(dump.block("pc.ram").expect("pc.ram"));
            assert!(
                content(&before).expect("a dump") == content(&after).expect("a dump"),
                "{name}: the image has changed"
            );
            assert_eq!(before.device_state()?, after.device_state()?);
        }

        // A guest that runs already is not run over.
        let other = Qemu::start(
            lab,
            "other",
            &Machine::bare("pc", 96, Guest::Test(TestGuest::idle())),
        )?;
        let monitor = other.free_monitor().display().to_string();
        let refused = secondary.receiver.failover_refused(1, ["--qmp", &monitor])?;
        assert!(refused.contains("does not wait for a guest"), "{refused}");

        let report = secondary.receiver.failover(1, &unchanged)?;
        assert_eq!(
            (&report["way"], &report["status"]),
            (&json!("shared"), &json!("running")),
            "{report}"
        );
        let serial = lab.file("fresh-serial.log");
        let tick = lab.tick_in(&before)?;
        wait_until("the guest's ticks", || {
            let text = std::fs::read_to_string(&serial).unwrap_or_default();
            assert!(!text.lines().any(|line| line.starts_with("error")), "{text}");
            text.contains(&format!("tick {} ", tick + 3))
        });
        quit(report["qmp"].as_str().expect("its monitor"))
    });
}

/// A stream on standard output or in a file, and the copy that is kept, start the guest by QEMU's own `-incoming`.
#[test]
fn streams_start_the_guest_anywhere() {
    experiment(|lab| {
        let machine = Machine::bare("pc", 96, Guest::Test(load()));
        let secondary = Secondary::start(lab, 4)?;
        let mut primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 2 ", LIMIT)?;
        secondary.protect(&mut primary)?;
        primary.wait_checkpoints(2, LIMIT)?;
        kill(primary);
        secondary.wait_ended(1)?;
        let tick = lab.tick_in(&secondary.receiver.dump(1, &lab.file("dump"))?)?;
        let [file, kept] = ["stream", "kept"].map(|name| lab.file(name));
        let to_file = format!("file:{}", file.display());
        let kept_name = kept.display().to_string();
        let report = secondary
            .receiver
            .failover(1, ["--to", &to_file, "--keep", &kept_name])?;
        assert_eq!(
            (&report["way"], &report["status"]),
            (&json!("written"), &Value::Null)
        );
        let refused = secondary.receiver.failover_refused(1, ["--to", &to_file])?;
        assert!(
            refused.contains("--retry") && refused.contains("file:"),
            "{refused}"
        );
        let piped = lab.file("piped");
        secondary
            .receiver
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
        check_continues(&resumed, tick)
    });
}

/// A Linux guest that writes and checks files all the while.
#[test]
fn a_linux_guest_lives_on() {
    experiment(|lab| {
        let guest = LinuxGuest {
            touch_kib: 512,
            files: 16,
            pause_ms: 50,
        };
        let kinds = [("pc", 4, Way::Shared), ("q35", 0, Way::Stream)];
        for (run, (machine, channels, way)) in (0..runs()).flat_map(|run| kinds.map(|kind| (run, kind))) {
            let machine = Machine::bare(machine, 256, Guest::Linux(guest.clone()));
            let secondary = Secondary::start(lab, channels)?;
            let mut primary = Qemu::start(lab, &format!("linux-{way:?}{run}"), &machine)?;
            primary.wait_serial("tick 3", Duration::from_secs(120))?;
            secondary.protect(&mut primary)?;
            primary.wait_checkpoints(4, LIMIT)?;
            let standby = secondary.standby(lab, &format!("resumed-{way:?}{run}"), &machine, way, 1)?;
            let ticks = primary.ticks();
            kill(primary);
            secondary.wait_ended(1)?;
            let report = secondary.failover(1, &standby, way)?;
            standby.wait_serial(&format!("tick {}", ticks + 10), LIMIT)?;
            standby.check_guest()?;
            let first = standby.all_ticks()[0];
            println!(
                "{way:?}: {ticks} ticks on the primary, on from {first}: {}",
                report["steps"]
            );
            // No tick is missing; how many come again depends on the age of the checkpoint.
            assert!(first <= ticks + 1, "{ticks} on the primary, {first} at first");
        }
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
        for session in 1..=u64::from(runs().max(3)) {
            let mut primary = Qemu::start(lab, &format!("primary{session}"), &machine)?;
            primary.wait_serial("tick 10 ", LIMIT)?;
            secondary.protect(&mut primary)?;
            primary.wait_checkpoints(3, LIMIT)?;
            let standby =
                secondary.standby(lab, &format!("standby{session}"), &machine, Way::Shared, session)?;
            kill(primary);
            secondary.wait_ended(session)?;
            let (began, serial) = (Instant::now(), lab.file(&format!("standby{session}-serial.log")));
            let first = std::thread::spawn(move || {
                let ticked = || std::fs::read_to_string(&serial).is_ok_and(|text| text.contains("\ntick "));
                wait_until("the first tick", ticked);
                began.elapsed()
            });
            let report = secondary.failover(session, &standby, Way::Shared)?;
            let microseconds = |time: Duration| u64::try_from(time.as_micros()).expect("a short time");
            until_tick.push(microseconds(first.join().expect("the watching thread")));
            let step = |name: &str| report["steps"][name].as_u64().expect("a time") / 1000;
            own.push(step("claim_ns") + step("check_ns") + step("feed_ns"));
            loading.push(step("load_ns"));
            standby.check_guest()?;
        }
        println!("{MEMORY_MIB} MiB on {}", host());
        println!(
            "from the command to the first new tick: {}",
            Distribution::of_us(&until_tick)
        );
        println!("claim, check and feed: {}", Distribution::of_us(&own));
        println!(
            "QEMU's loading after the last byte: {}",
            Distribution::of_us(&loading)
        );
        Ok(())
    });
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < LIMIT, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ends a QEMU that the command has started, and with it its directory.
fn quit(monitor: &str) -> Result<(), LabError> {
    let path = Path::new(monitor);
    Qmp::connect(path, LIMIT)?.execute("quit", &json!({}))?;
    let directory = path.parent().expect("a directory");
    std::fs::remove_dir_all(directory).map_err(|source| LabError::Io {
        what: format!("remove {}", directory.display()),
        source,
    })
}
