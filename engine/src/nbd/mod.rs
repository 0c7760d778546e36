//! The NBD protocol, server side, without I/O: bytes to requests, and replies to bytes.
//!
//! Fixed newstyle only. `handshake.rs` is the state machine up to the choice of an export, `request.rs` what follows. All
//! numbers on the wire are big-endian. What a peer sends is checked here, in 64 bits, before anything is made of it.

pub(crate) mod handshake;
pub(crate) mod request;
#[cfg(all(test, not(loom)))]
mod tests;

/// What a fuzzer feeds: the handshake of a server with one export, and the requests behind it. Returns how many of each were
/// taken.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) -> (usize, usize) {
    struct One;
    impl handshake::Exports for One {
        fn names(&self) -> Vec<String> {
            vec!["disk".into()]
        }
        fn open(&mut self, name: &str) -> Result<u64, handshake::Unavailable> {
            self.size(name)
        }
        fn size(&self, name: &str) -> Result<u64, handshake::Unavailable> {
            match name {
                "disk" => Ok(1 << 30),
                _ => Err(handshake::Unavailable("no such export".into())),
            }
        }
    }
    let mut handshake = handshake::Handshake::new();
    let mut out = Vec::new();
    let (mut rest, mut steps) = (bytes, 0);
    let agreed = loop {
        out.clear();
        match handshake.step(rest, &mut One, &mut out) {
            Ok((taken, handshake::Progress::Continue)) => rest = &rest[taken..],
            Ok((taken, handshake::Progress::Chosen(agreed))) => {
                rest = &rest[taken..];
                break agreed;
            }
            _ => return (steps, 0),
        }
        steps += 1;
    };
    let mut requests = 0;
    while let Some((head, tail)) = rest.split_first_chunk() {
        let Ok(request) = request::Request::parse(head) else {
            break;
        };
        requests += 1;
        rest = match request.command(1 << 30, &agreed) {
            Ok(request::Command::Write { range, .. }) => {
                assert!(range.end() <= 1 << 30 && range.length <= request::PAYLOAD_MAX);
                tail.get(usize::try_from(range.length).unwrap_or(0)..)
                    .unwrap_or(&[])
            }
            _ => tail,
        };
    }
    (steps, requests)
}
