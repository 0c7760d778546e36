//! Guests with a disk: what it hangs on, what is on it, and its image.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Lab, LabError};

/// Disk size; XFS is not made smaller.
const DISK_BYTES: u64 = 320 << 20;

/// What a disk hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskBus {
    /// virtio-blk.
    VirtioBlk,
    /// A SCSI disk of a virtio-scsi controller.
    VirtioScsi,
    /// A SATA disk of q35's AHCI controller.
    Ahci,
    /// An IDE disk of pc's PIIX3.
    Ide,
    /// NVMe.
    Nvme,
}

impl DiskBus {
    /// The machine type that has it.
    pub(super) fn machine(self) -> &'static str {
        match self {
            Self::Ide => "pc",
            _ => "q35",
        }
    }

    fn device(self, node: &str) -> Vec<String> {
        let devices: &[&str] = match self {
            Self::VirtioBlk => &["virtio-blk-pci"],
            Self::VirtioScsi => &["virtio-scsi-pci,id=scsi", "scsi-hd,bus=scsi.0"],
            Self::Ahci | Self::Ide => &["ide-hd,bus=ide.0"],
            Self::Nvme => &["nvme,serial=lab"],
        };
        let last = devices.len() - 1;
        let words = (0..).zip(devices).flat_map(|(number, device)| {
            let drive = if number == last {
                format!(",drive={node}")
            } else {
                String::new()
            };
            ["-device".to_owned(), format!("{device}{drive}")]
        });
        words.collect()
    }
}

/// A disk of a machine: a raw image.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What it hangs on.
    pub bus: DiskBus,
    /// Its image.
    pub file: PathBuf,
}

impl Disk {
    pub(super) fn args(&self) -> Vec<String> {
        let file = format!("driver=file,filename={},node-name=file0", self.file.display());
        let words = [
            "-blockdev",
            &file,
            "-blockdev",
            "driver=raw,file=file0,node-name=disk0",
        ];
        let words = words.map(str::to_owned).into_iter();
        words.chain(self.bus.device("disk0")).collect()
    }
}

/// How the guest uses its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskContent {
    /// Blocks, past the page cache.
    Raw,
    /// A file's blocks in ext4, and files that come and go.
    Ext4,
    /// The same in XFS.
    Xfs,
    /// SQLite databases in ext4, with clients behind the loopback interface.
    Sqlite,
    /// Blocks of 4 KiB written to random places, at a rate.
    Random,
    /// 1 MiB written behind the other, at a rate.
    Sequential,
}

impl DiskContent {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Sqlite => "sqlite",
            Self::Random => "random",
            Self::Sequential => "sequential",
        }
    }

    pub(super) fn make(self, image: &Path) -> Result<(), LabError> {
        match self {
            Self::Raw | Self::Random | Self::Sequential => Ok(()),
            Self::Ext4 | Self::Sqlite => run_tool("mkfs.ext4", &["-q", "-F"], image),
            Self::Xfs => run_tool("mkfs.xfs", &["-q", "-f"], image),
        }
    }

    pub(super) fn check(self, image: &Path) -> Result<(), LabError> {
        match self {
            Self::Raw | Self::Random | Self::Sequential => Ok(()),
            Self::Ext4 | Self::Sqlite => run_tool("e2fsck", &["-f", "-n"], image),
            Self::Xfs => run_tool("xfs_repair", &["-n"], image),
        }
    }
}

/// A guest that writes a counter to memory and to its disk, `tests/guest/disk-counter.rs`, or does as its content says.
#[derive(Clone, Copy, Debug)]
pub struct DiskGuest {
    /// What is on the disk.
    pub content: DiskContent,
    /// Threads that write at the same time: requests in flight.
    pub threads: u32,
    /// Blocks of each thread, a power of two.
    pub slots: u32,
    /// Pause of each thread after a write, µs.
    pub pause_us: u32,
}

impl DiskGuest {
    pub(super) fn args(self, lab: &Lab) -> Vec<String> {
        let Self {
            content,
            threads,
            slots,
            pause_us,
        } = self;
        let append = format!(
            "console=ttyS0 quiet no_timer_check kind={} threads={threads} slots={slots} pause_us={pause_us}",
            content.name()
        );
        let [kernel, initrd] = [&lab.kernel, &lab.disk_initrd].map(|path| path.display().to_string());
        ["-kernel", &kernel, "-initrd", &initrd, "-append", &append]
            .map(str::to_owned)
            .to_vec()
    }
}

/// An empty disk.
pub(super) fn make_image(path: &Path) -> Result<(), LabError> {
    let made = File::create(path).and_then(|file| file.set_len(DISK_BYTES));
    made.map_err(LabError::io(format!("make {}", path.display())))
}

fn run_tool(name: &str, arguments: &[&str], image: &Path) -> Result<(), LabError> {
    let output = Command::new(name).args(arguments).arg(image).output();
    let output = output.map_err(LabError::io(format!(
        "run {name} (apt-get install e2fsprogs xfsprogs)"
    )))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(LabError::Ended {
        what: format!("{name} ({})", output.status),
        detail: String::from_utf8_lossy(&said).into_owned(),
    })
}
