//! Silence behind what looks like the end of an initial device state (spec §11).
//!
//! The bytes alone cannot prove that it is the end: all of them may be a guest's, in the buffer of one of its devices. But a primary
//! that has sent the end waits for an answer, and one that has not goes on. So the main channel asks, and posts no further receive; the
//! control thread, which has a clock, looks at its socket after a while. Bytes that a receive brings which was posted before withdraw the
//! question.
//!
//! ```text
//!          core                 control
//!  Not ─────────► Asked ─────────────────► Silent or Broken
//!   ▲               │ core, bytes came            │ core
//!   └───────────────┴─────────────────────────────┘
//! ```

use crate::wire::vmdesc::Evidence;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long nothing may follow a state whose sections are those of its description. Between two writes of a device state a primary computes
/// for less than a millisecond, and its guest is stopped for as long as this.
const DESCRIBED: Duration = Duration::from_millis(10);

/// The same for a state whose description is of other sections: longer than a lost packet takes to be sent again, a few times.
const UNDESCRIBED: Duration = Duration::from_secs(1);

/// What the word says in its low bits; above them is the number of the question.
const NOT_ASKED: u64 = 0;
const ASKED_DESCRIBED: u64 = 1;
const ASKED_UNDESCRIBED: u64 = 2;
const SILENT: u64 = 3;
const BROKEN: u64 = 4;
const STATES: u64 = 7;
const NEXT: u64 = STATES + 1;

/// What the control thread has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing has come.
    Silent,
    /// More has come, or the connection has ended.
    Broken,
}

/// A question that is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question(u64);

impl Question {
    /// How long the silence has to last.
    pub(super) fn allowed(self) -> Duration {
        match self.0 & STATES {
            ASKED_DESCRIBED => DESCRIBED,
            _ => UNDESCRIBED,
        }
    }
}

/// Shared by the driver of the main channel and the control thread.
#[derive(Debug, Default)]
pub(super) struct Silence(AtomicU64);

impl Silence {
    fn word(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self, state: u64) {
        self.0.store(self.word() & !STATES | state, Ordering::Release);
    }

    /// Asks whether anything follows what this speaks for. The control thread has to be notified.
    pub(super) fn ask(&self, evidence: Evidence) -> Question {
        let state = match evidence {
            Evidence::Described => ASKED_DESCRIBED,
            Evidence::Undescribed(_) => ASKED_UNDESCRIBED,
        };
        let question = (self.word() & !STATES).wrapping_add(NEXT) | state;
        self.0.store(question, Ordering::Release);
        Question(question)
    }

    /// Something has come.
    pub(super) fn withdraw(&self) {
        self.set(NOT_ASKED);
    }

    /// The question, if there is one.
    pub(super) fn asked(&self) -> Option<Question> {
        let word = self.word();
        matches!(word & STATES, ASKED_DESCRIBED | ASKED_UNDESCRIBED).then_some(Question(word))
    }

    /// Answers, unless the question is withdrawn. The main channel has to be woken.
    pub(super) fn decide(&self, question: Question, answer: Answer) {
        let state = match answer {
            Answer::Silent => SILENT,
            Answer::Broken => BROKEN,
        };
        let answered = question.0 & !STATES | state;
        // It fails where the question is withdrawn.
        let _ = (self.0).compare_exchange(question.0, answered, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Takes the answer, if there is one.
    pub(super) fn answer(&self) -> Option<Answer> {
        let answer = match self.word() & STATES {
            SILENT => Answer::Silent,
            BROKEN => Answer::Broken,
            _ => return None,
        };
        self.set(NOT_ASKED);
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_has_one_answer() {
        let silence = Silence::default();
        assert_eq!((silence.asked(), silence.answer()), (None, None));
        for answer in [Answer::Broken, Answer::Silent] {
            let question = silence.ask(Evidence::Described);
            assert_eq!(question.allowed(), DESCRIBED);
            assert_eq!((silence.asked(), silence.answer()), (Some(question), None));
            silence.decide(question, answer);
            assert_eq!((silence.asked(), silence.answer()), (None, Some(answer)));
            assert_eq!(silence.answer(), None);
        }
    }

    #[test]
    fn an_answer_is_to_its_question() {
        let silence = Silence::default();
        let withdrawn = silence.ask(Evidence::Described);
        silence.withdraw();
        silence.decide(withdrawn, Answer::Silent);
        assert_eq!(silence.answer(), None);
        let again = silence.ask(Evidence::Described);
        assert_ne!(again, withdrawn);
        silence.decide(withdrawn, Answer::Silent);
        assert_eq!((silence.asked(), silence.answer()), (Some(again), None));
    }
}
