//! Guests with a disk that is mirrored to a receiver: killed at random instants, resumed, and memory compared with disk
//! by the guest itself.

use crate::HANG_LIMIT;
use crate::random::generator;
use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::disk_guest::{Disk, DiskBus, DiskContent, DiskGuest, make_image};
use super::{Guest, Lab, LabError, Machine, Qemu, Secondary, Way, wait_for};

const INTERVAL_MS: u64 = 200;
/// How often the guest prints what it has counted.
const TICK_MS: u64 = 100;
/// Passes of the guest's threads over all that they have written, after which it has found memory and disk to agree.
const SWEEPS: u64 = 12;
/// By which the receiver knows whose disk is whose.
const UUID: &str = "5ca1ab1e-c010-4000-8000-000000000001";
/// The receiver's name for the disk.
const EXPORT: &str = "guest-root";

/// How many runs of every kind are made: `COLO_RING_DISK_RUNS`, or 1.
///
/// # Panics
/// When it is no number.
#[must_use]
pub fn disk_runs() -> u32 {
    std::env::var("COLO_RING_DISK_RUNS").map_or(1, |text| text.parse().expect("a number of runs"))
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The primary.
    Primary,
    /// The receiver; the next one with its directories resumes the guest.
    Receiver,
}

/// What a kill has left.
#[derive(Debug)]
pub struct KilledGuest {
    /// The receiver, whose session 1 it was.
    pub secondary: Secondary,
    /// The primary's own disk.
    pub image: PathBuf,
    /// The receiver's.
    pub base: PathBuf,
    /// The last committed checkpoint.
    pub checkpoint: u64,
}

/// Runs of guests with a disk, one after the other.
#[derive(Debug)]
pub struct DiskRuns<'a> {
    lab: &'a Lab,
    bus: DiskBus,
    guest: DiskGuest,
    random: Xoshiro256PlusPlus,
    runs: u32,
}

impl<'a> DiskRuns<'a> {
    /// None yet. The instants come from `COLO_RING_FAILOVER_SEED`, or from a new seed, which is printed.
    ///
    /// # Panics
    /// When the seed is no number.
    #[must_use]
    pub fn new(lab: &'a Lab, bus: DiskBus, content: DiskContent) -> Self {
        Self {
            lab,
            bus,
            guest: DiskGuest {
                content,
                threads: 4,
                slots: 64,
                pause_us: 0,
            },
            random: generator("COLO_RING_FAILOVER_SEED"),
            runs: 0,
        }
    }

    /// The guest's machine with its disk in that file.
    #[must_use]
    pub fn machine(&self, image: &Path) -> Machine {
        Machine {
            uuid: Some(UUID.to_owned()),
            disk: Some(Disk {
                bus: self.bus,
                file: image.to_owned(),
            }),
            ..Machine::bare(self.bus.machine(), 128, Guest::Disk(self.guest))
        }
    }

    /// Protects a guest with its disk, kills `victim` at a random instant, resumes the guest from the receiver's disk, and
    /// has it compare its memory with its disk.
    ///
    /// # Errors
    /// When a step fails, or memory and disk do not agree.
    ///
    /// # Panics
    /// When the receiver reports another disk than the guest's.
    pub fn run(&mut self, victim: Victim) -> Result<(), LabError> {
        let left = match self.kill(victim) {
            // QEMU 11.1.3 did that once in about 150 first copies, with an IDE disk. There was no checkpoint to judge yet.
            Err(crashed @ LabError::QemuCrashed { .. }) => {
                println!("once more: {crashed}");
                self.kill(victim)?
            }
            killed => killed?,
        };
        let resumed = self.resume(&left.secondary, 1, &left.base)?;
        let (sweeps, tick) = (self.sweeps_after(&resumed)?, resumed.ticks());
        println!(
            "{victim:?} killed: checkpoint {}, {sweeps} sweeps, tick {tick}: memory and disk agree",
            left.checkpoint
        );
        self.end_and_check(resumed, &left.base)?;
        left.secondary.remove_disks()
    }

