//! Guests that are protected as they should be.

use super::{CHANNELS, Soak, count};
use colo_ring::wire::codec::Method;
use colo_ring_tests::command::{guest, until};
use colo_ring_tools::net::Address;
use colo_ring_tools::page_compression::PageCompression;
use colo_ring_tools::primary::{DiskOptions, Distribution, SynthOptions, SynthPrimary, check_disk};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Blocks written to a disk before each checkpoint.
const WRITES: u32 = 10;

const DISK_BYTES: u64 = 1 << 20;

/// Their hosts.
const HOST: &str = "127.0.0.1:";

/// A guest with its session's number.
struct Protected {
    primary: SynthPrimary,
    session: u32,
    checkpoints: u64,
}

impl Protected {
    fn begin(soak: &Soak, options: &SynthOptions) -> Self {
        let _one = soak.connecting.lock().expect("no panic");
        let primary = SynthPrimary::connect(soak.receiver.address(), options).expect("precopy");
        let session = soak.sessions().into_iter().filter(|session| {
            let peer = session["peer"].as_str().expect("a text");
            peer.starts_with(HOST) && session["state"] == "protected"
        });
        let session = session
            .filter_map(|session| session["session"].as_u64())
            .max()
            .expect("its session");
        Self {
            primary,
            session: u32::try_from(session).expect("a number"),
            checkpoints: 0,
        }
    }

    fn checkpoint(&mut self, soak: &Soak) {
        self.primary.checkpoint().expect("a checkpoint");
        self.checkpoints += 1;
        count(&soak.counts.checkpoints);
    }

    /// What is dumped of it is its memory.
    fn check(&self, soak: &Soak, directory: &Path) {
        let (session, out) = (self.session.to_string(), directory.to_str().expect("a text"));
        let dumped = (soak.receiver).ask(&[
            "dump",
            "--json",
            "--no-disks",
            "--session",
            &session,
            "--out",
            out,
        ]);
        assert_eq!(dumped["checkpoint"], self.checkpoints);
        let blocks = dumped["blocks"].as_array().expect("a list");
        assert_eq!(blocks.len(), self.primary.blocks().len());
        for block in blocks {
            let [name, file] = ["name", "file"].map(|key| block[key].as_str().expect("a text"));
            let bytes = fs::read(directory.join(file)).expect("a dumped file");
            let image = self.primary.image(name).expect("its block");
            assert!(
                *image == *bytes,
                "block {name} of session {} differs",
                self.session
            );
        }
        count(&soak.counts.dumps);
    }
}

fn directory(soak: &Soak, name: &str) -> std::path::PathBuf {
    let directory = soak.scratch.path().join(name);
    fs::create_dir_all(&directory).expect("a directory");
    directory
}

/// The guest that stays.
pub fn steady(soak: &Soak, _: Xoshiro256PlusPlus) {
    let directory = directory(soak, "steady");
    let options = SynthOptions {
        ram_bytes: 16 << 20,
        dirty_pages: Distribution::Exponential { mean: 200 },
        interval: Duration::from_millis(20),
        ..guest()
    };
    let mut guest = Protected::begin(soak, &options);
    while soak.goes_on() {
        for _ in 0..50 {
            guest.checkpoint(soak);
        }
        guest.check(soak, &directory);
    }
    // It was protected to the end.
    guest.checkpoint(soak);
    guest.check(soak, &directory);
    guest.primary.close().expect("its end");
    until("the end of the guest that stays", || {
        let discard = json!({"command": "discard", "session": guest.session});
        soak.conversation().ask(&discard).ok()
    });
}

fn random_guest(rng: &mut Xoshiro256PlusPlus) -> SynthOptions {
    let methods = [Method::None, Method::None, Method::Zlib, Method::Zstd];
    let method = *methods.choose(rng).expect("some");
    SynthOptions {
        ram_bytes: *[1 << 20, 4 << 20, 32 << 20].choose(rng).expect("some"),
        channels: CHANNELS,
        dirty_pages: Distribution::Exponential { mean: 100 },
        zero_share: rng.random_range(0.0..0.5),
        compression: PageCompression {
            method,
            level: (method != Method::None).then_some(1),
        },
        interval: Duration::from_millis(rng.random_range(0..30)),
        seed: rng.next_u64(),
        ..guest()
    }
}

/// Guests that come and go.
pub fn passing(soak: &Soak, mut rng: Xoshiro256PlusPlus) {
    let own = format!("passing-{}", rng.next_u64());
    let directory = directory(soak, &own);
    while soak.goes_on() {
        let mut options = random_guest(&mut rng);
        let disk = soak.scratch.path().join("disks").join(format!("{own}-0.raw"));
        let has_disk = rng.random_bool(0.5);
        if has_disk {
            File::create(&disk)
                .expect("a file")
                .set_len(DISK_BYTES)
                .expect("a length");
            options.disks = Some(DiskOptions {
                to: soak
                    .receiver
                    .disk_address()
                    .parse::<Address>()
                    .expect("an address"),
                name: own.clone(),
                count: 1,
                writes: WRITES,
            });
        }
        let mut guest = Protected::begin(soak, &options);
        for _ in 0..rng.random_range(0..40) {
            guest.checkpoint(soak);
        }
        guest.check(soak, &directory);
        end(soak, guest, &mut rng, &directory, |checkpoints| {
            if has_disk {
                let written = check_disk(&disk, 0, checkpoints, options.seed, WRITES);
                written.expect("the disk is that of the checkpoint");
            }
        });
    }
}

/// Ends a session in one of several ways; nothing of it is left.
fn end(
    soak: &Soak,
    guest: Protected,
    rng: &mut Xoshiro256PlusPlus,
    directory: &Path,
    check_disk: impl Fn(u64),
) {
    let Protected {
        primary,
        session,
        checkpoints,
    } = guest;
    let mut operator = soak.conversation();
    match rng.random_range(0..3) {
        0 => primary.close().expect("its end"),
        // Killed.
        1 => drop(primary),
        _ => {
            let ended = operator
                .ask(&json!({"command": "end", "session": session}))
                .expect("it runs");
            assert_eq!(ended["checkpoint"], checkpoints);
            drop(primary);
        }
    }
    let claimed: Value = until("the claim", || operator.claim(session).ok());
    assert_eq!(claimed["checkpoint"], checkpoints);
    if rng.random_bool(0.5) {
        let file = File::create(directory.join("stream")).expect("a file");
        let restored = operator.restore(session, None, &[file.as_fd()]);
        let bytes = restored.expect("a failover")["stream"]["bytes"].as_u64();
        assert_eq!(bytes, Some(file.metadata().expect("the stream").len()));
        check_disk(checkpoints);
        operator
            .ask(&json!({"command": "promoted", "session": session}))
            .expect("a promotion");
        soak.counts.failovers.fetch_add(1, Ordering::Relaxed);
    } else {
        let release = json!({"command": "release", "session": session, "may_have_run": false});
        operator.ask(&release).expect("a release");
        let discard = json!({"command": "discard", "session": session});
        // The receiver may still be about to take note of its end.
        until("the discard", || operator.ask(&discard).ok());
        soak.counts.discards.fetch_add(1, Ordering::Relaxed);
    }
}
