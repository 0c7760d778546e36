//! A message for the operator that is only text.

use super::guest::SessionTitle;
use std::fmt;

/// A line for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The session that it is about, where it is about one.
    pub session: Option<SessionTitle>,
    /// All that is said; the session is named in it, too.
    pub text: String,
}

impl Remark {
    pub(super) fn of(session: &SessionTitle, text: String) -> Self {
        let session = Some(session.clone());
        Self { session, text }
    }
}

impl From<String> for Remark {
    fn from(text: String) -> Self {
        Self { session: None, text }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}
