//! The handshake: from the server's greeting to the choice of an export.
//!
//! ```text
//!            client flags           option: answered
//!  Greeting ─────────────► Options ──────────────────┐
//!                             ▲ └────────────────────┘
//!                             └─── GO, EXPORT_NAME: chosen; ABORT: ended
//! ```
//!
//! Options that are not known are refused with NBD_REP_ERR_UNSUP, as the protocol demands, so that newer clients fall back.

use thiserror::Error;

/// What the server sends first: two magics and its flags, fixed newstyle and "no zeroes".
pub(crate) const GREETING: [u8; 18] = *b"NBDMAGICIHAVEOPT\x00\x03";

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Most bytes of an option: four names of the protocol's greatest length.
pub(crate) const OPTION_MAX: u32 = 16 << 10;

/// Most bytes of a name that a client asks for.
const NAME_MAX: usize = 4096;

/// Most queries for contexts in one option: each is answered by a reply of its own.
const QUERIES_MAX: u32 = 64;

const FIXED_NEWSTYLE: u32 = 1;
const NO_ZEROES: u32 = 2;

mod option {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const ABORT: u32 = 2;
    pub(super) const LIST: u32 = 3;
    pub(super) const INFO: u32 = 6;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const LIST_META_CONTEXT: u32 = 9;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const SERVER: u32 = 2;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    pub(super) const ERR_UNSUP: u32 = 0x8000_0001;
    pub(super) const ERR_INVALID: u32 = 0x8000_0003;
    pub(super) const ERR_UNKNOWN: u32 = 0x8000_0006;
}

/// Items of information on an export.
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// What the server can do: flags, FLUSH, FUA, TRIM, WRITE_ZEROES, CACHE, FAST_ZERO; one connection at a time.
const TRANSMISSION_FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 1024 | 2048;

/// With structured replies also: a read is one chunk where the client wants that.
const DONT_FRAGMENT: u16 = 128;

/// Sizes of requests in bytes: least, preferred, most.
const BLOCK_SIZES: [u32; 3] = [1, 4096, 32 << 20];

/// The one context there is, and its id.
const ALLOCATION: &str = "base:allocation";
pub(crate) const ALLOCATION_ID: u32 = 1;

/// Why a client is disconnected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum HandshakeError {
    #[error("it does not speak fixed newstyle NBD (client flags {0:#x})")]
    Flags(u32),
    #[error("an option of NBD begins with {0:02x?}")]
    Magic([u8; 8]),
    #[error("option {option} of NBD has {length} bytes, and at most {OPTION_MAX} are taken")]
    TooLong { option: u32, length: u32 },
    #[error("the name of an export is not UTF-8")]
    Name,
    #[error("{0}")]
    Unavailable(#[from] Unavailable),
}

/// Why a client does not get an export, in words for its user.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) struct Unavailable(pub(crate) String);

/// The exports as a handshake needs them.
pub(crate) trait Exports {
    /// Their names.
    fn names(&self) -> Vec<String>;

    /// The size of an export.
    ///
    /// # Errors
    /// If there is no such export.
    fn size(&self, name: &str) -> Result<u64, Unavailable>;

    /// Opens an export for this connection. Returns its size.
    ///
    /// # Errors
    /// If the client does not get it.
    fn open(&mut self, name: &str) -> Result<u64, Unavailable>;
}

/// What client and server have agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) has_structured_replies: bool,
    /// Whether the client may ask what is allocated.
    pub(crate) has_allocation: bool,
}

/// Where a handshake stands after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    NeedMore,
    /// The replies are to be sent.
    Continue,
    /// The replies are to be sent; requests follow.
    Chosen(Agreed),
    /// The replies are to be sent, and the connection closed.
    Ended,
}

/// The handshake with one client. See the module.
pub(crate) struct Handshake {
    has_client_flags: bool,
    has_no_zeroes: bool,
    has_structured_replies: bool,
    /// The export for which the context was selected.
    allocation_of: Option<String>,
}

/// Cuts numbers and names off the data of an option.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    /// A text behind its length.
    fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        if length > NAME_MAX {
            return None;
        }
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

impl Handshake {
    /// A handshake whose greeting is sent.
    pub(crate) fn new() -> Self {
        Self {
            has_client_flags: false,
            has_no_zeroes: false,
            has_structured_replies: false,
            allocation_of: None,
        }
    }

