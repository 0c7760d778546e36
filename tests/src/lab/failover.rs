//! Failovers in the laboratory: the commands under test, and what of a guest's state they must not lose.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::receiver::{document, end_of_command};
use super::{Address, Dump, Guest, Lab, LabError, Receiver, SharedDirectory, command_under_test};

impl Lab {
    /// A directory on a tmpfs, for RAM images; removed when dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn ram_directory(&self) -> Result<SharedDirectory, LabError> {
        SharedDirectory::new()
    }

    /// The number of a guest's last tick, as it counts it itself, in a dump of its RAM.
    ///
    /// # Errors
    /// When the dump cannot be read or has no tick, or `nm` does not run (binutils).
    pub fn tick_in(&self, dump: &Dump, guest: &Guest) -> Result<u64, LabError> {
        let ram = dump.block("pc.ram")?;
        match guest {
            Guest::Test(_) => self.test_guest_tick(&ram),
            Guest::Disk(_) | Guest::Net(_) | Guest::Services(_) => Err(LabError::Malformed {
                what: "the image of a guest with a disk or a network card".into(),
                detail: "where its program counts is not known from outside".into(),
            }),
            Guest::Linux(_) => {
                let bytes = fs::read(&ram).map_err(LabError::io(format!("read {}", ram.display())))?;
                linux_tick(&bytes).ok_or_else(|| LabError::Malformed {
                    what: "the Linux guest's image".into(),
                    detail: "its shell has no variable `turn`".into(),
                })
            }
        }
    }

    fn test_guest_tick(&self, ram: &Path) -> Result<u64, LabError> {
        let output = Command::new("nm").arg(&self.test_guest).output();
        let output = output.map_err(LabError::io("run nm (apt-get install binutils)"))?;
        let symbols = String::from_utf8_lossy(&output.stdout).into_owned();
        let address = symbols.lines().find_map(|line| line.strip_suffix(" b ticks"));
        let address = address.and_then(|text| u64::from_str_radix(text, 16).ok());
        let address = address.ok_or_else(|| LabError::Malformed {
            what: "the test guest".into(),
            detail: "it has no variable `ticks`".into(),
        })?;
        let mut ticks = [0; 4];
        let file = fs::File::open(ram).map_err(LabError::io(format!("open {}", ram.display())))?;
        let read = file.read_exact_at(&mut ticks, address);
        read.map_err(LabError::io(format!("read {}", ram.display())))?;
        Ok(u64::from(u32::from_le_bytes(ticks)))
    }
}

/// The variable `turn` of the shell that runs `tests/guest/linux-init`: a string of its heap, `turn=NUMBER` and a zero
/// byte. It only grows, so that the largest one is the variable, and smaller ones are memory that was given back.
fn linux_tick(ram: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"turn=";
    let value = |at: usize| {
        let digits = ram[at + NAME.len()..]
            .split(|byte| !byte.is_ascii_digit())
            .next()?;
        let end = ram.get(at + NAME.len() + digits.len());
        let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
        (end == Some(&0)).then_some(number)
    };
    let starts = ram.windows(NAME.len()).enumerate();
    let found = starts.filter(|(_, bytes)| *bytes == NAME);
    found.filter_map(|(at, _)| value(at)).max()
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
        parse_report(&text)
    }

    /// The same, interrupted (SIGINT) so long after its start. Its temporary files are in that directory. Without a report
    /// it has not succeeded: its own words.
    ///
    /// # Errors
    /// When it cannot be run or does not end.
    pub fn failover_interrupted(
        &self,
        session: u64,
        arguments: &[String],
        after: Duration,
        temporary: &Path,
    ) -> Result<Result<Value, String>, LabError> {
        let child = self
            .command("failover")
            .args(["--json", "--session", &session.to_string()])
            .args(arguments)
            .env("TMPDIR", temporary)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(LabError::io("run colo-ring failover"))?;
        std::thread::sleep(after);
        let pid = i32::try_from(child.id()).expect("process ids are below 2^22 on Linux");
        // It is not reaped yet, whether or not it has ended.
        kill(Pid::from_raw(pid), Signal::SIGINT)
            .map_err(|errno| LabError::io("signal colo-ring")(errno.into()))?;
        match end_of_command(child, "failover") {
            Ok(text) => parse_report(&text).map(Ok),
            Err(LabError::Ended { detail, .. }) => Ok(Err(detail)),
            Err(other) => Err(other),
        }
    }

    /// `colo-ring discard` of a session.
    ///
    /// # Errors
    /// [`LabError::Ended`] with the command's own words when it fails.
    pub fn discard(&self, session: u64) -> Result<(), LabError> {
        self.control_command("discard", ["--session", &session.to_string()])
            .map(drop)
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

fn parse_report(text: &str) -> Result<Value, LabError> {
    document("colo-ring failover --json", text.as_bytes())
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
    document("colo-ring protect --json", &output.stdout)
}

/// `colo-ring unprotect --json` of the QEMU with this monitor.
///
/// # Errors
/// [`LabError::Ended`] with the command's own words when it fails.
pub fn unprotect_by_command(monitor: &Path) -> Result<Value, LabError> {
    let mut command = Command::new(command_under_test()?);
    command.args(["unprotect", "--json", "--qmp"]).arg(monitor);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.map_err(LabError::io("run colo-ring unprotect"))?;
    let text = end_of_command(child, "unprotect")?;
    document("colo-ring unprotect --json", text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::linux_tick;

    #[test]
    fn the_largest_whole_number_is_the_shells_variable() {
        let ram = b"turn=$((turn + 1))\nturn=77\nxturn=9\0turn=12\0\0turn=\0turn=99";
        assert_eq!(linux_tick(ram), Some(12));
        assert_eq!(linux_tick(b"turn=0\n"), None);
    }
}
