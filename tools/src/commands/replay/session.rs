//! The sessions of a replay, one after the other, and what is measured in them.

use super::Pace;
use super::pace::Pacer;
use super::player::{PlayOptions, Player, Timing};
use super::sender::SenderCpu;
use super::usage::{Secondary, Watch};
use crate::output::ProgressLine;
use crate::primary::SynthError;
use crate::streams::{Changed, Streams};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Everything that sessions are played by.
pub(super) struct Sessions<'a> {
    pub streams: &'a Streams,
    /// How the capture's checkpoints differ when they come again in the same session.
    pub again: Option<&'a Changed>,
    pub options: PlayOptions,
    pub pace: Pace,
    /// Checkpoints of each session.
    pub wanted: u64,
    pub secondary: Option<Secondary>,
    /// Set when the replay shall end after the checkpoint that is being taken.
    pub stop: &'a AtomicBool,
    pub line: ProgressLine,
    pub measured: Measured,
}

/// What was measured.
#[derive(Debug)]
pub(super) struct Measured {
    pub started: SystemTime,
    pub since: Instant,
    pub sessions: u32,
    pub checkpoints: Vec<MeasuredCheckpoint>,
    pub senders: SenderCpu,
}

#[derive(Debug)]
pub(super) struct MeasuredCheckpoint {
    /// The session, from 0, and the number in it, from 1.
    pub session: u32,
    pub n: u64,
    /// When it ended, since the first session began.
    pub at: Duration,
    pub timing: Timing,
    pub disturbed: Option<String>,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            started: SystemTime::now(),
            since: Instant::now(),
            sessions: 0,
            checkpoints: Vec::new(),
            senders: SenderCpu::default(),
        }
    }
}

impl Sessions<'_> {
    /// Plays a session.
    pub fn play(&mut self, session: u32) -> Result<(), SynthError> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (streams, again, options) = (self.streams, self.again, self.options.clone());
        std::thread::scope(|scope| {
            self.line.show(&format!("session {}: precopy", session + 1));
            let mut player = Player::connect(scope, streams, again, &options)?;
            let played = player.precopy(self.pace == Pace::Original).and_then(|()| {
                self.secondary.iter_mut().for_each(Secondary::begin);
                let taken = self.take_all(session, &mut player);
                self.secondary.iter_mut().for_each(Secondary::end);
                taken
            });
            let used = player.close();
            self.measured.senders.user += used.user;
            self.measured.senders.system += used.system;
            self.measured.sessions += 1;
            played
        })
    }

    fn take_all(&mut self, session: u32, player: &mut Player<'_>) -> Result<(), SynthError> {
        let mut pacer = Pacer::new(self.pace, self.streams, player.elapsed());
        let captured = self.streams.checkpoints.len() as u64;
        let mut watch = self.secondary.as_ref().and_then(Watch::start);
        let mut window_first = self.measured.checkpoints.len();
        let mut taken = Ok(());
        for number in 0..self.wanted {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let position = usize::try_from(number % captured).unwrap_or(0);
            match player.checkpoint(position, number >= captured, &mut pacer) {
                Ok(timing) => self.took(session, number + 1, timing),
                Err(error) => {
                    taken = Err(error);
                    break;
                }
            }
            if let (Some(watch), Some(secondary)) = (&mut watch, &mut self.secondary) {
                secondary.look_at_memory();
                if let Some(disturbance) = watch.checkpoint_ended(secondary) {
                    self.measured.mark(&mut window_first, disturbance);
                }
            }
        }
        if let (Some(watch), Some(secondary)) = (&mut watch, &self.secondary) {
            let disturbance = watch.end_window(secondary);
            self.measured.mark(&mut window_first, disturbance);
        }
        taken
    }

    fn took(&mut self, session: u32, n: u64, timing: Timing) {
        if self.line.is_shown() && n.is_multiple_of(16) {
            let wanted = self.wanted;
            self.line
                .show(&format!("session {}: checkpoint {n} of {wanted}", session + 1));
        }
        self.measured.checkpoints.push(MeasuredCheckpoint {
            session,
            n,
            at: self.measured.since.elapsed(),
            timing,
            disturbed: None,
        });
    }
}

impl Measured {
    /// A window has ended: its checkpoints begin at `first`.
    fn mark(&mut self, first: &mut usize, disturbance: Option<String>) {
        let window = std::mem::replace(first, self.checkpoints.len());
        for checkpoint in &mut self.checkpoints[window..] {
            checkpoint.disturbed.clone_from(&disturbance);
        }
    }
}
