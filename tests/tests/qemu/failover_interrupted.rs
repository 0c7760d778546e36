//! Ctrl-C in a running `colo-ring failover`, whatever it is doing: either the guest runs in the fresh QEMU, or its checkpoint
//! is as it was and another attempt succeeds.
//!
//! `COLO_RING_FAILOVER_RUNS` makes the sweep over the command's duration so many times as fine.

use colo_ring_tests::HANG_LIMIT;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use colo_ring_tests::lab::{
    Dump, Guest, Lab, LabError, Machine, Qemu, Secondary, TestGuest, Way, check_continues, experiment,
    failover_runs, wait_for,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const INTERVAL_MS: u32 = 100;

/// Into which QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// The command starts it.
    Own,
    /// It waits already.
    Standby,
}

/// A checkpoint whose primary is gone.
struct Offer {
    session: u64,
    dump: Dump,
    tick: u64,
}

/// One attempt after the other.
struct Sweep<'a> {
    lab: &'a Lab,
    machine: Machine,
    secondary: Secondary,
    target: Target,
    way: Way,
    primaries: u32,
    attempts: u32,
    temporary: PathBuf,
}

/// A QEMU that the command has started.
struct Running {
    pid: Pid,
    directory: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended where the test has passed.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl<'a> Sweep<'a> {
    fn new(lab: &'a Lab, target: Target, way: Way) -> Result<Self, LabError> {
        let load = TestGuest {
            interrupts_per_tick: 1,
            ..TestGuest::random(5_000, 48)
        };
        let temporary = lab.file("t");
        std::fs::create_dir(&temporary).expect("a directory");
        Ok(Self {
            lab,
            machine: Machine::bare("pc", 96, Guest::Test(load)),
            secondary: Secondary::start(lab, 4)?,
            target,
            way,
            primaries: 0,
            attempts: 0,
            temporary,
        })
    }

    /// Protects a new guest and kills its primary.
    fn offer(&mut self) -> Result<Offer, LabError> {
        self.primaries += 1;
        let session = u64::from(self.primaries);
        let mut primary = Qemu::start(self.lab, &format!("primary{session}"), &self.machine)?;
        primary.wait_serial("tick 2 ", HANG_LIMIT)?;
        self.secondary.protect(&mut primary, INTERVAL_MS)?;
        primary.wait_checkpoints(2, HANG_LIMIT)?;
        drop(primary);
        self.secondary.wait_state(session, "ended")?;
        let dump = self
            .secondary
            .receiver()
            .dump(session, &self.lab.file(&format!("before{session}")))?;
        let tick = self.lab.tick_in(&dump, &self.machine.guest)?;
        Ok(Offer { session, dump, tick })
    }

    /// An attempt, interrupted so long after its start, or not. Returns the report if the guest runs, and the offer if it is
    /// still there.
    fn attempt(&mut self, offer: Offer, after: Option<Duration>) -> Result<Result<Value, Offer>, LabError> {
        self.attempts += 1;
        let name = format!("fresh{}", self.attempts);
        let standby = match self.target {
            Target::Own => None,
            Target::Standby => {
                Some(
                    self.secondary
                        .standby(self.lab, &name, &self.machine, self.way, offer.session)?,
                )
            }
        };
        let mut arguments = Vec::new();
        if self.way == Way::Stream {
            arguments.push("--stream".to_owned());
        }
        if !self.secondary.session(offer.session)?["promotion"].is_null() {
            arguments.push("--retry".to_owned());
        }
        match &standby {
            None => {
                arguments.push("--".to_owned());
                arguments.extend(Qemu::command_line(self.lab, &name, &self.machine, None));
            }
            Some(qemu) => arguments.extend(["--qmp".to_owned(), qemu.free_monitor().display().to_string()]),
        }
        let receiver = self.secondary.receiver();
        let ended = match after {
            None => Ok(receiver.failover(offer.session, &arguments)?),
            Some(after) => {
                receiver.failover_interrupted(offer.session, &arguments, after, &self.temporary)?
            }
        };
        match ended {
            Ok(report) => {
                let words = report["steps"]["total_ns"].as_u64().unwrap_or(0) / 1000;
                println!(
                    "{:?} {:?}, {after:?}: it runs, after {words} µs",
                    self.target, self.way
                );
                self.check_runs(&report, &offer, standby.as_ref(), &name)?;
                Ok(Ok(report))
            }
            Err(said) => {
                drop(standby);
                let stands = self.check_offered(&offer, &name)?;
                println!(
                    "{:?} {:?}, {after:?}: {}; {stands}",
                    self.target,
                    self.way,
                    said.trim()
                );
                Ok(Err(offer))
            }
        }
    }

    /// The guest goes on, and nothing of it is left here.
    fn check_runs(
        &self,
        report: &Value,
        offer: &Offer,
        standby: Option<&Qemu>,
        name: &str,
    ) -> Result<(), LabError> {
        let own = report["pid"].as_i64().map(|pid| Running {
            pid: Pid::from_raw(i32::try_from(pid).expect("process ids are below 2^22 on Linux")),
            directory: Path::new(report["qmp"].as_str().expect("its monitor"))
                .parent()
                .expect("a directory")
                .to_owned(),
        });
        assert_eq!(
            (&report["status"], &report["way"]),
            (&json!("running"), &json!(self.way.name())),
            "{report}"
        );
        assert_eq!(self.secondary.session(offer.session)?, Value::Null);
        if let Some(standby) = standby {
            return check_continues(standby, &self.machine, offer.tick);
        }
        let serial = self.lab.file(&format!("{name}-serial.log"));
        let (first, later) = (offer.tick, offer.tick + 5);
        wait_for("the guest's ticks", HANG_LIMIT, || {
            let text = std::fs::read_to_string(&serial).unwrap_or_default();
            assert!(!text.lines().any(|line| line.starts_with("error")), "{text}");
            Ok(text.contains(&format!("tick {later} ")).then(|| {
                let begins = text.lines().find(|line| line.starts_with("tick "));
                let from = [first, first + 1].map(|tick| format!("tick {tick} "));
                let begins = begins.expect("a tick");
                assert!(
                    from.iter().any(|tick| begins.starts_with(tick)),
                    "{begins}, not {from:?}"
                );
            }))
        })?;
        let own = own.expect("its process");
        kill(own.pid, Signal::SIGTERM).expect("its process");
        self.wait_gone(name)
    }

    /// No QEMU is left, and the checkpoint is as it was. Returns what the receiver says of it.
    fn check_offered(&self, offer: &Offer, name: &str) -> Result<String, LabError> {
        self.wait_gone(name)?;
        let left = std::fs::read_dir(&self.temporary).expect("its directory").count();
        assert_eq!(left, 0, "temporary files are left");
        // The receiver may still be at work for a client that is gone.
        let status = wait_for("the failover to be over", HANG_LIMIT, || {
            let status = self.secondary.session(offer.session)?;
            let words = status["promotion"].as_str().unwrap_or_default();
            let is_over = !words.contains("under way") && !words.contains("is loading it");
            Ok(is_over.then_some(status))
        })?;
        assert_eq!(status["state"], "ended", "{status}");
        let out = self.lab.file("after");
        let promotion = status["promotion"].as_str().unwrap_or("untouched").to_owned();
        let after = self.secondary.receiver().dump(offer.session, &out)?;
        let ram = |dump: &Dump| std::fs::read(dump.block("pc.ram").expect("pc.ram")).expect("a dump");
        assert!(ram(&offer.dump) == ram(&after), "the image has changed: {status}");
        assert_eq!(offer.dump.device_state()?, after.device_state()?);
        std::fs::remove_dir_all(&out).expect("the dump");
        Ok(promotion)
    }

    /// Waits until no process has that QEMU's serial port open.
    fn wait_gone(&self, name: &str) -> Result<(), LabError> {
        let socket = self.lab.file(&format!("{name}.serial"));
        wait_for(&format!("the QEMU {name} to end"), HANG_LIMIT, || {
            Ok(UnixStream::connect(&socket).is_err().then_some(()))
        })
    }

    /// Over the whole duration of the command, finer where it gives the checkpoint away.
    fn run(&mut self, early: u32, late: u32) -> Result<(), LabError> {
        let offer = self.offer()?;
        let whole = self.attempt(offer, None)?.ok().expect("it was not interrupted");
        let of = |step: &str| Duration::from_nanos(whole["steps"][step].as_u64().expect("a time"));
        let took = of("total_ns") + of("give_up_ns");
        let give = took.saturating_sub(of("restore_ns") + of("load_ns") + of("give_up_ns"));
        let (early, late) = (early * failover_runs(), late * failover_runs());
        let instants = (0..early).map(|n| give * n / early);
        // Its own start takes a little, too, and is not in its report.
        let (from, to) = (give, took + Duration::from_millis(20));
        let tail = (0..late).map(|n| from + (to - from) * n / late);
        let (mut offer, mut ran) = (None, 0);
        for after in instants.chain(tail).collect::<Vec<_>>() {
            let there = offer.take().map_or_else(|| self.offer(), Ok)?;
            match self.attempt(there, Some(after))? {
                Ok(_) => ran += 1,
                Err(left) => offer = Some(left),
            }
        }
        // On a busy machine a command may have ended before its signal comes: again, until enough were interrupted.
        let mut interrupted = early + late - ran;
        for _ in 0..100 {
            if interrupted >= early {
                break;
            }
            let there = offer.take().map_or_else(|| self.offer(), Ok)?;
            if let Err(left) = self.attempt(there, Some(Duration::ZERO))? {
                offer = Some(left);
                interrupted += 1;
            }
        }
        if let Some(left) = offer {
            let again = self.attempt(left, None)?;
            assert!(again.is_ok(), "it was not interrupted");
        }
        println!(
            "{:?} {:?}: took {took:?}, gives after {give:?}; {interrupted} interrupted, {ran} ran",
            self.target, self.way
        );
        assert!(interrupted >= early, "{interrupted} were interrupted");
        assert_eq!(self.secondary.files(), 0, "images are given up");
        Ok(())
    }
}

#[test]
fn the_start_of_a_qemu_on_the_image() {
    experiment(|lab| Sweep::new(lab, Target::Own, Way::Shared)?.run(2, 6));
}

#[test]
fn the_start_of_a_qemu_with_a_stream() {
    experiment(|lab| Sweep::new(lab, Target::Own, Way::Stream)?.run(1, 3));
}

#[test]
fn a_standby_that_takes_over() {
    experiment(|lab| Sweep::new(lab, Target::Standby, Way::Shared)?.run(1, 3));
}
