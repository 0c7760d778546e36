//! The command under test: `colo-ring receive` as a process, and its control commands.

use crate::HANG_LIMIT;
use crate::schema;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use colo_ring::ring::BackendKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;

use super::{Address, Lab, LabError, wait_for};

/// How a receiver is started.
#[derive(Clone, Debug)]
pub struct ReceiverOptions {
    /// multifd channels; 0 = plain.
    pub channels: u8,
    /// Receive backend.
    pub backend: BackendKind,
    /// `--once`: it ends after its first session.
    pub once: bool,
    /// Further arguments.
    pub extra: Vec<String>,
}

/// A running `colo-ring receive`, killed when dropped.
#[derive(Debug)]
pub struct Receiver {
    process: Child,
    command: PathBuf,
    control: String,
    log: PathBuf,
    histograms: PathBuf,
}

/// What `colo-ring dump` wrote.
#[derive(Debug)]
pub struct Dump {
    directory: PathBuf,
    checkpoint: CheckpointFile,
}

#[derive(Debug, Deserialize)]
struct CheckpointFile {
    checkpoint: u64,
    machine: String,
    blocks: Vec<BlockFile>,
}

#[derive(Debug, Deserialize)]
struct BlockFile {
    name: String,
    used_length: u64,
    file: PathBuf,
}

impl Receiver {
    /// Starts a receiver and waits until its control socket answers.
    ///
    /// # Errors
    /// When there is no command, or it ends at once; its own words are in the error.
    pub fn start(lab: &Lab, address: &Address, options: &ReceiverOptions) -> Result<Self, LabError> {
        Self::start_command(command_under_test()?, lab, address, options)
    }

    /// [`Receiver::start`] of the `colo-ring` of another build.
    ///
    /// # Errors
    /// As of [`Receiver::start`].
    pub fn start_command(
        command: PathBuf,
        lab: &Lab,
        address: &Address,
        options: &ReceiverOptions,
    ) -> Result<Self, LabError> {
        let control = format!("unix:{}", lab.fresh_file("control", "sock").display());
        let log = lab.fresh_file("receiver", "log");
        let histograms = log.with_extension("");
        let stderr = File::create(&log).map_err(LabError::io(format!("create {}", log.display())))?;
        let process = Command::new(&command)
            .args(["receive", "--listen", &address.to_string()])
            .args(["--channels", &options.channels.to_string()])
            .args(["--backend", options.backend.name()])
            .args(["--control", &control])
            .args(options.once.then_some("--once"))
            .arg("--hist")
            .arg(&histograms)
            .args(&options.extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(LabError::io(format!("start {}", command.display())))?;
        let mut receiver = Self {
            process,
            command,
            control,
            log,
            histograms,
        };
        wait_for(
            "colo-ring receive to answer on its control socket",
            HANG_LIMIT,
            || {
                receiver.check_alive()?;
                Ok(receiver.status().ok().map(|_| ()))
            },
        )?;
        Ok(receiver)
    }

    /// `colo-ring status --json`.
    ///
    /// # Errors
    /// When the command fails or prints no JSON.
    pub fn status(&self) -> Result<Value, LabError> {
        let text = self.control_command("status", ["--json"])?;
        document("colo-ring status --json", text.as_bytes())
    }

    /// `colo-ring slow --json` of its only session.
    ///
    /// # Errors
    /// When the command fails or prints no JSON.
    pub fn slow(&self, top: usize) -> Result<Value, LabError> {
        let text = self.control_command("slow", ["--json", "--top", &top.to_string()])?;
        document("colo-ring slow --json", text.as_bytes())
    }

    /// The numbers of its sessions, as `colo-ring status` lists them.
    ///
    /// # Errors
    /// When the command fails or its answer is not as documented.
    pub fn sessions(&self) -> Result<Vec<u64>, LabError> {
        let status = self.status()?;
        let sessions = status["sessions"].as_array();
        let numbers = sessions.and_then(|list| list.iter().map(|entry| entry["session"].as_u64()).collect());
        numbers.ok_or_else(|| LabError::Malformed {
            what: "colo-ring status --json".into(),
            detail: format!("it lists no numbered sessions: {status}"),
        })
    }

    /// [`Receiver::dump`] of its only session.
    ///
    /// # Errors
    /// When there is not exactly one session, and those of [`Receiver::dump`].
    pub fn dump_only(&self, out: &Path) -> Result<Dump, LabError> {
        match self.sessions()?[..] {
            [session] => self.dump(session, out),
            ref sessions => Err(LabError::Malformed {
                what: "the list of sessions".into(),
                detail: format!("one was expected: {sessions:?}"),
            }),
        }
    }

    /// `colo-ring dump` of a session's last committed checkpoint into a directory.
    ///
    /// # Errors
    /// When the command fails or what it wrote is not as documented.
    pub fn dump(&self, session: u64, out: &Path) -> Result<Dump, LabError> {
        let session = session.to_string();
        self.control_command(
            "dump",
            [
                OsStr::new("--session"),
                session.as_ref(),
                "--out".as_ref(),
                out.as_os_str(),
            ],
        )?;
        let file = out.join("checkpoint.json");
        let text = fs::read(&file).map_err(LabError::io(format!("read {}", file.display())))?;
        let checkpoint = document("checkpoint.json", &text)?;
        let checkpoint = serde_json::from_value(checkpoint);
        let checkpoint = checkpoint.map_err(|error| malformed("checkpoint.json", error.to_string()))?;
        Ok(Dump {
            directory: out.to_owned(),
            checkpoint,
        })
    }

    /// What the receiver has written to its standard error.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The prefix of its histogram files.
    #[must_use]
    pub fn histograms(&self) -> &Path {
        &self.histograms
    }

    /// The receiver's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    /// [`LabError::Timeout`] if it does not end.
    pub fn terminate(&mut self) -> Result<ExitStatus, LabError> {
        let pid = i32::try_from(self.process.id()).expect("process ids are below 2^22 on Linux");
        kill(Pid::from_raw(pid), Signal::SIGTERM)
            .map_err(|errno| LabError::io("signal colo-ring")(errno.into()))?;
        self.wait_exit()
    }

    /// Stops all of it where it is, with its connections open. Killing it ends that.
    ///
    /// # Errors
    /// When it is gone.
    pub fn freeze(&self) -> Result<(), LabError> {
        let pid = i32::try_from(self.process.id()).expect("process ids are below 2^22 on Linux");
        kill(Pid::from_raw(pid), Signal::SIGSTOP)
            .map_err(|errno| LabError::io("signal colo-ring")(errno.into()))
    }

    /// Kills it by SIGKILL.
    pub fn kill(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Waits until it has ended by itself, as it does with `--once` after its session.
    ///
    /// # Errors
    /// [`LabError::Timeout`] if it does not end.
    pub fn wait_exit(&mut self) -> Result<ExitStatus, LabError> {
        wait_for("colo-ring receive to end", HANG_LIMIT, || {
            self.process
                .try_wait()
                .map_err(LabError::io("wait for colo-ring"))
        })
    }

    fn check_alive(&mut self) -> Result<(), LabError> {
        match self
            .process
            .try_wait()
            .map_err(LabError::io("wait for colo-ring"))?
        {
            None => Ok(()),
            Some(status) => Err(LabError::Ended {
                what: format!("colo-ring receive ({status})"),
                detail: self.log(),
            }),
        }
    }

    /// A subcommand that speaks to this receiver.
    pub(super) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.command);
        command
            .args([name, "--control", &self.control])
            .stdin(Stdio::null());
        command
    }

