//! Failovers in the laboratory: the commands under test, and what of a guest's state they must not lose.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Address, Dump, Lab, LabError, Receiver, SharedDirectory, command_under_test};

impl Lab {
    /// A directory on a tmpfs, for RAM images; removed when dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn ram_directory(&self) -> Result<SharedDirectory, LabError> {
        SharedDirectory::new()
    }

    /// The number of the test guest's last tick, as it stands in a dump of its RAM.
    ///
    /// # Errors
    /// When the dump cannot be read, or `nm` does not run (binutils).
    pub fn tick_in(&self, dump: &Dump) -> Result<u64, LabError> {
        let output = Command::new("nm").arg(&self.test_guest).output();
        let output = output.map_err(LabError::io("run nm (apt-get install binutils)"))?;
        let symbols = String::from_utf8_lossy(&output.stdout).into_owned();
        let address = symbols.lines().find_map(|line| line.strip_suffix(" b ticks"));
        let address = address.and_then(|text| u64::from_str_radix(text, 16).ok());
        let address = address.ok_or_else(|| LabError::Malformed {
            what: "the test guest".into(),
            detail: "it has no variable `ticks`".into(),
        })?;
        let ram = dump.block("pc.ram")?;
        let mut ticks = [0; 4];
        let file = fs::File::open(&ram).map_err(LabError::io(format!("open {}", ram.display())))?;
        let read = file.read_exact_at(&mut ticks, address);
        read.map_err(LabError::io(format!("read {}", ram.display())))?;
        Ok(u64::from(u32::from_le_bytes(ticks)))
    }
}

impl Receiver {
    /// `colo-ring failover --json` of a session, with these further arguments.
    ///
    /// # Errors
    /// [`LabError::Ended`] with the command's own words when it fails.
    pub fn failover<I>(&self, session: u64, arguments: I) -> Result<Value, LabError>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
        let session = ["--json", "--session", &session.to_string()].map(Into::into);
        let text = self.control_command("failover", session.into_iter().chain(arguments))?;
        serde_json::from_str(&text).map_err(|error| LabError::Malformed {
            what: "colo-ring failover --json".into(),
            detail: error.to_string(),
        })
    }

    /// `colo-ring failover` with its standard output in a file.
    ///
    /// # Errors
    /// [`LabError::Ended`] with the command's own words when it fails.
    pub fn failover_to_stdout(&self, session: u64, arguments: &[&str], out: &Path) -> Result<(), LabError> {
        let file = fs::File::create(out).map_err(LabError::io(format!("create {}", out.display())))?;
        let output = self
            .command("failover")
            .args(["--session", &session.to_string()])
            .args(arguments)
            .stdout(file)
            .stderr(Stdio::piped())
            .output()
            .map_err(LabError::io("run colo-ring failover"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(LabError::Ended {
            what: format!("colo-ring failover ({})", output.status),
            detail: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// What `colo-ring failover` says when it fails, as it must.
    ///
    /// # Errors
    /// When it succeeds, or fails otherwise than by its own words.
    pub fn failover_refused<I>(&self, session: u64, arguments: I) -> Result<String, LabError>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        match self.failover(session, arguments) {
            Err(LabError::Ended { detail, .. }) => Ok(detail),
            Err(other) => Err(other),
            Ok(report) => Err(LabError::Ended {
                what: "a failover that had to be refused".into(),
                detail: report.to_string(),
            }),
        }
    }
}

/// `colo-ring protect --json` of the QEMU with this monitor.
///
/// # Errors
/// [`LabError::Ended`] with the command's own words when it fails.
pub fn protect_by_command(monitor: &Path, to: &Address, arguments: &[&str]) -> Result<Value, LabError> {
    let output = Command::new(command_under_test()?)
        .args(["protect", "--json", "--to", &to.to_string(), "--qmp"])
        .arg(monitor)
        .args(arguments)
        .output()
        .map_err(LabError::io("run colo-ring protect"))?;
    if !output.status.success() {
        return Err(LabError::Ended {
            what: format!("colo-ring protect ({})", output.status),
            detail: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(|error| LabError::Malformed {
        what: "colo-ring protect --json".into(),
        detail: error.to_string(),
    })
}
