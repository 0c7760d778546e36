//! The real command in surroundings of a test's choice: limits, filters, missing privileges.

use crate::HANG_LIMIT;
use crate::lab::command_under_test;
use crate::schema;
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A directory of its own, removed when dropped.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Scratch {
    /// A new one.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A file in it.
    ///
    /// # Panics
    /// If the temporary directory's path is not UTF-8.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        let path = self.path().join(name);
        path.to_str().expect("a path in UTF-8").to_owned()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).expect("a file that the command wrote")
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// `wrap` and then the command: `wrap` are programs that execute the rest of their command line.
///
/// # Panics
/// If there is no command to test.
#[must_use]
pub fn wrapped(wrap: &[&str]) -> Command {
    let own = command_under_test().expect("the command");
    let Some((first, rest)) = wrap.split_first() else {
        return Command::new(own);
    };
    let mut command = Command::new(first);
    command.args(rest).arg(own);
    command
}

/// Runs the command to its end.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn run(args: &[&str]) -> Output {
    wrapped(&[]).args(args).output().expect("the command")
}

/// Runs `start` on a thread on which every system call of io_uring fails with this error, as in all that it starts.
///
/// # Panics
/// If the kernel has no filters of system calls.
pub fn without_io_uring<T: Send>(errno: i32, start: impl FnOnce() -> T + Send) -> T {
    let calls = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ];
    without_calls(&calls, errno, start)
}

