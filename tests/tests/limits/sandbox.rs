//! What an intruder in a receiver can do: nothing but what the receiver does. docs/threat-model.md has what this is for.

use colo_ring_skip::skip;
use colo_ring_tests::command::{RunningReceiver, Scratch, as_user, guest, until, without_calls, wrapped};
use colo_ring_tests::intruder::{Called, Intruder};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tools::primary::SynthPrimary;
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use std::path::Path;
use std::{fs, io};

/// By its number.
const IPC_LOCK: u64 = 1 << 14;

/// Capabilities that some thread keeps: CAP_DAC_OVERRIDE, too.
const KEPT: u64 = 1 << 1 | IPC_LOCK;

/// What the kernel says of a thread or a process: /proc/PID/status.
struct Status(String);

impl Status {
    fn of(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self(fs::read_to_string(path.as_ref().join("status"))?))
    }

    /// The line `name:`.
    fn field(&self, name: &str) -> &str {
        let mut lines = self.0.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {name} in {}", self.0)).trim()
    }

    fn capabilities(&self) -> u64 {
        u64::from_str_radix(self.field("CapPrm"), 16).expect("a set")
    }
}

/// Of all threads that run: one may end while they are listed.
fn threads(process: u32) -> Vec<Status> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    tasks
        .filter_map(|task| match Status::of(task.ok()?.path()) {
            Ok(status) => Some(status),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => None,
            Err(error) => panic!("a thread's status: {error}"),
        })
        .collect()
}

/// The processes that it has started.
fn children(process: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    let children = children.expect("a kernel with CONFIG_PROC_CHILDREN");
    children
        .split_whitespace()
        .map(|child| child.parse().expect("a process id"))
        .collect()
}

#[test]
fn every_thread_is_confined_and_the_helper_is_not() {
    let (disks, ram) = (Scratch::new(), SharedDirectory::new().expect("a directory"));
    let (disks, ram) = (
        disks.path().display().to_string(),
        ram.path().display().to_string(),
    );
    for backend in ["uring", "epoll", "threads"] {
        let args = [
            "--backend",
            backend,
            "--hugepages",
            "off",
            "--on-loss",
            "true",
            "--disks",
            &disks,
        ];
        let more = [
            "--nbd",
            "tcp:127.0.0.1:0",
            "--ram-dir",
            &ram,
            "--metrics",
            "tcp:127.0.0.1:0",
        ];
        let receiver = RunningReceiver::start(wrapped(&[]), &[&args[..], &more].concat());
        let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
        primary.checkpoint().expect("a checkpoint");
        let mut names = Vec::new();
        for thread in threads(receiver.pid()) {
            let name = thread.field("Name");
            assert_eq!(thread.field("NoNewPrivs"), "1", "{backend}: {name}");
            assert_eq!(thread.field("Seccomp"), "2", "{backend}: {name}");
            // Those of the process, and its own.
            let filters: u32 = thread.field("Seccomp_filters").parse().expect("a number");
            assert!(filters >= 3, "{backend}: {name} has {filters} filters");
            let capabilities = thread.capabilities();
            assert_eq!(capabilities & !KEPT, 0, "{backend}: {name} has {capabilities:x}");
            names.push(name.to_owned());
        }
        for thread in [
            "stderr",
            "signals",
            "on-loss",
            "colo-control",
            "colo-hist",
            "colo-nbd",
            "metrics",
            "colo-starter",
            "colo-dump",
        ] {
            assert!(
                names.iter().any(|name| name == thread),
                "{backend}: {thread} of {names:?}"
            );
        }
        let [helper] = children(receiver.pid())[..] else {
            panic!("one process runs the hooks");
        };
        let helper = Status::of(format!("/proc/{helper}")).expect("it runs");
        assert_eq!(helper.field("Seccomp"), "0");
        assert_eq!(helper.field("NoNewPrivs"), "0");
        primary.checkpoint().expect("another checkpoint");
    }
}

