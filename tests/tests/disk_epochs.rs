//! Guests' disks: what foreign NBD clients make of the server, and whether disk and memory are of one checkpoint, whatever a
//! primary or a stranger does. With a real QEMU primary: `qemu/`.

use colo_ring::receiver::{
    DiskServing, DiskState, ListenAddress, RamLimit, ReceiverOptions, Request, Response, RestoreReport,
    RestoreRequest, SessionState, StatusReport,
};
use colo_ring_tests::command::until;
use colo_ring_tests::hostile::{Cut, HostilePrimary};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::nbd::{NbdClient, greet, kind, option, request};
use colo_ring_tests::receiver::{LocalReceiver, dump, options_with_files, tcp};
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

const CHANNELS: u8 = 1;
const SIZE: usize = 4 << 20;

/// A receiver with disks, which keeps their logs in memory.
struct Bench {
    /// None while it starts again.
    receiver: Option<LocalReceiver>,
    disks: SocketAddr,
    bases: tempfile::TempDir,
    ram: SharedDirectory,
}

impl Bench {
    fn start() -> Self {
        Self::start_with(64 << 20)
    }

    fn start_with(log_max_bytes: u64) -> Self {
        let bases = tempfile::tempdir().expect("a directory");
        for name in ["root", "data"] {
            std::fs::write(bases.path().join(format!("{name}.raw")), vec![0xee; SIZE]).expect("a base");
        }
        let mut bench = Self {
            receiver: None,
            disks: ([127, 0, 0, 1], 0).into(),
            bases,
            ram: SharedDirectory::new().expect("a directory"),
        };
        bench.restart(log_max_bytes);
        bench
    }

    /// A receiver on the same directories.
    fn restart(&mut self, log_max_bytes: u64) {
        self.receiver = None;
        let receiver = LocalReceiver::start(ReceiverOptions {
            ram_limit: RamLimit::exactly(256 << 20),
            disks: Some(DiskServing {
                directory: self.bases.path().to_owned(),
                listen: vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into())],
                log_max_bytes,
            }),
            ..options_with_files(CHANNELS, &self.ram)
        });
        self.disks = tcp(&receiver.get().disk_addresses()[0]);
        self.receiver = Some(receiver);
    }

    fn receiver(&self) -> &LocalReceiver {
        self.receiver.as_ref().expect("it runs")
    }

    fn base(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("a base")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bases.path().join(format!("{name}.raw"))
    }

    fn client(&self, name: &str) -> NbdClient {
        NbdClient::go(self.disks, name).expect("an export")
    }

    /// A client as soon as whoever had the disk before is gone.
    fn client_soon(&self, name: &str) -> NbdClient {
        until("the export", || NbdClient::go(self.disks, name).ok())
    }

    fn ask(&self, request: Request) -> Result<Response, String> {
        let receiver = self.receiver().get();
        receiver.ask(request).map_err(|error| error.to_string())
    }

    fn status(&self) -> StatusReport {
        match self.ask(Request::Status) {
            Ok(Response::Status(status)) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// What a failover is given; the stream goes to a file.
    fn restore(&self) -> Result<RestoreReport, String> {
        self.ask(Request::Claim {
            session: 1,
            force: true,
            retry: false,
        })?;
        let file = tempfile::tempfile().expect("a file");
        let request = RestoreRequest {
            session: 1,
            to: "a file".to_owned(),
            shared: None,
            keep: None,
        };
        let receiver = self.receiver().get();
        let restored = receiver.ask_with(Request::Restore(request), vec![file.into()]);
        match restored.map_err(|error| error.to_string())? {
            Response::Restored(report) => Ok(report),
            other => panic!("{other:?}"),
        }
    }
}

/// A primary whose disks are connected, after checkpoint 0.
fn protected(bench: &Bench) -> HostilePrimary {
    let mut primary = bench.receiver().connected();
    primary.precopy();
    primary
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output
        .unwrap_or_else(|error| panic!("{program} is missing (scripts/test tools installs it): {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

#[test]
fn foreign_clients_find_what_they_wrote() {
    let bench = Bench::start();
    let uri = format!("nbd://{}/root", bench.disks);
    let list = run("nbdinfo", &["--list", &format!("nbd://{}", bench.disks)]);
    assert!(
        list.contains("export=\"root\"") && list.contains("export=\"data\""),
        "{list}"
    );
    assert!(run("nbdinfo", &["--size", &uri]).trim() == SIZE.to_string());
    let image = bench.bases.path().join("image");
    let pattern: Vec<u8> = (0..SIZE)
        .map(|at| u8::try_from(at / 512 % 251).expect("a byte"))
        .collect();
    std::fs::write(&image, &pattern).expect("an image");
    let image = image.to_str().expect("a text");
    run("nbdcopy", &[image, &uri]);
    assert!(bench.base("root") == pattern);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &uri]);
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 7 1M 64k",
            "-c",
            "read -P 7 1M 64k",
            "-c",
            "write -z -u 1M 16k",
            "-c",
            "read -P 0 1M 16k",
            "-c",
            "write -f -P 9 3M 512",
            "-c",
            "discard 2M 64k",
            "-c",
            "flush",
            "-c",
            "read -P 9 3M 512",
            &uri,
        ],
    );
    assert!(
        bench.base("root")[3 << 20..(3 << 20) + 512]
            .iter()
            .all(|byte| *byte == 9)
    );
    let map = run("nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
}

/// The same while a session owns the disk and its writes go to the log.
#[test]
fn foreign_clients_find_what_they_wrote_in_the_log() {
    let bench = Bench::start();
    let uri = format!("nbd://{}/root", bench.disks);
    let mut qemu_io = Command::new("qemu-io")
        .args(["-f", "raw", &uri])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .expect("qemu-io, which scripts/test tools installs");
    until("its connection", || {
        (!bench.status().disks.is_empty()).then_some(())
    });
    let mut primary = protected(&bench);
    let mut commands = qemu_io.stdin.take().expect("it is piped");
    let text = "write -P 7 1M 1M\nread -P 7 1M 1M\nwrite -z 1M 16k\nread -P 0 1M 16k\ndiscard 2M 64k\nread -P 0 2M 64k\n\
                aio_write -P 3 0 8k\naio_flush\nread -P 3 0 8k\nread -P 0xee 3M 1M\nmap\nflush\n";
    commands.write_all(text.as_bytes()).expect("it reads");
    drop(commands);
    let output = qemu_io.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !said.contains("failed"), "{said}");
    // Nothing of it is committed, and the client is gone.
    primary.request();
    let _ = primary.main.is_closed();
    assert!(bench.base("root").iter().all(|byte| *byte == 0xee));
}

