//! A QEMU that waits for the checkpoint: started here, or by the operator as a warm standby.

use super::command_line::{CommandLine, main_block};
use super::standby::{OwnWords, why_it_stands};
use super::started::Started;
use crate::output::{CommandError, tell};
use crate::qmp::{CONNECT_LIMIT, Qmp, QmpError};
use colo_ring::failover::IGNORE_SHARED;
use colo_ring::files::{self, Readers};
use colo_ring::receiver::{ClaimedCheckpoint, GuestBlock};
use colo_ring::text::elapsed;
use rustix::fs::FlockOperation;
use rustix::io::FdFlags;
use serde_json::{Value, json};
use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a QEMU may take from its start to its monitor's greeting.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long QEMU may take to run the guest once it has everything.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// How long a QEMU that has closed the stream may take to end.
const FAIL_LIMIT: Duration = Duration::from_secs(1);

/// How long what QEMU needs may be busy, and how often it is tried.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_POLL: Duration = Duration::from_millis(100);

/// QEMU's words for what is in use: a tap device, an address, an image.
const BUSY: [&str; 3] = [
    "Device or resource busy",
    "Address already in use",
    "Is another process using the image",
];

/// How often QEMU is asked for states that no event reports.
const POLL: Duration = Duration::from_millis(20);

/// The same where no event is to come, because it pauses the guest.
const PAUSED_POLL: Duration = Duration::from_millis(1);

/// How often in succession QEMU must be found with a whole guest that it does not run.
const STANDS_AFTER: u32 = 2;

/// A monitor in a run directory is as much as the guest itself.
const RUN_DIRECTORY_MODE: u32 = 0o700;

