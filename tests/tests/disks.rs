//! Memory and disks of one checkpoint, with synthetic primaries: processes are killed at random instants, and what is kept
//! then is compared with a guest that never was killed.
//!
//! `COLO_RING_DISK_RUNS` makes more runs of every kind (8 otherwise).

use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::loop_device::LoopDevice;
use colo_ring_tests::random::generator;
use colo_ring_tools::capture_file::{CaptureInfo, CaptureWriter, Compression};
use colo_ring_tools::primary::{SynthOptions, SynthPrimary, check_disk, device_state_at};
use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::symlink;
use std::process::{Child, Stdio};
use std::time::Duration;

const DISKS: u8 = 2;
const WRITES: u32 = 60;
const DISK_BYTES: u64 = 4 << 20;
const RAM_BYTES: u64 = 2 << 20;

fn runs() -> u32 {
    std::env::var("COLO_RING_DISK_RUNS").map_or(8, |text| text.parse().expect("a number of runs"))
}

/// Directories of a receiver and its successors.
struct Place {
    scratch: Scratch,
    ram: SharedDirectory,
    /// The last disk's base, where that is not a file.
    #[expect(dead_code, reason = "the device goes when it is dropped")]
    device: Option<LoopDevice>,
}

/// A primary as a process, killed when dropped.
struct Primary(Child);

impl Drop for Primary {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        for disk in 0..DISKS {
            let base = File::create(scratch.file(&format!("synth-{disk}.raw"))).unwrap();
            base.set_len(DISK_BYTES).unwrap();
        }
        Self {
            scratch,
            ram: SharedDirectory::new().unwrap(),
            device: None,
        }
    }

    /// With a block device for its last disk.
    fn with_a_block_device() -> Result<Self, String> {
        let place = Self::new();
        let base = place.scratch.path().join(format!("synth-{}.raw", DISKS - 1));
        let backing = place.scratch.path().join("backing");
        std::fs::rename(&base, &backing).unwrap();
        let device = LoopDevice::of(&backing)?;
        symlink(device.path(), &base).unwrap();
        Ok(Self {
            device: Some(device),
            ..place
        })
    }

    fn receiver(&self, more: &[&str]) -> RunningReceiver {
        let ram = self.ram.path().to_str().unwrap();
        let disks = self.scratch.path().to_str().unwrap();
        // Over TCP like the stream, so that the receiver knows by the address that both are of one guest.
        let args = ["--ram-dir", ram, "--disks", disks, "--nbd", "tcp:127.0.0.1:0"];
        RunningReceiver::start(wrapped(&[]), &[&args, more].concat())
    }

    fn primary(&self, receiver: &RunningReceiver, seed: u64) -> Primary {
        let mut command = wrapped(&[]);
        let to = receiver.address().to_string();
        command
            .args([
                "synth",
                "--json",
                "--to",
                &to,
                "--ram",
                &RAM_BYTES.to_string(),
                "--channels",
                "2",
            ])
            .args([
                "--pages",
                "100",
                "--pace",
                "max",
                "--checkpoints",
                "1000000",
                "--seed",
                &seed.to_string(),
            ])
            .args([
                "--disks",
                &DISKS.to_string(),
                "--disk-writes",
                &WRITES.to_string(),
            ])
            .args(["--disk-to", &receiver.disk_address()]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Primary(child.unwrap())
    }

    /// Compares what is kept of session 1, memory and disks, with the guest at that checkpoint. Returns its number.
    fn check(&self, receiver: &RunningReceiver, seed: u64) -> u64 {
        let status = until("the disks to be applied", || {
            let status = session(receiver);
            let disks = status["disks"].as_array().expect("a list");
            assert_eq!(disks.len(), usize::from(DISKS), "{status}");
            disks.iter().all(|disk| disk["lag_epochs"] == 0).then_some(status)
        });
        let checkpoint = status["checkpoint"].as_u64().expect("a checkpoint");
        let (dumped, read) = receiver.dump(1);
        assert_eq!(dumped["checkpoint"], checkpoint);
        let model = self.model(seed, checkpoint);
        for block in dumped["blocks"].as_array().expect("a list") {
            let [name, file] = ["name", "file"].map(|key| block[key].as_str().expect("a text"));
            let image = model.image(name).expect("its block");
            assert!(
                *image == *read(file),
                "block {name} of checkpoint {checkpoint} differs"
            );
        }
        if checkpoint > 0 {
            let found = read(dumped["device_state_file"].as_str().expect("a name"));
            assert!(found == device_state_at(checkpoint), "the device state differs");
        }
        for disk in 0..DISKS {
            let base = self.scratch.path().join(format!("synth-{disk}.raw"));
            let written = check_disk(&base, disk, checkpoint, seed, WRITES);
            assert!(written.unwrap_or_else(|error| panic!("checkpoint {checkpoint}: {error}")) > 0);
            let dumped = &dumped["disks"][usize::from(disk)];
            assert_eq!(dumped["size_bytes"], DISK_BYTES, "{dumped}");
            let copy = read(dumped["file"].as_str().expect("a name"));
            assert!(copy == std::fs::read(&base).unwrap(), "the dumped disk differs");
        }
        checkpoint
    }

    /// The guest's memory at a checkpoint: the same session, written to a file.
    fn model(&self, seed: u64, checkpoint: u64) -> SynthPrimary {
        let options = SynthOptions {
            ram_bytes: RAM_BYTES,
            seed,
            ..guest()
        };
        let info = CaptureInfo::now("synth", Value::Null);
        let path = self.scratch.path().join("model.cap");
        let writer = CaptureWriter::create(&path, &info, Compression::None).unwrap();
        let mut model = SynthPrimary::record(writer, &options).unwrap();
        for _ in 0..checkpoint {
            model.checkpoint().unwrap();
        }
        model
    }
}

