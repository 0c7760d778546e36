//! A QEMU process: its command line, its monitor, its serial port, its end.

use crate::HANG_LIMIT;
use std::fs::{self, File};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Disk, Event, Guest, Lab, LabError, Nic, Qmp, SavedRam, wait_for};

/// A guest machine. Primary and QEMU's own secondary are started from the same one.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `-machine`, such as `pc` or `pc-i440fx-8.0`.
    pub machine: String,
    /// Guest memory, MiB; at most 2 GiB, so that it is one range from guest-physical 0.
    pub memory_mib: u32,
    /// What is in it beside memory and a serial port.
    pub devices: Devices,
    /// Whether its memory is touched before it starts, so that no page fault is measured.
    pub prealloc: bool,
    /// `-uuid`, by which a receiver tells the channels of several guests apart.
    pub uuid: Option<String>,
    /// Its disk, if it has one.
    pub disk: Option<Disk>,
    /// Its network card, if it has one.
    pub nic: Option<Nic>,
    /// What it boots.
    pub guest: Guest,
}

const MANY_DEVICES: &str = "-smp 2 -vga std -netdev user,id=n0 -device e1000,netdev=n0 \
    -netdev user,id=n1 -device virtio-net-pci,netdev=n1 -device qemu-xhci -device usb-tablet \
    -device virtio-balloon-pci -device virtio-rng-pci -device virtio-serial-pci";

/// What a machine has beside memory and a serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// One CPU, nothing else.
    None,
    /// Two CPUs, VGA, e1000, xHCI with a tablet, virtio network, balloon, random numbers and serial. Its RAM is a
    /// shared file, because `pmemsave` cannot read what lies behind the VGA window.
    Many,
}

impl Machine {
    /// A bare machine with one CPU.
    #[must_use]
    pub fn bare(machine: &str, memory_mib: u32, guest: Guest) -> Self {
        Self {
            machine: machine.to_owned(),
            memory_mib,
            devices: Devices::None,
            prealloc: false,
            uuid: None,
            disk: None,
            nic: None,
            guest,
        }
    }

    /// A pc with two CPUs and many devices.
    #[must_use]
    pub fn with_devices(memory_mib: u32, guest: Guest) -> Self {
        Self {
            devices: Devices::Many,
            ..Self::bare("pc", memory_mib, guest)
        }
    }

    /// With its RAM in a file, where one is given.
    pub(super) fn args(&self, ram_file: Option<&Path>) -> Vec<String> {
        let (machine, memory_mib) = (&self.machine, self.memory_mib);
        let backend = match ram_file.map(Path::display) {
            None if !self.prealloc => None,
            None => Some("memory-backend-ram".to_owned()),
            Some(file) => Some(format!("memory-backend-file,mem-path={file},share=on")),
        };
        let mut args = vec!["-m".to_owned(), format!("{memory_mib}M"), "-machine".to_owned()];
        match backend {
            None => args.push(machine.clone()),
            Some(backend) => {
                let prealloc = if self.prealloc { "on" } else { "off" };
                args.push(format!("{machine},memory-backend=pc.ram"));
                args.push("-object".to_owned());
                args.push(format!(
                    "{backend},id=pc.ram,size={memory_mib}M,prealloc={prealloc}"
                ));
            }
        }
        if self.devices == Devices::Many {
            args.extend(MANY_DEVICES.split_whitespace().map(str::to_owned));
        }
        args.extend(self.disk.iter().flat_map(Disk::args));
        args.extend(self.nic.iter().flat_map(Nic::args));
        if let Some(uuid) = &self.uuid {
            args.extend(["-uuid".to_owned(), uuid.clone()]);
        }
        args
    }
}

/// A running QEMU, killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    process: Child,
    qmp: Qmp,
    machine: Machine,
    ram_file: Option<PathBuf>,
    free_monitor: PathBuf,
    serial_log: PathBuf,
    serial_socket: PathBuf,
}

impl Qemu {
    /// Starts a QEMU whose guest runs at once.
    ///
    /// # Errors
    /// When QEMU does not start; its own words are in `NAME.log`.
    pub fn start(lab: &Lab, name: &str, machine: &Machine) -> Result<Self, LabError> {
        Self::launch(lab, name, machine, own_ram(lab, name, machine).as_deref(), &[])
    }

    /// Starts a QEMU that waits for `migrate-incoming`.
    ///
    /// # Errors
    /// As [`Qemu::start`].
    pub fn start_incoming(lab: &Lab, name: &str, machine: &Machine) -> Result<Self, LabError> {
        Self::start_incoming_at(lab, name, machine, "defer")
    }