/// A directory for sockets and QEMU's log, for this user alone.
#[derive(Debug)]
pub(super) struct RunDirectory {
    path: PathBuf,
    /// Removed with this command; none where the operator named the directory, which stays.
    temporary: Option<TempDir>,
    /// The directory itself, locked: by this command, and by the QEMU that it starts in it, for as long as one of them lives.
    lock: File,
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
        let failed = |error: io::Error| CommandError::Failed(format!("{}: {error}", path.display()));
        let lock = File::open(&path).map_err(failed)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return refuse(&format!(
                    "the run directory {} is used by another failover, or by a QEMU that one has started: give another --run-dir",
                    path.display()
                ));
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        Ok(Self {
            path,
            temporary,
            lock,
        })
    }

    /// Starts a program that keeps the directory locked after this command.
    fn lend_to<T>(&self, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        rustix::io::fcntl_setfd(&self.lock, FdFlags::empty())?;
        let started = start();
        rustix::io::fcntl_setfd(&self.lock, FdFlags::CLOEXEC)?;
        started
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
    /// What it says on its standard error.
    words: OwnWords,
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
            words: OwnWords::of(&qmp),
            qmp,
            child: None,
            started: started.clone(),
            directory,
            pauses: false,
        })
    }

    /// Starts one. One that ends because something is busy, as what the primary had is for a moment after its end, is started again.
    pub(super) fn start(
        mut line: CommandLine,
        directory: RunDirectory,
        started: &Started,
    ) -> Result<Self, CommandError> {
        line.wait_for_migration(&directory.file("qmp.sock"));
        let pauses = line.start_paused();
        let (since, mut is_told) = (Instant::now(), false);
        loop {
            match start_once(&line, &directory, started) {
                Ok((qmp, child)) => {
                    return Ok(Self {
                        qmp,
                        child: Some(child),
                        words: OwnWords::log(&directory.file("qemu.log")),
                        started: started.clone(),
                        directory,
                        pauses,
                    });
                }
                Err(NotStarted::Busy(why)) if since.elapsed() < BUSY_LIMIT => {
                    if !std::mem::replace(&mut is_told, true) {
                        tell(&format!("{why}\nstarting it again for {BUSY_LIMIT:?}"));
                    }
                    std::thread::sleep(BUSY_POLL);
                }
                Err(NotStarted::Busy(why) | NotStarted::Failed(why)) => {
                    return Err(CommandError::Failed(why));
                }
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
        let migration = self.ask("query-migrate", &json!({}))?;
        if migration["status"]
            .as_str()
            .is_some_and(|status| status != "none")
        {
            return refuse("this QEMU has listened for a guest before, which works once: start another one");
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
        let is_same = |one: &Metadata, other: &Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
        let mapped = property("mem-path");
        let mapped = mapped.as_str().and_then(|path| fs::metadata(path).ok());
        let (Some(mapped), Ok(image)) = (mapped, fs::metadata(file)) else {
            return Ok(false);
        };
        if !is_same(&mapped, &image) {
            return Ok(false);
        }
        // The name may have been that of an earlier session's file when QEMU mapped it.
        let why = match self.qmp.has_mapped(&image) {
            Ok(true) => return Ok(true),
            Ok(false) => "it has mapped an earlier file of that name".to_owned(),
            Err(error) => format!("what it has mapped is unknown: {error}"),
        };
        tell(&format!(
            "warning: this QEMU does not get {} as it is: {why}",
            file.display()
        ));
        Ok(false)
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
            // A signal has nothing to end here but this process.
            let _ = self.started.decide();
        }
    }

    /// Lets the guest run that was loaded and is paused. Returns QEMU's word for what it does then.
    pub(super) fn run(&mut self, status: String) -> Result<String, Unloaded> {
        if !self.started.decide() {
            return Err(Unloaded::certain("QEMU was ended by a signal".to_owned()));
        }
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
        let mut stood = 0;
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
                // It has the guest, and could not run it: nothing changes that any more.
                Some("completed") if stood == STANDS_AFTER => {
                    let why = why_it_stands(&mut self.qmp);
                    return Err(Unloaded::certain(format!("{why}{}", self.said())));
                }
                Some("completed") => stood += 1,
                _ => {}
            }
        }
        Err(Unloaded {
            text: format!(
                "QEMU did not load the guest within {}{}",
                elapsed(limit),
                self.said()
            ),
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

    /// The last of QEMU's own words.
    fn said(&self) -> String {
        self.words.last()
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

/// Why a QEMU was not started.
enum NotStarted {
    /// Something that it needs is in use.
    Busy(String),
    Failed(String),
}

/// Starts a QEMU, and waits for its monitor.
fn start_once(
    line: &CommandLine,
    directory: &RunDirectory,
    started: &Started,
) -> Result<(Qmp, Child), NotStarted> {
    let (monitor, log) = (directory.file("qmp.sock"), directory.file("qemu.log"));
    let failed = |what: &str, error: &dyn std::fmt::Display| NotStarted::Failed(format!("{what}: {error}"));
    let not_logged = |error| failed(&log.display().to_string(), &error);
    let out = files::replace(&log, Readers::Owner).map_err(not_logged)?;
    let err = out.try_clone().map_err(not_logged)?;
    let mut command = Command::new(line.program());
    // A group of its own: it goes on when this command's terminal is gone.
    command
        .args(line.arguments())
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .process_group(0);
    // One that was left there is nobody's: no QEMU has the directory. It would be asked in vain.
    let _ = fs::remove_file(&monitor);
    let mut child = directory
        .lend_to(|| started.spawn(&mut command))
        .map_err(|error| failed(&format!("cannot start {}", line.program()), &error))?;
    let began = Instant::now();
    loop {
        match Qmp::connect(&monitor, Duration::ZERO) {
            Ok(qmp) => return Ok((qmp, child)),
            Err(QmpError::Connect { .. }) if began.elapsed() < START_LIMIT => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => {
                started.forget();
                end(&mut child);
                return Err(NotStarted::Failed(format!(
                    "QEMU does not start: {error}{}",
                    OwnWords::log(&log).last()
                )));
            }
        }
        if let Some(status) = child.try_wait().ok().flatten() {
            started.forget();
            let said = OwnWords::log(&log).last();
            let why = format!("QEMU does not start ({status}){said}");
            return Err(match BUSY.iter().any(|words| said.contains(words)) {
                true => NotStarted::Busy(why),
                false => NotStarted::Failed(why),
            });
        }
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

fn refuse<T>(why: &str) -> Result<T, CommandError> {
    Err(CommandError::Failed(why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::tests::{Responder, monitor};

    #[test]
    fn a_run_directory_is_its_users_alone() {
        let mode =
            |directory: &RunDirectory| fs::metadata(&directory.path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&RunDirectory::new(None, 1).unwrap()), 0o700);
        let scratch = tempfile::tempdir().unwrap();
        let named = RunDirectory::new(Some(&scratch.path().join("a/b")), 1).unwrap();
        assert_eq!(mode(&named), 0o700);
    }

    /// A hook may give every guest the same.
    #[test]
    fn a_run_directory_is_that_of_one_failover_and_its_qemu() {
        let scratch = tempfile::tempdir().unwrap();
        let take = || RunDirectory::new(Some(scratch.path()), 1);
        let directory = take().unwrap();
        let refused = take().unwrap_err().to_string();
        assert!(refused.contains("give another --run-dir"), "{refused}");
        let mut qemu = directory
            .lend_to(|| Command::new("sleep").arg("1000").spawn())
            .unwrap();
        drop(directory);
        assert!(take().is_err(), "it runs there still");
        end(&mut qemu);
        drop(take().unwrap());
    }

    /// A standby that has the guest and cannot lock its disk says so at once, and not after the time that loading may take.
    #[test]
    fn a_standby_that_has_failed_is_not_waited_for() {
        let respond: Responder = Box::new(|command, _| match command {
            "query-status" => Ok(json!({"status": "inmigrate"})),
            "query-migrate" => Ok(json!({"status": "completed"})),
            "query-block" => Ok(json!([
                {"inserted": {"active": false, "node-name": "#block1", "file": "/srv/web3.raw"}}
            ])),
            "blockdev-set-active" => Err("Failed to get \"write\" lock".to_owned()),
            other => Err(format!("{other} was not expected")),
        });
        let path = monitor((11, 1, 3), respond);
        let directory = RunDirectory::new(None, 1).unwrap();
        let mut waiting = Waiting::attach(&path.0, directory, &Started::default()).unwrap();
        let began = Instant::now();
        let unloaded = waiting.wait_loaded().unwrap_err();
        assert!(began.elapsed() < LOAD_LIMIT / 2, "{:?}", began.elapsed());
        assert!(
            unloaded.text.contains("/srv/web3.raw: Failed to get"),
            "{}",
            unloaded.text
        );
        assert!(!unloaded.may_have_run);
    }
}
