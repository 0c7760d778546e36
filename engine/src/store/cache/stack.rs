//! A stack of numbers that any thread pushes to and pops from without a lock: what was pushed last is popped first.
//!
//! It links through an array that its owner has, one link for every number there can be, so that several stacks may
//! share one: a number is on one stack at most. The head carries a counter beside the number, so that a head
//! that was popped and pushed again between a thread's look and its exchange is noticed.

use crate::store::memory::index;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// The number above it on the stack, plus one: 0 is the end.
pub(crate) type Link = AtomicU32;

/// See the module.
pub(crate) struct FreeStack {
    /// Changes so far in the upper half, the top number plus one in the lower.
    head: AtomicU64,
}

fn next_head(head: u64, top: u32) -> u64 {
    ((head >> 32).wrapping_add(1) << 32) | u64::from(top)
}

fn top(head: u64) -> Option<u32> {
    let low = u32::try_from(head & u64::from(u32::MAX)).expect("masked to 32 bits");
    low.checked_sub(1)
}

fn link(links: &[Link], number: u32) -> &Link {
    &links[index(u64::from(number))]
}

impl FreeStack {
    pub(crate) fn new() -> Self {
        Self {
            head: AtomicU64::new(0),
        }
    }

    /// The thread that pops the number sees what this thread did before.
    pub(crate) fn push(&self, number: u32, links: &[Link]) {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            let below = top(head).map_or(0, |top| top + 1);
            link(links, number).store(below, Ordering::Relaxed);
            let new = next_head(head, number + 1);
            match self
                .head
                .compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(changed) => head = changed,
            }
        }
    }

    pub(crate) fn pop(&self, links: &[Link]) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let number = top(head)?;
            let below = link(links, number).load(Ordering::Relaxed);
            match self.head.compare_exchange_weak(
                head,
                next_head(head, below),
                Ordering::Acquire,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(number),
                Err(changed) => head = changed,
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn links(count: usize) -> Vec<Link> {
        (0..count).map(|_| Link::new(0)).collect()
    }

    #[test]
    fn the_last_one_pushed_is_popped_first() {
        let (stack, links) = (FreeStack::new(), links(4));
        assert_eq!(stack.pop(&links), None);
        for number in [2, 0, 3] {
            stack.push(number, &links);
        }
        assert_eq!(stack.pop(&links), Some(3));
        stack.push(1, &links);
        let rest: Vec<_> = std::iter::from_fn(|| stack.pop(&links)).collect();
        assert_eq!(rest, [1, 0, 2]);
    }

    #[test]
    fn threads_never_hold_the_same_number() {
        let (stack, links) = (FreeStack::new(), links(8));
        let held: Vec<_> = (0..8)
            .map(|_| std::sync::atomic::AtomicBool::new(false))
            .collect();
        (0..8).for_each(|number| stack.push(number, &links));
        let work = || {
            for _ in 0..20_000 {
                if let Some(number) = stack.pop(&links) {
                    let flag = &held[usize::try_from(number).unwrap()];
                    assert!(!flag.swap(true, Ordering::Relaxed), "{number} was taken twice");
                    flag.store(false, Ordering::Relaxed);
                    stack.push(number, &links);
                }
            }
        };
        std::thread::scope(|scope| {
            (0..3).for_each(|_| drop(scope.spawn(work)));
        });
        assert_eq!(std::iter::from_fn(|| stack.pop(&links)).count(), 8);
    }
}

/// Run with `scripts/test loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Two threads that pop and push back: neither gets a number that the other has, and none is lost.
    #[test]
    fn loom_a_number_is_held_by_one() {
        loom::model(|| {
            let links: Arc<Vec<Link>> = Arc::new((0..2).map(|_| Link::new(0)).collect());
            let stack = Arc::new(FreeStack::new());
            stack.push(0, &links);
            stack.push(1, &links);
            let other = {
                let (stack, links) = (stack.clone(), links.clone());
                thread::spawn(move || {
                    let mine = stack.pop(&links);
                    if let Some(number) = mine {
                        stack.push(number, &links);
                    }
                })
            };
            let (first, second) = (stack.pop(&links), stack.pop(&links));
            assert!(first.is_none() || first != second, "one number twice");
            for number in [first, second].into_iter().flatten() {
                stack.push(number, &links);
            }
            other.join().unwrap();
            let mut all: Vec<_> = std::iter::from_fn(|| stack.pop(&links)).collect();
            all.sort_unstable();
            assert_eq!(all, [0, 1]);
        });
    }
}
