//! The laboratory itself: its guests do what they are asked, and QEMU's own secondary can be put under COLO.

use colo_ring_tests::HANG_LIMIT;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use colo_ring_tests::lab::{
    Address, Content, Guest, LabError, LinuxGuest, Machine, Pattern, Protection, Qemu, TestGuest, Transport,
    check_test_guest_image, experiment, experiment_alone,
};

/// "tick N pages W checked C" → (W, C)
fn last_counters(qemu: &Qemu) -> Option<(u64, u64)> {
    let serial = qemu.serial();
    let complete = &serial[..serial.rfind('\n')?];
    let words: Vec<&str> = complete
        .lines()
        .rev()
        .find(|line| line.starts_with("tick "))?
        .split_whitespace()
        .collect();
    Some((words.get(3)?.parse().ok()?, words.get(5)?.parse().ok()?))
}

#[test]
fn test_guest_writes_at_the_rate_asked_for_and_finds_its_pages_right() {
    experiment_alone(|lab| {
        for (number, (machine, pattern, content)) in [
            ("pc", Pattern::Random, Content::Incompressible),
            ("q35", Pattern::Runs(16), Content::Compressible),
            ("pc", Pattern::Sequential, Content::Incompressible),
        ]
        .into_iter()
        .enumerate()
        {
            let guest = TestGuest {
                pattern,
                content,
                ..TestGuest::random(2000, 32)
            };
            let qemu = Qemu::start(
                lab,
                &format!("guest{number}"),
                &Machine::bare(machine, 64, Guest::Test(guest)),
            )?;
            assert_eq!(
                qemu.wait_serial("ready", HANG_LIMIT)?.trim(),
                "ready 8192",
                "pages of 32 MiB"
            );
            qemu.wait_serial("tick 20 ", HANG_LIMIT)?;
            qemu.check_guest()?;
            let (written, checked) = last_counters(&qemu).expect("a tick line has both counters");
            // A tick is 100 ms of guest time, so 200 pages; interrupts may be lost on a busy host, never invented.
            let due = qemu.ticks() * 200;
            assert!(
                written * 10 >= due * 9 && written <= due + 200,
                "{written} pages written, {due} are due"
            );
            assert!(checked > 0, "no page was checked");
        }
        Ok(())
    })
}

#[test]
fn test_guest_notices_spoiled_pages() {
    experiment(|lab| {
        let guest = TestGuest {
            fill: true,
            ..TestGuest::idle()
        };
        let qemu = Qemu::start(lab, "spoiled", &Machine::bare("pc", 128, Guest::Test(guest)))?;
        qemu.wait_serial("tick 2 ", HANG_LIMIT)?;
        qemu.check_guest()?;
        qemu.send_serial(b"x")?;
        qemu.wait_serial("error page ", HANG_LIMIT)?;
        qemu.check_guest()
            .expect_err("an inconsistent guest must be reported");
        qemu.send_serial(b"q")?;
        qemu.wait_serial("quiet", HANG_LIMIT).map(|_| ())
    })
}

#[test]
fn test_guest_refuses_a_region_that_it_does_not_have() {
    experiment(|lab| {
        let machine = Machine::bare("pc", 64, Guest::Test(TestGuest::random(1000, 64)));
        let qemu = Qemu::start(lab, "small", &machine)?;
        qemu.wait_serial("error: mib", HANG_LIMIT).map(|_| ())
    })
}

#[test]
fn linux_guest_boots_and_ticks() {
    experiment(|lab| {
        let guest = LinuxGuest {
            touch_kib: 256,
            files: 4,
            pause_ms: 50,
        };
        let qemu = Qemu::start(lab, "linux", &Machine::bare("pc", 256, Guest::Linux(guest)))?;
        qemu.wait_serial("tick 10", HANG_LIMIT)?;
        qemu.check_guest()
    })
}

#[test]
fn qemu_protects_itself_with_its_own_secondary() {
    experiment(|lab| {
        let load = TestGuest {
            fill: true,
            ..TestGuest::random(5000, 64)
        };
        let machine = Machine::bare("pc", 128, Guest::Test(load.clone()));
        let address = Address::free(lab, Transport::Unix)?;
        let mut secondary = Qemu::start_incoming(lab, "secondary", &machine)?;
        secondary.be_secondary(&address, 4)?;
        let mut primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 2 ", HANG_LIMIT)?;
        primary.protect(&address, &Protection::every_ms(200, 4))?;
        primary.wait_checkpoints(5, HANG_LIMIT)?;
        assert!(primary.pauses_us().len() >= 5);

        // What `commit_stopped` promises: one more checkpoint took the RAM that was saved, and the guest runs again.
        let checkpoints = primary.checkpoints()?;
        let file = lab.file("saved.ram");
        let saved = primary.commit_stopped(&file)?;
        assert!(primary.checkpoints()? > checkpoints);
        let ticks = primary.ticks();
        primary.wait_serial(&format!("tick {} ", ticks + 5), HANG_LIMIT)?;
        primary.check_guest()?;
        secondary.check_guest()?;

        // And that the comparisons can fail: the guest has run on.
        let later = lab.file("later.ram");
        primary.save_ram(&later)?;
        saved.assert_equal(&file)?;
        assert!(matches!(
            saved.assert_equal(&later),
            Err(LabError::RamDiffers { pages: 100.., .. })
        ));
        check_test_guest_image(&file, &load)?;
        spoil_pages(&file, &[0x0100_0000, 0x0200_0000]);
        assert!(matches!(
            check_test_guest_image(&file, &load),
            Err(LabError::RamDiffers { pages: 2, .. })
        ));
        assert!(matches!(
            saved.assert_equal(&later),
            Err(LabError::RamDiffers { .. })
        ));
        Ok(())
    })
}

fn spoil_pages(file: &Path, offsets: &[u64]) {
    let file = File::options()
        .write(true)
        .open(file)
        .expect("the file was written before");
    for offset in offsets {
        file.write_all_at(b"spoiled", offset + 100)
            .expect("it is that large");
    }
}
