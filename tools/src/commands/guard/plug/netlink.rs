//! Requests to the kernel's network configuration over rtnetlink, and what comes back.
//!
//! A message is a header of 16 bytes with its length, kind, flags and number, a structure of that kind, and attributes: length, kind,
//! and a payload, which may be attributes again. All of it is in the byte order of the host, and padded to four bytes.

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::os::fd::{AsRawFd, OwnedFd};

const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;

/// Flags of a message. `CREATE` makes what is not there, and with `EXCLUSIVE` refuses what is.
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
pub(super) const EXCLUSIVE: u16 = 0x200;
pub(super) const CREATE: u16 = 0x400;

/// The kind of a message that says how a request ended: 0, or a negative error number.
const ERROR: u16 = 2;

/// Bits of an attribute's kind that are not part of it: that it is nested, and in which byte order it is.
const KIND_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// Longest answer that is read. A link with all of its attributes has some 2 KiB.
const ANSWER_MAX: usize = 32 << 10;

/// How long the kernel may take. It answers at once, unless another process holds its lock of network configuration.
const LIMIT_S: i64 = 5;

fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// One of that kind, with the structure that belongs to it.
    pub(super) fn new(kind: u16, flags: u16, structure: &[u8]) -> Self {
        let mut body = structure.to_vec();
        body.resize(padded(body.len()), 0);
        Self { kind, flags, body }
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, payload: &[u8]) -> Self {
        self.add(kind, payload);
        self
    }

    /// Adds an attribute of a text, with the zero that ends it.
    pub(super) fn with_text(self, kind: u16, text: &str) -> Self {
        let bytes: Vec<u8> = text.bytes().chain([0]).collect();
        self.with(kind, &bytes)
    }

    /// Adds an attribute of the attributes that `fill` adds.
    pub(super) fn with_nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.body.len();
        self.add(kind | NESTED, &[]);
        let mut filled = fill(self);
        let length = u16::try_from(filled.body.len() - start).expect("requests are short");
        filled.body[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    fn add(&mut self, kind: u16, payload: &[u8]) {
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + payload.len()).expect("requests are short");
        self.body.extend_from_slice(&length.to_ne_bytes());
        self.body.extend_from_slice(&kind.to_ne_bytes());
        self.body.extend_from_slice(payload);
        self.body.resize(padded(self.body.len()), 0);
    }

    #[cfg(test)]
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    fn bytes(&self, number: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + self.body.len()).expect("requests are short");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.body.len());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | REQUEST | ACKNOWLEDGE).to_ne_bytes());
        bytes.extend_from_slice(&number.to_ne_bytes());
        // The kernel fills in whose it is.
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A message of the kernel.
struct Message<'a> {
    kind: u16,
    number: u32,
    body: &'a [u8],
}

/// Reads a number at the beginning of some bytes.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

/// The messages in what was read; those after one that is cut are not seen.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let (kind, number) = (u16_at(bytes, 4)?, u32_at(bytes, 8)?);
        let body = bytes.get(HEADER_BYTES..length)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some(Message { kind, number, body })
    })
}

/// Attributes by kind and payload; those after one that is cut are not seen.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (usize::from(u16_at(bytes, 0)?), u16_at(bytes, 2)?);
        let payload = bytes.get(ATTRIBUTE_HEADER_BYTES..length)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some((kind & KIND_MASK, payload))
    })
}

/// The payload of the first attribute of that kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, payload)| (found == kind).then_some(payload))
}

/// A text in an attribute.
pub(super) fn text(payload: &[u8]) -> String {
    let end = payload
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

/// A connection to the kernel. It belongs to the network namespace of the thread that made it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    number: u32,
}

