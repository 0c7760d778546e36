//! Memory and disk are of one instant after a failover: guests with a disk on every controller are killed at random
//! instants, and so are receivers. The guest itself compares, block by block, and its file systems are checked.
//!
//! `COLO_RING_DISK_RUNS` makes more runs of every kind (otherwise one primary each is killed, and a receiver where the name
//! says so), `COLO_RING_FAILOVER_SEED` kills at the instants of an
//! earlier run. `COLO_RING_DISK_PAUSES` measures the pauses of so many checkpoints in each of four series (10 otherwise).

use colo_ring_tests::lab::{
    Company, DiskBus, DiskContent, DiskRuns, Distribution, Qemu, Victim, disk_experiment, disk_runs,
};
use serde_json::json;
use std::fs;

fn agree(bus: DiskBus, content: DiskContent) {
    agree_after(bus, content, disk_runs(), disk_runs() / 3);
}

fn agree_after(bus: DiskBus, content: DiskContent, primaries: u32, receivers: u32) {
    disk_experiment(Company::Others, |lab| {
        let mut runs = DiskRuns::new(lab, bus, content);
        for _ in 0..primaries {
            runs.run(Victim::Primary)?;
        }
        for _ in 0..receivers {
            runs.run(Victim::Receiver)?;
        }
        Ok(())
    });
}

#[test]
fn virtio_blk_agrees_with_memory_after_the_receiver_was_killed() {
    agree_after(DiskBus::VirtioBlk, DiskContent::Raw, 0, disk_runs());
}

#[test]
fn ext4_is_clean_after_the_receiver_was_killed() {
    agree_after(DiskBus::VirtioBlk, DiskContent::Ext4, 0, disk_runs());
}

#[test]
fn virtio_blk_agrees_with_memory() {
    agree(DiskBus::VirtioBlk, DiskContent::Raw);
}

#[test]
fn virtio_scsi_agrees_with_memory() {
    agree(DiskBus::VirtioScsi, DiskContent::Raw);
}

#[test]
fn ahci_agrees_with_memory() {
    agree(DiskBus::Ahci, DiskContent::Raw);
}

#[test]
fn ide_agrees_with_memory() {
    agree(DiskBus::Ide, DiskContent::Raw);
}

#[test]
fn nvme_agrees_with_memory() {
    agree(DiskBus::Nvme, DiskContent::Raw);
}

#[test]
fn ext4_agrees_with_memory_and_is_clean() {
    agree(DiskBus::VirtioBlk, DiskContent::Ext4);
}

#[test]
fn xfs_agrees_with_memory_and_is_clean() {
    agree(DiskBus::VirtioBlk, DiskContent::Xfs);
}

#[test]
fn databases_have_what_they_acknowledged() {
    agree_after(
        DiskBus::VirtioBlk,
        DiskContent::Sqlite,
        disk_runs(),
        disk_runs() / 3,
    );
}

/// The reason for all this: the primary's own disk is ahead of the memory that is kept.
#[test]
fn an_unprotected_disk_is_ahead_of_memory() {
    // The kill may fall into the moment after a checkpoint, before the guest has written.
    const ATTEMPTS: u32 = 5;
    disk_experiment(Company::Others, |lab| {
        let mut runs = DiskRuns::new(lab, DiskBus::VirtioBlk, DiskContent::Raw);
        for _ in 0..ATTEMPTS {
            if runs.run_unprotected()? {
                return Ok(());
            }
        }
        panic!("the guest has found its disk to agree with its memory {ATTEMPTS} times");
    });
}

#[test]
fn a_guest_that_loses_its_receiver_runs_on() {
    disk_experiment(Company::Others, |lab| {
        let mut runs = DiskRuns::new(lab, DiskBus::VirtioBlk, DiskContent::Raw);
        runs.lose_receiver(false)?;
        runs.lose_receiver(true)
    });
}

#[test]
fn a_guest_is_protected_again_over_mirrors_that_were_left() {
    disk_experiment(Company::Others, |lab| {
        DiskRuns::new(lab, DiskBus::VirtioBlk, DiskContent::Raw).protect_over_mirrors()
    });
}

