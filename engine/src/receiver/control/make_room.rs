//! Room for a guest that was refused: first copies that stand still end for it, so that it finds room when it tries again.

use super::state::{ControlState, Live};
use super::watch::STANDING;
use crate::budget::BudgetError;
use crate::net::Origin;
use crate::receiver::end::SessionEnd;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What there was none of for a guest.
#[derive(Clone, Copy)]
pub(super) enum Lack<'a> {
    /// Memory, or mappings.
    Budget(&'a BudgetError),
    /// A place for a session.
    Place,
    /// One of those for sessions of its origin.
    PlaceOfOrigin,
}

impl Lack<'_> {
    /// How much.
    fn missing(self) -> u64 {
        match self {
            Self::Budget(lack) => lack.missing(),
            Self::Place | Self::PlaceOfOrigin => 1,
        }
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::Budget(_) => "memory",
            Self::Place | Self::PlaceOfOrigin => "place",
        }
    }
}

impl ControlState {
    /// There was no room for a guest of `origin`: first copies that stand still make some. Those of its own origin do first, and no more than are
    /// needed.
    pub(super) fn end_standing_first_copies(&self, origin: Origin, lack: Lack<'_>) {
        let now = Instant::now();
        let is_foreign = |live: &Live| live.session.origin.group() != origin.group();
        let has_some = |live: &&Live| match lack {
            Lack::Budget(_) => live.session.store().is_some(),
            Lack::Place => true,
            Lack::PlaceOfOrigin => !is_foreign(live),
        };
        let (ending, running): (Vec<_>, Vec<_>) = self
            .live
            .iter()
            .filter(has_some)
            .partition(|live| live.session.end().is_some());
        // What ends already gives its part back soon.
        let soon = ending.iter().map(|live| live.gives_back(lack));
        let missing = soon.fold(lack.missing(), u64::saturating_sub);
        let standing = running.into_iter().filter_map(|live| {
            Some(Standing {
                is_foreign: is_foreign(live),
                since: live.standing_since(now)?,
                gives_back: live.gives_back(lack),
                what: live,
            })
        });
        for live in enough(standing.collect(), missing) {
            let end = SessionEnd::MadeRoom(STANDING.1, lack.in_words());
            live.session.finish(end);
        }
    }
}

impl Live {
    /// What its end gives back at least of that which is missing.
    fn gives_back(&self, lack: Lack<'_>) -> u64 {
        let Lack::Budget(lack) = lack else {
            return 1;
        };
        let Some(memory) = self.session.memory() else {
            return 0;
        };
        if !lack.is_of_bytes() {
            return memory.leases.mappings();
        }
        memory.store.reserved_bytes()
    }

    /// Since when it is a first copy that stands still, if it is one. A primary sends its list of RAM blocks at once.
    fn standing_since(&self, now: Instant) -> Option<Instant> {
        if self.session.memory_asked.load(Ordering::Relaxed) {
            return self.watch.standing_since(now);
        }
        let is_standing = now.saturating_duration_since(self.began) > STANDING.1;
        is_standing.then_some(self.began)
    }
}

/// A first copy that stands still.
struct Standing<T> {
    /// Of another origin than the guest that was refused.
    is_foreign: bool,
    since: Instant,
    gives_back: u64,
    what: T,
}

/// Those whose ends give so much back, or all: foreign ones last, and those that have stood longest first.
fn enough<T>(mut standing: Vec<Standing<T>>, mut missing: u64) -> Vec<T> {
    standing.sort_by_key(|copy| (copy.is_foreign, copy.since));
    let needed = standing.into_iter().take_while(|copy| {
        let is_needed = missing > 0;
        missing = missing.saturating_sub(copy.gives_back);
        is_needed
    });
    needed.map(|copy| copy.what).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn as_many_first_copies_end_as_are_needed_and_foreign_ones_last() {
        let start = Instant::now();
        let copies = || {
            let copy = |what, is_foreign, seconds| Standing {
                is_foreign,
                since: start + Duration::from_secs(seconds),
                gives_back: 100,
                what,
            };
            vec![
                copy("foreign", true, 0),
                copy("own, later", false, 2),
                copy("own", false, 1),
                copy("foreign, later", true, 3),
            ]
        };
        assert!(enough(copies(), 0).is_empty());
        assert_eq!(enough(copies(), 100), ["own"]);
        assert_eq!(enough(copies(), 101), ["own", "own, later"]);
        assert_eq!(enough(copies(), 250), ["own", "own, later", "foreign"]);
        assert_eq!(enough(copies(), u64::MAX).len(), 4);
    }
}
