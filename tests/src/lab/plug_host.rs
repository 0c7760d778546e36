//! A host with a plug queue in its kernel, in which a QEMU with a guest runs: an emulated machine in an emulated machine.

use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::host_guest::{Host, HostKernel};
use super::{Guest, Lab, LabError, Machine, NetGuest, Nic, Qemu, repository, script_output};
use crate::HANG_LIMIT;

/// In the order in which they need each other.
const MODULES: [&str; 10] = [
    "tun",
    "ifb",
    "sch_plug",
    "sch_ingress",
    "cls_matchall",
    "act_mirred",
    "vhost_iotlb",
    "vhost",
    "tap",
    "vhost_net",
];

/// What QEMU loads for such a guest.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];

/// Room for two QEMUs, a receiver and what is unpacked.
const MACHINE: &str = "-machine pc -smp 4 -m 2048M";

impl Host {
    /// One with a plug queue, QEMU, and the state of a guest that runs `tests/guest/net-server.rs`: booted here, where it
    /// takes seconds, because it would take minutes there.
    ///
    /// # Errors
    /// If the guest does not boot or a file is missing.
    pub fn with_plug(lab: &Lab) -> Result<Self, LabError> {
        let machine = Machine {
            nic: Some(Nic::Queues),
            ..Machine::bare("q35", 128, Guest::Net(NetGuest))
        };
        let mut files = vec![
            (saved_guest(lab, &machine)?, "lab/state".to_owned()),
            (lab.kernel.clone(), "lab/vmlinuz".to_owned()),
            (lab.net_initrd.clone(), "lab/net.gz".to_owned()),
            (program(lab)?, "bin/plug-scene".to_owned()),
        ];
        let words = [
            machine.args(None),
            NetGuest::args_with(Path::new("/lab/vmlinuz"), Path::new("/lab/net.gz")),
        ];
        files.push((
            written(lab, "machine", &words.concat())?,
            "lab/machine".to_owned(),
        ));
        files.extend(qemu()?);
        files.extend(modules(lab)?);
        Ok(Self {
            kernel: HostKernel::Trixie,
            machine: MACHINE,
            files,
        })
    }
}

/// Boots the guest, and saves it.
fn saved_guest(lab: &Lab, machine: &Machine) -> Result<PathBuf, LabError> {
    let mut guest = Qemu::start(lab, "saved", machine)?;
    guest.wait_serial("listening", HANG_LIMIT)?;
    let state = lab.file("saved.state");
    // Not stopped before: it would not run there either.
    let file = format!("file:{}", state.display());
    guest.qmp().execute("migrate", &json!({"uri": file}))?;
    guest.wait_loaded()?;
    let _ = guest.kill();
    Ok(state)
}

fn written(lab: &Lab, name: &str, lines: &[String]) -> Result<PathBuf, LabError> {
    let path = lab.file(name);
    let done = fs::write(&path, lines.join("\n") + "\n");
    done.map_err(LabError::io(format!("write {}", path.display())))?;
    Ok(path)
}

fn program(lab: &Lab) -> Result<PathBuf, LabError> {
    let out = lab.file("plug-scene");
    let mut rustc = Command::new("rustc");
    rustc.args([
        "--edition",
        "2024",
        "-O",
        "-C",
        "target-feature=+crt-static",
        "-C",
        "panic=abort",
        "-o",
    ]);
    rustc
        .arg(&out)
        .arg(repository().join("tests/guest/plug-scene/main.rs"));
    run(&mut rustc)?;
    Ok(out)
}

/// Its standard output, if it is content.
fn run(command: &mut Command) -> Result<Vec<u8>, LabError> {
    let output = command
        .output()
        .map_err(LabError::io(format!("run {command:?}")))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(LabError::Guest {
            detail: String::from_utf8_lossy(&output.stderr).into_owned(),
        }),
    }
}

/// QEMU with its loader, libraries and firmware: those of the laboratory, or of the system.
fn qemu() -> Result<Vec<(PathBuf, String)>, LabError> {
    let own = Path::new(&script_output("path")?).join("root");
    let binary = "usr/bin/qemu-system-x86_64";
    let root = match own.join(binary).exists() {
        true => own,
        false => PathBuf::from("/"),
    };
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let (loader, binary) = (libraries.join("ld-linux-x86-64.so.2"), root.join(binary));
    let mut list = Command::new(&loader);
    list.arg("--library-path")
        .arg(&libraries)
        .arg("--list")
        .arg(&binary);
    let listed = String::from_utf8_lossy(&run(&mut list)?).into_owned();
    let paths = listed.split_whitespace().filter(|word| word.starts_with('/'));
    let mut files: Vec<_> = paths
        .filter_map(|path| {
            let name = Path::new(path).file_name()?.to_str()?;
            Some((PathBuf::from(path), format!("lab/lib/{name}")))
        })
        .collect();
    files.push((loader, "lab/ld.so".to_owned()));
    files.push((binary, "lab/qemu".to_owned()));
    for name in FIRMWARE {
        let places = ["usr/share/seabios", "usr/share/qemu"].map(|place| root.join(place).join(name));
        let found = places.into_iter().find(|place| place.exists());
        let found = found.ok_or_else(|| LabError::Missing {
            file: root.join("usr/share/qemu").join(name),
        })?;
        files.push((found, format!("lab/share/{name}")));
    }
    Ok(files)
}

/// The kernel's modules, unpacked.
fn modules(lab: &Lab) -> Result<Vec<(PathBuf, String)>, LabError> {
    let packed = Path::new(&script_output("path")?).join("root/usr/lib/modules");
    let mut files = Vec::new();
    for module in MODULES {
        let file = format!("{module}.ko.xz");
        let mut find = Command::new("find");
        let found = run(find.arg(&packed).args(["-name", &file]))?;
        let found = String::from_utf8_lossy(&found).trim().to_owned();
        if found.is_empty() {
            return Err(LabError::Missing {
                file: packed.join(file),
            });
        }
        let mut unpack = Command::new(lab.busybox());
        let unpacked = run(unpack.args(["xzcat", &found]))?;
        let path = lab.file(&format!("{module}.ko"));
        fs::write(&path, unpacked).map_err(LabError::io(format!("write {}", path.display())))?;
        files.push((path, format!("modules/{module}.ko")));
    }
    let order = written(lab, "order", &MODULES.map(str::to_owned))?;
    files.push((order, "modules/order".to_owned()));
    Ok(files)
}