#[test]
fn a_failover_finds_disk_and_memory_of_one_checkpoint() {
    let bench = Bench::start();
    let (mut root, mut data) = (bench.client("root"), bench.client("data"));
    root.write(0, &[1; 8192]).expect("a copy");
    assert_eq!(&bench.base("root")[..8192], [1; 8192]);
    let unbound = bench.status().disks;
    assert_eq!((unbound.len(), unbound[0].state), (2, DiskState::Copying));
    let mut primary = protected(&bench);
    for moment in 1..20u8 {
        root.write(4096, &[moment; 4096]).expect("a disk");
        root.write(u64::from(moment) * 8192, &[moment; 512])
            .expect("a disk");
        data.write(0, &[moment; 100_000]).expect("a disk");
        assert_eq!(
            data.ask(kind::WRITE_ZEROES, 50_000, 10_000, &[]).expect("a disk"),
            0
        );
        assert_eq!(root.read(4096, 4096).expect("a disk"), [moment; 4096]);
        primary.checkpoint(&[(0, 1, moment)]);
    }
    let status = bench.status();
    assert!(status.disks.is_empty());
    let disks = &status.sessions[0].disks;
    assert!(
        disks
            .iter()
            .all(|disk| disk.state == DiskState::InSync && disk.epoch == Some(19))
    );
    // Not committed.
    root.write(4096, &[0xaa; 8192]).expect("a disk");
    data.write(0, &[0xaa; 200_000]).expect("a disk");
    let report = bench.restore().expect("a checkpoint");
    assert_eq!(report.checkpoint, 19);
    let names: Vec<_> = report
        .disks
        .iter()
        .map(|disk| (disk.name.as_str(), disk.epoch, disk.drained))
        .collect();
    assert_eq!(names, [("data", 19, true), ("root", 19, true)]);
    let (base, data) = (bench.base("root"), bench.base("data"));
    assert_eq!(&base[4096..8192], [19; 4096]);
    assert!((2..20u8).all(|moment| base[usize::from(moment) * 8192] == moment));
    assert!(
        data[..100_000]
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == if (50_000..60_000).contains(&at) { 0 } else { 19 })
    );
    assert!(data[100_000..].iter().all(|byte| *byte == 0xee));
    assert!(root.is_closed());
}

