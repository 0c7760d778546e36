//! A reader over the bytes that have arrived. Too few bytes are a result of their own, not an error.

use super::WireError;

/// Result of a parser: `None` if more bytes are needed, else the value and the number of bytes it took.
pub type Parsed<T> = Result<Option<(T, usize)>, WireError>;

/// Why a parser ended before its value was complete.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The bytes so far are fine; more are needed.
    Incomplete,
    /// More bytes would not help.
    Bad(WireError),
}

impl From<WireError> for Stop {
    fn from(error: WireError) -> Self {
        Self::Bad(error)
    }
}

/// Position in the received bytes. All numbers of the wire are big-endian.
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Runs `parser` from the start of `input` and returns how many bytes it took.
    pub(crate) fn parse<T>(
        input: &'a [u8],
        parser: impl FnOnce(&mut Cursor<'a>) -> Result<T, Stop>,
    ) -> Parsed<T> {
        let mut cursor = Cursor { rest: input };
        match parser(&mut cursor) {
            Ok(value) => Ok(Some((value, input.len() - cursor.rest.len()))),
            Err(Stop::Incomplete) => Ok(None),
            Err(Stop::Bad(error)) => Err(error),
        }
    }

    /// The next byte, not consumed.
    pub(crate) fn peek(&self) -> Result<u8, Stop> {
        self.rest.first().copied().ok_or(Stop::Incomplete)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Stop> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(Stop::Incomplete)?;
        self.rest = rest;
        Ok(array)
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Stop::Incomplete)?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Stop> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn be16(&mut self) -> Result<u16, Stop> {
        Ok(u16::from_be_bytes(*self.array()?))
    }

    pub(crate) fn be32(&mut self) -> Result<u32, Stop> {
        Ok(u32::from_be_bytes(*self.array()?))
    }

    pub(crate) fn be64(&mut self) -> Result<u64, Stop> {
        Ok(u64::from_be_bytes(*self.array()?))
    }

    /// One length byte and that many bytes.
    pub(crate) fn str8(&mut self) -> Result<&'a [u8], Stop> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }
}

/// Appends a `str8`.
///
/// # Panics
/// If the text is longer than 255 bytes: no such name can come from the wire, so it is the caller's own.
pub(crate) fn put_str8(out: &mut Vec<u8>, text: &[u8]) {
    let length = u8::try_from(text.len()).expect("a str8 has at most 255 bytes");
    out.push(length);
    out.extend_from_slice(text);
}