    /// Takes a step: returns how many of the bytes it has used, and appends replies to `out`.
    ///
    /// # Errors
    /// If the client must be disconnected.
    pub(crate) fn step(
        &mut self,
        bytes: &[u8],
        exports: &mut dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Progress), HandshakeError> {
        if !self.has_client_flags {
            let Some((flags, _)) = bytes.split_first_chunk() else {
                return Ok((0, Progress::NeedMore));
            };
            return self.flags(u32::from_be_bytes(*flags));
        }
        let Some((head, rest)) = bytes.split_first_chunk::<16>() else {
            return Ok((0, Progress::NeedMore));
        };
        let (magic, mut numbers) = (&head[..8], Data(&head[8..]));
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::Magic(magic.try_into().unwrap_or_default()));
        }
        let (option, length) = (numbers.u32().unwrap_or(0), numbers.u32().unwrap_or(0));
        if length > OPTION_MAX {
            return Err(HandshakeError::TooLong { option, length });
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(data) = rest.get(..length) else {
            return Ok((0, Progress::NeedMore));
        };
        Ok((head.len() + length, self.option(option, data, exports, out)?))
    }

    fn flags(&mut self, flags: u32) -> Result<(usize, Progress), HandshakeError> {
        if flags & FIXED_NEWSTYLE == 0 || flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(HandshakeError::Flags(flags));
        }
        self.has_client_flags = true;
        self.has_no_zeroes = flags & NO_ZEROES != 0;
        Ok((4, Progress::Continue))
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &mut dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        match option {
            option::EXPORT_NAME => return self.export_name(data, exports, out),
            option::ABORT => {
                put_reply(out, option, reply::ACK, &[]);
                return Ok(Progress::Ended);
            }
            option::LIST if data.is_empty() => {
                for name in exports.names() {
                    put_reply(out, option, reply::SERVER, &text(&name));
                }
                put_reply(out, option, reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.has_structured_replies = true;
                put_reply(out, option, reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                refuse(out, option, reply::ERR_INVALID, "this option has no data");
            }
            option::INFO | option::GO => return Ok(self.info(option, data, exports, out)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.contexts(option, data, exports, out);
            }
            _ => refuse(out, option, reply::ERR_UNSUP, "unknown option"),
        }
        Ok(Progress::Continue)
    }

    fn transmission_flags(&self) -> u16 {
        match self.has_structured_replies {
            true => TRANSMISSION_FLAGS | DONT_FRAGMENT,
            false => TRANSMISSION_FLAGS,
        }
    }

    fn agreed(&self, name: &str) -> Agreed {
        Agreed {
            has_structured_replies: self.has_structured_replies,
            has_allocation: self.allocation_of.as_deref() == Some(name),
        }
    }

    /// The one option that has no way to answer an error but to disconnect.
    fn export_name(
        &mut self,
        data: &[u8],
        exports: &mut dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        let name = std::str::from_utf8(data).map_err(|_| HandshakeError::Name)?;
        let size = exports.open(name)?;
        out.extend(size.to_be_bytes());
        out.extend(self.transmission_flags().to_be_bytes());
        if !self.has_no_zeroes {
            out.extend([0; 124]);
        }
        Ok(Progress::Chosen(self.agreed(name)))
    }

    fn info(&mut self, option: u32, data: &[u8], exports: &mut dyn Exports, out: &mut Vec<u8>) -> Progress {
        let mut rest = Data(data);
        let parsed = rest.text().zip(rest.u16()).and_then(|(name, count)| {
            let mut wants_sizes = false;
            for _ in 0..count {
                wants_sizes |= rest.u16()? == INFO_BLOCK_SIZE;
            }
            rest.end().map(|()| (name, wants_sizes))
        });
        let Some((name, wants_sizes)) = parsed else {
            refuse(out, option, reply::ERR_INVALID, "malformed option");
            return Progress::Continue;
        };
        let size = match option {
            option::GO => exports.open(name),
            _ => exports.size(name),
        };
        let size = match size {
            Ok(size) => size,
            Err(why) => {
                refuse(out, option, reply::ERR_UNKNOWN, &why.0);
                return Progress::Continue;
            }
        };
        let mut item = INFO_EXPORT.to_be_bytes().to_vec();
        item.extend(size.to_be_bytes());
        item.extend(self.transmission_flags().to_be_bytes());
        put_reply(out, option, reply::INFO, &item);
        if wants_sizes {
            let mut item = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
            item.extend(BLOCK_SIZES.iter().flat_map(|size| size.to_be_bytes()));
            put_reply(out, option, reply::INFO, &item);
        }
        put_reply(out, option, reply::ACK, &[]);
        match option {
            option::GO => Progress::Chosen(self.agreed(name)),
            _ => Progress::Continue,
        }
    }

    fn contexts(&mut self, option: u32, data: &[u8], exports: &mut dyn Exports, out: &mut Vec<u8>) {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            // Each such option replaces the selection, also if it is refused.
            self.allocation_of = None;
            if !self.has_structured_replies {
                return refuse(
                    out,
                    option,
                    reply::ERR_INVALID,
                    "ask for structured replies first",
                );
            }
        }
        let mut rest = Data(data);
        let parsed = rest.text().zip(rest.u32()).and_then(|(name, count)| {
            if count > QUERIES_MAX {
                return None;
            }
            let mut is_asked = count == 0 && !is_set;
            for _ in 0..count {
                let query = rest.text()?;
                is_asked |= query == ALLOCATION || (query == "base:" && !is_set);
            }
            rest.end().map(|()| (name, is_asked))
        });
        let Some((name, is_asked)) = parsed else {
            return refuse(out, option, reply::ERR_INVALID, "malformed option");
        };
        if let Err(why) = exports.size(name) {
            return refuse(out, option, reply::ERR_UNKNOWN, &why.0);
        }
        if is_asked {
            let id = if is_set { ALLOCATION_ID } else { 0 };
            let item = [&id.to_be_bytes(), ALLOCATION.as_bytes()].concat();
            put_reply(out, option, reply::META_CONTEXT, &item);
            if is_set {
                self.allocation_of = Some(name.to_owned());
            }
        }
        put_reply(out, option, reply::ACK, &[]);
    }
}

fn text(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes(), text.as_bytes()].concat()
}

fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, why: &str) {
    // The protocol's limit of a text.
    let mut end = why.len().min(NAME_MAX);
    while !why.is_char_boundary(end) {
        end -= 1;
    }
    put_reply(out, option, kind, &why.as_bytes()[..end]);
}