#[test]
fn a_disk_that_is_lost_ends_the_session_and_not_the_checkpoint() {
    let bench = Bench::start();
    let mut root = bench.client("root");
    let mut primary = protected(&bench);
    root.write(0, &[1; 4096]).expect("a disk");
    primary.checkpoint(&[]);
    root.write(0, &[2; 4096]).expect("a disk");
    drop(root);
    let status = bench.receiver().ended();
    assert!(
        status.end.as_deref().is_some_and(|end| end.contains("disk root")),
        "{:?}",
        status.end
    );
    assert_eq!(
        (status.state, status.checkpoint, status.lost),
        (SessionState::Ended, Some(1), true)
    );
    // The checkpoint has the disk.
    let refused = NbdClient::go(bench.disks, "root").err().expect("refused");
    assert!(
        refused.contains("session 1") && refused.contains("discard"),
        "{refused}"
    );
    assert!(bench.client("data").read(0, 1).is_ok());
    bench.ask(Request::Discard { session: 1 }).expect("discarded");
    assert!(bench.base("root")[..4096].iter().all(|byte| *byte == 1));
    drop(bench.client("root"));
}

#[test]
fn a_write_after_the_cut_ends_the_session() {
    let bench = Bench::start();
    let mut root = bench.client("root");
    let mut primary = protected(&bench);
    root.write(0, &[1; 4096]).expect("a disk");
    primary.checkpoint(&[]);
    primary.request();
    // VMSTATE_SEND, and not the rest.
    let bytes = primary.checkpoint_bytes(2, &[]);
    primary.main.send(&bytes[..bytes.len() / 2]);
    until("the cut", || root.write(0, &[2; 4096]).err());
    let status = bench.receiver().ended();
    assert!(
        status.end.as_deref().is_some_and(|end| end.contains("disk root")),
        "{:?}",
        status.end
    );
    assert_eq!(status.checkpoint, Some(1));
    // The log is applied by then.
    bench.ask(Request::Discard { session: 1 }).expect("discarded");
    assert!(bench.base("root")[..4096].iter().all(|byte| *byte == 1));
}

#[test]
fn an_epoch_that_fills_its_log_ends_the_session() {
    const BIG: usize = 32 << 20;
    let bench = Bench::start_with(8 << 20);
    std::fs::write(bench.path("big"), vec![0xee; BIG]).expect("a base");
    let mut big = bench.client("big");
    let mut primary = protected(&bench);
    // More than the limit, in several epochs: it is applied meanwhile.
    for moment in 1..8 {
        big.write(0, &vec![moment; 3 << 20]).expect("a disk");
        primary.checkpoint(&[]);
    }
    // In one epoch.
    let mut offsets = (0..BIG as u64).step_by(8192);
    assert!(offsets.any(|offset| big.write(offset, &[0xaa; 8192]).is_err()));
    let status = bench.receiver().ended();
    let end = status.end.unwrap_or_default();
    assert!(end.contains("--disk-log-max"), "{end}");
    assert_eq!(status.checkpoint, Some(7));
    bench.ask(Request::Discard { session: 1 }).expect("discarded");
    assert!(bench.base("big")[..3 << 20].iter().all(|byte| *byte == 7));
    assert!(bench.base("big")[3 << 20..].iter().all(|byte| *byte == 0xee));
}

