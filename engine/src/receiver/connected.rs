//! A connection that has said what it is.

use crate::net::Accepted;
use crate::tls::{self, Identity};
use std::ops::Deref;
use std::sync::Arc;

/// An accepted connection of which the first bytes were read.
pub(super) struct Connected {
    pub(super) accepted: Accepted,
    /// Its keys, if it has TLS.
    pub(super) tls: Option<tls::Channel>,
}

impl Connected {
    /// What its certificate says, if it has one.
    pub(super) fn identity(&self) -> Option<Arc<Identity>> {
        self.tls.as_ref()?.about.identity.clone()
    }
}

impl Deref for Connected {
    type Target = Accepted;

    fn deref(&self) -> &Accepted {
        &self.accepted
    }
}
