//! Points at which the simulation, or a test, makes something fail on purpose: the host refuses a mapping, or the receiver is killed.
//!
//! In every build but a test's nothing fails here: the functions below are a constant no.

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// A mapping is refused for want of memory.
    Mapping,
    /// The receiver may be killed: between any two stores whose order a later receiver relies on. What is called there looks at what a
    /// kill would leave, and the receiver goes on.
    Kill,
}

#[cfg(test)]
pub(crate) use hooks::{clear, fails, on_kill, set};

/// Whether it fails here: never.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn fails(_: Point) -> bool {
    false
}

/// Here the receiver may be killed.
#[inline(always)]
pub(crate) fn may_be_killed() {
    fails(Point::Kill);
}

#[cfg(test)]
mod hooks {
    use super::Point;
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut() -> bool>;

    thread_local! {
        static HOOKS: RefCell<[Option<Hook>; 2]> = const { RefCell::new([None, None]) };
    }

    fn swap(point: Point, hook: Option<Hook>) -> Option<Hook> {
        HOOKS.with_borrow_mut(|hooks| std::mem::replace(&mut hooks[point as usize], hook))
    }

    /// What this thread does at such a point; whether it fails there.
    pub(crate) fn set(point: Point, hook: impl FnMut() -> bool + 'static) {
        swap(point, Some(Box::new(hook)));
    }

    /// What this thread does where the receiver may be killed.
    pub(crate) fn on_kill(mut hook: impl FnMut() + 'static) {
        set(Point::Kill, move || {
            hook();
            false
        });
    }

    /// Nothing is done there any more.
    pub(crate) fn clear(point: Point) {
        swap(point, None);
    }

    /// Whether it fails here.
    pub(crate) fn fails(point: Point) -> bool {
        // Taken out meanwhile: the hook itself may pass such a point.
        let Some(mut hook) = swap(point, None) else {
            return false;
        };
        let fails = hook();
        swap(point, Some(hook));
        fails
    }
}