#[test]
fn a_receiver_that_starts_again_has_disk_and_memory() {
    let mut bench = Bench::start();
    let mut root = bench.client("root");
    let mut primary = protected(&bench);
    root.write(0, &[1; 4096]).expect("a disk");
    primary.checkpoint(&[(0, 1, 1)]);
    root.write(0, &[2; 4096]).expect("a disk");
    bench.restart(64 << 20);
    let status = bench.status();
    assert_eq!(status.sessions[0].state, SessionState::Recovered);
    assert_eq!(
        (
            status.sessions[0].disks[0].name.as_str(),
            status.sessions[0].disks[0].epoch
        ),
        ("root", Some(1))
    );
    assert!(bench.base("root")[..4096].iter().all(|byte| *byte == 1));
    assert!(NbdClient::go(bench.disks, "root").is_err());
    assert_eq!(bench.restore().expect("a checkpoint").disks[0].epoch, 1);
    // A guest may have run since.
    let (session, may_have_run) = (1, true);
    bench
        .ask(Request::Release {
            session,
            may_have_run,
        })
        .expect("its claim");
    let dumped = dump(bench.receiver().get(), 1, bench.bases.path()).expect("a dump");
    let left_out = dumped.disks_left_out.expect("a reason");
    assert!(
        dumped.disks.is_empty() && left_out.starts_with("root: a guest may have written"),
        "{left_out}"
    );
}

/// Two primaries on one host: their UUIDs keep their disks apart. Without, the session is refused rather than guessed.
#[test]
fn connections_of_several_guests_are_not_guessed() {
    let bench = Bench::start();
    let _one = NbdClient::go(bench.disks, "root@00000000-0000-4000-8000-000000000001").expect("an export");
    let _other = NbdClient::go(bench.disks, "data@00000000-0000-4000-8000-000000000002").expect("an export");
    let mut primary = bench.receiver().connected();
    for (_, bytes) in primary.precopy_parts() {
        primary.main.send(&bytes);
    }
    primary.sync();
    primary.sync();
    let status = bench.receiver().ended();
    assert!(
        status
            .end
            .as_deref()
            .is_some_and(|end| end.contains("validate-uuid")),
        "{:?}",
        status.end
    );
    assert_eq!(status.checkpoint, None);
}

/// Without a UUID a disk is found by its host's address, which can be wrong in both directions.
#[test]
fn disks_that_are_known_by_their_address_alone_are_reported() {
    let bench = Bench::start();
    let _root = bench.client("root");
    let _primary = protected(&bench);
    bench.receiver().warned("session 1 took root");
    // The session has its disks.
    let _data = bench.client("data");
}

/// A session whose first checkpoint is committed with the second SYNC of its channels.
fn in_precopy(bench: &Bench) -> HostilePrimary {
    let mut primary = bench.receiver().connected();
    for (_, bytes) in primary.precopy_parts() {
        primary.main.send(&bytes);
    }
    until("the session", || {
        (!bench.status().sessions.is_empty()).then_some(())
    });
    primary
}

#[test]
fn a_disk_that_is_lost_in_its_first_copy_prevents_the_first_checkpoint() {
    let bench = Bench::start();
    let mut root = bench.client("root");
    root.write(0, &[1; 4096]).expect("a copy");
    let mut primary = in_precopy(&bench);
    drop(root);
    until("its end", || bench.status().disks.is_empty().then_some(()));
    primary.sync();
    primary.sync();
    let status = bench.receiver().ended();
    let end = status.end.unwrap_or_default();
    assert!(end.contains("disk root") && end.contains("first copy"), "{end}");
    assert_eq!(status.checkpoint, None);
}

#[test]
fn a_client_that_only_looks_costs_no_session() {
    let bench = Bench::start();
    let mut earlier = bench.client("data");
    earlier.write(0, &[1; 4096]).expect("a disk");
    drop(earlier);
    until("its end", || bench.status().disks.is_empty().then_some(()));
    let mut primary = in_precopy(&bench);
    assert!(bench.client("root").read(0, 4096).is_ok());
    until("its end", || bench.status().disks.is_empty().then_some(()));
    primary.sync();
    primary.sync();
    until("a checkpoint", || {
        (bench.status().sessions[0].state == SessionState::Protected).then_some(())
    });
}

