//! `colo-ring failover`: resumes the guest from the last committed checkpoint.

mod command_line;
mod destination;
mod disks;
mod relay;
mod report;
mod standby;
mod started;
mod then_guard;
mod waiting;

use crate::control::{Conversation, WhichSession};
use crate::options::ControlAddress;
use crate::output::{CommandError, printable, take_output, tell};
use crate::qmp::socket_path;
use crate::signals;
use clap::Args;
use colo_ring::receiver::{
    ClaimedCheckpoint, KeepRequest, Request, RestoreReport, RestoreRequest, SessionTitle,
};
use command_line::{CommandLine, main_block};
use destination::{Destination, Kept, Outputs};
pub(crate) use disks::BlockdevReport;
pub(crate) use report::FailoverReport;
use report::{Outcome, Times};
use serde::Deserialize;
use serde_json::Value;
use started::Started;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::str::FromStr;
use std::time::Instant;
use then_guard::GuardOptions;
use waiting::{RunDirectory, Waiting};

/// Options of `colo-ring failover`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("target").required(true).args(["qmp", "qemu_args", "to", "qemu", "print_blockdev"])))]
pub struct FailoverArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    #[command(flatten)]
    which: WhichSession,

    /// QMP socket of a QEMU that waits already (-incoming defer): the fast way
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    qmp: Option<PathBuf>,

    /// File with the command line of the QEMU to start; read as a shell reads it
    #[arg(long, value_name = "FILE")]
    qemu_args: Option<PathBuf>,

    /// Only write the migration stream: to file:PATH, unix:PATH, tcp:HOST:PORT (of a QEMU started with -incoming), or -
    /// for standard output
    #[arg(long, value_name = "TARGET")]
    to: Option<Target>,

    /// Command line of the QEMU to start
    #[arg(last = true, value_name = "QEMU")]
    qemu: Vec<String>,

    /// Only print what the fresh QEMU's command line needs for the guest's disks; also while it is protected
    #[arg(long)]
    print_blockdev: bool,

    /// Also if the fresh QEMU does not use the checkpoint's disks: what it uses has their content at this checkpoint
    #[arg(long)]
    other_disks: bool,

    /// Send all memory in the stream, also where the fresh QEMU could use the receiver's file
    #[arg(long)]
    stream: bool,

    /// Keep a copy of the checkpoint, written first, as a stream that -incoming file:PATH takes; and of each disk, as
    /// FILE.NAME.raw, sharing its blocks where the file system can
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,

    /// Replace the files of --to file:PATH and --keep if they exist
    #[arg(long)]
    overwrite: bool,

    /// Make sure that the primary is off: run by sh before anything is given; it must succeed. In its environment: COLO_RING_SESSION,
    /// _GUEST, _UUID, _LISTENER, _PEER, _MACHINE and _CHECKPOINT
    #[arg(long, value_name = "CMD", group = "certainty")]
    fence: Option<String>,

    /// Also if the primary is still connected: the session is closed. Needs --fence or --unfenced
    #[arg(long, requires = "certainty")]
    force: bool,

    /// With --force, in place of --fence: you have made sure yourself that the primary is off. A guest that runs twice destroys its
    /// disks
    #[arg(long, requires = "force", group = "certainty")]
    unfenced: bool,

    /// The primary is well: its guard takes a last checkpoint, and ends it before the guest is resumed here. Nothing is lost, and no
    /// connection breaks
    #[arg(long, conflicts_with_all = ["force", "fence", "retry", "print_blockdev"])]
    planned: bool,

    /// Also if the checkpoint was given away before and it is unknown what became of it
    #[arg(long)]
    retry: bool,

    /// Directory for sockets and the log of the QEMU that is started, and of no other that runs [default: a new one in the temporary directory]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,

    /// Then become the guard of the guest, `colo-ring guard`, with these options, read as a shell reads them: like
    /// '--to tcp:192.0.2.3:4444 --name web3'
    #[arg(long, value_name = "OPTIONS", value_parser = GuardOptions::parse, allow_hyphen_values = true)]
    #[arg(conflicts_with_all = ["to", "print_blockdev"])]
    then_guard: Option<GuardOptions>,

    /// Print the result as JSON (schema colo-ring.failover, version 1)
    #[arg(long)]
    json: bool,
}

/// Where a stream goes that no QEMU of ours takes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// As the receiver takes it.
    There(String),
    /// Standard output.
    Here,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "-" => Ok(Self::Here),
            Some(("file", path)) if !path.is_empty() => {
                let path = std::path::absolute(path).map_err(|error| error.to_string())?;
                Ok(Self::There(format!("file:{}", path.display())))
            }
            Some(("unix" | "tcp", rest)) if !rest.is_empty() => Ok(Self::There(text.to_owned())),
            _ => Err("write file:PATH, unix:PATH, tcp:HOST:PORT or -".to_owned()),
        }
    }
}

