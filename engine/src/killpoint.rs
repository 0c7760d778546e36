//! Instants at which the simulation may kill the receiver: between any two stores whose order a later receiver relies on.
//!
//! In every build but a test's there are none: [`here`] does nothing.

#[cfg(test)]
type Hook = Box<dyn FnMut()>;

#[cfg(test)]
thread_local! {
    static HOOK: std::cell::RefCell<Option<Hook>> = const { std::cell::RefCell::new(None) };
}

/// What this thread does at such an instant.
#[cfg(test)]
pub(crate) fn set(hook: Option<Hook>) {
    HOOK.set(hook);
}

/// Here the receiver may be killed.
#[cfg(test)]
pub(crate) fn here() {
    // Taken out meanwhile: the hook itself may pass such an instant.
    let hook = HOOK.take();
    if let Some(mut hook) = hook {
        hook();
        HOOK.set(Some(hook));
    }
}

/// Here the receiver may be killed.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn here() {}
