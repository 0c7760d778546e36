//! The laboratory: real QEMU primaries with guests that dirty memory, and the secondaries that they are protected by.
//!
//! `scripts/qemu-lab` makes it; [`Lab::open`] finds it and fails with that command where it is missing, so that no
//! test passes without QEMU. One `Lab` exists at a time on a machine (a file lock), because its QEMUs and the
//! receiver would otherwise disturb each other's times. Every process and file of a `Lab` ends with it.

mod bulk;
mod client;
mod disk_guest;
mod disks;
mod error;
mod failover;
mod frames;
mod guard;
mod guest;
mod host_guest;
mod image;
mod kills;
mod link_proxy;
mod monitor_proxy;
mod net_guest;
mod network;
mod plug_host;
mod protect;
mod qemu;
mod qmp;
mod ram;
mod receiver;
mod recorder;
mod secondary;
mod services_guest;
mod settings;
mod shared;
mod stats;
mod turn;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use turn::Turn;

pub use bulk::{Direction, bulk_mib_per_s};
pub use client::{Client, ClientError, ClientReport, Load};
pub use disk_guest::{Disk, DiskBus, DiskContent, DiskGuest};
pub use disks::{DiskRuns, KilledGuest, Victim, disk_runs};
pub use error::LabError;
pub use failover::{protect_by_command, unprotect_by_command};
pub use frames::{FrameCapture, FrameKind, SeenFrame, ask_for_frames};
pub use guard::Guard;
pub use guest::{Content, Guest, LinuxGuest, Pattern, TestGuest};
pub use host_guest::{Host, HostGuest, HostKernel, NumaMap};
pub use image::check_test_guest_image;
pub use kills::{Kills, Moment, check_continues, failover_runs};
pub use link_proxy::{LinkMoment, LinkProxy, ReceiverFault};
pub use monitor_proxy::MonitorProxy;
pub use net_guest::{
    GUEST_ADDRESS, GUEST_ADDRESS_6, NetGuest, Nic, TAP, add_other_tap, delete_tap, join_networks, make_tap,
    net_experiment, set_loopback, wait_tap_free,
};
pub use network::{Address, Transport};
pub use protect::{Compression, Precopy, Protection, ZeroPageDetection};
pub use qemu::{Devices, Machine, Qemu};
pub use qmp::{Event, Qmp};
pub use ram::SavedRam;
pub use receiver::{Dump, Receiver, ReceiverOptions, command_under_test};
pub use recorder::Recorder;
pub use secondary::{Secondary, Way};
pub use services_guest::{ServicesGuest, services_experiment};
pub use settings::HostSetting;
pub use shared::{SharedDirectory, huge_pages};
pub use stats::Distribution;
pub use turn::Company;

/// The laboratory, in which a few experiments run side by side.
#[derive(Debug)]
pub struct Lab {
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    test_guest: PathBuf,
    disk_initrd: PathBuf,
    net_initrd: PathBuf,
    services_initrd: PathBuf,
    scratch: TempDir,
    files_made: AtomicU32,
    _turn: Turn,
}

impl Lab {
    /// Finds the laboratory, waits for its turn and assembles the test guest.
    ///
    /// # Errors
    /// [`LabError::Missing`] with the command that makes it.
    pub fn open(company: Company) -> Result<Self, LabError> {
        let lab = Self::without_qemu(company)?;
        for file in [&lab.qemu, &lab.kernel, &lab.initrd] {
            if !file.exists() {
                return Err(LabError::Missing { file: file.clone() });
            }
        }
        assemble_test_guest(&lab.test_guest)?;
        Ok(lab)
    }

    /// [`Lab::open`], and makes the guest with a disk.
    ///
    /// # Errors
    /// Those of [`Lab::open`], and when the guest cannot be made.
    pub fn open_with_disk_guest(company: Company) -> Result<Self, LabError> {
        let lab = Self::open(company)?;
        let laboratory = PathBuf::from(script_output("path")?);
        build_guest("build-disk-guest", &laboratory, &lab.disk_initrd)?;
        Ok(lab)
    }

    /// [`Lab::open`], and makes the guest with a network card.
    ///
    /// # Errors
    /// Those of [`Lab::open`], and when the guest cannot be made.
    pub fn open_with_net_guest(company: Company) -> Result<Self, LabError> {
        let lab = Self::open(company)?;
        let laboratory = PathBuf::from(script_output("path")?);
        build_guest("build-net-guest", &laboratory, &lab.net_initrd)?;
        Ok(lab)
    }

