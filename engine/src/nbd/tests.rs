//! The protocol byte by byte, against what its document says.

use super::handshake::{Agreed, Exports, GREETING, Handshake, HandshakeError, Progress, Unavailable};
use super::request::{Command, NbdError, Range, Request, RequestError, put_done, put_error, put_read_head};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

struct Two {
    opened: Option<String>,
}

impl Exports for Two {
    fn names(&self) -> Vec<String> {
        vec!["root".into(), "data".into()]
    }

    fn size(&self, name: &str) -> Result<u64, Unavailable> {
        match self.names().iter().any(|known| known == name) {
            true => Ok(SIZE),
            false => Err(Unavailable(format!("no export {name}"))),
        }
    }

    fn open(&mut self, name: &str) -> Result<u64, Unavailable> {
        let size = self.size(name)?;
        self.opened = Some(name.to_owned());
        Ok(size)
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [
        b"IHAVEOPT",
        &number.to_be_bytes()[..],
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(name.len()).unwrap();
    [&length.to_be_bytes(), name.as_bytes(), rest].concat()
}

/// The replies: (option, kind, data).
fn replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let word = |at: &[u8]| u32::from_be_bytes(at[..4].try_into().unwrap());
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        let length = usize::try_from(word(&bytes[16..])).unwrap();
        replies.push((
            word(&bytes[8..]),
            word(&bytes[12..]),
            bytes[20..20 + length].to_vec(),
        ));
        bytes = &bytes[20 + length..];
    }
    replies
}

struct Client {
    handshake: Handshake,
    exports: Two,
}