    /// Protects a guest with its disk, and kills `victim` at a random instant.
    ///
    /// # Errors
    /// When a step fails.
    ///
    /// # Panics
    /// When the receiver reports another disk than the guest's.
    pub fn kill(&mut self, victim: Victim) -> Result<KilledGuest, LabError> {
        let mut secondary = Secondary::start_with_disks(self.lab, 2)?;
        let base = secondary.disk(EXPORT);
        make_image(&base)?;
        let image = self.image();
        let mut primary = self.start(&image)?;
        let to = secondary.disk_address();
        let name = format!("disk0={EXPORT}");
        let report = self.protect(&secondary, &mut primary, &["--disk", &name, "--disk-to", &to])?;
        assert_eq!(report["disks"][0]["export"], EXPORT, "{report}");
        self.wait_instant(&mut primary)?;
        let status = match victim {
            Victim::Primary => {
                let _ = primary.kill();
                secondary.wait_state(1, "ended")?
            }
            Victim::Receiver => {
                secondary.kill_and_restart(self.lab)?;
                // It runs on, or stands, without a receiver: it is off before its guest runs elsewhere.
                let _ = primary.kill();
                secondary.wait_state(1, "recovered")?
            }
        };
        assert_eq!(status["disks"][0]["name"], EXPORT, "{status}");
        Ok(KilledGuest {
            secondary,
            image,
            base,
            checkpoint: status["checkpoint"].as_u64().expect("its number"),
        })
    }

    /// The same without its disk: the fresh QEMU has the primary's own image. Returns whether the guest has found its disk
    /// to be of another instant than its memory.
    ///
    /// # Errors
    /// When a step fails.
    pub fn run_unprotected(&mut self) -> Result<bool, LabError> {
        let secondary = Secondary::start(self.lab, 2)?;
        let image = self.image();
        let mut primary = self.start(&image)?;
        let report = self.protect(&secondary, &mut primary, &["--no-disks"])?;
        assert_eq!(report["unprotected_disks"], json!(["disk0"]), "{report}");
        self.wait_instant(&mut primary)?;
        let _ = primary.kill();
        secondary.wait_state(1, "ended")?;
        let resumed = self.resume(&secondary, 1, &image)?;
        match self.sweeps_after(&resumed) {
            Ok(_) => Ok(false),
            // It found something, and is still printing it.
            Err(LabError::Ended { .. }) => {
                let found = wait_for("the guest's own words", HANG_LIMIT, || {
                    let serial = resumed.serial();
                    let mut lines = serial.split_inclusive('\n').filter(|line| line.ends_with('\n'));
                    Ok(lines.find(|line| line.starts_with("error")).map(str::to_owned))
                })?;
                println!("without its disk: {}", found.trim());
                assert!(
                    found.contains("memory has") && found.contains("disk has"),
                    "{found}"
                );
                Ok(true)
            }
            Err(other) => Err(other),
        }
    }

    /// The guest's pauses in so many checkpoints, µs, with its disk mirrored or not. It writes at a rate that does not depend
    /// on that.
    ///
    /// # Errors
    /// When a step fails.
    pub fn pauses_us(&mut self, is_mirrored: bool, checkpoints: usize) -> Result<Vec<u64>, LabError> {
        // 1,000 small writes a second of four threads, or 20 MiB a second.
        self.guest.pause_us = match self.guest.content {
            DiskContent::Sequential => 50_000,
            _ => 4000,
        };
        let secondary = Secondary::start_with_disks(self.lab, 2)?;
        make_image(&secondary.disk(EXPORT))?;
        let image = self.image();
        let mut primary = self.start(&image)?;
        let (to, name) = (secondary.disk_address(), format!("disk0={EXPORT}"));
        let disks = match is_mirrored {
            true => vec!["--disk", &name, "--disk-to", &to],
            false => vec!["--no-disks"],
        };
        self.protect(&secondary, &mut primary, &disks)?;
        primary.wait_checkpoints(checkpoints, HANG_LIMIT)?;
        let pauses = primary.pauses_us();
        primary.check_guest()?;
        drop(primary);
        secondary.remove_disks()?;
        Ok(pauses)
    }