#[test]
fn a_refused_write_ends_the_session() {
    for kind in [kind::WRITE, kind::WRITE_ZEROES, kind::TRIM] {
        let bench = Bench::start();
        let mut root = bench.client("root");
        let _primary = protected(&bench);
        let payload = match kind {
            kind::WRITE => vec![1; 512],
            _ => Vec::new(),
        };
        // The session's end may close the connection before the answer is out.
        let answer = root.ask(kind, SIZE as u64, 512, &payload);
        assert!(answer.is_err() || answer.is_ok_and(|error| error != 0));
        let end = bench.receiver().ended().end.unwrap_or_default();
        assert!(end.contains("disk root") && end.contains("not valid"), "{end}");
    }
}

#[test]
fn reads_before_a_disc_are_answered() {
    const LENGTH: u32 = 512 << 10;
    let bench = Bench::start();
    for _ in 0..20 {
        let reads = [(0, LENGTH), (1 << 20, LENGTH), (2 << 20, LENGTH)];
        let answered = bench
            .client_soon("root")
            .read_and_disconnect(&reads)
            .expect("answers");
        assert_eq!(
            answered,
            3 * (16 + usize::try_from(LENGTH).expect("a short read"))
        );
    }
}

#[test]
fn hostile_clients_cost_themselves_alone() {
    let bench = Bench::start();
    let mut root = bench.client("root");
    let mut primary = protected(&bench);
    let mut checkpoint = |value: u8| {
        root.write(0, &[value; 4096]).expect("a disk");
        primary.checkpoint(&[(0, 1, value)]);
    };
    checkpoint(1);
    // What no client sends in a handshake.
    for bytes in [
        vec![0xff; 4096],
        [&3u32.to_be_bytes()[..], &[0xff; 64]].concat(),
        [&3u32.to_be_bytes()[..], &option(7, &[0xff; 900])].concat(),
        [
            &3u32.to_be_bytes()[..],
            b"IHAVEOPT",
            &7u32.to_be_bytes(),
            &u32::MAX.to_be_bytes(),
        ]
        .concat(),
    ] {
        let mut stream = TcpStream::connect(bench.disks).expect("a server");
        // It may have closed the connection already.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        checkpoint(2);
    }
    // What no client sends with an export.
    for bytes in [
        vec![0; 28],
        request(kind::WRITE, 1, 0, u32::MAX),
        request(kind::WRITE, 1, u64::MAX, 1 << 20),
        request(99, 1, 0, 0),
        [request(kind::WRITE, 1, 0, 1 << 20), vec![0xbb; 4096]].concat(),
    ] {
        let mut data = bench.client_soon("data");
        let _ = data.send(&bytes);
        drop(data);
        checkpoint(3);
        drop(bench.client_soon("data"));
    }
    assert!(bench.base("data")[4096..].iter().all(|byte| *byte == 0xee));
    assert_eq!(bench.status().sessions[0].state, SessionState::Protected);
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task")
        .expect("this process")
        .count()
}

#[test]
fn silent_clients_cost_no_threads() {
    let bench = Bench::start();
    let mut root = bench.client("root");
    let mut primary = protected(&bench);
    let before = threads();
    let silent: Vec<_> = (0..1500).map(|_| TcpStream::connect(bench.disks)).collect();
    assert!(silent.iter().filter(|stream| stream.is_ok()).count() > 100);
    for moment in 1..10 {
        root.write(0, &[moment; 4096]).expect("a disk");
        primary.checkpoint(&[(0, 1, moment)]);
    }
    // Other tests of this process have their own.
    assert!(threads() < before + 300, "{before} threads, then {}", threads());
    // Those that are silent make room.
    until("room for a client", || NbdClient::go(bench.disks, "data").ok());
    assert!(greet(bench.disks).is_ok());
    drop(silent);
    primary.cut(Cut::Fin);
}

#[test]
fn a_base_that_is_missing_or_not_raw_is_said() {
    let bench = Bench::start();
    let refused = |name: &str| NbdClient::go(bench.disks, name).err().expect("refused");
    assert!(refused("swap").contains("truncate -s"), "{}", refused("swap"));
    std::fs::write(bench.path("cow"), b"QFI\xfb and more").expect("a file");
    assert!(refused("cow").contains("qemu-img convert"));
    assert!(refused("../root").contains("not a disk's name"));
    let _first = bench.client("root");
    assert!(refused("root").contains("in use by 127.0.0.1"));
    assert!(Path::new(&bench.path("root")).exists());
}