impl Client {
    fn new() -> Self {
        let mut client = Self {
            handshake: Handshake::new(),
            exports: Two { opened: None },
        };
        let (taken, progress, out) = client.send(&3u32.to_be_bytes()).unwrap();
        assert_eq!((taken, progress, out.len()), (4, Progress::Continue, 0));
        client
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(usize, Progress, Vec<u8>), HandshakeError> {
        let mut out = Vec::new();
        let (taken, progress) = self.handshake.step(bytes, &mut self.exports, &mut out)?;
        Ok((taken, progress, out))
    }

    fn ask(&mut self, number: u32, data: &[u8]) -> (Progress, Vec<(u32, u32, Vec<u8>)>) {
        let bytes = option(number, data);
        for cut in 0..bytes.len() {
            assert_eq!(
                self.send(&bytes[..cut]).unwrap(),
                (0, Progress::NeedMore, Vec::new())
            );
        }
        let (taken, progress, out) = self.send(&bytes).unwrap();
        assert_eq!(taken, bytes.len());
        (progress, replies(&out))
    }
}

#[test]
fn the_greeting_is_fixed_newstyle() {
    assert_eq!(GREETING[..8], *b"NBDMAGIC");
    assert_eq!(GREETING[8..16], *b"IHAVEOPT");
    assert_eq!(GREETING[16..], [0, 3]);
    for flags in [0u32, 2, 5, u32::MAX] {
        let mut handshake = Handshake::new();
        let step = handshake.step(&flags.to_be_bytes(), &mut Two { opened: None }, &mut Vec::new());
        assert_eq!(step, Err(HandshakeError::Flags(flags)));
    }
}

#[test]
fn go_chooses_and_info_does_not() {
    let mut client = Client::new();
    let (progress, answers) = client.ask(6, &named("data", &[0, 1, 0, 3]));
    assert_eq!(progress, Progress::Continue);
    assert_eq!(client.exports.opened, None);
    assert_eq!(
        answers.iter().map(|(_, kind, _)| *kind).collect::<Vec<_>>(),
        [3, 3, 1]
    );
    assert_eq!(answers[0].2[..10], [&[0, 0][..], &SIZE.to_be_bytes()].concat());
    assert_eq!(answers[1].2.len(), 14);
    let (progress, answers) = client.ask(7, &named("nothing", &[0, 0]));
    assert_eq!(progress, Progress::Continue);
    assert_eq!(
        (answers[0].1, &answers[0].2[..]),
        (0x8000_0006, &b"no export nothing"[..])
    );
    let (progress, _) = client.ask(7, &named("data", &[0, 0]));
    let agreed = Agreed {
        has_structured_replies: false,
        has_allocation: false,
    };
    assert_eq!(progress, Progress::Chosen(agreed));
    assert_eq!(client.exports.opened.as_deref(), Some("data"));
}

#[test]
fn export_name_has_its_own_reply() {
    let mut client = Client::new();
    let (_, progress, out) = client.send(&option(1, b"root")).unwrap();
    assert!(matches!(progress, Progress::Chosen(_)));
    assert_eq!((&out[..8], out.len()), (&SIZE.to_be_bytes()[..], 10));
    let mut client = Client::new();
    assert!(matches!(
        client.send(&option(1, b"none")),
        Err(HandshakeError::Unavailable(_))
    ));
}

#[test]
fn options_that_are_unknown_or_wrong_are_refused() {
    let mut client = Client::new();
    for number in [4, 5, 11, 77] {
        let (progress, answers) = client.ask(number, b"data");
        assert_eq!(
            (progress, answers[0].1),
            (Progress::Continue, 0x8000_0001),
            "{number}"
        );
    }
    for (number, data) in [
        (3, &b"x"[..]),
        (8, b"x"),
        (6, b""),
        (7, &[0, 0, 0, 9, 1]),
        (10, b"x"),
    ] {
        let (progress, answers) = client.ask(number, data);
        assert_eq!(
            (progress, answers[0].1),
            (Progress::Continue, 0x8000_0003),
            "{number}"
        );
    }
    let long = [b"IHAVEOPT", &9u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
    assert_eq!(
        client.send(&long),
        Err(HandshakeError::TooLong {
            option: 9,
            length: u32::MAX
        })
    );
    assert!(matches!(client.send(&[0; 16]), Err(HandshakeError::Magic(_))));
    assert_eq!(client.ask(2, b"").0, Progress::Ended);
}

#[test]
fn the_allocation_context_is_selected_for_one_export() {
    let queries = |name: &str, list: &[&str]| {
        let mut rest = u32::try_from(list.len()).unwrap().to_be_bytes().to_vec();
        list.iter().for_each(|query| rest.extend(named(query, b"")));
        named(name, &rest)
    };
    let mut client = Client::new();
    // Not before structured replies.
    assert_eq!(
        client.ask(10, &queries("root", &["base:allocation"])).1[0].1,
        0x8000_0003
    );
    assert_eq!(client.ask(8, b"").1[0].1, 1);
    assert_eq!(
        client.ask(9, &queries("root", &[])).1[0].2,
        b"\0\0\0\0base:allocation"
    );
    let answers = client
        .ask(10, &queries("root", &["qemu:dirty-bitmap:x", "base:allocation"]))
        .1;
    assert_eq!(answers[0].2, b"\0\0\0\x01base:allocation");
    let (progress, _) = client.ask(7, &named("root", &[0, 0]));
    let agreed = |has_allocation| {
        Progress::Chosen(Agreed {
            has_structured_replies: true,
            has_allocation,
        })
    };
    assert_eq!(progress, agreed(true));
    let mut other = Client::new();
    other.ask(8, b"");
    other.ask(10, &queries("root", &["base:allocation"]));
    assert_eq!(other.ask(7, &named("data", &[0, 0])).0, agreed(false));
}

fn request(flags: u16, kind: u16, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&77u64.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

const PLAIN: Agreed = Agreed {
    has_structured_replies: false,
    has_allocation: false,
};
const STRUCTURED: Agreed = Agreed {
    has_structured_replies: true,
    has_allocation: true,
};

#[test]
fn requests_are_checked_in_64_bits() {
    let command = |flags, kind, offset, length, agreed: &Agreed| {
        Request::parse(&request(flags, kind, offset, length))
            .unwrap()
            .command(SIZE, agreed)
    };
    let range = |offset, length| Range { offset, length };
    assert_eq!(command(0, 0, 0, 4096, &PLAIN), Ok(Command::Read(range(0, 4096))));
    assert_eq!(command(0, 0, SIZE - 1, 2, &PLAIN), Err(NbdError::Invalid));
    assert_eq!(command(0, 0, u64::MAX, 2, &PLAIN), Err(NbdError::Invalid));
    assert_eq!(command(0, 0, 0, u32::MAX, &PLAIN), Err(NbdError::Invalid));
    assert_eq!(command(4, 0, 0, 1, &PLAIN), Err(NbdError::Invalid));
    assert!(command(4, 0, 0, 1, &STRUCTURED).is_ok());
    assert_eq!(command(0, 1, SIZE, 1, &PLAIN), Err(NbdError::NoSpace));
    assert_eq!(command(0, 6, u64::MAX, u32::MAX, &PLAIN), Err(NbdError::NoSpace));
    assert_eq!(
        command(1, 1, 512, 512, &PLAIN),
        Ok(Command::Write {
            range: range(512, 512),
            fua: true
        })
    );
    assert_eq!(command(0, 7, 0, 4096, &PLAIN), Err(NbdError::Invalid));
    assert!(command(8, 7, 0, 4096, &STRUCTURED).is_ok());
    for kind in 8..64 {
        assert_eq!(command(0, kind, 0, 1, &STRUCTURED), Err(NbdError::Invalid));
    }
    assert_eq!(
        Request::parse(&request(0, 1, 0, (32 << 20) + 1)),
        Err(RequestError::TooLong((32 << 20) + 1))
    );
    assert_eq!(Request::parse(&[0; 28]), Err(RequestError::Magic(0)));
}

#[test]
fn replies_are_laid_out_as_documented() {
    let mut out = Vec::new();
    put_done(&mut out, &STRUCTURED, 77, Ok(()));
    assert_eq!(
        out,
        [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &77u64.to_be_bytes()].concat()
    );
    out.clear();
    put_error(&mut out, &STRUCTURED, 77, NbdError::Io, true);
    let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1];
    assert_eq!(
        out,
        [&head[..], &77u64.to_be_bytes(), &[0, 0, 0, 6, 0, 0, 0, 5, 0, 0]].concat()
    );
    out.clear();
    let range = Range {
        offset: 512,
        length: 8,
    };
    put_read_head(&mut out, &STRUCTURED, 77, range);
    let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1];
    assert_eq!(
        out,
        [
            &head[..],
            &77u64.to_be_bytes(),
            &[0, 0, 0, 16],
            &512u64.to_be_bytes()
        ]
        .concat()
    );
}

proptest! {
    /// Whatever comes: an answer or an error, and no step takes more than it was given.
    #[test]
    fn no_bytes_harm_the_handshake(bytes: Vec<u8>, number in 0u32..16, data: Vec<u8>) {
        let _ = super::fuzz(&bytes);
        let _ = super::fuzz(&[&3u32.to_be_bytes(), &option(number, &data)[..], &bytes].concat());
    }
}
