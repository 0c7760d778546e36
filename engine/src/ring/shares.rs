//! How much of a core each guest has had, so that the one that has had the least goes first.
//!
//! A share is counted in work, not in time: the bytes that were received, and a constant for each call of a connection, whose work is
//! bounded. So the order in which a core works follows from what has come alone.

/// What a call of a connection counts for beside the bytes that it is handed.
pub(super) const CALL: u64 = 4 << 10;

/// What a further part of its work counts for: as much as a call may do with what it has.
pub(super) const PART: u64 = 128 << 10;

/// Guests whose shares differ by no more than this are served in one turn.
const SAME: u64 = 64 << 10;

/// How far a guest that had nothing to do may be behind those that had, and so goes before them: the work of a short checkpoint. It is
/// little, since many guests may have been silent, and one that has worked waits for all of them.
const CREDIT: u64 = 2 << 20;

/// The shares of all guests of a core, by the index of their tenant. Connections whose guests are not present have one together.
#[derive(Debug, Default)]
pub(super) struct Shares {
    of_tenants: Vec<u64>,
    of_others: u64,
    /// The most that the guest which went first has had.
    reached: u64,
}

impl Shares {
    /// Another guest has this index. It has had as much as those that were served last.
    pub(super) fn admit(&mut self, tenant: usize) {
        let needed = self.of_tenants.len().max(tenant + 1);
        self.of_tenants.resize(needed, 0);
        self.of_tenants[tenant] = self.reached;
    }

    fn share(&mut self, tenant: Option<usize>) -> &mut u64 {
        match tenant {
            Some(tenant) => &mut self.of_tenants[tenant],
            None => &mut self.of_others,
        }
    }

    /// The share of a guest that has something to do.
    pub(super) fn of_ready(&mut self, tenant: Option<usize>) -> u64 {
        let least = self.reached.saturating_sub(CREDIT);
        let share = self.share(tenant);
        *share = least.max(*share);
        *share
    }

    /// `least` is the smallest share of those that have something to do. The largest one that is served together with it.
    pub(super) fn served_together(&mut self, least: u64) -> u64 {
        self.reached = self.reached.max(least);
        least.saturating_add(SAME)
    }

    /// The core has worked for a guest.
    pub(super) fn charge(&mut self, tenant: Option<usize>, work: u64) {
        let share = self.share(tenant);
        *share = share.saturating_add(work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of these guests is served first, after each has had what it had.
    fn first(shares: &mut Shares, ready: &[usize]) -> usize {
        let mut share = |tenant: &usize| shares.of_ready(Some(*tenant));
        let (least, first) = ready.iter().map(|tenant| (share(tenant), *tenant)).min().unwrap();
        shares.served_together(least);
        first
    }

    #[test]
    fn who_has_had_the_least_goes_first() {
        let mut shares = Shares::default();
        (0..2).for_each(|tenant| shares.admit(tenant));
        let mut served = [0; 2];
        for _ in 0..1000 {
            let next = first(&mut shares, &[0, 1]);
            served[next] += 1;
            // One of them costs three times as much.
            shares.charge(Some(next), [PART, 3 * PART][next]);
        }
        assert!((740..=760).contains(&served[0]), "{served:?}");
    }

    #[test]
    fn a_guest_that_was_silent_does_not_keep_others_off_for_as_long() {
        let mut shares = Shares::default();
        (0..2).for_each(|tenant| shares.admit(tenant));
        for _ in 0..1_000_000 {
            assert_eq!(first(&mut shares, &[0]), 0);
            shares.charge(Some(0), PART);
        }
        let mut before = 0;
        while first(&mut shares, &[0, 1]) == 1 {
            shares.charge(Some(1), PART);
            before += 1;
        }
        let credit = CREDIT / PART;
        assert!((credit - 2..=credit + 2).contains(&before), "{before}");
        // Nor does one that comes.
        shares.admit(2);
        assert_ne!(first(&mut shares, &[0, 1, 2]), 2);
    }

    #[test]
    fn many_guests_that_were_silent_hold_one_up_for_a_moment() {
        const SILENT: usize = 64;
        let mut shares = Shares::default();
        (0..=SILENT).for_each(|tenant| shares.admit(tenant));
        for _ in 0..10_000 {
            assert_eq!(first(&mut shares, &[0]), 0);
            shares.charge(Some(0), PART);
        }
        let all: Vec<usize> = (0..=SILENT).collect();
        let mut before = 0;
        loop {
            let next = first(&mut shares, &all);
            if next == 0 {
                break;
            }
            shares.charge(Some(next), PART);
            before += PART;
        }
        // Some 20 ms of a core, where all of 64 guests begin at one instant.
        assert!(before <= (SILENT as u64) * (CREDIT + 2 * PART), "{before}");
        assert!(before < 160 << 20, "{before}");
    }
}