    /// Waits for its turn, for experiments of the command alone: no QEMU can be started.
    ///
    /// # Errors
    /// When its files cannot be made.
    pub fn without_qemu(company: Company) -> Result<Self, LabError> {
        let dir = PathBuf::from(script_output("path")?);
        let turn = Turn::take(&dir, company)?;
        // Short, because the path of a UNIX socket has at most 107 bytes.
        let scratch = tempfile::tempdir().map_err(LabError::io("create a scratch directory"))?;
        Ok(Self {
            qemu: dir.join("bin/qemu-system-x86_64"),
            kernel: dir.join("linux/vmlinuz"),
            initrd: dir.join("linux/initrd.gz"),
            test_guest: scratch.path().join("dirtier.elf"),
            disk_initrd: scratch.path().join("disk-initrd.gz"),
            net_initrd: scratch.path().join("net-initrd.gz"),
            services_initrd: scratch.path().join("services-initrd.gz"),
            scratch,
            files_made: AtomicU32::new(0),
            _turn: turn,
        })
    }

    /// The version of its QEMU, such as `11.1.3`.
    ///
    /// # Errors
    /// When it does not run.
    pub fn qemu_version(&self) -> Result<String, LabError> {
        let output = Command::new(&self.qemu)
            .arg("--version")
            .output()
            .map_err(LabError::io(format!("run {}", self.qemu.display())))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = said
            .strip_prefix("QEMU emulator version ")
            .and_then(|rest| rest.split([' ', '\n']).next());
        version.map(str::to_owned).ok_or_else(|| LabError::Malformed {
            what: "the answer to --version".into(),
            detail: said.clone(),
        })
    }

    /// A path for a file or socket of this test; removed with the `Lab`. Logs are named `*.log`: a failing test prints
    /// their ends.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A static busybox, which is there with whichever QEMU.
    fn busybox(&self) -> PathBuf {
        self.kernel.with_file_name("busybox")
    }

    /// A path as of [`Lab::file`], with a number that no other has.
    fn fresh_file(&self, stem: &str, extension: &str) -> PathBuf {
        let number = self.files_made.fetch_add(1, Ordering::Relaxed);
        self.scratch.path().join(format!("{stem}-{number}.{extension}"))
    }
}

/// Runs the body of a test in the laboratory, beside others.
///
/// # Panics
/// With the error's text when the laboratory is missing or the body fails; the ends of all logs are printed then.
pub fn experiment(body: impl FnOnce(&Lab) -> Result<(), LabError>) {
    run_experiment(Lab::open(Company::Others), body);
}

/// The same for one that measures times or changes settings of the host: no other runs meanwhile.
///
/// # Panics
/// As of [`experiment`].
pub fn experiment_alone(body: impl FnOnce(&Lab) -> Result<(), LabError>) {
    run_experiment(Lab::open(Company::Nobody), body);
}

/// The same with a guest that has a disk.
///
/// # Panics
/// As of [`experiment`].
pub fn disk_experiment(company: Company, body: impl FnOnce(&Lab) -> Result<(), LabError>) {
    run_experiment(Lab::open_with_disk_guest(company), body);
}

fn run_experiment(lab: Result<Lab, LabError>, body: impl FnOnce(&Lab) -> Result<(), LabError>) {
    let lab = lab.unwrap_or_else(|error| panic!("{error}"));
    if let Err(error) = body(&lab) {
        panic!("{error}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_logs(self.scratch.path());
        }
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn script_output(word: &str) -> Result<String, LabError> {
    let script = repository().join("scripts/qemu-lab");
    let output = Command::new(&script)
        .arg(word)
        .output()
        .map_err(LabError::io(format!("run {}", script.display())))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Makes the initramfs of a guest by a script of `tests/guest`.
fn build_guest(script: &str, laboratory: &Path, out: &Path) -> Result<(), LabError> {
    let script = repository().join("tests/guest").join(script);
    let output = Command::new(&script).arg(laboratory).arg(out).output();
    let output = output.map_err(LabError::io(format!("run {}", script.display())))?;
    if output.status.success() && fs::exists(out).unwrap_or(false) {
        return Ok(());
    }
    Err(LabError::Guest {
        detail: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn assemble_test_guest(out: &Path) -> Result<(), LabError> {
    let script = repository().join("tests/guest/build");
    let output = Command::new(&script)
        .arg(out)
        .output()
        .map_err(LabError::io(format!("run {}", script.display())))?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Guest {
        detail: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn print_logs(dir: &Path) {
    const LINES_MAX: usize = 30;
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "log") {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("---- end of {}", path.display());
            for line in &lines[lines.len().saturating_sub(LINES_MAX)..] {
                eprintln!("{line}");
            }
        }
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets every [`wait_for`] of this process end with [`LabError::Interrupted`], now and from now on, so that whatever was
/// started is ended by its owner.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Asks `ready` every few milliseconds until it gives a value.
///
/// # Errors
/// Those of `ready`, [`LabError::Timeout`] after `limit`, and [`LabError::Interrupted`] after [`interrupt`].
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>, LabError>,
) -> Result<T, LabError> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(LabError::Interrupted);
        }
        if Instant::now() >= deadline {
            return Err(LabError::Timeout {
                what: what.to_owned(),
                limit,
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
