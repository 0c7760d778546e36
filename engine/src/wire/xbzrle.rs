//! XBZRLE deltas: what changed in a page since it was last received (spec §7.4).
//!
//! A delta is pairs of runs: unchanged bytes, then new bytes. Both lengths are ULEB128 of at most two bytes.

use super::WireError;
use crate::units::PAGE_SIZE;

/// Bytes to be written into a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Where, in bytes from the page's start. `at + bytes.len()` is within the page.
    pub at: usize,
    /// What; never empty.
    pub bytes: &'a [u8],
}

/// The runs of a delta, each checked against the page before it is handed out. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    rest: &'a [u8],
    at: usize,
    first: bool,
}

/// The runs of `delta`.
pub fn runs(delta: &[u8]) -> Runs<'_> {
    Runs {
        rest: delta,
        at: 0,
        first: true,
    }
}

impl<'a> Runs<'a> {
    fn number(&mut self) -> Result<usize, WireError> {
        let ended = WireError::Xbzrle("it ends before a run's length");
        let (&low, rest) = self.rest.split_first().ok_or(ended.clone())?;
        self.rest = rest;
        if low < 0x80 {
            return Ok(usize::from(low));
        }
        let (&high, rest) = self.rest.split_first().ok_or(ended)?;
        self.rest = rest;
        if high >= 0x80 {
            return Err(WireError::Xbzrle("a run's length has more than two bytes"));
        }
        Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
    }

    fn run(&mut self) -> Result<Run<'a>, WireError> {
        let skipped = self.number()?;
        if skipped == 0 && !self.first {
            return Err(WireError::Xbzrle(
                "an empty run of unchanged bytes that is not the first",
            ));
        }
        self.first = false;
        let length = self.number()?;
        if length == 0 {
            return Err(WireError::Xbzrle("an empty run of new bytes"));
        }
        let at = self.at + skipped;
        if at + length > PAGE_SIZE {
            return Err(WireError::Xbzrle("a run reaches beyond the page"));
        }
        let cut = WireError::Xbzrle("it ends inside a run of new bytes");
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(cut)?;
        self.rest = rest;
        self.at = at + length;
        Ok(Run { at, bytes })
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = Result<Run<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let run = self.run();
        if run.is_err() {
            self.rest = &[];
        }
        Some(run)
    }
}

/// Checks all of `delta` without writing, so that no page is left partly changed.
///
/// # Errors
/// As [`apply`].
pub fn check(delta: &[u8]) -> Result<(), WireError> {
    if delta.is_empty() {
        return Err(WireError::Xbzrle("it is empty"));
    }
    runs(delta).try_for_each(|run| run.map(drop))
}

/// Applies `delta` to the newest received content of its page.
///
/// # Errors
/// If it is malformed or exceeds the page; the page is then unchanged.
pub fn apply(delta: &[u8], page: &mut [u8; PAGE_SIZE]) -> Result<(), WireError> {
    check(delta)?;
    for run in runs(delta) {
        let Run { at, bytes } = run?;
        page[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Ok(())
}

/// Appends the delta that turns `old` into `new`, byte runs as they come. It can be longer than a page, and is
/// empty if nothing changed; a primary sends no delta then.
pub fn encode(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], out: &mut Vec<u8>) {
    let differs = |at: &usize| old[*at] != new[*at];
    let mut at = 0;
    while let Some(start) = (at..PAGE_SIZE).find(differs) {
        let end = (start..PAGE_SIZE).find(|i| !differs(i)).unwrap_or(PAGE_SIZE);
        put_number(out, start - at);
        put_number(out, end - start);
        out.extend_from_slice(&new[start..end]);
        at = end;
    }
}

/// A number up to the page size, which two groups of seven bits hold.
fn put_number(out: &mut Vec<u8>, number: usize) {
    let [low, high] = [number & 0x7f, number >> 7].map(|part| u8::try_from(part).expect("of 14 bits"));
    if high == 0 {
        out.push(low);
    } else {
        out.extend_from_slice(&[low | 0x80, high]);
    }
}
