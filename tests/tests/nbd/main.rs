//! The receiver's disks with other programs' NBD clients: qemu-img and qemu-io, libnbd's nbdinfo, nbdcopy and nbdsh, nbdkit's
//! plugin `nbd` and its filter `checkwrite`, fio. They need the Debian packages qemu-utils, libnbd-bin, python3-libnbd, nbdkit and fio.

use colo_ring_tests::command::{RunningReceiver, Scratch, wrapped};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

/// A receiver that serves the disk `d`.
struct Served {
    scratch: Scratch,
    #[expect(dead_code, reason = "ends the receiver when dropped")]
    receiver: RunningReceiver,
}

impl Served {
    fn new() -> Self {
        let scratch = Scratch::new();
        File::create(scratch.file("d.raw"))
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        let nbd = format!("unix:{}", scratch.file("nbd.sock"));
        let receiver = RunningReceiver::start(
            wrapped(&[]),
            &["--disks", scratch.path().to_str().unwrap(), "--nbd", &nbd],
        );
        Self { scratch, receiver }
    }

    fn base(&self) -> PathBuf {
        self.scratch.path().join("d.raw")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.scratch.file("nbd.sock"))
    }
}

/// Runs a client to its end, which must be a success, and returns what it printed.
fn client(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| {
        panic!("{program}: {error}; apt-get install qemu-utils libnbd-bin python3-libnbd nbdkit fio")
    });
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// An image with data, holes, and zeroes that are written out.
fn image(scratch: &Scratch) -> String {
    let path = scratch.file("image.raw");
    let file = File::create(&path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    for (at, byte) in [(0, 1), (5 * MIB, 2), (33 * MIB, 0), (DISK_BYTES - MIB, 3)] {
        file.write_all_at(&vec![byte; 1 << 20], at).unwrap();
    }
    path
}

#[test]
fn qemu_io_writes_and_reads() {
    let served = Served::new();
    let uri = served.uri("d");
    let commands = [
        "write -P 0xa5 0 64k",
        "write -f -P 0x5a 1M 3k",
        "write -z 32k 4k",
        "write -z -u 16k 4k",
        "discard 8k 4k",
        "aio_write -P 7 2M 1M",
        "aio_write -P 8 3M 1M",
        "aio_flush",
        "flush",
        "read -P 0xa5 0 8k",
        "read -P 0 16k 4k",
        "read -P 0 32k 4k",
        "read -P 0xa5 36k 28k",
        "read -P 0x5a 1M 3k",
        "read -P 7 2M 1M",
        "read -P 8 3M 1M",
        "read -P 0 4M 8M",
    ];
    let mut args = vec!["-f", "raw", &uri];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    let said = client("qemu-io", &args);
    assert!(
        !said.contains("verification failed") && !said.contains("error"),
        "{said}"
    );
    let file = File::open(served.base()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 2 * MIB).unwrap();
    assert_eq!(byte, [7]);
}

#[test]
fn qemu_img_copies_compares_and_maps() {
    let served = Served::new();
    let (uri, image) = (served.uri("d"), image(&served.scratch));
    let info: Value = serde_json::from_str(&client("qemu-img", &["info", "--output=json", &uri])).unwrap();
    assert_eq!(info["virtual-size"], DISK_BYTES);
    client(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &image, &uri],
    );
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &uri]);
    assert!(fs::read(&image).unwrap() == fs::read(served.base()).unwrap());
    let map: Value = serde_json::from_str(&client("qemu-img", &["map", "--output=json", &uri])).unwrap();
    let extents = map.as_array().unwrap();
    let end = extents.last().unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    assert_eq!(number(end, "start") + number(end, "length"), DISK_BYTES);
    assert!(extents.iter().any(|extent| extent["zero"] == true), "{map}");
    // What holds nothing takes no room.
    assert!(fs::metadata(served.base()).unwrap().blocks() * 512 < DISK_BYTES / 4);
}

#[test]
fn libnbd_lists_and_copies() {
    let served = Served::new();
    let (uri, image) = (served.uri("d"), image(&served.scratch));
    let size = client("nbdinfo", &["--size", &uri]);
    assert_eq!(size.trim(), DISK_BYTES.to_string());
    for capability in ["trim", "zero", "fua", "flush"] {
        client("nbdinfo", &["--can", capability, &uri]);
    }
    let is_multi = Command::new("nbdinfo")
        .args(["--can", "multi-conn", &uri])
        .status();
    assert_eq!(is_multi.unwrap().code(), Some(2), "one connection at a time");
    client("nbdcopy", &[&image, &uri]);
    let back = served.scratch.file("back.raw");
    client("nbdcopy", &[&uri, &back]);
    assert!(fs::read(&image).unwrap() == fs::read(&back).unwrap());
    let map = client("nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole") && map.contains("data"), "{map}");
    let refused = Command::new("nbdinfo").arg(served.uri("none")).output().unwrap();
    assert!(!refused.status.success());
    // It serves on.
    client("nbdinfo", &["--size", &uri]);
}

#[test]
fn libnbd_asks_for_all_and_for_what_is_not_allowed() {
    let served = Served::new();
    let script = include_str!("conversation.py");
    // nbdsh takes the first python3, and Debian's has the module.
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("nbdsh")
        .args(["-c", script])
        .env("URI", served.uri("d"))
        .env("PATH", format!("/usr/bin:{path}"))
        .output();
    let output = output.unwrap_or_else(|error| panic!("nbdsh: {error}; apt-get install python3-libnbd"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    assert!(
        text(&output.stdout).contains("all answered"),
        "{}",
        text(&output.stdout)
    );
    client("nbdinfo", &["--size", &served.uri("d")]);
}

#[test]
fn nbdkit_forwards_and_checks() {
    let served = Served::new();
    let (uri, image) = (served.uri("d"), image(&served.scratch));
    let back = served.scratch.file("back.raw");
    let forwarded = format!("nbdcopy {image} \"$uri\" && nbdcopy \"$uri\" {back}");
    let plugin_uri = format!("uri={uri}");
    client("nbdkit", &["-U", "-", "nbd", &plugin_uri, "--run", &forwarded]);
    assert!(fs::read(&image).unwrap() == fs::read(&back).unwrap());
    // The filter takes no byte that its file does not have at that place, and no end before all of it was written.
    let checked = format!("nbdcopy '{uri}' \"$uri\"");
    client(
        "nbdkit",
        &[
            "-U",
            "-",
            "--filter=checkwrite",
            "file",
            &image,
            "--run",
            &checked,
        ],
    );
}

#[test]
fn fio_verifies_what_it_wrote() {
    let served = Served::new();
    let (uri, state) = (served.uri("d"), served.scratch.file("."));
    for (pattern, block, depth) in [
        ("randwrite", "4k", "16"),
        ("write", "1M", "4"),
        ("randrw", "512-64k", "8"),
    ] {
        client(
            "fio",
            &[
                "--name=nbd",
                "--ioengine=nbd",
                &format!("--uri={uri}"),
                &format!("--rw={pattern}"),
                if block.contains('-') {
                    "--bsrange=512-64k"
                } else {
                    "--bs=4k"
                },
                &format!("--iodepth={depth}"),
                "--size=32M",
                "--io_size=32M",
                "--verify=crc32c",
                "--verify_fatal=1",
                &format!("--aux-path={state}"),
                if block == "1M" {
                    "--bs=1M"
                } else {
                    "--randrepeat=0"
                },
            ],
        );
    }
}
