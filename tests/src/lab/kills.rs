//! Kills at random instants, of primaries and of receivers, and what must be true of the guests that are resumed then.

use crate::HANG_LIMIT;
use crate::random::generator;
use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use std::fs;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::qmp::Event;
use super::{Compression, Guest, Lab, LabError, Machine, Qemu, Secondary, Way, check_test_guest_image};

const INTERVAL: Duration = Duration::from_millis(300);
/// Over how long the kills in precopy are spread. It lasts longer.
const PRECOPY_SPREAD: Duration = Duration::from_millis(500);
/// Shorter than any transfer: how often the primary's events are looked at.
const GLANCE: Duration = Duration::from_micros(100);

/// How many runs of every kind are made: `COLO_RING_FAILOVER_RUNS`, or 1.
///
/// # Panics
/// When it is no number.
#[must_use]
pub fn failover_runs() -> u32 {
    std::env::var("COLO_RING_FAILOVER_RUNS").map_or(1, |text| text.parse().expect("a number of runs"))
}

/// When something is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Between two checkpoints.
    Idle,
    /// During one.
    MidTransfer,
}

/// What a kill leaves behind.
#[derive(Debug)]
struct LastSeen {
    /// Checkpoints that the primary knew to be received.
    acknowledged: u64,
    /// Whether the guest stood still for another one.
    in_transfer: bool,
    mark: Mark,
}

/// A checkpoint, and what the guest had printed when it was taken.
#[derive(Clone, Copy, Debug)]
struct Mark {
    checkpoint: u64,
    tick: u64,
}

/// A primary under a secondary's protection.
struct Protected {
    primary: Qemu,
    /// How often its guest was let run before.
    resumes_before: usize,
}

/// Kills of guests on one machine, one after the other: each may be of a guest that an earlier one has left.
#[derive(Debug)]
pub struct Kills<'a> {
    lab: &'a Lab,
    machine: &'a Machine,
    random: Xoshiro256PlusPlus,
    resumed: u32,
    /// How its primaries compress pages.
    compression: Option<Compression>,
    /// Whether its primaries send deltas.
    xbzrle: bool,
}

impl<'a> Kills<'a> {
    /// None yet. The instants come from `COLO_RING_FAILOVER_SEED`, or from a new seed, which is printed.
    ///
    /// # Panics
    /// When the seed is no number.
    #[must_use]
    pub fn new(lab: &'a Lab, machine: &'a Machine) -> Self {
        Self {
            lab,
            machine,
            random: generator("COLO_RING_FAILOVER_SEED"),
            resumed: 0,
            compression: None,
            xbzrle: false,
        }
    }

    /// The same of primaries that compress.
    #[must_use]
    pub fn of_compressed(self, compression: Compression) -> Self {
        Self {
            compression: Some(compression),
            ..self
        }
    }

    /// The same of primaries that send deltas (XBZRLE), to a secondary without multifd channels.
    #[must_use]
    pub fn of_xbzrle(self) -> Self {
        Self { xbzrle: true, ..self }
    }

    /// Protects a primary, kills it at a random instant, resumes its guest from the secondary and checks that it goes
    /// on from the last committed checkpoint. Returns the QEMU in which it runs.
    ///
    /// # Errors
    /// When a step fails or the guest finds its memory to be wrong.
    ///
    /// # Panics
    /// When it is not the last committed checkpoint that the guest goes on from.
    pub fn kill_primary(
        &mut self,
        secondary: &Secondary,
        primary: Qemu,
        way: Way,
        moment: Moment,
    ) -> Result<Qemu, LabError> {
        let (session, mut protected) = self.protect(secondary, primary)?;
        let name = self.next_name();
        let standby = secondary.standby(self.lab, &name, self.machine, way, session)?;
        let mark = protected.mark()?;
        self.wait_moment(&mut protected, moment);
        let seen = protected.kill(mark);
        let status = secondary.wait_state(session, "ended")?;
        // A killed primary's last events may be missing.
        let end = status["end"].as_str().unwrap_or_default();
        let in_transfer = seen.in_transfer || end.contains("during a checkpoint");
        let seen = LastSeen { in_transfer, ..seen };
        self.resume(secondary, standby, way, (&status, &seen))
    }