    /// A protected guest loses its receiver, which is killed or stops to answer, and runs on after `colo-ring unprotect`.
    ///
    /// # Errors
    /// When a step fails, or memory and disk do not agree.
    pub fn lose_receiver(&mut self, hangs: bool) -> Result<(), LabError> {
        let mut secondary = Secondary::start_with_disks(self.lab, 2)?;
        make_image(&secondary.disk(EXPORT))?;
        let image = self.image();
        let mut primary = self.start(&image)?;
        let to = secondary.disk_address();
        let name = format!("disk0={EXPORT}");
        self.protect(&secondary, &mut primary, &["--disk", &name, "--disk-to", &to])?;
        self.wait_instant(&mut primary)?;
        if hangs {
            secondary.receiver().freeze()?;
            wait_stalled(&mut primary)?;
        } else {
            secondary.kill_receiver();
        }
        let report = super::unprotect_by_command(primary.free_monitor())?;
        println!("receiver {}: {report}", if hangs { "hangs" } else { "killed" });
        assert_eq!(report["status"], "running", "{report}");
        assert_eq!(report["disks_released"], 1, "{report}");
        self.sweeps_after(&primary)?;
        let nodes = nodes(&mut primary)?;
        assert!(!nodes.iter().any(is_of_mirror), "{nodes:?}");
        // What the guest writes is noted from the first copy on, for the next protection.
        let records = nodes
            .iter()
            .filter_map(|node| node["dirty-bitmaps"][0]["name"].as_str());
        assert_eq!(
            records.collect::<Vec<_>>(),
            [format!("colo-ring {} {EXPORT}", secondary.disk_address())]
        );
        secondary.remove_disks()
    }

    /// A guest is protected again over what its last protection has left, which `colo-ring unprotect` has not ended: mirrors
    /// that stand when the first copy was given up by hand, and those of a receiver that was killed. Then it lives on from
    /// the receiver's disk.
    ///
    /// # Errors
    /// When a step fails, or memory and disk do not agree.
    ///
    /// # Panics
    /// When no mirror stands over the disk after the first copy was given up.
    pub fn protect_over_mirrors(&mut self) -> Result<(), LabError> {
        let mut secondary = Secondary::start_with_disks(self.lab, 2)?;
        let base = secondary.disk(EXPORT);
        make_image(&base)?;
        let image = self.image();
        let mut primary = self.start(&image)?;
        let (to, name) = (secondary.disk_address(), format!("disk0={EXPORT}"));
        let disks = ["--disk", &name, "--disk-to", &to];
        let slowly = [&disks[..], &["--wait", "0", "--bandwidth", "1M"]].concat();
        self.protect(&secondary, &mut primary, &slowly)?;
        // A QEMU that is asked for it before may never answer again; and one whose channels are still connecting may let an old one
        // arrive among those of the next migration.
        wait_migration(&mut primary, &["active"])?;
        secondary.wait_state(1, "precopy")?;
        end_migration(&mut primary, "migrate_cancel")?;
        let left = nodes(&mut primary)?;
        assert!(
            left.iter().any(|node| node["node-name"] == "colo-ring-top0"),
            "{left:?}"
        );
        self.protect(&secondary, &mut primary, &disks)?;
        let session = wait_committed(&secondary)?;

        secondary.kill_and_restart(self.lab)?;
        end_migration(&mut primary, "x-colo-lost-heartbeat")?;
        secondary.receiver().discard(session)?;
        self.sweeps_after(&primary)?;
        self.protect(&secondary, &mut primary, &disks)?;
        let session = wait_committed(&secondary)?;
        let _ = primary.kill();
        secondary.wait_state(session, "ended")?;
        let resumed = self.resume(&secondary, session, &base)?;
        self.sweeps_after(&resumed)?;
        drop(resumed);
        secondary.remove_disks()
    }