impl Netlink {
    /// # Errors
    /// If there is no descriptor for it.
    pub(super) fn connect() -> Result<Self, Errno> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(LIMIT_S, 0))?;
        Ok(Self { socket, number: 0 })
    }

    /// Carries out a request, and returns the body of what the kernel answers beside its end: nothing for most.
    ///
    /// # Errors
    /// The kernel's own.
    pub(super) fn execute(&mut self, request: &Request) -> Result<Vec<u8>, Errno> {
        self.number = self.number.wrapping_add(1);
        let bytes = request.bytes(self.number);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let (mut buffer, mut answer) = (vec![0; ANSWER_MAX], Vec::new());
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            // What is left of a request that took too long has another number.
            for message in messages(&buffer[..length]).filter(|message| message.number == self.number) {
                if message.kind != ERROR {
                    answer = message.body.to_vec();
                    continue;
                }
                let code = u32_at(message.body, 0).ok_or(Errno::EBADMSG)?;
                return match 0_i32.wrapping_sub(code.cast_signed()) {
                    0 => Ok(answer),
                    code => Err(Errno::from_raw(code)),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes as a little-endian machine has them.
    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_is_encoded_as_the_kernel_reads_it() {
        let request = Request::new(16, CREATE | EXCLUSIVE, &[0xaa; 6])
            .with_text(3, "abcd")
            .with_nested(18, |info| info.with(1, b"ifb").with_nested(2, |none| none));
        let expected: &[&[u8]] = &[
            // Length, kind, flags with REQUEST and ACKNOWLEDGE, number, sender.
            &[60, 0, 0, 0, 16, 0, 0x05, 0x06, 7, 0, 0, 0, 0, 0, 0, 0],
            // The structure, padded.
            &[0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0, 0],
            // A text of 4 bytes and its zero, padded.
            &[9, 0, 3, 0, b'a', b'b', b'c', b'd', 0, 0, 0, 0],
            // A nest, the attribute in it, padded, and an empty nest.
            &[16, 0, 18, 0x80, 7, 0, 1, 0, b'i', b'f', b'b', 0],
            &[4, 0, 2, 0x80],
        ];
        let expected = expected.concat();
        let bytes = request.bytes(7);
        assert_eq!(bytes.len(), expected.len());
        assert_eq!(u32_at(&bytes, 0), u32::try_from(bytes.len()).ok());
        assert_eq!(bytes[4..], expected[4..]);
    }

    #[test]
    fn what_is_encoded_is_found_again() {
        let request = Request::new(1, 0, &[])
            .with(1, b"one")
            .with_nested(2, |nest| nest.with_text(5, "five").with(6, &7_u32.to_ne_bytes()))
            .with(3, b"");
        let body = &request.body;
        assert_eq!(attribute(body, 1), Some(&b"one"[..]));
        let nest = attribute(body, 2).unwrap();
        assert_eq!(text(attribute(nest, 5).unwrap()), "five");
        assert_eq!(u32_at(attribute(nest, 6).unwrap(), 0), Some(7));
        assert_eq!(attribute(body, 3), Some(&b""[..]));
        assert_eq!(attribute(body, 4), None);
        let bytes = [request.bytes(1), request.bytes(2)].concat();
        let numbers: Vec<_> = messages(&bytes).map(|message| message.number).collect();
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn what_is_cut_or_wrong_is_not_read() {
        let whole = Request::new(1, 0, &[1; 4]).with(1, b"one").bytes(1);
        for cut in 0..whole.len() {
            assert_eq!(messages(&whole[..cut]).count(), 0, "{cut}");
        }
        // Lengths of nothing end the walk, and so do those beyond the end.
        for length in [0_u16, 3, 9, u16::MAX] {
            let bytes = [length.to_ne_bytes(), 1_u16.to_ne_bytes()].concat();
            assert_eq!(attributes(&bytes).count(), 0, "{length}");
        }
    }

    #[test]
    fn the_kernel_answers_for_loopback() {
        let mut netlink = Netlink::connect().unwrap();
        // RTM_GETLINK of IFLA_IFNAME, with a struct ifinfomsg.
        let get = |name| Request::new(18, 0, &[0; 16]).with_text(3, name);
        let answer = netlink.execute(&get("lo")).unwrap();
        assert_eq!(u32_at(&answer, 4), Some(1));
        assert_eq!(attribute(&answer[16..], 3).map(text), Some("lo".to_owned()));
        assert_eq!(netlink.execute(&get("nobody-has-it")), Err(Errno::ENODEV));
    }
}