    /// The same, but the receiver is killed, and the guest is resumed from what the next one with its directory finds.
    /// The QEMU that takes the guest over was started before.
    ///
    /// # Errors
    /// As [`Kills::kill_primary`].
    ///
    /// # Panics
    /// As [`Kills::kill_primary`].
    pub fn kill_receiver(
        &mut self,
        secondary: &mut Secondary,
        primary: Qemu,
        way: Way,
        moment: Moment,
    ) -> Result<Qemu, LabError> {
        let (session, mut protected) = self.protect(secondary, primary)?;
        let name = self.next_name();
        let standby = secondary.standby(self.lab, &name, self.machine, way, session)?;
        let mark = protected.mark()?;
        self.wait_moment(&mut protected, moment);
        secondary.kill_and_restart(self.lab)?;
        // It has lost its receiver; whatever it makes of that, it is off before its guest runs elsewhere.
        let seen = protected.kill(mark);
        let status = secondary.session(session)?;
        assert_eq!(status["state"], "recovered", "{status}");
        self.resume(secondary, standby, way, (&status, &seen))
    }

    /// Kills a primary at a random instant of its precopy: nothing can be resumed, and that is said, before and after.
    ///
    /// # Errors
    /// When a step fails, or the failover does not.
    ///
    /// # Panics
    /// When something else is said, or something stays behind.
    pub fn kill_in_precopy(&mut self, secondary: &Secondary, primary: Qemu) -> Result<(), LabError> {
        let files_before = secondary.files();
        let slowly = ["--bandwidth", "1M", "--wait", "0"];
        secondary.protect_by_command(&primary, &slowly)?;
        let session = newest_session(secondary)?;
        secondary.wait_state(session, "precopy")?;
        let nowhere = ["--qmp", "/nonexistent"];
        let refused = secondary.receiver().failover_refused(session, nowhere)?;
        assert!(
            refused.contains("is in precopy: there is nothing to resume"),
            "{refused}"
        );
        let delay = self.below(PRECOPY_SPREAD);
        std::thread::sleep(delay);
        let status = secondary.session(session)?;
        assert_eq!(status["state"], "precopy", "{status}");
        let _ = primary.kill();
        let left = super::wait_for("the receiver to notice", HANG_LIMIT, || {
            let refused = secondary.receiver().failover_refused(session, nowhere)?;
            Ok(Some(refused).filter(|said| !said.contains("is in precopy")))
        })?;
        println!("killed in precopy after {delay:?}: {}", left.trim());
        assert!(left.contains("left no checkpoint"), "{left}");
        assert_eq!(secondary.session(session)?, Value::Null);
        super::wait_for("its files to be removed", HANG_LIMIT, || {
            Ok((secondary.files() == files_before).then_some(()))
        })
    }

    fn next_name(&mut self) -> String {
        self.resumed += 1;
        format!("resumed{}", self.resumed)
    }

    /// A random time below a limit.
    fn below(&mut self, limit: Duration) -> Duration {
        let limit = u64::try_from(limit.as_micros()).expect("a short time").max(1);
        Duration::from_micros(self.random.random_range(0..limit))
    }