/// Runs `start` on a thread on which these system calls fail with this error, as in all that it starts.
///
/// # Panics
/// If the kernel has no filters of system calls.
pub fn without_calls<T: Send>(calls: &[i64], errno: i32, start: impl FnOnce() -> T + Send) -> T {
    let filter = SeccompFilter::new(
        calls.iter().map(|call| (*call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        TargetArch::try_from(std::env::consts::ARCH).expect("an architecture that has filters"),
    );
    let filter = BpfProgram::try_from(filter.expect("a filter")).expect("a filter");
    std::thread::scope(|scope| {
        let started = scope.spawn(|| {
            seccompiler::apply_filter(&filter).expect("a kernel with CONFIG_SECCOMP_FILTER");
            start()
        });
        started.join().expect("what was to be run")
    })
}

/// What runs the command as another user, with CAP_IPC_LOCK alone. Only root can start it.
///
/// # Panics
/// If the command cannot be put where that user finds it.
#[must_use]
pub fn as_user(user: u32, scratch: &Scratch) -> Command {
    let own = command_under_test().expect("the command");
    let found = scratch.file("colo-ring");
    std::fs::copy(own, &found).expect("a copy of the command");
    chown(scratch.path(), Some(user), Some(user)).expect("root may");
    let mut command = Command::new("setpriv");
    command
        .args([
            &format!("--reuid={user}"),
            &format!("--regid={user}"),
            "--clear-groups",
        ])
        .args(["bounding-set", "inh-caps", "ambient-caps"].map(|set| format!("--{set}=-all,+ipc_lock")))
        .arg(found);
    command
}

/// Starts a receiver by this command line, to which what every test needs is added.
fn spawn(mut command: Command, channels: u8, args: &[&str], scratch: &Scratch, stderr: Stdio) -> Child {
    command
        .args(["receive", "--listen", "tcp:127.0.0.1:0", "--json"])
        .args(["--channels", &channels.to_string()])
        .args(["--control", &format!("unix:{}", scratch.file("control"))])
        .args(["--hist", &scratch.file("hist")])
        .args(args)
        .stdin(Stdio::null())
        .stdout(File::create(scratch.file("out")).expect("a file"))
        .stderr(stderr);
    let spawned = command.spawn();
    spawned.unwrap_or_else(|error| panic!("{command:?}: {error}: install it (util-linux)"))
}

/// A running `colo-ring receive` on a free port of this host, killed when dropped.
#[derive(Debug)]
pub struct RunningReceiver {
    process: Child,
    scratch: Scratch,
    address: Address,
}

/// What a receiver left.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// The report on its standard output.
    pub report: Value,
    /// Its standard error.
    pub log: String,
    /// The file PREFIX.json of the histograms.
    pub histograms: Value,
    scratch: Scratch,
}

impl Ended {
    /// A file that it wrote; `hist` is the prefix of the histograms.
    ///
    /// # Panics
    /// If it wrote none of that name.
    #[must_use]
    pub fn read(&self, name: &str) -> String {
        self.scratch.read(name)
    }
}

impl RunningReceiver {
    /// Starts it by this command line, to which what every test needs is added, for two channels, and waits until it
    /// listens.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn start(command: Command, args: &[&str]) -> Self {
        Self::with_channels(command, 2, args)
    }

    /// Like [`Self::start`], for so many channels.
    ///
    /// # Panics
    /// If it does not listen.
    #[must_use]
    pub fn with_channels(command: Command, channels: u8, args: &[&str]) -> Self {
        Self::start_in(Scratch::new(), command, channels, args)
    }

    /// Like [`Self::with_channels`], with its files in this directory.
    ///
    /// # Panics
    /// If it does not listen.
    #[must_use]
    pub fn start_in(scratch: Scratch, command: Command, channels: u8, args: &[&str]) -> Self {
        let log = File::create(scratch.file("log")).expect("a file");
        let mut process = spawn(command, channels, args, &scratch, log.into());
        let address = until("it listens", || {
            let log = scratch.read("log");
            let line = log.lines().find_map(|line| line.strip_prefix("listening on "));
            let ended = process.try_wait().expect("its state");
            assert!(ended.is_none(), "it ended ({ended:?}): {log}");
            line.map(|address| address.parse().expect("an address"))
        });
        Self {
            process,
            scratch,
            address,
        }
    }

    /// Like [`Self::start`], with a standard error that is not read once it listens: the smallest pipe there is, whose end to
    /// read from is returned. Its log is empty.
    ///
    /// # Panics
    /// If it does not listen.
    #[must_use]
    pub fn with_unread_log(command: Command, args: &[&str]) -> (Self, ChildStderr) {
        let scratch = Scratch::new();
        drop(File::create(scratch.file("log")).expect("a file"));
        let mut process = spawn(command, 2, args, &scratch, Stdio::piped());
        let mut pipe = process.stderr.take().expect("a pipe");
        fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(4096)).expect("a size of a pipe");
        let mut log = String::new();
        let address = loop {
            let mut bytes = [0; 256];
            let read = pipe.read(&mut bytes).expect("a pipe");
            assert!(read > 0, "it ended: {log}");
            log.push_str(&String::from_utf8_lossy(&bytes[..read]));
            let lines = log
                .split_inclusive('\n')
                .filter_map(|line| line.strip_suffix('\n'));
            if let Some(address) = lines.filter_map(|line| line.strip_prefix("listening on ")).next() {
                break address.parse().expect("an address");
            }
        };
        let receiver = Self {
            process,
            scratch,
            address,
        };
        (receiver, pipe)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The path of its control socket.
    #[must_use]
    pub fn control_path(&self) -> String {
        self.scratch.file("control")
    }

    /// Where it serves disks.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn disk_address(&self) -> String {
        until("it serves disks", || {
            let log = self.log();
            let address = log
                .lines()
                .find_map(|line| line.strip_prefix("serving disks on "));
            address.map(str::to_owned)
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Whether it runs no more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        // Of a process that has not been waited for.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()));
        stat.is_ok_and(|stat| stat.contains(") Z "))
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.scratch.read("log")
    }

    /// Waits until this is in its log.
    pub fn wait_for_log(&self, part: &str) {
        until(part, || self.log().contains(part).then_some(()));
    }

    /// `colo-ring status`.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn status(&self) -> Value {
        self.ask(&["status", "--json"])
    }

    /// `colo-ring dump` of a session: its `checkpoint.json`, and the content of a file that it names.
    ///
    /// # Panics
    /// If it fails.
    pub fn dump(&self, session: u64) -> (Value, impl Fn(&str) -> Vec<u8>) {
        let out = self.scratch.file("dump");
        let dumped = self.ask(&["dump", "--json", "--out", &out, "--session", &session.to_string()]);
        let read = move |file: &str| std::fs::read(PathBuf::from(&out).join(file)).expect("a dumped file");
        (dumped, read)
    }

    /// Runs one of the commands that take `--control`, to its end.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Output {
        let control = format!("unix:{}", self.scratch.file("control"));
        run(&[&args[..1], &["--control", &control], &args[1..]].concat())
    }

    /// Asks it by one of the commands that take `--control` and `--json`.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn ask(&self, args: &[&str]) -> Value {
        let output = self.command(args);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        schema::document(&output.stdout)
    }

    /// A whole session of a guest that behaves, whose checkpoints are dumped and compared. Returns its status.
    ///
    /// # Panics
    /// If anything of it fails.
    #[must_use]
    pub fn protect(&self) -> Value {
        let mut primary = SynthPrimary::connect(&self.address, &guest()).expect("precopy");
        for _ in 0..5 {
            primary.checkpoint().expect("a checkpoint");
        }
        let session = self.protected();
        self.check_dump(&primary, &session, 5);
        primary.close().expect("its end");
        until("the session's end", || {
            let ended = format!("session {} ended", session["session"]);
            self.log().contains(&ended).then_some(())
        });
        session
    }

    /// The status of the session whose primary is connected.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn protected(&self) -> Value {
        let status = self.status();
        let sessions = status["sessions"].as_array().expect("a list");
        let session = sessions.iter().find(|session| session["state"] == "protected");
        session.expect("the session").clone()
    }

    /// Resident memory of the receiver in bytes.
    ///
    /// # Panics
    /// If it has ended.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
        kib.and_then(|kib| kib.trim().parse::<u64>().ok())
            .expect("a number of kB")
            << 10
    }

    /// Dumps the session's checkpoint, which must be this one, and the memory that this primary has sent.
    ///
    /// # Panics
    /// If it is another one, or differs.
    pub fn check_dump(&self, primary: &SynthPrimary, session: &Value, checkpoint: u64) {
        let out = self.scratch.file("dump");
        let dumped = self.ask(&[
            "dump",
            "--json",
            "--out",
            &out,
            "--session",
            &session["session"].to_string(),
        ]);
        assert_eq!(dumped["checkpoint"], checkpoint);
        for block in dumped["blocks"].as_array().expect("a list") {
            let [name, file] = ["name", "file"].map(|key| block[key].as_str().expect("a text"));
            let bytes = std::fs::read(PathBuf::from(&out).join(file)).expect("a dumped file");
            assert!(
                *primary.image(name).expect("its block") == *bytes,
                "block {name} differs"
            );
        }
    }

    /// The prefix of its `--hist`.
    pub fn histograms(&self) -> String {
        self.scratch.file("hist")
    }

    /// What it has printed.
    pub fn output(&self) -> String {
        self.scratch.read("out")
    }

    /// Its exit code, once it has ended.
    ///
    /// # Panics
    /// If a signal has ended it.
    pub fn exit_code(&mut self) -> Option<i32> {
        let status = self.process.try_wait().expect("its state")?;
        Some(status.code().expect("no signal"))
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it has ended.
    pub fn signal(&self, signal: Signal) {
        let process = i32::try_from(self.process.id()).expect("a process id");
        kill(Pid::from_raw(process), signal).expect("it runs");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end, or leaves no report.
    #[must_use]
    pub fn wait(mut self) -> Ended {
        let status = until("its end", || self.process.try_wait().expect("its state"));
        let json = |name: &str| schema::document(self.scratch.read(name).as_bytes());
        Ended {
            status,
            report: json("out"),
            log: self.log(),
            histograms: json("hist.json"),
            scratch: std::mem::take(&mut self.scratch),
        }
    }
}

impl Drop for RunningReceiver {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A small guest for two channels.
#[must_use]
pub fn guest() -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        channels: 2,
        dirty_pages: Distribution::Fixed(100),
        interval: Duration::ZERO,
        ..SynthOptions::new(Version::V11_1)
    }
}

/// Waits until there is something.
///
/// # Panics
/// After [`HANG_LIMIT`].
pub fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(since.elapsed() < HANG_LIMIT, "waited {HANG_LIMIT:?} for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