    /// A guest that lost its receiver is protected again by copying what has changed on its disk, once while it runs, once
    /// while it stands; then it lives on from the receiver's disk.
    ///
    /// # Errors
    /// When a step fails, or memory and disk do not agree.
    ///
    /// # Panics
    /// When another amount was copied than can have changed.
    pub fn protect_again(&mut self) -> Result<(), LabError> {
        // So many that most of them are not written once more before the primary dies.
        self.guest.slots = 512;
        let written = u64::from(self.guest.threads * self.guest.slots) * 4096;
        let mut secondary = Secondary::start_with_disks(self.lab, 2)?;
        let base = secondary.disk(EXPORT);
        make_image(&base)?;
        let image = self.image();
        let mut primary = self.start(&image)?;
        let (to, name) = (secondary.disk_address(), format!("disk0={EXPORT}"));
        let disks = ["--disk", &name, "--disk-to", &to];
        self.protect(&secondary, &mut primary, &disks)?;
        self.wait_instant(&mut primary)?;
        secondary.kill_and_restart(self.lab)?;
        let changed = [&disks[..], &["--disk-sync", "changed"]].concat();
        for (stands, session) in [(false, 1), (true, 2)] {
            super::unprotect_by_command(primary.free_monitor())?;
            secondary.receiver().discard(session)?;
            self.sweeps_after(&primary)?;
            let report = match stands {
                true => self.protect(&secondary, &mut primary, &changed)?,
                false => secondary.protect_by_command(&primary, &changed)?,
            };
            println!("protected again: {}", report["disk_changes"]);
            let bytes = report["disk_changes"]["bytes"].as_u64().expect("bytes");
            // A record counts in pieces of 64 KiB.
            assert!((written / 2..=2 * written).contains(&bytes), "{report}");
            let stopped = report["disk_changes"]["stopped_ms"].as_u64().expect("time");
            assert_eq!(stopped == 0, stands, "{report}");
            assert_eq!(wait_committed(&secondary)?, session + 1);
        }
        let _ = primary.kill();
        secondary.wait_state(3, "ended")?;
        let resumed = self.resume(&secondary, 3, &base)?;
        self.sweeps_after(&resumed)?;
        drop(resumed);
        secondary.remove_disks()
    }

    fn image(&mut self) -> PathBuf {
        self.runs += 1;
        self.lab.file(&format!("primary{}.raw", self.runs))
    }

    fn start(&self, image: &Path) -> Result<Qemu, LabError> {
        make_image(image)?;
        self.guest.content.make(image)?;
        let primary = Qemu::start(self.lab, &format!("primary{}", self.runs), &self.machine(image))?;
        // Every slot was written, so that all of them can be told apart.
        wait_sweeps(&primary, u64::from(self.guest.threads))?;
        Ok(primary)
    }

    /// The guest stands during the first copy: with TCG, QEMU may miss pages that it dirties meanwhile.
    fn protect(
        &self,
        secondary: &Secondary,
        primary: &mut Qemu,
        arguments: &[&str],
    ) -> Result<Value, LabError> {
        primary.stop()?;
        let interval = INTERVAL_MS.to_string();
        let all = [&["--interval", &interval], arguments].concat();
        let protected = secondary.protect_by_command(primary, &all);
        protected.map_err(|error| primary.crash().unwrap_or(error))
    }

    fn wait_instant(&mut self, primary: &mut Qemu) -> Result<(), LabError> {
        primary.wait_checkpoints(3, HANG_LIMIT)?;
        let delay_us = self.random.random_range(0..4 * INTERVAL_MS * 1000);
        std::thread::sleep(Duration::from_micros(delay_us));
        Ok(())
    }

    fn resume(&self, secondary: &Secondary, session: u64, image: &Path) -> Result<Qemu, LabError> {
        let name = format!("resumed{}", self.runs);
        let way = if self.runs.is_multiple_of(2) {
            Way::Stream
        } else {
            Way::Shared
        };
        let standby = secondary.standby(self.lab, &name, &self.machine(image), way, session)?;
        let monitor = standby.free_monitor().display().to_string();
        let stream = (way == Way::Stream).then_some("--stream");
        let arguments = ["--qmp", &monitor].into_iter().chain(stream);
        secondary.receiver().failover(session, arguments)?;
        Ok(standby)
    }

    /// Waits until all of the disk was compared with memory several times from now on. Returns how often it was in all.
    ///
    /// # Errors
    /// When the guest finds that they do not agree.
    pub fn sweeps_after(&self, guest: &Qemu) -> Result<u64, LabError> {
        let first = wait_for("the guest's ticks", HANG_LIMIT, || {
            guest.check_guest()?;
            Ok(sweeps(&guest.serial()))
        })?;
        wait_sweeps(guest, first + SWEEPS)
    }

    /// Has the guest unmount its file system, and checks that.
    fn end_and_check(&self, guest: Qemu, image: &Path) -> Result<(), LabError> {
        if self.guest.content == DiskContent::Raw {
            return Ok(());
        }
        guest.send_serial(b"stop\n")?;
        guest.wait_serial("unmounted", HANG_LIMIT)?;
        guest.check_guest()?;
        drop(guest);
        self.guest.content.check(image)
    }
}

fn wait_sweeps(guest: &Qemu, count: u64) -> Result<u64, LabError> {
    wait_for(
        "the guest to compare its disk with its memory",
        HANG_LIMIT,
        || {
            guest.check_guest()?;
            Ok(sweeps(&guest.serial()).filter(|sweeps| *sweeps >= count))
        },
    )
}

