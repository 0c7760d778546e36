//! A guest that is a host: `colo-ring` itself runs in it, on a kernel and a machine of the test's choice, and its init
//! (`tests/guest/host-init`) tells on the serial port what came of it.

use crate::HANG_LIMIT;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Lab, LabError, command_under_test, repository, wait_for};

/// Two NUMA nodes of two cores and 512 MiB each.
const TWO_NODES: &str = "-machine pc -smp 4 -m 1G \
    -object memory-backend-ram,id=node0,size=512M -numa node,nodeid=0,cpus=0-1,memdev=node0 \
    -object memory-backend-ram,id=node1,size=512M -numa node,nodeid=1,cpus=2-3,memdev=node1";

/// How long a host guest may run, if it goes on to print.
const RUN_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// The kernel of a [`HostGuest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKernel {
    /// Debian 12's, Linux 6.1.
    Bookworm,
    /// Debian 13's, Linux 6.12: that of the other guests.
    Trixie,
}

/// A host guest before it runs.
#[derive(Debug)]
pub struct Host {
    pub(super) kernel: HostKernel,
    /// QEMU's options for its cores and memory.
    pub(super) machine: &'static str,
    /// What it has beside `colo-ring`: files of this machine, and where they lie there.
    pub(super) files: Vec<(PathBuf, String)>,
}

impl Host {
    /// One with two NUMA nodes.
    #[must_use]
    pub fn with_two_nodes(kernel: HostKernel) -> Self {
        Self {
            kernel,
            machine: TWO_NODES,
            files: Vec::new(),
        }
    }
}

/// What a host guest has told: the words after `try=`, and what each printed.
#[derive(Debug)]
pub struct HostGuest {
    serial: String,
}

/// A line of `/proc/PID/numa_maps`.
#[derive(Debug)]
pub struct NumaMap {
    /// Such as `default`, `prefer:1` or `interleave:0-1`.
    pub policy: String,
    /// The file mapped, as the kernel writes it.
    pub file: Option<String>,
    /// Whether it is private memory.
    pub anonymous: bool,
    /// Pages on each node.
    pub pages: BTreeMap<usize, u64>,
}