    /// The same, but it listens there from its start.
    ///
    /// # Errors
    /// As [`Qemu::start`].
    pub fn start_incoming_at(
        lab: &Lab,
        name: &str,
        machine: &Machine,
        address: &str,
    ) -> Result<Self, LabError> {
        let ram = own_ram(lab, name, machine);
        Self::launch(lab, name, machine, ram.as_deref(), &["-incoming", address])
    }

    /// How much of its memory is huge pages of the host's pool, in bytes.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn huge_bytes(&self) -> Result<u64, LabError> {
        let file = format!("/proc/{}/smaps_rollup", self.pid());
        let text = fs::read_to_string(&file).map_err(LabError::io(format!("read {file}")))?;
        let lines = text.lines().filter(|line| line.contains("_Hugetlb:"));
        let kibibytes = lines.map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        let sum: Option<u64> = kibibytes.sum();
        sum.map(|kibibytes| kibibytes << 10).ok_or(LabError::Malformed {
            what: file,
            detail: text,
        })
    }

    /// The same with its RAM in a file that there is: that of a receiver's image.
    ///
    /// # Errors
    /// As [`Qemu::start`].
    pub fn start_standby(lab: &Lab, name: &str, machine: &Machine, ram: &Path) -> Result<Self, LabError> {
        Self::launch(lab, name, machine, Some(ram), &["-incoming", "defer"])
    }

    /// The command line of a QEMU of that name and machine, without a monitor, for another program to start it.
    #[must_use]
    pub fn command_line(lab: &Lab, name: &str, machine: &Machine, ram: Option<&Path>) -> Vec<String> {
        let plain = "-nodefaults -no-user-config -display none -accel tcg";
        let mut words = vec![lab.qemu.display().to_string()];
        words.extend(plain.split(' ').map(str::to_owned));
        words.extend(machine.args(ram));
        let [socket, log] = [".serial", "-serial.log"].map(|end| lab.file(&format!("{name}{end}")));
        let chardev = serial_chardev(&socket, &log);
        words.extend(["-chardev", &chardev, "-serial", "chardev:serial"].map(str::to_owned));
        words.extend(machine.guest.args(lab));
        words
    }

    /// A monitor without a client: for a command under test.
    #[must_use]
    pub fn free_monitor(&self) -> &Path {
        &self.free_monitor
    }

    fn launch(
        lab: &Lab,
        name: &str,
        machine: &Machine,
        ram: Option<&Path>,
        more: &[&str],
    ) -> Result<Self, LabError> {
        let [qmp_socket, free_monitor] = [".qmp", ".free"].map(|end| lab.file(&format!("{name}{end}")));
        let serial_socket = lab.file(&format!("{name}.serial"));
        let serial_log = lab.file(&format!("{name}-serial.log"));
        let log_path = lab.file(&format!("{name}.log"));
        let log = File::create(&log_path).map_err(LabError::io(format!("create {}", log_path.display())))?;
        let words = Self::command_line(lab, name, machine, ram);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(more);
        for monitor in [&qmp_socket, &free_monitor] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        }
        command.stdin(Stdio::null()).stderr(log);
        let mut process = command
            .spawn()
            .map_err(LabError::io(format!("start {}", lab.qemu.display())))?;
        match Qmp::connect(&qmp_socket, HANG_LIMIT) {
            Ok(qmp) => Ok(Self {
                process,
                qmp,
                machine: machine.clone(),
                ram_file: ram.map(Path::to_owned),
                free_monitor,
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

    /// Waits until a guest is loaded that came in by a migration, running or not.
    ///
    /// # Errors
    /// [`LabError::Timeout`], and [`LabError::Ended`] when it cannot be loaded.
    pub fn wait_loaded(&mut self) -> Result<(), LabError> {
        wait_for("the guest to be loaded", HANG_LIMIT, || {
            let state = self.qmp.execute("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed") => Err(LabError::Ended {
                    what: "the migration".into(),
                    detail: state.to_string(),
                }),
                _ => Ok(None),
            }
        })
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
        // QEMU forgets what the guest has not taken when its client has gone: it closes the connection once all was taken.
        let sent = UnixStream::connect(&self.serial_socket).and_then(|mut socket| {
            socket.write_all(bytes)?;
            socket.shutdown(Shutdown::Write)?;
            std::io::copy(&mut socket, &mut std::io::sink())
        });
        sent.map(drop).map_err(LabError::io("write to the serial port"))
    }

    /// Waits until a line of the guest starts with `prefix`, and returns the first such line.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_serial(&self, prefix: &str, limit: Duration) -> Result<String, LabError> {
        wait_for(&format!("the guest to print '{prefix}'"), limit, || {
            // A line is whole once its end was printed.
            Ok(self
                .serial()
                .split_inclusive('\n')
                .filter_map(|line| line.strip_suffix('\n'))
                .find(|line| line.starts_with(prefix))
                .map(str::to_owned))
        })
    }

    /// The number of the guest's last complete tick; 0 before the first.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        last_tick(&self.serial())
    }

    /// The numbers of all complete ticks, in order.
    #[must_use]
    pub fn all_ticks(&self) -> Vec<u64> {
        ticks(&self.serial()).collect()
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

    /// Saves the guest's RAM. Only with the guest stopped are all its pages of one instant.
    ///
    /// # Errors
    /// Those of QEMU, and of copying the RAM file where there is one.
    pub fn save_ram(&mut self, to: &Path) -> Result<SavedRam, LabError> {
        let size = u64::from(self.machine.memory_mib) << 20;
        self.qmp
            .execute("pmemsave", &json!({"val": 0, "size": size, "filename": to}))?;
        let block = match (self.machine.devices, &self.ram_file) {
            (Devices::Many, Some(ram)) => {
                let copy = to.with_extension("block");
                fs::copy(ram, &copy).map_err(LabError::io("copy the RAM file"))?;
                Some(copy)
            }
            _ => None,
        };
        Ok(SavedRam::new(to.to_owned(), block))
    }

    /// Whether it has crashed by a fault of its own; waits a little, as its monitor is closed before it has ended.
    #[must_use]
    pub fn crash(&mut self) -> Option<LabError> {
        const ENDING: Duration = Duration::from_secs(2);
        let faults = [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGABRT];
        let ended = wait_for("QEMU's end", ENDING, || {
            self.process.try_wait().map_err(LabError::io("wait for QEMU"))
        });
        let status = ended.ok()?;
        let is_fault = |signal| faults.iter().any(|fault| *fault as i32 == signal);
        (status.signal().is_some_and(is_fault)).then_some(LabError::QemuCrashed { status })
    }

    /// Kills it by SIGKILL. Returns all events that it has sent.
    #[must_use]
    pub fn kill(mut self) -> Vec<Event> {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
        // What is on its way is read until the connection ends: a killed QEMU sends no SHUTDOWN event.
        let _ = self.qmp.wait_event("SHUTDOWN", HANG_LIMIT);
        self.qmp.events()
    }

    /// Stops the whole process, QEMU's own threads too, wherever they are ([`Qemu::thaw`] lets it go on).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn freeze(&self) -> Result<(), LabError> {
        self.signal(Signal::SIGSTOP)
    }

    /// Ends a [`Qemu::freeze`].
    ///
    /// # Errors
    /// When the process is gone.
    pub fn thaw(&self) -> Result<(), LabError> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), LabError> {
        let pid = i32::try_from(self.pid()).expect("process ids are below 2^22 on Linux");
        kill(Pid::from_raw(pid), signal).map_err(|errno| LabError::io("signal QEMU")(errno.into()))
    }

    /// Sets migration capabilities on.
    ///
    /// # Errors
    /// When QEMU refuses one.
    pub fn enable(&mut self, capabilities: &[&str]) -> Result<(), LabError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.qmp
            .execute("migrate-set-capabilities", &json!({"capabilities": list}))?;
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// With many devices its RAM is a shared file (see [`Devices::Many`]).
fn own_ram(lab: &Lab, name: &str, machine: &Machine) -> Option<PathBuf> {
    (machine.devices == Devices::Many).then(|| lab.file(&format!("{name}.ram")))
}

// Output goes to the log whether or not a client is connected.
fn serial_chardev(socket: &Path, log: &Path) -> String {
    format!(
        "socket,id=serial,path={},server=on,wait=off,logfile={}",
        socket.display(),
        log.display()
    )
}

fn last_tick(serial: &str) -> u64 {
    ticks(serial).last().unwrap_or(0)
}

fn ticks(serial: &str) -> impl Iterator<Item = u64> {
    let complete = &serial[..serial.rfind('\n').unwrap_or(0)];
    let numbers = complete
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("tick "));
    numbers.filter_map(|rest| rest.split(' ').next()?.parse().ok())
}