/// Ends a migration or COLO by that command, and waits until it is over.
fn end_migration(primary: &mut Qemu, command: &str) -> Result<(), LabError> {
    match primary.qmp().execute(command, &json!({})) {
        Ok(_) => {}
        // It may have ended by itself.
        Err(error) if error.refusal().is_some() => {}
        Err(error) => return Err(error.into()),
    }
    wait_migration(primary, &["cancelled", "completed", "failed"])
}

/// Waits until a QEMU's migration is in one of these states.
fn wait_migration(primary: &mut Qemu, states: &[&str]) -> Result<(), LabError> {
    wait_for(&format!("a migration that is {states:?}"), HANG_LIMIT, || {
        let state = primary.qmp().execute("query-migrate", &json!({}))?;
        let is_there = states.iter().any(|wanted| state["status"] == *wanted);
        Ok(is_there.then_some(()))
    })
}

/// Waits for some checkpoints of the last session; returns its number. The primary's own events have the end of an earlier one.
fn wait_committed(secondary: &Secondary) -> Result<u64, LabError> {
    wait_for("checkpoints", HANG_LIMIT, || {
        let last = secondary.receiver().sessions()?.last().copied();
        let Some(last) = last else { return Ok(None) };
        let committed = secondary.session(last)?["checkpoint"].as_u64();
        Ok(committed.filter(|checkpoint| *checkpoint >= 3).map(|_| last))
    })
}

/// Waits until a receiver that does not answer has its effect: the guest stands still for a checkpoint, or its writes wait.
fn wait_stalled(guest: &mut Qemu) -> Result<(), LabError> {
    wait_for("the guest to wait for its receiver", HANG_LIMIT, || {
        Ok((guest.is_paused() || has_stalled(&guest.serial())).then_some(()))
    })
}

/// All block nodes of a QEMU.
fn nodes(guest: &mut Qemu) -> Result<Vec<Value>, LabError> {
    let listed = guest
        .qmp()
        .execute("query-named-block-nodes", &json!({"flat": true}))?;
    Ok(listed.as_array().expect("a list").clone())
}

fn is_of_mirror(node: &Value) -> bool {
    let name = node["node-name"].as_str();
    name.is_some_and(|name| name.starts_with("colo-ring"))
}

/// The guest's whole tick lines, the last one first.
fn ticks(serial: &str) -> impl Iterator<Item = &str> {
    let complete = &serial[..serial.rfind('\n').unwrap_or(0)];
    complete.lines().rev().filter(|line| line.starts_with("tick "))
}

/// The number at the end of the guest's last tick line.
fn sweeps(serial: &str) -> Option<u64> {
    ticks(serial).next()?.trim_end().rsplit(' ').next()?.parse().ok()
}

/// Whether the guest has counted no write for longer than from one checkpoint to the next, by its own clock.
fn has_stalled(serial: &str) -> bool {
    let lines = INTERVAL_MS / TICK_MS + 2;
    let writes = |line: &str| line.split(' ').nth(3).map(str::to_owned);
    let mut last = (0..lines).zip(ticks(serial)).map(|(_, line)| writes(line));
    let newest = last.next().flatten();
    newest.is_some() && last.filter(|writes| *writes == newest).count() as u64 == lines - 1
}

#[cfg(test)]
mod tests {
    use super::{has_stalled, sweeps};

    #[test]
    fn sweeps_are_read_from_whole_lines() {
        let serial =
            "ready /dev/vda raw\ntick 1 writes 20 sweeps 3\r\ntick 2 writes 40 sweeps 11\r\ntick 3 wri";
        assert_eq!(sweeps(serial), Some(11));
        assert_eq!(sweeps("tick 1 writes 20 sweeps 3"), None);
    }

    #[test]
    fn writes_that_are_not_counted_any_more_have_stalled() {
        let serial = |writes: [u32; 5]| -> String {
            let line = |(tick, writes): (usize, u32)| format!("tick {tick} writes {writes} sweeps 1\r\n");
            writes.into_iter().enumerate().map(line).collect()
        };
        assert!(has_stalled(&serial([7, 8, 8, 8, 8])));
        assert!(!has_stalled(&serial([7, 7, 8, 8, 8])));
        assert!(!has_stalled("tick 1 writes 8 sweeps 1\n"));
    }
}
