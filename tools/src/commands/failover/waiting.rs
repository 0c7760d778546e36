//! A QEMU that waits for the checkpoint: started here, or by the operator as a warm standby.

use super::command_line::{CommandLine, main_block};
use super::started::Started;
use crate::output::CommandError;
use crate::qmp::{Qmp, QmpError};
use colo_ring::failover::IGNORE_SHARED;
use colo_ring::files::{self, Readers};
use colo_ring::receiver::{ClaimedCheckpoint, GuestBlock};
use serde_json::{Value, json};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a QEMU may take from its start to its monitor's greeting.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a monitor that should be there may take to be there.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long QEMU may take to run the guest once it has everything.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// How long a QEMU that has closed the stream may take to end.
const FAIL_LIMIT: Duration = Duration::from_secs(1);

/// How often QEMU is asked for states that no event reports.
const POLL: Duration = Duration::from_millis(20);

/// The same where no event is to come, because it pauses the guest.
const PAUSED_POLL: Duration = Duration::from_millis(1);

/// Lines of QEMU's own words in an error.
const LOG_LINES: usize = 10;

/// A monitor in a run directory is as much as the guest itself.
const RUN_DIRECTORY_MODE: u32 = 0o700;

/// A directory for sockets and QEMU's log, for this user alone.
#[derive(Debug)]
pub(super) struct RunDirectory {
    path: PathBuf,
    /// Removed with this command; none where the operator named the directory, which stays.
    temporary: Option<TempDir>,
}

impl RunDirectory {
    /// `path`, which is made where it is not there, or a new one in the temporary directory.
    pub(super) fn new(path: Option<&Path>, session: u32) -> Result<Self, CommandError> {
        let made = match path {
            Some(path) => DirBuilder::new()
                .recursive(true)
                .mode(RUN_DIRECTORY_MODE)
                .create(path)
                .and_then(|()| path.canonicalize())
                .map(|path| (path, None)),
            None => tempfile::Builder::new()
                .prefix(&format!("colo-ring-failover-{session}-"))
                .permissions(fs::Permissions::from_mode(RUN_DIRECTORY_MODE))
                .tempdir()
                .map(|made| (made.path().to_owned(), Some(made))),
        };
        let named = path.map_or_else(std::env::temp_dir, Path::to_owned);
        let (path, temporary) = made.map_err(|error| {
            CommandError::Failed(format!("a directory for sockets in {}: {error}", named.display()))
        })?;
        Ok(Self { path, temporary })
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Lets it stay: the QEMU that uses it goes on.
    pub(super) fn keep(&mut self) {
        if let Some(made) = self.temporary.take() {
            let _ = made.keep();
        }
    }

    /// Its path, if it goes with this command.
    pub(super) fn passing(&self) -> Option<PathBuf> {
        self.temporary.as_ref().map(|made| made.path().to_owned())
    }
}

/// The QEMU. One that was started here is killed when this is dropped, unless it was let go.
pub(super) struct Waiting {
    qmp: Qmp,
    child: Option<Child>,
    started: Started,
    directory: RunDirectory,
    /// Whether it pauses the guest, once it is loaded, until `cont`.
    pauses: bool,
}

impl Waiting {
    /// The operator's own, which waits already.
    pub(super) fn attach(
        monitor: &Path,
        directory: RunDirectory,
        started: &Started,
    ) -> Result<Self, CommandError> {
        let qmp =
            Qmp::connect(monitor, CONNECT_LIMIT).map_err(|error| CommandError::Failed(error.to_string()))?;
        Ok(Self {
            qmp,
            child: None,
            started: started.clone(),
            directory,
            pauses: false,
        })
    }

    /// Starts one.
    pub(super) fn start(
        mut line: CommandLine,
        directory: RunDirectory,
        started: &Started,
    ) -> Result<Self, CommandError> {
        let (monitor, log) = (directory.file("qmp.sock"), directory.file("qemu.log"));
        line.wait_for_migration(&monitor);
        let pauses = line.start_paused();
        let failed =
            |what: &str, error: &dyn std::fmt::Display| CommandError::Failed(format!("{what}: {error}"));
        let out = files::replace(&log, Readers::Owner)
            .map_err(|error| failed(&log.display().to_string(), &error))?;
        let err = out
            .try_clone()
            .map_err(|error| failed(&log.display().to_string(), &error))?;
        let mut command = Command::new(line.program());
        // A group of its own: it goes on when this command's terminal is gone.
        command
            .args(line.arguments())
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0);
        let mut child = started
            .spawn(&mut command)
            .map_err(|error| failed(&format!("cannot start {}", line.program()), &error))?;
        let began = Instant::now();
        loop {
            match Qmp::connect(&monitor, Duration::ZERO) {
                Ok(qmp) => {
                    return Ok(Self {
                        qmp,
                        child: Some(child),
                        started: started.clone(),
                        directory,
                        pauses,
                    });
                }
                Err(QmpError::Connect { .. }) if began.elapsed() < START_LIMIT => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => {
                    started.forget();
                    end(&mut child);
                    return Err(CommandError::Failed(format!(
                        "QEMU does not start: {error}{}",
                        last_lines(&log)
                    )));
                }
            }
            if let Some(status) = child.try_wait().ok().flatten() {
                started.forget();
                return Err(CommandError::Failed(format!(
                    "QEMU does not start ({status}){}",
                    last_lines(&log)
                )));
            }
        }
    }

