//! Which of the operator's commands run, and which wait for a place.
//!
//! Any peer can end a session, and its command may hang, so that there are three kinds of places:
//!
//! | places | for |
//! |---|---|
//! | [`Places::of_guests`] | the first command of each known guest: one that a rule of the operator names, or that has a certificate |
//! | [`Places::of_origins`] | the first command of each other origin |
//! | [`Places::shared`] | any other, of one origin at most [`Places::shared_of_origin`]; the origin with the fewest is next |
//!
//! A loss without a place waits. The queue is bounded: when it is full, the newest loss of the most crowded party is dropped and counted.

use super::hook_runner::{RunHooks, Values};
use crate::log::Fields;
use crate::output::{tell, tell_of};
use colo_ring::rate_limit::RateLimit;
use colo_ring::receiver::SessionTitle;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How many commands run at a time: each takes a process.
pub(super) const PLACES: Places = Places {
    of_guests: 256,
    of_origins: 192,
    shared: 64,
    shared_of_origin: 32,
};

/// At the end all are started.
const ANY: Places = Places {
    of_guests: usize::MAX,
    of_origins: usize::MAX,
    shared: usize::MAX,
    shared_of_origin: usize::MAX,
};

/// Most losses that wait, of one party and of all: of one as many as a receiver has sessions.
const WAITING_OF_PARTY_MAX: usize = 256;
const WAITING_MAX: usize = 1024;

/// Lines about losses that are dropped: so many at once, and how soon one more.
const DROPPED_LINES: (u32, Duration) = (20, Duration::from_secs(10));

/// How soon a command that could not be started is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How long the end of the receiver waits for commands to be started.
pub(super) const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// How often the running commands are looked at.
pub(super) const POLL: Duration = Duration::from_millis(50);

/// See the module.
pub(super) struct Places {
    of_guests: usize,
    of_origins: usize,
    shared: usize,
    shared_of_origin: usize,
}

/// Who has a place of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Party {
    /// Where the primary was.
    pub(super) origin: String,
    /// What a rule or a certificate calls the guest, if one does.
    pub(super) guest: Option<String>,
}

/// A primary that was lost, or stands still.
pub(super) struct Loss {
    pub(super) session: SessionTitle,
    pub(super) party: Party,
    pub(super) command: usize,
    pub(super) values: Values,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Own,
    Shared,
}

struct Running {
    session: SessionTitle,
    party: Party,
    place: Place,
    /// By which its end is reported.
    id: u32,
}

/// What waits and what runs.
pub(super) struct Queue<R> {
    option: &'static str,
    runner: R,
    waiting: Vec<Loss>,
    running: Vec<Running>,
    dropped: RateLimit,
    /// Until then nothing is started, because that has failed.
    not_before: Option<Instant>,
    has_warned: bool,
}