impl HostGuest {
    /// Boots a host that tries these things, one after the other, and waits for its end, as long as it goes on to print.
    ///
    /// # Errors
    /// If it cannot be put together or does not come to its end.
    pub fn run(lab: &Lab, host: &Host, tries: &[&str]) -> Result<Self, LabError> {
        let kernel = match host.kernel {
            HostKernel::Bookworm => lab.kernel.with_file_name("vmlinuz-bookworm"),
            HostKernel::Trixie => lab.kernel.clone(),
        };
        if !kernel.exists() {
            return Err(LabError::Missing { file: kernel });
        }
        let initrd = initramfs(lab, &host.files)?;
        let serial_log = lab.fresh_file("host-serial", "log");
        let tries: Vec<String> = tries.iter().map(|what| format!("try={what}")).collect();
        let process = Command::new(&lab.qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-accel", "tcg,thread=multi"])
            .args(host.machine.split_whitespace())
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(&initrd)
            .args([
                "-append",
                // As for the Linux guest: the timer may be late on a busy host.
                &format!("console=ttyS0 quiet no_timer_check panic=-1 {}", tries.join(" ")),
            ])
            .args(["-serial", &format!("file:{}", serial_log.display())])
            .stdin(Stdio::null())
            .spawn()
            .map_err(LabError::io(format!("start {}", lab.qemu.display())))?;
        let mut process = Running(process);
        // It switches itself off.
        let (mut printed, mut since) = (0, Instant::now());
        let ended = wait_for("the guest to come to its end", RUN_LIMIT, || {
            let length = fs::metadata(&serial_log).map_or(0, |log| log.len());
            if length != printed {
                (printed, since) = (length, Instant::now());
            }
            match since.elapsed() < HANG_LIMIT {
                true => process.0.try_wait().map_err(LabError::io("wait for QEMU")),
                false => Err(LabError::Timeout {
                    what: "the guest to print anything".into(),
                    limit: HANG_LIMIT,
                }),
            }
        });
        let serial = String::from_utf8_lossy(&fs::read(&serial_log).unwrap_or_default()).into_owned();
        ended?;
        match serial.lines().any(|line| line.trim_end() == "end") {
            true => Ok(Self { serial }),
            false => Err(LabError::Ended {
                what: "the guest came to its end too early".into(),
                detail: serial,
            }),
        }
    }

    /// The release of its kernel.
    #[must_use]
    pub fn kernel(&self) -> &str {
        let ready = self
            .serial
            .lines()
            .find_map(|line| line.strip_prefix("ready linux "));
        ready.unwrap_or_default().trim()
    }

    fn of(&self, what: &str) -> impl Iterator<Item = &str> {
        let begin = format!("try {what}");
        let lines = self.serial.lines().map(str::trim_end);
        lines
            .skip_while(move |line| *line != begin)
            .skip(1)
            .take_while(|line| !line.starts_with("try ") && *line != "end")
    }

    /// How a try ended: `0` if all was well.
    #[must_use]
    pub fn code(&self, what: &str) -> String {
        let done = format!("done {what} ");
        let code = self
            .of(what)
            .find_map(|line| line.strip_prefix(&done).map(str::to_owned));
        code.unwrap_or_else(|| "it did not end".to_owned())
    }

    /// What one program printed in a try.
    #[must_use]
    pub fn printed(&self, what: &str, program: &str) -> String {
        let prefix = format!("| {program} ");
        let lines = self.of(what).filter_map(|line| line.strip_prefix(&prefix));
        lines.map(|line| format!("{line}\n")).collect()
    }

    /// The same, as JSON.
    ///
    /// # Errors
    /// If it is none.
    pub fn json(&self, what: &str, program: &str) -> Result<Value, LabError> {
        let text = self.printed(what, program);
        serde_json::from_str(&text).map_err(|error| LabError::Malformed {
            what: format!("what {program} printed ({error})"),
            detail: text,
        })
    }

    /// Where the receiver's memory lay while it received, as the kernel told it.
    #[must_use]
    pub fn numa_maps(&self, what: &str) -> Vec<NumaMap> {
        self.printed(what, "numa")
            .lines()
            .filter_map(NumaMap::parse)
            .collect()
    }
}

impl NumaMap {
    /// `ADDRESS POLICY name=value … N0=pages …`
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1);
        let mut map = Self {
            policy: words.next()?.to_owned(),
            file: None,
            anonymous: false,
            pages: BTreeMap::new(),
        };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            match (name, name.strip_prefix('N').map(str::parse)) {
                ("file", _) => map.file = Some(value.to_owned()),
                ("anon", _) => map.anonymous = true,
                (_, Some(Ok(node))) => drop(map.pages.insert(node, value.parse().ok()?)),
                _ => {}
            }
        }
        Some(map)
    }
}

/// A QEMU, killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The Linux guest's initramfs, and over it `colo-ring` with the libraries it needs, and another init.
fn initramfs(lab: &Lab, files: &[(PathBuf, String)]) -> Result<PathBuf, LabError> {
    let tree = lab.fresh_file("host", "tree");
    let command = command_under_test()?;
    let put = |from: &Path, to: &str| {
        let to = tree.join(to.trim_start_matches('/'));
        fs::create_dir_all(to.parent().expect("a place in the tree"))
            .and_then(|()| fs::copy(from, &to))
            .map_err(LabError::io(format!(
                "copy {} to {}",
                from.display(),
                to.display()
            )))
    };
    put(&repository().join("tests/guest/host-init"), "init")?;
    put(&command, "bin/colo-ring")?;
    for library in libraries(&command)? {
        put(Path::new(&library), &library)?;
    }
    for (from, to) in files {
        put(from, to)?;
    }
    let initramfs = lab.fresh_file("host", "initrd");
    let made = fs::copy(&lab.initrd, &initramfs).and_then(|_| {
        let out = File::options().append(true).open(&initramfs)?;
        // The kernel unpacks one archive after the other; of two inits the last one stays.
        let script = "find . | \"$0\" cpio -o -H newc 2>/dev/null | gzip -1";
        let status = Command::new("sh")
            .args(["-c", script])
            .arg(lab.busybox())
            .current_dir(&tree)
            .stdout(out)
            .status()?;
        match status.success() {
            true => Ok(()),
            false => Err(std::io::Error::other(format!("cpio: {status}"))),
        }
    });
    made.map_err(LabError::io(format!("make {}", initramfs.display())))?;
    Ok(initramfs)
}

/// The shared libraries of a program, and its loader: absolute paths.
fn libraries(program: &Path) -> Result<Vec<String>, LabError> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .map_err(LabError::io("run ldd"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let paths = said.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(str::to_owned).collect())
}