/// A claimed checkpoint, and the conversation that has claimed it.
struct Claim {
    conversation: Conversation,
    title: SessionTitle,
    claimed: ClaimedCheckpoint,
}

/// Gives a session's last committed checkpoint to a QEMU, and returns once the guest runs there.
///
/// # Errors
/// If it is not available, does not fit, or does not start; the error names the state of the checkpoint then.
pub fn run(args: &FailoverArgs) -> Result<ExitCode, CommandError> {
    if args.print_blockdev {
        return disks::print_blockdev(args);
    }
    if args.to == Some(Target::Here) {
        take_output();
    }
    let began = Instant::now();
    let started = Started::default();
    let to_end = started.clone();
    signals::on_end(move || {
        if !to_end.end_process() {
            tell(
                "a guest is about to run, which cannot be taken back: this ends when it does; another signal ends it at once",
            );
        }
    })?;
    let line = args.command_line()?;
    let mut conversation = Conversation::open(&args.control)?;
    let title = args.which.find(&mut conversation)?;
    let claim = Request::Claim {
        session: title.session,
        force: args.force || args.planned,
        retry: args.retry,
    };
    let claimed: ClaimedCheckpoint = conversation.ask(&claim)?;
    let mut claim = Claim {
        conversation,
        title,
        claimed,
    };
    let mut times = Times {
        claim: began.elapsed(),
        ..Times::default()
    };
    let mut outcome = match (&args.to, line) {
        (Some(target), _) => write_only(args, &mut claim, target, &started, &mut times)?,
        (None, line) => resume(args, &mut claim, line, &started, &mut times)?,
    };
    times.total = began.elapsed() - times.give_up;
    outcome.times = times;
    let printed = report::print_outcome(args, &claim, &outcome);
    let Some(monitor) = &outcome.qmp else {
        return printed.map(|()| ExitCode::SUCCESS);
    };
    // The guest runs, which no reader that has gone can change.
    if let Err(error) = printed {
        tell(&format!(
            "warning: the guest runs, its monitor is {}: {error}",
            monitor.display()
        ));
    }
    match &args.then_guard {
        Some(options) => options.become_guard(monitor),
        None => Ok(ExitCode::SUCCESS),
    }
}

impl FailoverArgs {
    /// The QEMU to start, if one is.
    fn command_line(&self) -> Result<Option<CommandLine>, CommandError> {
        if let Some(path) = &self.qemu_args {
            let failed =
                |error: &dyn std::fmt::Display| CommandError::Failed(format!("{}: {error}", path.display()));
            let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
            return CommandLine::parse(&text)
                .map(Some)
                .map_err(|error| failed(&error));
        }
        match self.qemu.is_empty() {
            true => Ok(None),
            false => CommandLine::new(self.qemu.clone())
                .map(Some)
                .map_err(|error| CommandError::Usage(error.to_string())),
        }
    }

    fn keep(&self) -> Result<Option<PathBuf>, CommandError> {
        // A report names it, and may be read in another directory.
        let absolute = |path: &PathBuf| std::path::absolute(path);
        let path = self.keep.as_ref().map(absolute).transpose();
        path.map_err(|error| CommandError::Failed(format!("--keep: {error}")))
    }
}

impl Claim {
    /// Opens the files of the copy that is to be kept, if one is.
    fn kept(&self, args: &FailoverArgs, started: &Started) -> Result<Option<Kept>, CommandError> {
        let Some(path) = args.keep()? else {
            return Ok(None);
        };
        let disks = self.claimed.disks.iter().map(|disk| disk.name.clone());
        let kept = Kept::create(&path, disks, args.overwrite)?;
        started.begins(kept.parts());
        Ok(Some(kept))
    }

    /// Has the receiver write the stream. It may end the session for it.
    fn restore(
        &mut self,
        to: String,
        shared: Option<String>,
        outputs: &Outputs,
    ) -> Result<RestoreReport, CommandError> {
        let keep = outputs.kept.as_ref();
        let request = Request::Restore(RestoreRequest {
            session: self.claimed.session,
            to,
            shared,
            keep: keep.map(|kept| KeepRequest { disks: kept.disks() }),
        });
        let restored = self.conversation.ask_with(&request, &outputs.descriptors())?;
        outputs.finish()?;
        Ok(restored)
    }

    /// It failed before anything was given; the claim ends with the conversation.
    fn untouched(&self, error: &CommandError) -> CommandError {
        let (session, checkpoint) = (&self.title, self.claimed.checkpoint);
        CommandError::Failed(format!(
            "{error}\nnothing was given away: checkpoint {checkpoint} of session {session} is still there"
        ))
    }

