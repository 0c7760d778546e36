//! Several streams in one input, with long runs of one byte made short, so that an input of a few hundred bytes has whole packets and
//! pages.
//!
//! A piece begins with a byte: the stream in its lowest four bits, the kind in the next ([`FILL`]), above it the length less one, or
//! [`LONG`] and the length in two bytes, or [`LONGEST`] and the length in units of 64 in two bytes. Literal bytes follow, or the one
//! byte that is repeated.

/// Streams of an input.
pub const STREAMS: usize = 16;

const FILL: u8 = 1 << 4;
const LENGTH: u8 = 5;
const LONG: u8 = 6;
const LONGEST: u8 = 7;
const UNIT: usize = 64;

/// Runs of so many equal bytes are worth a piece of their own.
const RUN_MIN: usize = 8;

/// A part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These bytes.
    Literal(&'a [u8]),
    /// So many of this byte.
    Fill(u8, usize),
}

impl Piece<'_> {
    /// Appends its bytes.
    pub fn append_to(&self, out: &mut Vec<u8>) {
        match *self {
            Piece::Literal(bytes) => out.extend_from_slice(bytes),
            Piece::Fill(byte, length) => out.resize(out.len() + length, byte),
        }
    }

    fn len(&self) -> usize {
        match self {
            Piece::Literal(bytes) => bytes.len(),
            Piece::Fill(_, length) => *length,
        }
    }
}

/// The pieces of an input and their streams, of together at most so many bytes.
pub struct Pieces<'a> {
    rest: &'a [u8],
    room: usize,
}

impl<'a> Pieces<'a> {
    /// Reads an input.
    pub fn new(input: &'a [u8], bytes_max: usize) -> Self {
        Self {
            rest: input,
            room: bytes_max,
        }
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<usize> {
        let bytes = self.take(2)?;
        Some(usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = (usize, Piece<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let head = self.take(1)?[0];
        let length = match head >> LENGTH {
            LONG => self.number()?,
            LONGEST => self.number()? * UNIT,
            short => usize::from(short) + 1,
        };
        let piece = match head & FILL {
            0 => Piece::Literal(self.take(length.min(self.rest.len()))?),
            _ => Piece::Fill(self.take(1)?[0], length),
        };
        self.room = self.room.checked_sub(piece.len())?;
        Some((usize::from(head) % STREAMS, piece))
    }
}

/// Appends bytes of a stream as pieces.
pub fn encode(stream: usize, bytes: &[u8], out: &mut Vec<u8>) {
    let stream = u8::try_from(stream % STREAMS).unwrap_or(0);
    let mut rest = bytes;
    let mut literal = 0;
    while literal < rest.len() {
        let byte = rest[literal];
        let run = rest[literal..].iter().take_while(|next| **next == byte).count();
        if run < RUN_MIN {
            literal += run;
            continue;
        }
        put_literal(stream, &rest[..literal], out);
        put_fill(stream, byte, run, out);
        rest = &rest[literal + run..];
        literal = 0;
    }
    put_literal(stream, rest, out);
}

fn put_literal(stream: u8, bytes: &[u8], out: &mut Vec<u8>) {
    for part in bytes.chunks(usize::from(u16::MAX)) {
        put_head(stream, part.len(), out);
        out.extend_from_slice(part);
    }
}

fn put_fill(stream: u8, byte: u8, mut length: usize, out: &mut Vec<u8>) {
    while length >= UNIT {
        let units = u16::try_from(length / UNIT).unwrap_or(u16::MAX);
        out.push(LONGEST << LENGTH | FILL | stream);
        out.extend_from_slice(&units.to_le_bytes());
        out.push(byte);
        length -= usize::from(units) * UNIT;
    }
    if length > 0 {
        put_head(stream | FILL, length, out);
        out.push(byte);
    }
}

fn put_head(low: u8, length: usize, out: &mut Vec<u8>) {
    match u8::try_from(length) {
        Ok(short @ 1..=6) => out.push((short - 1) << LENGTH | low),
        _ => {
            out.push(LONG << LENGTH | low);
            out.extend_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
        }
    }
}
