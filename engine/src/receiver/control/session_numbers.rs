//! The numbers of new sessions.

use std::collections::BTreeSet;

/// Gives each session the number after the last one's, but for those that have files in the RAM directory.
#[derive(Debug)]
pub(in crate::receiver) struct SessionNumbers {
    next: u32,
    found: BTreeSet<u32>,
}

impl SessionNumbers {
    /// `found` have files in the RAM directory, of whomever they are.
    pub(in crate::receiver) fn after(found: BTreeSet<u32>) -> Self {
        Self {
            next: found.last().map_or(1, |last| following(*last)),
            found,
        }
    }

    /// The number of the next session, where sessions that run or are kept use some.
    pub(super) fn take(&mut self, is_used: impl Fn(u32) -> bool) -> u32 {
        loop {
            let number = self.next;
            self.next = following(number);
            if !self.found.contains(&number) && !is_used(number) {
                return number;
            }
        }
    }
}

fn following(number: u32) -> u32 {
    number.checked_add(1).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_behind_what_is_there_and_never_wrap_into_it() {
        let none = |_| false;
        let mut numbers = SessionNumbers::after(BTreeSet::new());
        assert_eq!([1, 2, 3], [(); 3].map(|()| numbers.take(none)));
        let mut numbers = SessionNumbers::after([1, 6].into());
        assert_eq!([7, 8], [(); 2].map(|()| numbers.take(none)));
        let mut numbers = SessionNumbers::after([2, u32::MAX].into());
        let taken = [(); 3].map(|()| numbers.take(|number| number == 3));
        assert_eq!(taken, [1, 4, 5]);
    }
}