    /// Its monitor.
    pub(super) fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Whether no guest runs in it before [`Self::run`].
    pub(super) fn pauses(&self) -> bool {
        self.pauses
    }

    pub(super) fn version(&self) -> String {
        self.qmp.version().to_string()
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub(super) fn monitor(&self) -> &Path {
        self.qmp.path()
    }

    /// Where it will wait for the stream.
    pub(super) fn socket(&self) -> PathBuf {
        self.directory.file("incoming.sock")
    }

    /// Checks that it waits and is the machine of the checkpoint. Returns the checkpoint's block that it has mapped,
    /// if it has.
    pub(super) fn check<'a>(
        &mut self,
        claimed: &'a ClaimedCheckpoint,
    ) -> Result<Option<&'a GuestBlock>, CommandError> {
        let status = self.ask("query-status", &json!({}))?;
        if status["status"] != "inmigrate" {
            return refuse(&format!(
                "this QEMU does not wait for a guest, it has one ({}): start it with -incoming defer",
                status["status"].as_str().unwrap_or("unknown")
            ));
        }
        let machine = self.machine_property("type")?;
        let machine = machine.strip_suffix("-machine").unwrap_or(&machine);
        if machine != claimed.machine {
            return refuse(&format!(
                "the machine type differs: the checkpoint is of {0}, this QEMU is {machine}; give it -machine {0}",
                claimed.machine
            ));
        }
        let memory = self.ask("query-memory-size-summary", &json!({}))?;
        let bytes = memory["base-memory"].as_u64().unwrap_or(0);
        let backend = self.machine_property("memory-backend")?;
        let backend = backend.strip_prefix("/objects/").filter(|name| !name.is_empty());
        let block = main_block(&claimed.blocks, backend, bytes).map_err(CommandError::failed)?;
        let is_shared = self.has_mapped(block)?;
        self.check_other_memory(claimed, block, is_shared)?;
        Ok(is_shared.then_some(block))
    }

    /// Whether its main memory is the file of the image.
    fn has_mapped(&mut self, block: &GuestBlock) -> Result<bool, CommandError> {
        let Some(file) = &block.file else {
            return Ok(false);
        };
        let object = format!("/objects/{}", block.name);
        let mut property = |name: &str| {
            let value = self
                .qmp
                .execute("qom-get", &json!({"path": object, "property": name}));
            value.unwrap_or(Value::Null)
        };
        if property("type") != "memory-backend-file" || property("share") != Value::Bool(true) {
            return Ok(false);
        }
        let same = |path: &str| match (fs::metadata(path), fs::metadata(file)) {
            (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
            _ => false,
        };
        Ok(property("mem-path").as_str().is_some_and(same))
    }

    /// With shared memory QEMU takes no pages for any shared file, so there may be none that is not the image's.
    fn check_other_memory(
        &mut self,
        claimed: &ClaimedCheckpoint,
        main: &GuestBlock,
        is_shared: bool,
    ) -> Result<(), CommandError> {
        let backends = self.ask("query-memdev", &json!({}))?;
        let others = backends.as_array().into_iter().flatten();
        for id in others.filter_map(|backend| backend["id"].as_str()) {
            let object = json!({"path": format!("/objects/{id}"), "property": "share"});
            let is_block = id != main.name && claimed.blocks.iter().any(|block| block.name == id);
            if is_shared
                && is_block
                && self
                    .qmp
                    .execute("qom-get", &object)
                    .is_ok_and(|share| share == Value::Bool(true))
            {
                return refuse(&format!(
                    "memory {id} is shared in this QEMU, which would then not take it from the stream: give it share=off, \
                     or use --stream"
                ));
            }
        }
        Ok(())
    }

    /// Makes it listen for the stream, with its main memory in it or not.
    pub(super) fn listen(&mut self, is_shared: bool) -> Result<(), CommandError> {
        let capability = json!({"capability": IGNORE_SHARED, "state": is_shared});
        self.ask("migrate-set-capabilities", &json!({"capabilities": [capability]}))?;
        let uri = format!("unix:{}", self.socket().display());
        self.ask("migrate-incoming", &json!({"uri": uri})).map(drop)
    }

    /// It is about to get the checkpoint. One that does not hold the guest runs it then, whatever becomes of this command.
    pub(super) fn is_given(&self) {
        if self.child.is_none() {
            self.started.decide();
        }
    }

    /// Lets the guest run that was loaded and is paused. Returns QEMU's word for what it does then.
    pub(super) fn run(&mut self, status: String) -> Result<String, Unloaded> {
        self.started.decide();
        if !self.pauses || status != "paused" {
            return Ok(status);
        }
        let running = self.qmp.execute("cont", &json!({}));
        let status = running.and_then(|_| self.qmp.execute("query-status", &json!({})));
        match status {
            Ok(status) => Ok(status["status"].as_str().unwrap_or("unknown").to_owned()),
            Err(error) if error.refusal().is_some() => Err(Unloaded::certain(format!(
                "QEMU does not run the checkpoint: {error}{}",
                self.said()
            ))),
            Err(error) => Err(self.died(&error)),
        }
    }

    /// Waits until the guest is loaded: runs, or is paused. Returns QEMU's word for that.
    pub(super) fn wait_loaded(&mut self) -> Result<String, Unloaded> {
        self.wait_loaded_within(LOAD_LIMIT)
    }

    fn wait_loaded_within(&mut self, limit: Duration) -> Result<String, Unloaded> {
        let began = Instant::now();
        let poll = if self.pauses { PAUSED_POLL } else { POLL };
        while began.elapsed() < limit {
            let resumed = self.qmp.wait_event("RESUME", poll);
            let ask = |qmp: &mut Qmp, command| qmp.execute(command, &json!({}));
            let state = ask(&mut self.qmp, "query-status")
                .and_then(|status| Ok((status, ask(&mut self.qmp, "query-migrate")?)));
            let (status, migration) = match state {
                Ok(both) => both,
                Err(error) => return Err(self.died(&error)),
            };
            let status = status["status"].as_str().unwrap_or("unknown");
            match migration["status"].as_str() {
                Some("failed") => {
                    let why = migration["error-desc"].as_str().unwrap_or("it does not say why");
                    return Err(Unloaded::certain(format!(
                        "QEMU did not load the checkpoint: {why}{}",
                        self.said()
                    )));
                }
                Some("completed") if status != "inmigrate" => return Ok(status.to_owned()),
                _ if resumed && status == "running" => return Ok(status.to_owned()),
                _ => {}
            }
        }
        Err(Unloaded {
            text: format!("QEMU did not load the guest within {limit:?}{}", self.said()),
            may_have_run: !self.pauses,
        })
    }

    /// After a stream that was not written to its end: QEMU's own reason, if it has one, and whether the guest may have
    /// run after all.
    pub(super) fn why_not_taken(&mut self) -> (Option<String>, bool) {
        let began = Instant::now();
        match self.wait_loaded_within(FAIL_LIMIT) {
            Err(unloaded) if unloaded.may_have_run => (None, true),
            // It has not failed, but waits for the rest: that is no reason.
            Err(_) if began.elapsed() >= FAIL_LIMIT => (None, false),
            Err(unloaded) => (Some(unloaded.text), false),
            Ok(_) => (None, !self.pauses),
        }
    }

    /// It ended while it loaded: QEMU does that when it cannot.
    fn died(&mut self, error: &QmpError) -> Unloaded {
        let mut text = format!("QEMU did not load the checkpoint: {error}");
        if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
            text = format!("QEMU did not load the checkpoint ({status})");
        }
        let may_have_run = self.qmp.events().iter().any(|event| event.name == "RESUME");
        text.push_str(&self.said());
        Unloaded { text, may_have_run }
    }

    /// The last of QEMU's own words, where they are known.
    fn said(&self) -> String {
        match self.child {
            Some(_) => last_lines(&self.directory.file("qemu.log")),
            None => "; its own standard error says more".to_owned(),
        }
    }

    /// The guest runs: it is no longer ours.
    pub(super) fn let_go(mut self) {
        if self.child.is_some() {
            self.directory.keep();
        }
        self.child = None;
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, CommandError> {
        let answer = self.qmp.execute(command, arguments);
        answer.map_err(|error| CommandError::Failed(format!("{error}{}", self.said())))
    }

    fn machine_property(&mut self, name: &str) -> Result<String, CommandError> {
        let value = self.ask("qom-get", &json!({"path": "/machine", "property": name}))?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            self.started.forget();
            end(child);
        }
    }
}

/// A checkpoint that was given and does not run.
pub(super) struct Unloaded {
    pub(super) text: String,
    /// Whether the guest may have run for a while.
    pub(super) may_have_run: bool,
}

impl Unloaded {
    fn certain(text: String) -> Self {
        Self {
            text,
            may_have_run: false,
        }
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself; either way it is reaped.
    let _ = child.kill();
    let _ = child.wait();
}

/// The end of a log, to be appended to an error.
fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    match &lines[lines.len().saturating_sub(LOG_LINES)..] {
        [] => String::new(),
        last => format!("; it said:\n  {}", last.join("\n  ")),
    }
}

fn refuse<T>(why: &str) -> Result<T, CommandError> {
    Err(CommandError::Failed(why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_is_its_users_alone() {
        let mode =
            |directory: &RunDirectory| fs::metadata(&directory.path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&RunDirectory::new(None, 1).unwrap()), 0o700);
        let scratch = tempfile::tempdir().unwrap();
        let named = RunDirectory::new(Some(&scratch.path().join("a/b")), 1).unwrap();
        assert_eq!(mode(&named), 0o700);
    }
}