    pub(super) fn control_command<I>(&self, name: &str, arguments: I) -> Result<String, LabError>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let child = self
            .command(name)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(LabError::io(format!("run colo-ring {name}")))?;
        end_of_command(child, name)
    }
}

/// What a command has said on its standard output, once it has succeeded.
pub(super) fn end_of_command(mut child: Child, name: &str) -> Result<String, LabError> {
    // Its output is far smaller than a pipe's buffer, so it need not be read before the end.
    let ended = wait_for(&format!("colo-ring {name} to end"), HANG_LIMIT, || {
        child
            .try_wait()
            .map_err(LabError::io(format!("wait for colo-ring {name}")))
    });
    if ended.is_err() {
        // It may have ended in this moment; either way the next call reaps it.
        let _ = child.kill();
    }
    let output = child
        .wait_with_output()
        .map_err(LabError::io(format!("read from colo-ring {name}")))?;
    ended?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(LabError::Ended {
        what: format!("colo-ring {name} ({})", output.status),
        detail: said,
    })
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Dump {
    /// The checkpoint's number.
    #[must_use]
    pub fn checkpoint(&self) -> u64 {
        self.checkpoint.checkpoint
    }

    /// Number of its RAM blocks.
    #[must_use]
    pub(super) fn block_count(&self) -> usize {
        self.checkpoint.blocks.len()
    }

    /// The machine type that the primary named.
    #[must_use]
    pub fn machine(&self) -> &str {
        &self.checkpoint.machine
    }

    /// The file with a RAM block's content, whose size is as listed.
    ///
    /// # Errors
    /// When there is no such block, or its file has another size.
    pub fn block(&self, name: &str) -> Result<PathBuf, LabError> {
        let block = self
            .checkpoint
            .blocks
            .iter()
            .find(|block| block.name == name)
            .ok_or_else(|| LabError::Malformed {
                what: "the dump".into(),
                detail: format!("it has no block {name}"),
            })?;
        let path = self.directory.join(&block.file);
        let bytes = fs::metadata(&path)
            .map_err(LabError::io(format!("stat {}", path.display())))?
            .len();
        if bytes != block.used_length {
            let detail = format!(
                "{} has {bytes} bytes, listed are {}",
                path.display(),
                block.used_length
            );
            return Err(LabError::Malformed {
                what: "the dump".into(),
                detail,
            });
        }
        Ok(path)
    }

    /// The device state of the checkpoint.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn device_state(&self) -> Result<Vec<u8>, LabError> {
        let path = self.directory.join("device-state.bin");
        fs::read(&path).map_err(LabError::io(format!("read {}", path.display())))
    }
}

/// A document of `colo-ring`, held against its schema.
pub(super) fn document(what: &str, text: &[u8]) -> Result<Value, LabError> {
    schema::parse(text).map_err(|detail| malformed(what, detail))
}

fn malformed(what: &str, detail: String) -> LabError {
    LabError::Malformed {
        what: what.to_owned(),
        detail,
    }
}

/// The `colo-ring` that tests and measurements run: `COLO_RING_BIN`, or the command that cargo built beside this program
/// (target/PROFILE), or above it where this program is a test (target/PROFILE/deps).
///
/// # Errors
/// If there is none.
pub fn command_under_test() -> Result<PathBuf, LabError> {
    if let Some(path) = std::env::var_os("COLO_RING_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().map_err(LabError::io("find this program's own path"))?;
    let built = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("colo-ring"));
    built
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| LabError::Ended {
            what: "there is no colo-ring beside this program".into(),
            detail: "build it with the same profile (cargo build -p colo-ring-tools) or set COLO_RING_BIN"
                .into(),
        })
}