#[test]
fn a_guest_is_protected_again_by_copying_what_has_changed() {
    disk_experiment(Company::Others, |lab| {
        DiskRuns::new(lab, DiskBus::VirtioBlk, DiskContent::Raw).protect_again()
    });
}

/// A fresh QEMU must use the checkpoint's disk; what it needs for that is printed; a copy that is kept starts the guest, too.
#[test]
fn a_failover_checks_the_disk_and_keeps_a_copy() {
    disk_experiment(Company::Others, |lab| {
        let mut runs = DiskRuns::new(lab, DiskBus::VirtioBlk, DiskContent::Raw);
        let left = runs.kill(Victim::Primary)?;
        let receiver = left.secondary.receiver();
        let line = |name: &str, image| {
            let words = Qemu::command_line(lab, name, &runs.machine(image), None);
            ["--".to_owned()].into_iter().chain(words).collect::<Vec<_>>()
        };
        let refused = receiver.failover_refused(1, line("wrong", &left.image))?;
        assert!(
            refused.contains("does not use") && refused.contains("still there"),
            "{refused}"
        );
        let printed = receiver.failover(1, ["--print-blockdev"])?;
        let base = left.base.display().to_string();
        let word = printed["arguments"][1].as_str().expect("a text");
        assert!(word.ends_with(&format!("file.filename={base}")), "{printed}");

        let kept = lab.file("kept");
        let keep = ["--keep".to_owned(), kept.display().to_string()];
        let report = receiver.failover(1, keep.into_iter().chain(line("right", &left.base)))?;
        let disk = &report["disks"][0];
        assert_eq!(
            (&disk["epoch"], &disk["drained"]),
            (&json!(left.checkpoint), &json!(true)),
            "{report}"
        );
        let monitor = report["qmp"].as_str().expect("its monitor");
        let mut resumed = colo_ring_tests::lab::Qmp::connect(monitor.as_ref(), colo_ring_tests::HANG_LIMIT)?;
        resumed.execute("quit", &json!({}))?;

        let copy = lab.file("kept.guest-root.raw");
        assert_eq!(
            fs::metadata(&copy).expect("the copy").len(),
            fs::metadata(&left.base).expect("the base").len()
        );
        let mut again = Qemu::start_incoming(lab, "again", &runs.machine(&copy))?;
        let uri = format!("file:{}", kept.display());
        again.qmp().execute("migrate-incoming", &json!({"uri": uri}))?;
        again.wait_loaded()?;
        again.qmp().execute("cont", &json!({}))?;
        runs.sweeps_after(&again)?;
        left.secondary.remove_disks()
    });
}

/// What the mirror costs the pause of a guest that writes: series with and without it, in turn.
#[test]
fn pauses_with_and_without_the_mirror() {
    let asked = std::env::var("COLO_RING_DISK_PAUSES").ok();
    let checkpoints = asked.as_ref().map_or(10, |text| text.parse().expect("a number"));
    // In a sample one load, once with the mirror and once without, shows that it works.
    let (loads, rounds): (&[_], _) = match asked {
        Some(_) => (&[DiskContent::Random, DiskContent::Sequential], 4),
        None => (&[DiskContent::Random], 1),
    };
    for load in loads {
        disk_experiment(Company::Nobody, |lab| {
            let mut runs = DiskRuns::new(lab, DiskBus::VirtioBlk, *load);
            let [mut with, mut without] = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                with.extend(runs.pauses_us(true, checkpoints)?);
                without.extend(runs.pauses_us(false, checkpoints)?);
            }
            let [with, without] = [with, without].map(|pauses| Distribution::of_us(&pauses));
            println!("{load:?}, with the disk mirrored: {with}");
            println!("{load:?}, without:                {without}");
            for percent in [50, 99] {
                let ratio = with.percentile_ms(percent) / without.percentile_ms(percent);
                println!("{load:?}, p{percent}: {ratio:.2} times");
            }
            Ok(())
        });
    }
}
