//! What a primary does: compresses the pages of packets, for tests and the synthetic primary.

use super::Method;
use zlib_rs::{Deflate, DeflateFlush, Status};
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, zstd_sys::ZSTD_EndDirective};

/// Room for output that is added at a time.
const STEP_BYTES: usize = 64 << 10;

/// Compresses the packets of one channel, in order: one stream, flushed after each packet.
pub struct Encoder {
    stream: Stream,
}

enum Stream {
    Zlib(Deflate),
    Zstd(CCtx<'static>),
}

impl Encoder {
    /// The encoder of a method at its `level`; `None` where pages are not compressed.
    ///
    /// # Panics
    /// With a method of accelerators, for which there is none, or a level that the method does not have.
    pub fn new(method: Method, level: i32) -> Option<Self> {
        let stream = match method {
            Method::None => return None,
            Method::Zlib => Stream::Zlib(Deflate::new(level, true, 15)),
            Method::Zstd => {
                let mut context = CCtx::create();
                let set = context.set_parameter(CParameter::CompressionLevel(level));
                assert!(set.is_ok(), "zstd has no level {level}");
                Stream::Zstd(context)
            }
            Method::Qpl | Method::Uadk | Method::Qatzip => panic!("there is no encoder for {method:?}"),
        };
        Some(Self { stream })
    }

    /// Its method.
    pub fn method(&self) -> Method {
        match self.stream {
            Stream::Zlib(_) => Method::Zlib,
            Stream::Zstd(_) => Method::Zstd,
        }
    }

    /// Appends the payload of a packet of these pages.
    ///
    /// # Panics
    /// If the library fails, which it does not on memory.
    pub fn encode(&mut self, pages: &[u8], payload: &mut Vec<u8>) {
        self.put(
            pages,
            payload,
            DeflateFlush::SyncFlush,
            ZSTD_EndDirective::ZSTD_e_flush,
        );
    }

    /// The same, and the end of the stream, which a primary never sends.
    #[cfg(all(test, not(miri)))]
    pub(crate) fn finish(&mut self, pages: &[u8], payload: &mut Vec<u8>) {
        self.put(
            pages,
            payload,
            DeflateFlush::Finish,
            ZSTD_EndDirective::ZSTD_e_end,
        );
    }

    /// With any parameters of zstd.
    #[cfg(all(test, not(miri)))]
    pub(crate) fn of_zstd(context: CCtx<'static>) -> Self {
        let stream = Stream::Zstd(context);
        Self { stream }
    }

    fn put(&mut self, pages: &[u8], payload: &mut Vec<u8>, flush: DeflateFlush, end: ZSTD_EndDirective) {
        let mut taken = 0;
        loop {
            let begin = payload.len();
            payload.resize(begin + STEP_BYTES, 0);
            let room = &mut payload[begin..];
            let (took, wrote, complete) = match &mut self.stream {
                Stream::Zlib(deflate) => {
                    let (before_in, before_out) = (deflate.total_in(), deflate.total_out());
                    let status = deflate.compress(&pages[taken..], room, flush);
                    let status = status.expect("a compressor takes any bytes");
                    let count = |bytes: u64| usize::try_from(bytes).expect("within a slice");
                    let wrote = count(deflate.total_out() - before_out);
                    let complete = wrote < STEP_BYTES || status == Status::StreamEnd;
                    (count(deflate.total_in() - before_in), wrote, complete)
                }
                Stream::Zstd(context) => {
                    let (mut output, mut input) =
                        (OutBuffer::around(room), InBuffer::around(&pages[taken..]));
                    let left = context.compress_stream2(&mut output, &mut input, end);
                    let left = left.map_err(zstd_safe::get_error_name);
                    (
                        input.pos(),
                        output.pos(),
                        left.expect("a compressor takes any bytes") == 0,
                    )
                }
            };
            taken += took;
            payload.truncate(begin + wrote);
            if complete {
                assert_eq!(taken, pages.len(), "all pages were taken");
                return;
            }
        }
    }
}