    /// Gives the claim up, and says what is left. `may_have_run`: whether a guest may have, if the stream was written.
    fn release(&mut self, may_have_run: bool, why: &str) -> CommandError {
        let session = self.claimed.session;
        let released = self.conversation.ask::<Released>(&Request::Release {
            session,
            may_have_run,
        });
        let left = match released {
            Ok(Released { promotion: None }) => {
                "it is still there, and another attempt can be made".to_owned()
            }
            Ok(Released {
                promotion: Some(words),
            }) => words,
            Err(error) => format!("what became of it is unknown: {error}"),
        };
        let checkpoint = self.claimed.checkpoint;
        CommandError::Failed(format!(
            "{why}\ncheckpoint {checkpoint} of session {}: {left}",
            self.title
        ))
    }
}

/// A guest that was handed over by its guard.
#[derive(Deserialize)]
struct HandedOver {
    checkpoint: u64,
}

/// The state of a checkpoint after its claim was given up.
#[derive(Deserialize)]
struct Released {
    promotion: Option<String>,
}

/// Gives the checkpoint to a QEMU and waits until its guest runs.
fn resume(
    args: &FailoverArgs,
    claim: &mut Claim,
    line: Option<CommandLine>,
    started: &Started,
    times: &mut Times,
) -> Result<Outcome, CommandError> {
    let (mut waiting, shared, kept) =
        prepare(args, claim, line, started, times).map_err(|error| claim.untouched(&error))?;
    let began = Instant::now();
    let to = format!("unix:{}", waiting.socket().display());
    waiting.is_given();
    let restored = Destination::open(&to, false).and_then(|destination| {
        let outputs = Outputs { destination, kept };
        claim.restore(to, shared.clone(), &outputs)
    });
    let restored = match restored {
        Ok(restored) => restored,
        Err(error) => {
            let (why, may_have_run) = waiting.why_not_taken();
            drop(waiting);
            return Err(claim.release(may_have_run, &why.unwrap_or_else(|| error.to_string())));
        }
    };
    times.restore = began.elapsed();
    if let Err(error) = disks::check_restored(&claim.claimed, &restored) {
        let may_have_run = !waiting.pauses();
        drop(waiting);
        return Err(claim.release(may_have_run, &error.to_string()));
    }
    let began = Instant::now();
    let status = match waiting.wait_loaded().and_then(|status| waiting.run(status)) {
        Ok(status) => status,
        Err(unloaded) => {
            drop(waiting);
            return Err(claim.release(unloaded.may_have_run, &unloaded.text));
        }
    };
    times.load = began.elapsed();
    let outcome = Outcome::resumed(&waiting, status, shared, restored);
    waiting.let_go();
    let began = Instant::now();
    let session = claim.claimed.session;
    if let Err(error) = claim.conversation.ask::<Value>(&Request::Promoted { session }) {
        tell(&format!(
            "warning: the guest runs, but the receiver does not know it: {error}"
        ));
    }
    times.give_up = began.elapsed();
    Ok(outcome)
}

/// Starts or finds the QEMU, checks it, makes sure that the primary is off, and has it wait for the stream. Returns the
/// name of the block that it has mapped, if it has, and the copy that is begun.
fn prepare(
    args: &FailoverArgs,
    claim: &mut Claim,
    line: Option<CommandLine>,
    started: &Started,
    times: &mut Times,
) -> Result<(Waiting, Option<String>, Option<Kept>), CommandError> {
    let directory = RunDirectory::new(args.run_dir.as_deref(), claim.claimed.session)?;
    started.uses(&directory);
    let began = Instant::now();
    let mut waiting = match (line, &args.qmp) {
        (Some(line), _) => Waiting::start(fit(args, &claim.claimed, line)?, directory, started)?,
        (None, Some(monitor)) => Waiting::attach(monitor, directory, started)?,
        (None, None) => {
            return Err(CommandError::Usage(
                "one of --qmp, --qemu-args, --to and -- QEMU is needed".to_owned(),
            ));
        }
    };
    times.start = began.elapsed();
    let began = Instant::now();
    let mapped = waiting.check(&claim.claimed)?.filter(|_| !args.stream);
    disks::check(waiting.qmp(), &claim.claimed, args.other_disks)?;
    let shared = mapped.map(|block| block.name.clone());
    if shared.is_none() && !args.stream {
        tell(
            "the receiver's memory has no file that this QEMU has mapped: all of it goes through the stream",
        );
    }
    times.check = began.elapsed();
    // Before the primary is ended: what cannot be done leaves it as it is.
    let kept = claim.kept(args, started)?;
    fence(args, claim, times)?;
    let began = Instant::now();
    // After that: a standby that listens cannot be used for another attempt.
    waiting.listen(shared.is_some())?;
    times.check += began.elapsed();
    hand_over(args, claim, times)?;
    Ok((waiting, shared, kept))
}