    fn protect(&self, secondary: &Secondary, mut primary: Qemu) -> Result<(u64, Protected), LabError> {
        // All that QEMU has said before an answer is there when the answer is.
        primary.qmp().execute("query-status", &json!({}))?;
        let resumes_before = resumes(&primary.qmp().events());
        // For the image's sake: see `Precopy::Stands`.
        primary.stop()?;
        let interval = INTERVAL.as_millis().to_string();
        let mut arguments = vec!["--interval".to_owned(), interval];
        if let Some((method, level)) = self.compression.map(Compression::method_and_level) {
            let compression = ["--compression", method, "--compression-level"];
            arguments.extend(compression.map(str::to_owned));
            arguments.push(level.to_string());
        }
        if self.xbzrle {
            arguments.push("--xbzrle".to_owned());
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let report = secondary.protect_by_command(&primary, &arguments)?;
        assert_eq!(report["status"], "colo", "{report}");
        let protected = Protected {
            primary,
            resumes_before,
        };
        Ok((newest_session(secondary)?, protected))
    }

    fn wait_moment(&mut self, protected: &mut Protected, moment: Moment) {
        match moment {
            Moment::Idle => std::thread::sleep(self.below(INTERVAL)),
            Moment::MidTransfer => {
                let (due_us, pause) = next_pause(&protected.primary.qmp().events());
                let at_us = due_us + u64::try_from(self.below(pause).as_micros()).expect("a short time");
                std::thread::sleep(Duration::from_micros(at_us.saturating_sub(now_us())));
            }
        }
    }

    /// Resumes a session's guest and checks it.
    fn resume(
        &self,
        secondary: &Secondary,
        standby: Qemu,
        way: Way,
        (status, seen): (&Value, &LastSeen),
    ) -> Result<Qemu, LabError> {
        let number = |name: &str| status[name].as_u64().expect("a number");
        let (session, committed) = (number("session"), number("checkpoint"));
        let acknowledged = seen.acknowledged;
        assert!(
            (acknowledged..=acknowledged + 1).contains(&committed),
            "{committed} is kept, {acknowledged} were acknowledged"
        );
        let tick = self.check_image(secondary, session, committed)?;
        seen.mark.check(committed, tick);
        let report = secondary.failover(session, &standby, way)?;
        assert_eq!(report["checkpoint"], committed);
        check_continues(&standby, self.machine, tick)?;
        println!(
            "{} channels, {way:?}, killed {}: checkpoint {committed}, {acknowledged} acknowledged, tick {tick}, \
             {} KiB sent, stream {} µs, load {} µs",
            secondary.channels(),
            if seen.in_transfer { "mid-transfer" } else { "idle" },
            report["stream_bytes"].as_u64().unwrap_or(0) / 1024,
            report["steps"]["restore_ns"].as_u64().unwrap_or(0) / 1000,
            report["steps"]["load_ns"].as_u64().unwrap_or(0) / 1000,
        );
        // The guest's memory belongs to it alone, and one has won.
        assert_eq!(secondary.session(session)?, Value::Null);
        let again = ["--force", "--unfenced", "--retry", "--qmp", "/nonexistent"];
        let refused = secondary.receiver().failover_refused(session, again)?;
        assert!(refused.contains("was promoted"), "{refused}");
        Ok(standby)
    }

    /// The image by itself: its number, its content, its tick.
    fn check_image(&self, secondary: &Secondary, session: u64, committed: u64) -> Result<u64, LabError> {
        let out = self.lab.fresh_file("image", "dump");
        let dump = secondary.receiver().dump(session, &out)?;
        assert_eq!(dump.checkpoint(), committed);
        if let Guest::Test(load) = &self.machine.guest {
            check_test_guest_image(&dump.block("pc.ram")?, load)?;
        }
        let tick = self.lab.tick_in(&dump, &self.machine.guest)?;
        // A failure to remove it costs disk space only.
        let _ = fs::remove_dir_all(&out);
        Ok(tick)
    }
}

impl Protected {
    /// Waits for checkpoints after the first ones, and finds out what the guest had printed at one of them that is
    /// acknowledged now.
    fn mark(&mut self) -> Result<Mark, LabError> {
        let before = self.resumes_before;
        wait_events(&mut self.primary, "two checkpoints", |events| {
            (acknowledged(events, before) >= 2).then_some(())
        })?;
        loop {
            let stop = self.wait_paused()?;
            let (tick, read_at) = (self.primary.ticks(), now_us());
            let (checkpoint, resumed_at) =
                wait_events(&mut self.primary, "the checkpoint's acknowledgement", |events| {
                    let next = events[stop..].iter().position(|event| event.name == "RESUME")?;
                    Some((
                        acknowledged(&events[..=stop + next], before),
                        events[stop + next].at_us,
                    ))
                })?;
            // The guest still stood when its output was read: that is what it had printed at the checkpoint.
            if read_at < resumed_at {
                return Ok(Mark { checkpoint, tick });
            }
        }
    }

    /// Waits until the guest stands still for a checkpoint; returns where in the events.
    fn wait_paused(&mut self) -> Result<usize, LabError> {
        wait_events(&mut self.primary, "a checkpoint to begin", |events| {
            let last = events.iter().rposition(is_step)?;
            (events[last].name == "STOP").then_some(last)
        })
    }

