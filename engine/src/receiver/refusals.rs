//! Lines of the log that anyone who can connect causes, about connections that were refused, about guards and sessions: they are limited
//! and counted.
//!
//! By origin and kind, so that a monitoring host that connects every few seconds, or a second receiver that tries an address again and
//! again, hides neither another host's failure nor one of its own that means something; and by kind over all of them together.

use super::{Event, Events};
use crate::net::Origin;
use crate::rate_limit::RateLimit;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most origins and kinds that are told from others. Those beyond are limited together.
const KNOWN_MAX: usize = 64;

/// Lines of one kind over all: so many at once, and how soon one more.
const ALL: (u32, Duration) = (100, Duration::from_secs(5));

/// What was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Refused {
    /// A connection that did not say what it is: a check, a scan, a probe of the port.
    Stranger,
    /// A primary, a guard or a client of disks.
    Client,
    /// Nothing: a guard of a session has come, or gone.
    Guard,
    /// Nothing: something is to be said of a session.
    Session,
}

impl Refused {
    /// Lines of one origin.
    fn limit(self) -> (u32, Duration) {
        match self {
            Self::Stranger => (5, Duration::from_secs(600)),
            Self::Client => (20, Duration::from_secs(10)),
            Self::Guard | Self::Session => (50, Duration::from_secs(5)),
        }
    }

    const ALL: [Self; 4] = [Self::Stranger, Self::Client, Self::Guard, Self::Session];

    fn in_words(self) -> &'static str {
        match self {
            Self::Stranger => "connections that did not say what they are were closed",
            Self::Client => "connections were closed",
            Self::Guard => "lines about guards were left out",
            Self::Session => "warnings about sessions were left out",
        }
    }
}

/// A limit for one origin and kind.
struct Known {
    limit: RateLimit,
    /// The last of its connections, for the count.
    from: String,
}

struct State {
    /// By kind.
    all: [RateLimit; Refused::ALL.len()],
    known: HashMap<(Origin, Refused), Known>,
}

/// See the module. Used by the control thread and the server of disks.
pub(super) struct Refusals {
    state: Mutex<State>,
    events: Arc<Events>,
}

impl State {
    fn new(now: Instant) -> Self {
        let (burst, every) = ALL;
        Self {
            all: Refused::ALL.map(|_| RateLimit::new(burst, every, now)),
            known: HashMap::new(),
        }
    }

    fn admits(&mut self, origin: Origin, refused: Refused, from: &str, now: Instant) -> bool {
        let origin = match origin.group() {
            // Of this host, whichever they are.
            Origin::Process(_) => Origin::Process(0),
            host @ Origin::Host(_) => host,
        };
        let key = (origin, refused);
        if !self.known.contains_key(&key) && self.known.len() == KNOWN_MAX {
            self.known.retain(|_, known| !known.limit.is_idle(now));
        }
        if self.known.len() < KNOWN_MAX || self.known.contains_key(&key) {
            let known = self.known.entry(key).or_insert_with(|| {
                let (burst, every) = refused.limit();
                Known {
                    limit: RateLimit::new(burst, every, now),
                    from: String::new(),
                }
            });
            from.clone_into(&mut known.from);
            if !known.limit.admits(now) {
                return false;
            }
        }
        self.all[refused as usize].admits(now)
    }

    /// Lines that count up what was left out.
    fn counts(&mut self, now: Instant) -> Vec<String> {
        let line = |what: &str, count: u64, time: Duration, of: &str| {
            format!("{count} more {what} within {:.0} s{of}", time.as_secs_f64())
        };
        let known = self.known.iter_mut().filter_map(|((_, refused), known)| {
            let (count, time) = known.limit.summary(now)?;
            Some(line(
                refused.in_words(),
                count,
                time,
                &format!(", the last from {}", known.from),
            ))
        });
        let mut lines: Vec<_> = known.collect();
        lines.extend(
            Refused::ALL
                .into_iter()
                .zip(&mut self.all)
                .filter_map(|(refused, all)| {
                    let (count, time) = all.summary(now)?;
                    Some(line(refused.in_words(), count, time, ""))
                }),
        );
        lines
    }
}

impl Refusals {
    pub(super) fn new(events: Arc<Events>) -> Self {
        Self {
            state: Mutex::new(State::new(Instant::now())),
            events,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Warns of a connection of `origin`, which is called `from`, if that may be logged now; otherwise counts it.
    pub(super) fn warn(&self, origin: Origin, refused: Refused, from: &str, why: &str) {
        self.report(origin, refused, from, || Event::warning(format!("{from}: {why}")));
    }

    /// The same with an event of its own.
    pub(super) fn report(&self, origin: Origin, refused: Refused, from: &str, event: impl FnOnce() -> Event) {
        if self.lock().admits(origin, refused, from, Instant::now()) {
            (self.events)(event());
        }
    }

    /// Warns of what no origin can be named for.
    pub(super) fn warn_of_all(&self, text: String) {
        if self.lock().all[Refused::Client as usize].admits(Instant::now()) {
            (self.events)(Event::warning(text));
        }
    }

    /// Counts up what was left out, if it is time to. To be called now and then.
    pub(super) fn count_up(&self, now: Instant) {
        let lines = self.lock().counts(now);
        lines
            .into_iter()
            .for_each(|line| (self.events)(Event::warning(line)));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn host(number: u32) -> Origin {
        Origin::Host(Ipv4Addr::from_bits(number).into())
    }

    #[test]
    fn strangers_hide_no_primary() {
        let now = Instant::now();
        let mut state = State::new(now);
        let admitted = |state: &mut State, origin, refused, count: u32| {
            (0..count)
                .filter(|_| state.admits(origin, refused, "x", now))
                .count()
        };
        assert_eq!(admitted(&mut state, host(1), Refused::Stranger, 200), 5);
        assert_eq!(
            admitted(&mut state, Origin::Process(7), Refused::Stranger, 190),
            5
        );
        assert_eq!(admitted(&mut state, host(1), Refused::Client, 200), 20);
        assert_eq!(admitted(&mut state, host(2), Refused::Client, 1), 1);
        let mut counts = state.counts(now + Duration::from_secs(10));
        counts.sort();
        let said = |count, what| format!("{count} more {what} within 10 s, the last from x");
        let strangers = "connections that did not say what they are were closed";
        let expected = [
            said(180, "connections were closed"),
            said(185, strangers),
            said(195, strangers),
        ];
        assert_eq!(counts, expected);
    }

    /// However many addresses they have.
    #[test]
    fn many_origins_are_limited_together() {
        let now = Instant::now();
        let mut state = State::new(now);
        let lines = (0..10_000).filter(|number| state.admits(host(*number), Refused::Stranger, "x", now));
        assert_eq!(lines.count(), 100);
        assert_eq!(state.known.len(), KNOWN_MAX);
        // Those that are quiet again make room.
        let later = now + Duration::from_secs(3600);
        state.counts(later);
        assert!(state.admits(host(20_000), Refused::Stranger, "x", later));
        assert_eq!(state.known.len(), 1);
    }
}