/// Has the primary's guard make a last checkpoint and end the primary, if that is asked for.
fn hand_over(args: &FailoverArgs, claim: &mut Claim, times: &mut Times) -> Result<(), CommandError> {
    if !args.planned {
        return Ok(());
    }
    let began = Instant::now();
    let session = claim.claimed.session;
    let handed_over: HandedOver = claim.conversation.ask(&Request::Handover { session })?;
    (claim.claimed.checkpoint, claim.claimed.checkpoint_age_ms) = (handed_over.checkpoint, 0);
    times.handover = began.elapsed();
    Ok(())
}

/// The command line with what must be added, checked against the checkpoint as far as it says something.
fn fit(
    args: &FailoverArgs,
    claimed: &ClaimedCheckpoint,
    mut line: CommandLine,
) -> Result<CommandLine, CommandError> {
    if args.stream {
        return Ok(line);
    }
    if line.has_memory_by_node() {
        return Err(CommandError::Failed(
            "with -numa memdev the guest's memory is not one file: use --stream".to_owned(),
        ));
    }
    let bytes = line.memory_bytes().map_err(CommandError::failed)?;
    let backend = line.machine_property("memory-backend").map(str::to_owned);
    let block = main_block(&claimed.blocks, backend.as_deref(), bytes).map_err(CommandError::failed)?;
    if let Some(file) = &block.file
        && let Some(replaced) = line.share(block, file)
    {
        tell(&format!(
            "-object {replaced} is replaced by the receiver's file {}",
            file.display()
        ));
    }
    Ok(line)
}

/// Makes sure that the primary is off, in the operator's way.
fn fence(args: &FailoverArgs, claim: &Claim, times: &mut Times) -> Result<(), CommandError> {
    let Some(command) = &args.fence else {
        return Ok(());
    };
    let began = Instant::now();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .env("COLO_RING_SESSION", claim.claimed.session.to_string())
        .env(
            "COLO_RING_GUEST",
            claim.claimed.guest.as_deref().unwrap_or_default(),
        )
        .env(
            "COLO_RING_UUID",
            claim.claimed.uuid.as_deref().unwrap_or_default(),
        )
        .env(
            "COLO_RING_LISTENER",
            claim.claimed.listener.as_deref().unwrap_or_default(),
        )
        .env("COLO_RING_PEER", &claim.claimed.peer)
        .env("COLO_RING_MACHINE", printable(&claim.claimed.machine))
        .env("COLO_RING_CHECKPOINT", claim.claimed.checkpoint.to_string())
        .stdin(Stdio::null())
        .stdout(std::io::stderr());
    let status = shell
        .status()
        .map_err(|error| CommandError::Failed(format!("--fence: {error}")))?;
    times.fence = began.elapsed();
    if status.success() {
        return Ok(());
    }
    Err(CommandError::Failed(format!(
        "--fence '{command}' failed ({status}): the primary may still run"
    )))
}

/// Writes the stream from which another program starts the guest.
fn write_only(
    args: &FailoverArgs,
    claim: &mut Claim,
    target: &Target,
    started: &Started,
    times: &mut Times,
) -> Result<Outcome, CommandError> {
    let prepared = open_and_fence(args, claim, target, started, times);
    let (destination, kept) = prepared.map_err(|error| claim.untouched(&error))?;
    let began = Instant::now();
    let restore = |name: &str, destination| {
        let outputs = Outputs { destination, kept };
        claim.restore(name.to_owned(), None, &outputs)
    };
    let (name, restored) = match (target, destination) {
        (Target::There(to), Some(destination)) => (&**to, restore(to, destination)),
        _ => {
            let name = "standard output";
            (name, relay::to_stdout(|destination| restore(name, destination)))
        }
    };
    times.restore = began.elapsed();
    match restored {
        Ok(restored) => Ok(Outcome::written(name.to_owned(), restored)),
        Err(error) => Err(claim.release(false, &error.to_string())),
    }
}

/// Opens what is written to, and then makes sure that the primary is off: what cannot be opened leaves it as it is. A connection is held until the
/// stream goes there. It comes after files, as it uses a QEMU up.
fn open_and_fence(
    args: &FailoverArgs,
    claim: &mut Claim,
    target: &Target,
    started: &Started,
    times: &mut Times,
) -> Result<(Option<Destination>, Option<Kept>), CommandError> {
    let kept = claim.kept(args, started)?;
    let destination = match target {
        Target::There(to) => Some(Destination::open(to, args.overwrite)?),
        Target::Here => None,
    };
    started.begins(destination.iter().flat_map(Destination::parts).collect());
    fence(args, claim, times)?;
    hand_over(args, claim, times)?;
    Ok((destination, kept))
}

/// A path for people.
fn shown(path: &Path) -> String {
    path.display().to_string()
}
