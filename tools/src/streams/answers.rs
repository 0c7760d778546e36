//! The captured secondary's answers and their times.

use super::Flow;
use colo_ring::wire::Parsed;
use colo_ring::wire::colo::Message;
use colo_ring::wire::return_path::RpMessage;
use std::time::Duration;

/// The times of the answers, up to the first one that the protocol does not expect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// CHECKPOINT_READY.
    pub ready: Option<Duration>,
    /// The answers of each checkpoint, in order; the last may be incomplete.
    pub checkpoints: Vec<CheckpointAnswers>,
    /// The first byte of an unexpected answer, if there is one.
    pub wrong_at: Option<usize>,
}

/// The answers of one checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointAnswers {
    /// CHECKPOINT_REPLY.
    pub reply: Option<Duration>,
    /// VMSTATE_RECEIVED.
    pub received: Option<Duration>,
    /// VMSTATE_LOADED.
    pub loaded: Option<Duration>,
}

impl Answers {
    /// Reads what the secondary sent on the main channel.
    pub(super) fn read(flow: &Flow, return_path: bool) -> Self {
        let mut reader = Reader { flow, position: 0 };
        let mut answers = Self::default();
        if return_path {
            while let Some((RpMessage::Pong(_), _)) = reader.next(RpMessage::parse) {}
            // The message that ended the loop is SHUT.
        }
        answers.ready = reader.expect(Message::CheckpointReady);
        while answers.ready.is_some()
            && let Some(reply) = reader.expect(Message::CheckpointReply)
        {
            let received = reader.expect(Message::VmstateReceived);
            let loaded = received.and_then(|_| reader.expect(Message::VmstateLoaded));
            answers.checkpoints.push(CheckpointAnswers {
                reply: Some(reply),
                received,
                loaded,
            });
            if loaded.is_none() {
                break;
            }
        }
        let left = flow.bytes().len() - reader.position;
        answers.wrong_at = (left >= 4).then_some(reader.position);
        answers
    }
}

struct Reader<'a> {
    flow: &'a Flow,
    position: usize,
}

impl Reader<'_> {
    /// The next message and the time of its last byte.
    fn next<T>(&mut self, parse: impl Fn(&[u8]) -> Parsed<T>) -> Option<(T, Duration)> {
        let (message, consumed) = parse(&self.flow.bytes()[self.position..]).ok()??;
        self.position += consumed;
        let at = self.flow.at(self.position - 1)?;
        Some((message, at))
    }

    fn expect(&mut self, expected: Message) -> Option<Duration> {
        let before = self.position;
        match self.next(Message::parse) {
            Some((message, at)) if message == expected => Some(at),
            _ => {
                self.position = before;
                None
            }
        }
    }
}
