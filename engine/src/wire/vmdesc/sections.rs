//! Whether a device state consists of the sections that its vmdesc lists (spec §11.2).

use crate::wire::stream::{SECTION_EOF, Section, parse_footer};
use std::fmt;

/// What speaks for the end of an initial device state, beside its form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The vmdesc lists exactly the sections before it, with their names and lengths.
    Described,
    /// It lists others: it is of another state, or describes this one in a way that is not known here.
    Undescribed(Mismatch),
}

/// Where a device state is not what its vmdesc says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The device among those that the text lists, counted from 0.
    pub device: u64,
    /// The byte of the device state.
    pub at: u64,
    /// What is not there.
    pub kind: MismatchKind,
}

/// What a device state lacks of what its vmdesc says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MismatchKind {
    /// A section of that name and instance begins.
    Head,
    /// A footer with the section's id follows the body.
    Footer,
    /// The EOF byte follows the last section, and no other byte.
    Eof,
    /// The text says how long the body is.
    Length,
    /// The text has the form that is known.
    Text,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, at, kind } = self;
        match kind {
            MismatchKind::Head => write!(f, "byte {at} does not begin the section of device {device}"),
            MismatchKind::Footer => write!(f, "the section of device {device} does not end at byte {at}"),
            MismatchKind::Eof => write!(f, "byte {at} is not its last, behind device {device}"),
            MismatchKind::Length => write!(f, "the length of device {device} is not in the description"),
            MismatchKind::Text => write!(f, "device {device} is described in a way that is not known"),
        }
    }
}

/// A device as the text describes it.
#[derive(Debug, Default)]
pub(super) struct Device<'a> {
    pub(super) name: Option<&'a str>,
    /// Of 32 bits; the last one may be shown as -1.
    pub(super) instance: Option<i64>,
    /// Bytes of its section's body.
    pub(super) body: Option<u64>,
}

/// Goes from section to section of a device state.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    state: &'a [u8],
    at: usize,
    devices: u64,
    mismatch: Option<Mismatch>,
}

impl<'a> Walk<'a> {
    /// Over a state with its EOF byte.
    pub(super) fn new(state: &'a [u8]) -> Self {
        Self {
            state,
            at: 0,
            devices: 0,
            mismatch: None,
        }
    }

    /// Goes over the section of the next device.
    pub(super) fn pass(&mut self, device: &Device<'_>) {
        if self.mismatch.is_none() {
            match self.end_of_section(device) {
                Ok(end) => self.at = end,
                Err((at, kind)) => self.mismatch = Some(self.mismatch_at(at, kind)),
            }
            self.devices += 1;
        }
    }

    fn end_of_section(&self, device: &Device<'_>) -> Result<usize, (usize, MismatchKind)> {
        let no_head = (self.at, MismatchKind::Head);
        let Some((
            Section::Full {
                id, idstr, instance, ..
            },
            head,
        )) = self.parse_at(self.at, Section::parse)
        else {
            return Err(no_head);
        };
        let is_named = device.name.is_some_and(|name| name.as_bytes() == idstr);
        let is_instance = |said| said == i64::from(instance) || (said == -1 && instance == u32::MAX);
        if !is_named || !device.instance.is_some_and(is_instance) {
            return Err(no_head);
        }
        let body = device.body.ok_or((self.at, MismatchKind::Length))?;
        let begin = self.at + head;
        let end = usize::try_from(body)
            .ok()
            .and_then(|body| begin.checked_add(body));
        let end = end.unwrap_or(usize::MAX);
        match self.parse_at(end, |rest| parse_footer(rest, id)) {
            Some(((), footer)) => Ok(end + footer),
            None => Err((end, MismatchKind::Footer)),
        }
    }

    /// What is at a position, if all of it is there.
    fn parse_at<T>(
        &self,
        at: usize,
        parse: impl FnOnce(&'a [u8]) -> crate::wire::Parsed<T>,
    ) -> Option<(T, usize)> {
        let rest = self.state.get(at..)?;
        parse(rest).ok().flatten()
    }

    /// What the whole text says, once all devices are passed.
    pub(super) fn evidence(&self) -> Evidence {
        let is_end = self.devices > 0 && self.state.get(self.at..) == Some(&[SECTION_EOF]);
        match self.mismatch {
            Some(mismatch) => Evidence::Undescribed(mismatch),
            None if is_end => Evidence::Described,
            None => Evidence::Undescribed(self.mismatch_at(self.at, MismatchKind::Eof)),
        }
    }

    /// The text cannot be read from here on.
    pub(super) fn not_understood(&self) -> Evidence {
        Evidence::Undescribed(self.mismatch_at(self.at, MismatchKind::Text))
    }

    fn mismatch_at(&self, at: usize, kind: MismatchKind) -> Mismatch {
        Mismatch {
            device: self.devices,
            at: at as u64,
            kind,
        }
    }
}
