//! The host: its tap device, and the processes on it.

use crate::{Done, HOST, text, wait};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::raw::{c_int, c_ulong};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

const TAP: &str = "plug0";
pub const RECEIVER: &str = "unix:/tmp/receiver";
pub const RECEIVER_CONTROL: &str = "unix:/tmp/receiver.control";
const GUARD_CONTROL: &str = "/tmp/guard.control";

/// A process with its own, killed when dropped. Its output is in /tmp/NAME.log.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    fn start(name: &str, command: &mut Command) -> Done<Self> {
        let log = File::create(format!("/tmp/{name}.log")).map_err(text("a log"))?;
        let out = log.try_clone().map_err(text("a log"))?;
        let command = command.stdin(Stdio::null()).stdout(out).stderr(log);
        let child = command.process_group(0).spawn();
        Ok(Self {
            child: child.map_err(text(name))?,
            name: name.to_owned(),
        })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(format!("/tmp/{}.log", self.name)).unwrap_or_default()
    }

    pub fn signal(&mut self, signal: &str) -> Done<()> {
        // A kill is one of all its processes, as that of a service is.
        let whom = if signal == "-KILL" { "-" } else { "" };
        let whom = format!("{whom}{}", self.child.id());
        let status = Command::new("kill").args([signal, "--", &whom]).status();
        status.map(drop).map_err(text("kill"))
    }

    pub fn end(mut self, signal: &str) -> Done<ExitStatus> {
        self.signal(signal)?;
        self.wait_end()
    }

    pub fn wait_end(&mut self) -> Done<ExitStatus> {
        let name = self.name.clone();
        wait(&format!("end of {name}"), || {
            self.child.try_wait().map_err(text("wait"))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.signal("-KILL");
        let _ = self.child.wait();
    }
}

unsafe extern "C" {
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
}

/// Makes a tap device with several queues, which stays.
pub fn make_tap() -> Done<()> {
    const TUNSETIFF: c_ulong = 0x4004_54ca;
    const TUNSETPERSIST: c_ulong = 0x4004_54cb;
    // IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_VNET_HDR.
    const FLAGS: u16 = 0x0002 | 0x1000 | 0x0100 | 0x4000;
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let tun = tun.map_err(text("/dev/net/tun"))?;
    let mut request = [0_u8; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
    // SAFETY: the first reads a struct ifreq of 40 bytes, the second takes a number; neither keeps a pointer.
    let made = unsafe {
        ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_ptr()) == 0
            && ioctl(tun.as_raw_fd(), TUNSETPERSIST, 1_u64) == 0
    };
    if !made {
        return Err(format!("a tap device: {}", std::io::Error::last_os_error()));
    }
    let up = Command::new("ifconfig")
        .args([TAP, HOST, "netmask", "255.255.255.0", "up"])
        .status();
    match up.map_err(text("ifconfig"))?.success() {
        true => Ok(()),
        false => Err("the tap device does not come up".to_owned()),
    }
}

/// A QEMU that gets its guest by a migration.
pub fn qemu(name: &str, incoming: &str) -> Done<Process> {
    let words = "--library-path /lab/lib /lab/qemu -L /lab/share -nodefaults -no-user-config -display none -accel tcg \
                 -uuid 6c6f636f-0000-4000-8000-000000000001";
    let mut command = Command::new("/lab/ld.so");
    command
        .env("QEMU_MODULE_DIR", "/lab/modules")
        .args(words.split_whitespace());
    let machine = fs::read_to_string("/lab/machine").map_err(text("/lab/machine"))?;
    command.args(
        machine
            .lines()
            .map(|word| word.replace("queues=2", "queues=2,vhost=on")),
    );
    command.args([
        "-chardev",
        &format!("file,id=serial,path=/tmp/{name}.serial"),
        "-serial",
        "chardev:serial",
    ]);
    command.args([
        "-qmp",
        &format!("unix:/tmp/{name}.qmp,server=on,wait=off"),
        "-incoming",
        incoming,
    ]);
    Process::start(name, &mut command)
}

pub fn serial(name: &str) -> String {
    fs::read_to_string(format!("/tmp/{name}.serial")).unwrap_or_default()
}

pub fn colo_ring(words: &[&str]) -> Command {
    let mut command = Command::new("colo-ring");
    command.args(words);
    command
}

pub fn receiver(name: &str) -> Done<Process> {
    let words = [
        "receive",
        "--listen",
        RECEIVER,
        "--channels",
        "2",
        "--control",
        RECEIVER_CONTROL,
    ];
    let receiver = Process::start(name, &mut colo_ring(&words))?;
    wait("receiver", || {
        Ok(receiver.log().contains("listening").then_some(()))
    })?;
    Ok(receiver)
}

pub fn guard(name: &str, qemu: &str, more: &[&str]) -> Done<Process> {
    let (qmp, control) = (format!("/tmp/{qemu}.qmp"), format!("unix:{GUARD_CONTROL}"));
    let words = [
        "guard",
        "--qmp",
        &qmp,
        "--to",
        RECEIVER,
        "--channels",
        "2",
        "--name",
        "guest",
        "--control",
        &control,
    ];
    Process::start(name, colo_ring(&words).args(more))
}

pub fn guard_status() -> Option<String> {
    let mut status = String::new();
    UnixStream::connect(GUARD_CONTROL)
        .ok()?
        .read_to_string(&mut status)
        .ok()?;
    Some(status)
}

/// A number in a status: the first of that name.
pub fn number(status: &str, name: &str) -> Option<u64> {
    let after = status.split_once(&format!("\"{name}\":"))?.1.trim_start();
    let end = after.find(|digit: char| !digit.is_ascii_digit())?;
    after[..end].parse().ok()
}

pub fn wait_state(guard: &mut Process, state: &str) -> Done<String> {
    let state = format!("\"state\":\"{state}\"");
    wait(&state, || match guard.child.try_wait() {
        Ok(None) => Ok(guard_status().filter(|status| status.contains(&state))),
        ended => Err(format!("the guard has ended ({ended:?}): {}", guard.log())),
    })
}

/// A number in the receiver's status.
fn received(name: &str) -> Done<u64> {
    let output = colo_ring(&["status", "--control", RECEIVER_CONTROL, "--json"]).output();
    let output = output.map_err(text("colo-ring status"))?;
    Ok(number(&String::from_utf8_lossy(&output.stdout), name).unwrap_or(0))
}

pub fn wait_checkpoints(more: u64) -> Done<()> {
    let goal = received("checkpoint")? + more;
    wait("checkpoints", || {
        Ok((received("checkpoint")? >= goal).then_some(()))
    })
}

/// Frames that the guest has sent, before anything holds them.
pub fn tap_frames() -> Done<u64> {
    let count = fs::read_to_string(format!("/sys/class/net/{TAP}/statistics/rx_packets"));
    let count = count.map_err(text("the tap device's counts"))?;
    count.trim().parse().map_err(text("the tap device's counts"))
}

/// Whether anything of a plug is there.
pub fn plugs() -> Done<Vec<String>> {
    let names = fs::read_dir("/sys/class/net").map_err(text("/sys/class/net"))?;
    let names = names
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| name.starts_with("colo")).collect())
}

