//! Guests with a network card, in a network namespace of their own.

use nix::sched::{CloneFlags, unshare};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Company, Lab, LabError, run_experiment, wait_for};
use crate::HANG_LIMIT;

/// The tap device of the host's end.
pub const TAP: &str = "guest0";

/// The tap device of another host on the same network, once [`join_networks`] or [`add_other_tap`] has made it.
const OTHER_TAP: &str = "guest1";

/// The tap device of a card with several queues.
const QUEUES_TAP: &str = "plug0";

/// Link-local, although nobody else is in the namespace.
const HOST_NETWORK: &str = "169.254.78.1/24";

/// Where the guest's service listens.
pub const GUEST_ADDRESS: &str = "169.254.78.2:7777";

/// The same over IPv6, at the address that the guest makes of its card's.
pub const GUEST_ADDRESS_6: (&str, u16) = ("fe80::5054:ff:fe00:1%guest0", 7777);

/// The other end of a guest's network card.
#[derive(Clone, Debug)]
pub enum Nic {
    /// QEMU owns the tap device.
    Tap,
    /// QEMU owns the tap device of the other host.
    OtherTap,
    /// QEMU owns a tap device of its own, with two queues: no filter holds what it sends.
    Queues,
    /// QEMU's card is a stream to a guard that listens there, and owns the tap device.
    Stream(PathBuf),
}

impl Nic {
    pub(super) fn args(&self) -> Vec<String> {
        let tap = |name: &str| format!("tap,id=net0,ifname={name},script=no,downscript=no");
        let backend = match self {
            Self::Tap => tap(TAP),
            Self::OtherTap => tap(OTHER_TAP),
            Self::Queues => format!("{},queues=2", tap(QUEUES_TAP)),
            Self::Stream(path) => format!(
                "stream,id=net0,server=off,addr.type=unix,addr.path={},reconnect-ms=100",
                path.display()
            ),
        };
        let device = "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01";
        let device = match self {
            // Its firmware is not where such a guest runs.
            Self::Queues => format!("{device},mq=on,romfile="),
            Self::Tap | Self::OtherTap | Self::Stream(_) => device.to_owned(),
        };
        ["-netdev", &backend, "-device", &device]
            .map(str::to_owned)
            .to_vec()
    }
}

/// A guest with a TCP service, `tests/guest/net-server.rs`.
#[derive(Clone, Copy, Debug)]
pub struct NetGuest;

impl NetGuest {
    pub(super) fn args(self, lab: &Lab) -> Vec<String> {
        Self::args_with(&lab.kernel, &lab.net_initrd)
    }

    /// The same where its files lie elsewhere.
    pub(super) fn args_with(kernel: &Path, initrd: &Path) -> Vec<String> {
        let address: SocketAddr = GUEST_ADDRESS.parse().expect("an address");
        let append = format!(
            "console=ttyS0 quiet no_timer_check address={} port={}",
            address.ip(),
            address.port()
        );
        let [kernel, initrd] = [kernel, initrd].map(|path| path.display().to_string());
        ["-kernel", &kernel, "-initrd", &initrd, "-append", &append]
            .map(str::to_owned)
            .to_vec()
    }
}

/// Runs the body of a test in a network namespace, which all that it starts is in, with [`TAP`] up. It needs root.
///
/// # Panics
/// As of [`super::experiment`].
pub fn net_experiment(company: Company, body: impl FnOnce(&Lab) -> Result<(), LabError> + Send) {
    in_namespace(|| run_experiment(Lab::open_with_net_guest(company), body));
}

/// Runs `body` in a network namespace of its own.
pub(super) fn in_namespace(body: impl FnOnce() + Send) {
    // On a thread of its own: a thread that has entered a namespace stays there.
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace, as root");
            ip("link set lo up");
            make_tap();
            body();
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Deletes [`TAP`], whoever has it open, as an operator may by mistake.
///
/// # Panics
/// If it cannot be deleted.
pub fn delete_tap() {
    ip(&format!("link delete {TAP}"));
}

/// Makes it again.
///
/// # Panics
/// If it cannot be made.
pub fn make_tap() {
    add_tap(TAP);
    ip(&format!("address add {HOST_NETWORK} dev {TAP}"));
}

/// Makes a switch of the experiment's network, with a second tap device, as another host on it has one.
///
/// # Panics
/// If it cannot be made.
pub fn join_networks() {
    ip(&format!("address flush dev {TAP}"));
    ip("link add lan type bridge");
    add_other_tap();
    for port in [TAP, OTHER_TAP] {
        ip(&format!("link set {port} master lan"));
    }
    ip(&format!("address add {HOST_NETWORK} dev lan"));
    ip("link set lan up");
}

/// Makes the tap device of [`Nic::OtherTap`], with nothing behind it.
///
/// # Panics
/// If it cannot be made.
pub fn add_other_tap() {
    add_tap(OTHER_TAP);
}

/// Sets the experiment's loopback device up or down: down, it drops what connections send, and says nothing of it.
///
/// # Panics
/// If it cannot be set.
pub fn set_loopback(is_up: bool) {
    ip(if is_up {
        "link set lo up"
    } else {
        "link set lo down"
    });
}

fn add_tap(name: &str) {
    ip(&format!("tuntap add {name} mode tap"));
    ip(&format!("link set {name} up"));
}

/// Waits until no process has [`TAP`] open: the kernel may close it a moment after the end of a QEMU that was killed.
///
/// # Errors
/// [`LabError::Timeout`].
pub fn wait_tap_free() -> Result<(), LabError> {
    wait_for("the tap device to be free", HANG_LIMIT, || {
        let shown = Command::new("ip").args(["-o", "link", "show", TAP]).output();
        let shown = shown.map_err(LabError::io("run ip"))?.stdout;
        Ok(String::from_utf8_lossy(&shown)
            .contains("NO-CARRIER")
            .then_some(()))
    })
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status();
    assert!(status.expect("ip (iproute2)").success(), "ip {words}");
}