/// Of each kind of thread one: what it does not need is refused, and the guests go on.
#[test]
#[cfg(target_arch = "x86_64")]
fn an_intruder_finds_nothing_to_open_and_nobody_to_call() {
    const SECRET: &std::ffi::CStr = c"/etc/passwd";
    let args = [
        "--hugepages",
        "off",
        "--on-loss",
        "true",
        "--metrics",
        "tcp:127.0.0.1:0",
    ];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    let (inet, stream) = (
        libc::AF_INET.cast_unsigned().into(),
        libc::SOCK_STREAM.cast_unsigned().into(),
    );
    let here = i64::from(libc::AT_FDCWD).cast_unsigned();
    let executable = (libc::PROT_READ | libc::PROT_EXEC).cast_unsigned().into();
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned().into();
    let none = u64::MAX;
    for name in [
        "colo-control",
        "colo-hist",
        "colo-core",
        "colo-decode",
        "colo-dump",
        "metrics",
        "on-loss",
        "stderr",
        "signals",
    ] {
        let mut intruder = Intruder::in_thread(receiver.pid(), name);
        intruder.is_refused(
            "a socket",
            Errno::EPERM,
            libc::SYS_socket,
            [inet, stream, 0, 0, 0, 0],
        );
        intruder.is_refused("a connection", Errno::EPERM, libc::SYS_connect, [0; 6]);
        intruder.is_refused(
            "another ring",
            Errno::EPERM,
            libc::SYS_io_uring_setup,
            [8, 0, 0, 0, 0, 0],
        );
        intruder.is_refused(
            "memory that is executed",
            Errno::EPERM,
            libc::SYS_mmap,
            [0, 4096, executable, private, none, 0],
        );
        intruder.is_refused("a process", Errno::EPERM, libc::SYS_clone, [0; 6]);
        intruder.is_refused("another user", Errno::EPERM, libc::SYS_setuid, [0; 6]);
        intruder.is_refused("a signal", Errno::EPERM, libc::SYS_kill, [1, 0, 0, 0, 0, 0]);
        let secret = intruder.text(SECRET);
        // Some may open files, and one more may remove them, of the operator's directories.
        let opens = ["colo-control", "colo-hist", "colo-core", "colo-decode"].contains(&name);
        let refusal = |may| if may { Errno::EACCES } else { Errno::EPERM };
        intruder.is_refused(
            "a file",
            refusal(opens),
            libc::SYS_openat,
            [here, secret, 0, 0, 0, 0],
        );
        let removes = refusal(opens || name == "colo-dump");
        intruder.is_refused("a removal", removes, libc::SYS_unlink, [secret, 0, 0, 0, 0, 0]);
    }
    assert!(Path::new("/etc/passwd").exists());
    for _ in 0..3 {
        primary.checkpoint().expect("a checkpoint");
    }
    drop(primary);
    receiver.wait_for_log("session 1 ended");
}

/// What only an intruder does ends the process: its primaries notice, and their guests go on there.
#[test]
#[cfg(target_arch = "x86_64")]
fn an_intruder_that_starts_a_program_ends_the_process() {
    for (name, number) in [
        ("colo-control", libc::SYS_execve),
        ("colo-core", libc::SYS_ptrace),
    ] {
        let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
        let mut intruder = Intruder::in_thread(receiver.pid(), name);
        let shell = intruder.text(c"/bin/sh");
        assert_eq!(
            intruder.call(number, [shell, 0, 0, 0, 0, 0]),
            Called::Killed(Signal::SIGSYS)
        );
        until("its end", || receiver.has_ended().then_some(()));
    }
}

/// Confined threads do not know the working directory.
#[test]
fn a_ram_directory_may_be_relative() {
    let ram = SharedDirectory::new().expect("a directory");
    let mut command = wrapped(&[]);
    command.current_dir(ram.path());
    let receiver = RunningReceiver::start(command, &["--hugepages", "off", "--ram-dir", "."]);
    assert_eq!(receiver.protect()["checkpoint"], 5);
}