fn session(receiver: &RunningReceiver) -> Value {
    receiver.status()["sessions"][0].clone()
}

fn wait_state(receiver: &RunningReceiver, state: &str) {
    until(state, || (session(receiver)["state"] == state).then_some(()));
}

/// Random microseconds below some tens of milliseconds: many checkpoints, and each of their parts.
fn delay(random: &mut Xoshiro256PlusPlus) -> Duration {
    Duration::from_micros(random.random_range(..60_000))
}

#[test]
fn a_killed_primary_leaves_memory_and_disks_of_one_checkpoint() {
    let mut random = generator("COLO_RING_DISK_SEED");
    for run in 0..runs() {
        let seed = u64::from(run) + 1;
        let checkpoint = kill_primary(&Place::new(), seed, delay(&mut random));
        println!("run {run}: checkpoint {checkpoint}");
    }
}

/// Kills the primary some time after it is protected. Returns the checkpoint of which all is.
fn kill_primary(place: &Place, seed: u64, after: Duration) -> u64 {
    let receiver = place.receiver(&[]);
    let primary = place.primary(&receiver, seed);
    wait_state(&receiver, "protected");
    std::thread::sleep(after);
    drop(primary);
    // Only when its connections are dropped, too, a dump has its disks.
    receiver.wait_for_log("session 1 ended");
    place.check(&receiver, seed)
}

#[test]
fn a_dump_says_why_it_is_without_disks() {
    let place = Place::new();
    let receiver = place.receiver(&[]);
    let primary = place.primary(&receiver, 1);
    wait_state(&receiver, "protected");
    let out = place.scratch.file("dump");
    let left_out = |more: &[&str]| -> (Value, Value) {
        let args = ["dump", "--json", "--out", &out, "--session", "1"];
        let mut dumped = receiver.ask(&[&args, more].concat());
        (dumped["disks"].take(), dumped["disks_left_out"].take())
    };
    let says = |(disks, left_out): (Value, Value), why: &str| {
        assert_eq!(disks, json!([]));
        let text = left_out.as_str().expect("a text");
        assert!(
            text.starts_with("synth-0, synth-1: ") && text.contains(why),
            "{text}"
        );
    };
    says(left_out(&[]), "session is live");
    drop(primary);
    wait_state(&receiver, "ended");
    says(left_out(&["--no-disks"]), "not asked for");
    assert_eq!(left_out(&[]).1, Value::Null);
}

#[test]
fn a_killed_receiver_leaves_memory_and_disks_of_one_checkpoint() {
    let mut random = generator("COLO_RING_DISK_SEED");
    for run in 0..runs() {
        let checkpoint = kill_receiver(&Place::new(), run, delay(&mut random));
        println!("run {run}: checkpoint {checkpoint}");
    }
}

/// Kills the receiver some time after it has a protected guest. Returns the checkpoint of which all is for its successor.
fn kill_receiver(place: &Place, run: u32, after: Duration) -> u64 {
    let seed = u64::from(run) + 1;
    let backend = ["uring", "epoll", "threads"][usize::try_from(run % 3).unwrap()];
    // With little memory, logs are spilled to files beside the bases.
    let limit = ["1G", "104M"][usize::try_from(run % 2).unwrap()];
    let receiver = place.receiver(&["--backend", backend, "--ram-limit", limit]);
    let primary = place.primary(&receiver, seed);
    wait_state(&receiver, "protected");
    std::thread::sleep(after);
    // By SIGKILL, and waits for it.
    drop(receiver);
    drop(primary);
    let receiver = place.receiver(&[]);
    wait_state(&receiver, "recovered");
    let checkpoint = place.check(&receiver, seed);
    assert_eq!(
        receiver.ask(&["discard", "--json", "--session", "1"])["discarded"],
        1
    );
    assert_eq!(place.ram.files(), 0);
    checkpoint
}

#[test]
fn a_block_device_is_a_base_like_a_file() {
    let mut random = generator("COLO_RING_DISK_SEED");
    for run in 0..2 {
        for is_primary in [true, false] {
            let place = match Place::with_a_block_device() {
                Ok(place) => place,
                Err(why) => return colo_ring_skip::skip("a_block_device_is_a_base_like_a_file", &why),
            };
            let after = delay(&mut random);
            let checkpoint = match is_primary {
                true => kill_primary(&place, u64::from(run) + 1, after),
                false => kill_receiver(&place, run, after),
            };
            println!("run {run}: checkpoint {checkpoint}");
        }
    }
}
