//! A QEMU process: its command line, its monitor, its serial port, its end.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Guest, Lab, LabError, Qmp, wait_for};

/// A guest machine. Primary and QEMU's own secondary are started from the same one.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `-machine`, such as `pc` or `pc-i440fx-8.0`.
    pub machine: String,
    /// Guest memory, MiB; at most 2 GiB, so that it is one range from guest-physical 0.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Further arguments: devices, and what they need.
    pub extra: Vec<String>,
    /// What it boots.
    pub guest: Guest,
}

impl Machine {
    /// A bare machine with one CPU.
    #[must_use]
    pub fn bare(machine: &str, memory_mib: u32, guest: Guest) -> Self {
        Self {
            machine: machine.to_owned(),
            memory_mib,
            cpus: 1,
            extra: Vec::new(),
            guest,
        }
    }

    /// A pc with two CPUs, VGA, e1000, xHCI with a tablet, and virtio devices.
    #[must_use]
    pub fn with_devices(memory_mib: u32, guest: Guest) -> Self {
        let devices = "-vga std -netdev user,id=n0 -device e1000,netdev=n0 -netdev user,id=n1 \
             -device virtio-net-pci,netdev=n1 -device qemu-xhci -device usb-tablet -device virtio-balloon-pci \
             -device virtio-rng-pci -device virtio-serial-pci";
        Self {
            cpus: 2,
            extra: devices.split_whitespace().map(str::to_owned).collect(),
            ..Self::bare("pc", memory_mib, guest)
        }
    }
}

/// A running QEMU, killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    process: Child,
    qmp: Qmp,
    serial_log: PathBuf,
    serial_socket: PathBuf,
}

impl Qemu {
    /// Starts a QEMU whose guest runs at once.
    ///
    /// # Errors
    /// When QEMU does not start; its own words are in `NAME.log`.
    pub fn start(lab: &Lab, name: &str, machine: &Machine) -> Result<Self, LabError> {
        Self::launch(lab, name, machine, &[])
    }

    /// Starts a QEMU that waits for `migrate-incoming`.
    ///
    /// # Errors
    /// As [`Qemu::start`].
    pub fn start_incoming(lab: &Lab, name: &str, machine: &Machine) -> Result<Self, LabError> {
        Self::launch(lab, name, machine, &["-incoming", "defer"])
    }

    fn launch(lab: &Lab, name: &str, machine: &Machine, more: &[&str]) -> Result<Self, LabError> {
        let qmp_socket = lab.file(&format!("{name}.qmp"));
        let serial_socket = lab.file(&format!("{name}.serial"));
        let serial_log = lab.file(&format!("{name}-serial.log"));
        let log_path = lab.file(&format!("{name}.log"));
        let log = File::create(&log_path).map_err(LabError::io(format!("create {}", log_path.display())))?;
        let mut command = Command::new(&lab.qemu);
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-accel",
                "tcg",
            ])
            .args(["-machine", &machine.machine])
            .args(["-m", &format!("{}M", machine.memory_mib)])
            .args(["-smp", &machine.cpus.to_string()])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", qmp_socket.display()),
            ])
            .args(["-chardev", &serial_chardev(&serial_socket, &serial_log)])
            .args(["-serial", "chardev:serial"])
            .args(&machine.extra)
            .args(machine.guest.args(lab))
            .args(more)
            .stdin(Stdio::null())
            .stderr(log);
        let mut process = command
            .spawn()
            .map_err(LabError::io(format!("start {}", lab.qemu.display())))?;
        match Qmp::connect(&qmp_socket, Duration::from_secs(20)) {
            Ok(qmp) => Ok(Self {
                process,
                qmp,
                serial_log,
                serial_socket,
            }),
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                let said = fs::read_to_string(&log_path).unwrap_or_default();
                Err(LabError::Ended {
                    what: format!("QEMU {name}: {error}"),
                    detail: said,
                })
            }
        }
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Its monitor.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// What the guest has printed on its serial port.
    #[must_use]
    pub fn serial(&self) -> String {
        // QEMU makes the file when the first byte is written.
        String::from_utf8_lossy(&fs::read(&self.serial_log).unwrap_or_default()).into_owned()
    }

    /// Sends bytes to the guest's serial port.
    ///
    /// # Errors
    /// When the serial port's socket does not take them.
    pub fn send_serial(&self, bytes: &[u8]) -> Result<(), LabError> {
        UnixStream::connect(&self.serial_socket)
            .and_then(|mut socket| socket.write_all(bytes))
            .map_err(LabError::io("write to the serial port"))
    }

    /// Waits until a line of the guest starts with `prefix`, and returns the first such line.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_serial(&self, prefix: &str, limit: Duration) -> Result<String, LabError> {
        wait_for(&format!("the guest to print '{prefix}'"), limit, || {
            Ok(self
                .serial()
                .lines()
                .find(|line| line.starts_with(prefix))
                .map(str::to_owned))
        })
    }

    /// The number of the guest's last complete tick; 0 before the first.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        last_tick(&self.serial())
    }

    /// Fails if the guest has found its own memory to be wrong.
    ///
    /// # Errors
    /// With the guest's first error line.
    pub fn check_guest(&self) -> Result<(), LabError> {
        match self.serial().lines().find(|line| line.starts_with("error")) {
            None => Ok(()),
            Some(line) => Err(LabError::Ended {
                what: "the guest is inconsistent".into(),
                detail: line.to_owned(),
            }),
        }
    }

    /// Saves guest-physical memory from 0 to a file, as the guest's CPU would read it.
    ///
    /// # Errors
    /// Those of QEMU.
    pub fn pmemsave(&mut self, memory_mib: u32, file: &Path) -> Result<(), LabError> {
        let size = u64::from(memory_mib) << 20;
        let arguments = json!({"val": 0, "size": size, "filename": file});
        self.qmp.execute("pmemsave", &arguments).map(|_| ())
    }

    /// Sets migration capabilities on.
    pub(super) fn enable(&mut self, capabilities: &[&str]) -> Result<(), LabError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.qmp
            .execute("migrate-set-capabilities", &json!({"capabilities": list}))
            .map(|_| ())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// Output goes to the log whether or not somebody is connected.
fn serial_chardev(socket: &Path, log: &Path) -> String {
    format!(
        "socket,id=serial,path={},server=on,wait=off,logfile={}",
        socket.display(),
        log.display()
    )
}

fn last_tick(serial: &str) -> u64 {
    let complete = &serial[..serial.rfind('\n').unwrap_or(0)];
    let tick = complete
        .lines()
        .rev()
        .find_map(|line| line.trim_end().strip_prefix("tick "));
    tick.and_then(|rest| rest.split(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}