/// With `--sandbox off` the threads are as the kernel makes them, and the log says so.
#[test]
fn it_can_be_switched_off() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off", "--sandbox", "off"]);
    assert!(
        receiver.log().contains("--sandbox off: an intruder"),
        "{}",
        receiver.log()
    );
    assert_eq!(receiver.protect()["checkpoint"], 5);
    for thread in threads(receiver.pid()) {
        let name = thread.field("Name");
        assert_eq!(thread.field("Seccomp"), "0", "{name}");
        assert_eq!(thread.field("NoNewPrivs"), "0", "{name}");
    }
}

#[test]
fn a_kernel_without_landlock_or_filters_is_reported() {
    for (calls, errno, says) in [
        (
            &[libc::SYS_landlock_create_ruleset][..],
            libc::ENOSYS,
            "this kernel has no Landlock",
        ),
        (
            &[libc::SYS_landlock_create_ruleset],
            libc::EOPNOTSUPP,
            "Landlock is not enabled",
        ),
        (
            &[libc::SYS_seccomp],
            libc::EINVAL,
            "this kernel has no filters of system calls",
        ),
    ] {
        let receiver = without_calls(calls, errno, || {
            RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"])
        });
        assert!(receiver.log().contains(says), "{says}: {}", receiver.log());
        assert_eq!(receiver.protect()["checkpoint"], 5);
        receiver.signal(Signal::SIGTERM);
        assert!(receiver.wait().status.success());
    }
}

/// As the unit in tools/packaging runs it.
#[test]
fn a_user_of_its_own_needs_one_capability() {
    if !nix::unistd::geteuid().is_root() {
        return skip(
            "a_user_of_its_own_needs_one_capability",
            "only root can change the user",
        );
    }
    let (scratch, ram) = (Scratch::new(), SharedDirectory::new().expect("a directory"));
    std::os::unix::fs::chown(ram.path(), Some(USER), Some(USER)).expect("root may");
    let command = as_user(USER, &scratch);
    let ram_dir = ram.path().display().to_string();
    let args = ["--ram-dir", &ram_dir, "--on-loss", "true"];
    let receiver = RunningReceiver::start_in(scratch, command, 2, &args);
    for thread in threads(receiver.pid()) {
        assert_eq!(thread.capabilities() & !IPC_LOCK, 0, "{}", thread.field("Name"));
    }
    assert_eq!(receiver.protect()["checkpoint"], 5);
    let log = receiver.log();
    for lack in ["capabilities", "ulimit -l", "confined"] {
        assert!(!log.contains(lack), "{log}");
    }
}

/// The number of `nobody`.
const USER: u32 = 65534;

#[test]
fn root_is_warned_of() {
    if !nix::unistd::geteuid().is_root() {
        return skip("root_is_warned_of", "this is not root");
    }
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
    let log = receiver.log();
    assert!(
        log.contains("capabilities that a receiver does not need (CAP_CHOWN"),
        "{log}"
    );
}

/// A hook that cannot be run any more must not be noticed only when a guest is lost.
#[test]
fn the_end_of_the_helper_is_reported_at_once() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off", "--on-loss", "true"]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    let [helper] = children(receiver.pid())[..] else {
        panic!("one process runs the hooks");
    };
    let helper = nix::unistd::Pid::from_raw(i32::try_from(helper).expect("a process id"));
    // What a terminal or a unit sends to all processes is not for it.
    nix::sys::signal::kill(helper, Signal::SIGTERM).expect("it runs");
    nix::sys::signal::kill(helper, Signal::SIGINT).expect("it runs");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(!receiver.log().contains("has ended"), "{}", receiver.log());
    nix::sys::signal::kill(helper, Signal::SIGKILL).expect("it runs");
    receiver.wait_for_log("WARNING: the process that runs --on-loss has ended");
    primary.checkpoint().expect("another checkpoint");
}
