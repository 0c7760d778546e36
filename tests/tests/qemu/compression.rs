//! Unmodified QEMU 11 primaries that compress: what the receiver holds is, bit for bit, the RAM that the primary saves of
//! itself, in both caches and commit modes.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Compression, Content, Guest, Lab, LabError, Machine, Pattern, Protection, Qemu, Receiver,
    ReceiverOptions, TestGuest, Transport, check_test_guest_image, experiment,
};

const CHECKPOINTS_MIN: usize = 10;
const MEMORY_MIB: u32 = 128;

struct Case {
    backend: BackendKind,
    channels: u8,
    compression: Compression,
    pattern: Pattern,
    content: Content,
    cache: &'static str,
    commit: &'static str,
}

impl Case {
    fn body(&self, lab: &Lab) -> Result<(), LabError> {
        // The primary's own speed is the limit here, some 1 MB/s at the highest level. It answers nothing meanwhile.
        let (pages_per_s, region_mib) = match self.compression {
            Compression::Zstd(10..) => (100, 4),
            _ => (1_000, 24),
        };
        let load = TestGuest {
            pattern: self.pattern,
            content: self.content,
            ..TestGuest::random(pages_per_s, region_mib)
        };
        let address = Address::free(lab, Transport::Tcp)?;
        let extra = ["--cache", self.cache, "--commit", self.commit];
        let options = ReceiverOptions {
            channels: self.channels,
            backend: self.backend,
            once: true,
            extra: extra.map(str::to_owned).to_vec(),
        };
        let mut receiver = Receiver::start(lab, &address, &options)?;
        let machine = Machine::bare("pc", MEMORY_MIB, Guest::Test(load.clone()));
        let mut primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 2 ", HANG_LIMIT)?;
        primary.end_precopy_early()?;
        let protection = Protection {
            compression: Some(self.compression),
            ..Protection::every_ms(150, self.channels)
        };
        primary.protect(&address, &protection)?;
        primary.wait_checkpoints(CHECKPOINTS_MIN / 2, HANG_LIMIT)?;
        let running = receiver.dump_only(&lab.file("running"))?;
        check_test_guest_image(&running.block("pc.ram")?, &load)?;
        primary.wait_checkpoints(CHECKPOINTS_MIN, HANG_LIMIT)?;
        let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
        let stopped = receiver.dump_only(&lab.file("stopped"))?;
        saved.assert_equal(&stopped.block("pc.ram")?)?;
        primary.check_guest()?;
        drop(primary);
        receiver.wait_exit()?;
        Ok(())
    }
}

macro_rules! cases {
    ($($name:ident: $backend:ident, $channels:expr, $method:ident $level:expr, $pattern:expr, $content:ident,
        $cache:expr, $commit:expr;)*) => {
        $(#[test]
        fn $name() {
            let case = Case {
                backend: BackendKind::$backend,
                channels: $channels,
                compression: Compression::$method($level),
                pattern: $pattern,
                content: Content::$content,
                cache: $cache,
                commit: $commit,
            };
            experiment(|lab| case.body(lab));
        })*
    };
}

use Pattern::{Random, Runs, Sequential};

cases! {
    zlib_1_multifd_4:        Uring,   4,  Zlib 1,  Random,     Compressible,   "pool",   "deferred";
    zlib_3_multifd_16:       Epoll,   16, Zlib 3,  Runs(40),   Compressible,   "mirror", "deferred";
    zlib_9_multifd_1:        Threads, 1,  Zlib 9,  Sequential, Compressible,   "pool",   "sync";
    zlib_1_incompressible:   Uring,   4,  Zlib 1,  Random,     Incompressible, "mirror", "sync";
    zstd_1_multifd_4:        Uring,   4,  Zstd 1,  Random,     Compressible,   "pool",   "deferred";
    zstd_3_multifd_16:       Uring,   16, Zstd 3,  Runs(40),   Compressible,   "mirror", "sync";
    zstd_20_multifd_1:       Epoll,   1,  Zstd 20, Sequential, Compressible,   "pool",   "sync";
    zstd_1_incompressible:   Threads, 4,  Zstd 1,  Random,     Incompressible, "mirror", "deferred";
}
