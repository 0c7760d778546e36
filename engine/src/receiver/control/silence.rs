//! Whether primaries are silent behind what looks like the end of their device states: see [`crate::receiver::silence`].

use super::state::ControlState;
use crate::receiver::silence::Answer;
use std::time::Instant;

impl ControlState {
    /// Answers to sessions that have waited long enough, and notes which have begun to wait. Returns when the next is to be answered.
    pub(super) fn decide_silences(&mut self) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        for live in &mut self.live {
            let Some(question) = live.session.silence.asked() else {
                continue;
            };
            let now = Instant::now();
            let until = match live.silent_until {
                Some((same, until)) if same == question => until,
                _ => now + question.allowed(),
            };
            live.silent_until = Some((question, until));
            if now < until {
                next = Some(next.map_or(until, |next| next.min(until)));
                continue;
            }
            let answer = match live.session.is_main_readable() {
                false => Answer::Silent,
                true => Answer::Broken,
            };
            live.session.silence.decide(question, answer);
            live.session.wake_main();
        }
        next
    }
}