pub fn assert_no_plug(when: &str) -> Done<()> {
    match plugs()? {
        none if none.is_empty() => Ok(()),
        some => Err(format!("{some:?} is left {when}")),
    }
}

/// Where frames were lost, as the kernel counts them.
fn print_counts() {
    for name in ["plug0".to_owned()].into_iter().chain(plugs().unwrap_or_default()) {
        let counts = ["rx_packets", "rx_dropped", "tx_packets", "tx_dropped"].map(|count| {
            let file = format!("/sys/class/net/{name}/statistics/{count}");
            format!(" {count} {}", fs::read_to_string(file).unwrap_or_default().trim())
        });
        println!("{name}:{}", counts.concat());
    }
    let snmp = fs::read_to_string("/proc/net/snmp").unwrap_or_default();
    for line in snmp.lines().filter(|line| line.starts_with("Udp:")) {
        println!("{line}");
    }
}

/// Prints the guard's status, what the processes have printed, and the end of what the guests have.
pub fn print_logs() {
    const LINES: usize = 5;
    println!("guard: {:?}", guard_status());
    print_counts();
    let entries = fs::read_dir("/tmp").into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let text = fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let shown = match path.extension().and_then(|end| end.to_str()) {
            Some("log") => &lines[..],
            Some("serial") => &lines[lines.len().saturating_sub(LINES)..],
            _ => continue,
        };
        for line in shown {
            println!("{}: {line}", path.display());
        }
    }
}