    /// By SIGKILL.
    fn kill(self, mark: Mark) -> LastSeen {
        let Self {
            primary,
            resumes_before,
        } = self;
        let mut events = primary.kill();
        // A guest that runs after that runs alone.
        let alone = events.iter().position(|event| event.name == "COLO_EXIT");
        events.truncate(alone.unwrap_or(events.len()));
        let last = events.iter().rfind(|event| is_step(event));
        LastSeen {
            acknowledged: acknowledged(&events, resumes_before),
            in_transfer: last.is_some_and(|event| event.name == "STOP"),
            mark,
        }
    }
}

impl Mark {
    /// No image is older than what is known, and that of the very checkpoint is of that moment.
    fn check(self, committed: u64, tick: u64) {
        let Self {
            checkpoint,
            tick: printed,
        } = self;
        assert!(
            committed >= checkpoint,
            "{committed} is older than {checkpoint}, which was acknowledged"
        );
        // The guest counts a tick before it prints it.
        let newest = if committed == checkpoint {
            printed + 1
        } else {
            u64::MAX
        };
        assert!(
            (printed..=newest).contains(&tick),
            "checkpoint {committed} has tick {tick}; at checkpoint {checkpoint} tick {printed} was printed"
        );
    }
}

/// A resumed guest goes on from where the checkpoint has it, leaves no tick out, and finds its memory right.
///
/// # Errors
/// When it does not go on, or with its own first error.
///
/// # Panics
/// When it goes on from somewhere else.
pub fn check_continues(resumed: &Qemu, machine: &Machine, tick: u64) -> Result<(), LabError> {
    // Until the Linux guest has read every file that it had before.
    let more = match &machine.guest {
        Guest::Test(_) | Guest::Disk(_) | Guest::Net(_) | Guest::Services(_) => 5,
        Guest::Linux(load) => u64::from(load.files) + 1,
    };
    super::wait_for("the resumed guest's ticks", HANG_LIMIT, || {
        Ok((resumed.ticks() >= tick + more).then_some(()))
    })?;
    resumed.check_guest()?;
    let ticks = resumed.all_ticks();
    // The checkpoint may be of a moment between the counting of a tick and its printing.
    assert!(
        (tick..=tick + 1).contains(&ticks[0]),
        "its first tick is {}, the checkpoint's was {tick}",
        ticks[0]
    );
    assert!(
        ticks.iter().zip(ticks[0]..).all(|(found, next)| *found == next),
        "{ticks:?}"
    );
    Ok(())
}

/// The session that came last.
fn newest_session(secondary: &Secondary) -> Result<u64, LabError> {
    super::wait_for("the primary's session", HANG_LIMIT, || {
        Ok(secondary.receiver().sessions()?.into_iter().max())
    })
}

fn is_step(event: &Event) -> bool {
    matches!(&*event.name, "STOP" | "RESUME")
}

fn resumes(events: &[Event]) -> usize {
    events.iter().filter(|event| event.name == "RESUME").count()
}

/// Checkpoints that are known to be received: after each the guest runs. The first time is the switch-over.
fn acknowledged(events: &[Event], resumes_before: usize) -> u64 {
    let acknowledged = resumes(events).saturating_sub(resumes_before + 1);
    u64::try_from(acknowledged).expect("a count")
}

/// When the next checkpoint should begin, and how long the guest should stand then, by the last ones. The event of its
/// beginning itself comes late: QEMU sends it when it has the time to.
fn next_pause(events: &[Event]) -> (u64, Duration) {
    let mut back = events.iter().rev().skip_while(|event| event.name != "RESUME");
    let mut last = |name: &str| {
        back.find(|event| event.name == name)
            .map_or(0, |event| event.at_us)
    };
    let (resumed, stopped, stopped_before) = (last("RESUME"), last("STOP"), last("STOP"));
    // QEMU's timer runs from one beginning to the next.
    let due = stopped + stopped.saturating_sub(stopped_before);
    (due, Duration::from_micros(resumed.saturating_sub(stopped)))
}

/// Glances at a primary's events until `found` finds something in them.
fn wait_events<T>(
    primary: &mut Qemu,
    what: &str,
    found: impl Fn(&[Event]) -> Option<T>,
) -> Result<T, LabError> {
    let since = Instant::now();
    loop {
        if let Some(found) = found(&primary.qmp().events()) {
            return Ok(found);
        }
        if since.elapsed() > HANG_LIMIT {
            return Err(LabError::Timeout {
                what: what.to_owned(),
                limit: HANG_LIMIT,
            });
        }
        std::thread::sleep(GLANCE);
    }
}

/// The host's clock, as QEMU stamps its events.
fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.expect("a clock").as_micros()).expect("a clock of this age")
}