impl<R: RunHooks> Queue<R> {
    pub(super) fn new(option: &'static str, runner: R) -> Self {
        let (burst, every) = DROPPED_LINES;
        Self {
            option,
            runner,
            waiting: Vec::new(),
            running: Vec::new(),
            dropped: RateLimit::new(burst, every, Instant::now()),
            not_before: None,
            has_warned: false,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub(super) fn push(&mut self, loss: Loss, now: Instant) {
        self.waiting.push(loss);
        let Some(position) = self.too_many() else {
            return;
        };
        let Loss { session, party, .. } = self.waiting.remove(position);
        if self.dropped.admits(now) {
            let (option, origin) = (self.option, party.origin);
            let why = format!("too many losses are waiting, most of them of {origin}");
            warn(&session, &format!("{option} is not run: {why}"));
        }
    }

    /// What has no room, if the queue has just become too long.
    fn too_many(&self) -> Option<usize> {
        let mut waiting: BTreeMap<&Party, usize> = BTreeMap::new();
        for loss in &self.waiting {
            *waiting.entry(&loss.party).or_default() += 1;
        }
        // Of two parties that are equally crowded, a known guest keeps its loss.
        let crowd = waiting
            .into_iter()
            .max_by_key(|(party, count)| (*count, party.guest.is_none()));
        let (party, count) = crowd?;
        let is_full = self.waiting.len() > WAITING_MAX || count > WAITING_OF_PARTY_MAX;
        self.waiting
            .iter()
            .rposition(|loss| loss.party == *party)
            .filter(|_| is_full)
    }

    /// Counts up what was dropped without a line, if it is time to. To be called now and then.
    pub(super) fn count_up(&mut self, now: Instant) {
        if let Some((count, time)) = self.dropped.summary(now) {
            tell(&format!(
                "warning: {} was not run for {count} more sessions within {:.0} s: too many losses were waiting",
                self.option,
                time.as_secs_f64()
            ));
        }
    }

    /// Starts what waits and has a place.
    pub(super) fn start(&mut self, places: &Places) {
        if self.not_before.is_some_and(|time| Instant::now() < time) {
            return;
        }
        while let Some((position, place)) = self.next(places) {
            match self
                .runner
                .run(self.waiting[position].command, &self.waiting[position].values)
            {
                Ok(id) => {
                    let Loss { session, party, .. } = self.waiting.remove(position);
                    self.running.push(Running {
                        session,
                        party,
                        place,
                        id,
                    });
                    self.not_before = None;
                }
                Err(error) => {
                    // Once, and not at each try.
                    if self.not_before.is_none() {
                        let (session, option) = (&self.waiting[position].session, self.option);
                        warn(
                            session,
                            &format!("{option} cannot be started, and is tried again: {error}"),
                        );
                    }
                    self.not_before = Some(Instant::now() + RETRY_AFTER);
                    return;
                }
            }
        }
    }

    /// The loss whose turn it is, and its place: the oldest that has one of its own, else the oldest of the origin that has the fewest of those
    /// that are shared.
    fn next(&self, places: &Places) -> Option<(usize, Place)> {
        // It is called again and again.
        if self.waiting.is_empty() {
            return None;
        }
        let (own, shared): (Vec<_>, Vec<_>) = self
            .running
            .iter()
            .partition(|running| running.place == Place::Own);
        let own: BTreeSet<_> = own.into_iter().map(|running| &running.party).collect();
        let of_guests = own.iter().filter(|party| party.guest.is_some()).count();
        let of_origins = own.len() - of_guests;
        let has_own = |loss: &Loss| {
            let is_left = match loss.party.guest {
                Some(_) => of_guests < places.of_guests,
                None => of_origins < places.of_origins,
            };
            is_left && !own.contains(&loss.party)
        };
        if let Some(position) = self.waiting.iter().position(has_own) {
            return Some((position, Place::Own));
        }
        if shared.len() >= places.shared {
            return None;
        }
        let mut of_origin: BTreeMap<&str, usize> = BTreeMap::new();
        for running in shared {
            *of_origin.entry(&running.party.origin).or_default() += 1;
        }
        let running = |loss: &Loss| of_origin.get(&*loss.party.origin).copied().unwrap_or(0);
        let turn = self.waiting.iter().map(running).enumerate();
        let turn = turn.min_by_key(|(_, count)| *count);
        turn.filter(|(_, count)| *count < places.shared_of_origin)
            .map(|(position, _)| (position, Place::Shared))
    }

    /// Forgets the commands that have ended.
    pub(super) fn reap(&mut self) {
        for (id, status) in self.runner.take_ended() {
            let Some(position) = self.running.iter().position(|running| running.id == id) else {
                continue;
            };
            let Running { session, .. } = self.running.swap_remove(position);
            if !status.success() {
                warn(&session, &format!("{} failed ({status})", self.option));
            }
        }
        if self.runner.is_gone() && !self.has_warned {
            self.has_warned = true;
            let option = self.option;
            tell(&format!(
                "WARNING: the process that runs {option} has ended, so {option} is not run any more: restart the receiver"
            ));
        }
    }

    /// Starts all that waits, whatever runs.
    pub(super) fn finish(&mut self) {
        let begin = Instant::now();
        loop {
            self.start(&ANY);
            if self.waiting.is_empty() {
                return;
            }
            if begin.elapsed() > FINISH_WITHIN {
                for loss in &self.waiting {
                    warn(&loss.session, &format!("{} was not run", self.option));
                }
                return;
            }
            std::thread::sleep(POLL);
        }
    }
}

fn warn(session: &SessionTitle, text: &str) {
    tell_of(
        &format!("warning: session {session}: {text}"),
        Fields::of(session),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::ExitStatus;

    /// Runs nothing.
    #[derive(Default)]
    struct Pretended {
        started: u32,
        ended: Vec<u32>,
        refuses: bool,
    }

    impl RunHooks for Pretended {
        fn run(&mut self, _: usize, _: &Values) -> std::io::Result<u32> {
            if self.refuses {
                return Err(std::io::ErrorKind::WouldBlock.into());
            }
            self.started += 1;
            Ok(self.started)
        }

        fn take_ended(&mut self) -> Vec<(u32, ExitStatus)> {
            self.ended
                .drain(..)
                .map(|id| (id, ExitStatus::default()))
                .collect()
        }

        fn is_gone(&mut self) -> bool {
            false
        }
    }

    fn queue() -> Queue<Pretended> {
        Queue::new("--on-loss", Pretended::default())
    }

    fn loss(session: u32, origin: &str, guest: Option<&str>) -> Loss {
        Loss {
            session: session.into(),
            party: Party {
                origin: origin.to_owned(),
                guest: guest.map(str::to_owned),
            },
            command: 0,
            values: Values::default(),
        }
    }

    impl Queue<Pretended> {
        fn lose(&mut self, session: u32, origin: &str, guest: Option<&str>) {
            self.push(loss(session, origin, guest), Instant::now());
        }

        fn runs(&self, session: u32) -> bool {
            self.running
                .iter()
                .any(|running| running.session == session.into())
        }

        fn counts(&self) -> (usize, usize) {
            (self.running.len(), self.waiting.len())
        }
    }

    const FEW: Places = Places {
        of_guests: 2,
        of_origins: 3,
        shared: 4,
        shared_of_origin: 2,
    };

    /// However many losses of strangers are before it.
    #[test]
    fn a_loss_of_another_origin_finds_a_place() {
        let mut queue = queue();
        (0..100).for_each(|session| queue.lose(session, "192.0.2.1", None));
        queue.start(&FEW);
        assert_eq!(queue.counts(), (3, 97));
        queue.lose(100, "192.0.2.2", None);
        queue.start(&FEW);
        assert!(queue.runs(100));
        // One that ends makes room for one.
        queue.runner.ended.push(queue.running[2].id);
        queue.reap();
        queue.start(&FEW);
        assert_eq!(queue.counts(), (4, 96));
    }

    /// Also where several hosts' commands hang.
    #[test]
    fn an_origin_and_a_known_guest_have_places_of_their_own() {
        let mut queue = queue();
        for (first, origin) in [(0, "192.0.2.1"), (10, "192.0.2.2")] {
            (first..first + 10).for_each(|session| queue.lose(session, origin, None));
        }
        queue.start(&FEW);
        assert_eq!(queue.counts(), (6, 14));
        queue.lose(100, "192.0.2.3", None);
        queue.start(&FEW);
        assert!(queue.runs(100));
        // No origin is left a place, and a guest that is known has one even there.
        queue.lose(101, "192.0.2.4", None);
        queue.lose(102, "192.0.2.1", Some("web3"));
        queue.lose(103, "192.0.2.1", Some("web4"));
        queue.start(&FEW);
        assert!(!queue.runs(101) && queue.runs(102) && queue.runs(103));
        // One each, and at most so many.
        queue.lose(104, "192.0.2.1", Some("web3"));
        queue.lose(105, "192.0.2.1", Some("web5"));
        queue.start(&FEW);
        assert!(!queue.runs(104) && !queue.runs(105));
        queue.runner.ended.push(queue.running[7].id);
        queue.reap();
        queue.start(&FEW);
        assert!(queue.runs(104) && !queue.runs(105));
        queue.finish();
        assert_eq!(queue.waiting.len(), 0);
    }

    #[test]
    fn a_queue_is_bounded_and_its_crowd_loses() {
        let mut queue = queue();
        (0..300).for_each(|session| queue.lose(session, "192.0.2.1", None));
        assert_eq!(queue.waiting.len(), WAITING_OF_PARTY_MAX);
        // The first of it stay.
        assert_eq!(queue.waiting[0].session, 0.into());
        for host in 0..2000 {
            queue.lose(1000 + host, &format!("host {}", host % 100), None);
            assert!(queue.waiting.len() <= WAITING_MAX);
        }
        queue.lose(9000, "192.0.2.9", None);
        queue.lose(9001, "192.0.2.1", Some("web3"));
        assert_eq!(queue.waiting.len(), WAITING_MAX);
        for session in [9000, 9001] {
            assert!(queue.waiting.iter().any(|loss| loss.session == session.into()));
        }
        // What is dropped is counted beyond some lines.
        let later = Instant::now() + Duration::from_secs(3600);
        let (count, _) = queue.dropped.summary(later).unwrap();
        let lost = 300 + 2000 + 2 - u64::try_from(WAITING_MAX).unwrap();
        assert!(count + 20 <= lost && count + 30 > lost, "{count} of {lost}");
    }

    #[test]
    fn what_cannot_be_started_stays_in_the_queue() {
        let mut queue = queue();
        queue.runner.refuses = true;
        queue.lose(1, "192.0.2.1", None);
        queue.start(&FEW);
        assert_eq!(queue.counts(), (0, 1));
        // Not at once, but later.
        queue.runner.refuses = false;
        queue.start(&FEW);
        assert_eq!(queue.waiting.len(), 1);
        queue.not_before = Some(Instant::now());
        queue.start(&FEW);
        assert_eq!(queue.waiting.len(), 0);
    }
}
