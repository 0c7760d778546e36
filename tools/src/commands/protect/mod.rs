//! `colo-ring protect`: puts a running QEMU under the protection of a receiver, over QMP.

mod call;
mod disks;
mod settings;

use crate::commands::unprotect::status_of;
use crate::guest_disks::{self, MirrorError, Mirrors};
use crate::net::Address;
use crate::options::Size;
use crate::output::{CommandError, ProgressLine, print, print_json, tell};
use crate::page_compression::{CompressionArgs, CompressionArgsError, PageCompression};
use crate::qmp::{Asked, CONNECT_LIMIT, Qmp, QmpError, socket_path};
use crate::signals;
use crate::tls::TlsArgs;
use call::{Called, Calling};
use clap::Args;
use colo_ring::host::Machine;
use colo_ring::receiver::GuestName;
use disks::{Changes, DiskArgs, DiskPlan, DiskReport, give_up};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use settings::{Wanted, set_capabilities, set_credentials, stops_under_tcg};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How often the primary is asked how far it is.
const POLL: Duration = Duration::from_millis(100);

/// How long an answer is waited for before it is looked at what is wished meanwhile, and how long QEMU may answer nothing.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// What is protected, by which receiver, and how: options of `colo-ring protect` and `colo-ring guard`.
#[derive(Debug, Args)]
pub struct PrimaryArgs {
    /// QMP socket of the primary, a QEMU whose guest runs (its -qmp unix:PATH,server=on,wait=off)
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    pub(crate) qmp: PathBuf,

    /// The receiver, as the primary reaches it: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) to: Address,

    /// multifd connections, as many as the receiver's --channels; 0 = without multifd
    #[arg(long, value_name = "N", default_value_t = 4)]
    channels: u8,

    #[command(flatten)]
    pub(crate) tls: TlsArgs,

    #[command(flatten)]
    compression: CompressionArgs,

    /// Most bytes per second for the first copy
    #[arg(long, value_name = "SIZE", default_value = "10G")]
    bandwidth: Size,

    #[command(flatten)]
    disks: DiskArgs,
}

/// Options of `colo-ring protect`.
#[derive(Debug, Args)]
pub struct ProtectArgs {
    #[command(flatten)]
    primary: PrimaryArgs,

    /// Send pages that the guest changes often as differences to what was sent before (XBZRLE); needs --channels 0 and a
    /// stopped guest (QMP `stop`), which runs again once it is protected: QEMU up to 11.1 loses bytes of one that runs
    #[arg(long)]
    xbzrle: bool,

    /// Milliseconds between checkpoints: how much of the guest's time a failover costs at most
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    interval: u32,

    /// What the receiver is to call the guest, unless its own --guest does [default: its UUID]
    #[arg(long)]
    name: Option<GuestName>,

    /// Give up watching after so many seconds; the migration goes on. 0 starts it only. The first copy of disks comes
    /// before, and is always waited for [default: no limit]
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,

    /// Print the result as JSON (schema colo-ring.protect, version 1)
    #[arg(long)]
    json: bool,
}

/// How a guest was put under protection.
#[derive(Serialize, JsonSchema)]
pub(crate) struct ProtectReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The primary's version of QEMU.
    qemu: String,
    /// Path of its monitor.
    qmp: &'a Path,
    /// The receiver's address.
    to: String,
    /// multifd channels; 0 is plain mode.
    channels: u8,
    #[serde(flatten)]
    compression: PageCompression,
    /// Whether pages are sent as differences.
    xbzrle: bool,
    /// Time between two checkpoints.
    interval_ms: u32,
    /// The limit for the migration.
    bandwidth_bytes_per_s: u64,
    /// Whether the migration has TLS.
    tls: bool,
    /// Capabilities that were changed.
    changed: &'a [String],
    /// QEMU's own word: `colo` once it is protected.
    status: String,
    /// The guest's RAM; null if QEMU does not say it.
    ram_bytes: Option<u64>,
    /// Bytes that were sent for the first copy; null if QEMU does not say it.
    transferred_bytes: Option<u64>,
    /// From the start of the migration until the guest was protected.
    elapsed_ms: u64,
    /// The session at the receiver; null where that has not said it.
    session: Option<u32>,
    /// What the receiver calls the guest; null where that has not said it.
    guest: Option<String>,
    #[serde(flatten)]
    disks: DiskReport,
    /// Where the command ran.
    machine: Machine,
}

/// How a protection begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beginning<'a> {
    pub(crate) primary: &'a PrimaryArgs,
    pub(crate) xbzrle: bool,
    /// Milliseconds between checkpoints that nothing else asks for.
    pub(crate) interval_ms: u32,
    /// How long the first copy is watched; none is without a limit.
    pub(crate) wait: Option<Duration>,
    /// Whether a line shows how far it is.
    pub(crate) shows: bool,
}

/// A protection that has begun.
pub(crate) struct Begun {
    plan: DiskPlan,
    changed: Vec<String>,
    compression: PageCompression,
    /// The mirrors of the guest's disks.
    pub(crate) mirrors: Mirrors,
    changes: Option<Changes>,
    copying: Duration,
    elapsed: Duration,
    /// QEMU's last word on the migration.
    state: Value,
}

/// Protects the guest, and returns once it is.
///
/// # Errors
/// If the primary cannot be protected: with QEMU's reason, and in what state it is left.
pub fn run(args: &ProtectArgs) -> Result<ExitCode, CommandError> {
    let beginning = Beginning {
        primary: &args.primary,
        xbzrle: args.xbzrle,
        interval_ms: args.interval,
        wait: args.wait.map(Duration::from_secs),
        shows: !args.json,
    };
    // Before QEMU is asked for anything.
    beginning.check_modes()?;
    if args.name.is_some() && args.wait == Some(0) {
        return Err(CommandError::Usage(
            "--name needs a --wait: the guest is named when it is protected".to_owned(),
        ));
    }
    let (wish, wished) = mpsc::channel();
    signals::on_end(move || {
        // Without a receiver the watching is over.
        let _ = wish.send(());
    })?;
    let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
    let calling = match args.wait {
        Some(0) => None,
        _ => {
            let uuid = qmp.guest_uuid().map_err(CommandError::failed)?;
            let primary = &args.primary;
            Calling::begin((&primary.to, &primary.tls), args.name.as_ref(), uuid)
        }
    };
    let begun = beginning.begin(&mut qmp, &wished)?;
    let called = calling.and_then(Calling::end);
    let report = begun.report(args, &qmp, called.as_ref());
    if args.json {
        print_json(&report)?;
    } else {
        print(&report.text(&beginning))?;
        print(&called.as_ref().map(Called::line).unwrap_or_default())?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Begun {
    fn report<'a>(&'a self, args: &'a ProtectArgs, qmp: &Qmp, called: Option<&Called>) -> ProtectReport<'a> {
        let primary = &args.primary;
        ProtectReport {
            schema: "colo-ring.protect",
            schema_version: 1,
            qemu: qmp.version().to_string(),
            qmp: &primary.qmp,
            to: primary.to.to_string(),
            channels: primary.channels,
            compression: self.compression,
            xbzrle: args.xbzrle,
            interval_ms: args.interval,
            bandwidth_bytes_per_s: primary.bandwidth.0,
            tls: primary.tls.tls.is_some(),
            changed: &self.changed,
            status: status_of(&self.state).to_owned(),
            ram_bytes: self.state["ram"]["total"].as_u64(),
            transferred_bytes: self.state["ram"]["transferred"].as_u64(),
            elapsed_ms: u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX),
            session: called.map(|called| called.session),
            guest: called.and_then(|called| called.name.clone()),
            disks: self.plan.report(&primary.disks, self.changes, self.copying),
            machine: Machine::read(),
        }
    }
}

impl ProtectReport<'_> {
    fn text(&self, beginning: &Beginning<'_>) -> String {
        if self.status != "colo" {
            return format!("started: the migration is in state {}\n", self.status);
        }
        format!(
            "protected: QEMU {} makes a checkpoint to {} every {} ms{}; the first copy took {:.1} s\n{}",
            self.qemu,
            self.to,
            self.interval_ms,
            beginning.modes(self.compression),
            Duration::from_millis(self.elapsed_ms).as_secs_f64(),
            self.disks.lines()
        )
    }
}

impl Beginning<'_> {
    /// Puts the guest under protection, and returns once it is protected.
    ///
    /// # Errors
    /// If the primary cannot be protected: with QEMU's reason, and in what state it is left.
    pub(crate) fn begin(&self, qmp: &mut Qmp, wished: &mpsc::Receiver<()>) -> Result<Begun, CommandError> {
        let compression = self.check_modes()?;
        let args = self.primary;
        check_can_begin(qmp, self.xbzrle)?;
        let plan = DiskPlan::make(qmp, &args.disks, &args.to)?;
        plan.tell_what_is_left();
        let changed = self.set_up(qmp, compression, plan.has_uuid())?;
        let began = Instant::now();
        let (mirrors, changes) = plan.mirror(qmp, &args.disks, wished, self.shows)?;
        let copying = began.elapsed();
        let began = Instant::now();
        let migrate = qmp.execute("migrate", &json!({"uri": args.to.to_string()}));
        migrate.map_err(|error| not_started(qmp, &error))?;
        let state = self.watch(qmp, &mirrors, wished)?;
        Ok(Begun {
            plan,
            changed,
            compression,
            mirrors,
            changes,
            copying,
            elapsed: began.elapsed(),
            state,
        })
    }

    /// Switches the capabilities and parameters of the primary to what is asked for. Returns the capabilities that were changed.
    fn set_up(
        &self,
        qmp: &mut Qmp,
        compression: PageCompression,
        has_uuid: bool,
    ) -> Result<Vec<String>, CommandError> {
        let wanted = Wanted {
            channels: self.primary.channels,
            xbzrle: self.xbzrle,
            uuid: has_uuid,
        };
        let changed = set_capabilities(qmp, wanted)?;
        // Those that COLO needs are no news.
        let news = changed.iter().filter(|change| change.ends_with(" off"));
        news.for_each(|change| tell(&format!("switched on the primary: {change}")));
        self.set_parameters(qmp, compression)
            .map_err(CommandError::failed)?;
        set_credentials(qmp, &self.primary.tls, &self.primary.to)?;
        Ok(changed)
    }

    /// What makes pages smaller must be there in the mode that is asked for.
    fn check_modes(&self) -> Result<PageCompression, CommandError> {
        let channels = self.primary.channels;
        let checked = match self.xbzrle && channels > 0 {
            true => Err(CompressionArgsError::XbzrleWithChannels(channels)),
            false => self.primary.compression.check(channels),
        };
        checked.map_err(|error| CommandError::Usage(error.to_string()))
    }

    /// What makes pages smaller, in words that follow others.
    fn modes(&self, compression: PageCompression) -> String {
        match (compression.is_some(), self.xbzrle) {
            (true, _) => format!(", pages compressed with {compression}"),
            (false, true) => ", with XBZRLE".to_owned(),
            (false, false) => String::new(),
        }
    }
}

/// Refuses a primary that cannot be protected, before anything is changed on it.
///
/// With XBZRLE the guest must stand until the switch-over. In the last pass of the first copy QEMU (7.2 to 11.1) sends deltas without
/// entering what it sends in its cache, and computes the next ones against that cache: a byte that has its older value again
/// is never sent. What a stopped guest has is all sent before that pass.
fn check_can_begin(qmp: &mut Qmp, xbzrle: bool) -> Result<(), CommandError> {
    let version = qmp.version();
    let mut ask = |command: &str| qmp.execute(command, &json!({})).map_err(CommandError::failed);
    let runs = ask("query-status")?;
    match runs["status"].as_str().unwrap_or("unknown") {
        "inmigrate" => return refuse("this QEMU waits for a guest itself (-incoming)"),
        "postmigrate" => {
            return refuse(
                "its guest was handed over by a completed migration; if that was a mistake, `cont` lets it go on here",
            );
        }
        "running" if xbzrle => {
            return refuse(
                "its guest runs, and with --xbzrle QEMU would lose bytes that change during the first copy: give it QMP \
                 `stop` before, after which it runs again once it is protected; or protect it without --xbzrle",
            );
        }
        _ => {}
    }
    let migration = ask("query-migrate")?;
    match status_of(&migration) {
        "none" | "completed" | "failed" | "cancelled" => {}
        "colo" => {
            return refuse(
                "it is under COLO already; if its receiver is lost, `colo-ring unprotect` ends that and the guest runs on",
            );
        }
        other => {
            return Err(CommandError::Failed(format!(
                "a migration is under way already, in state {other}"
            )));
        }
    }
    check_blockers(&migration)?;
    let kvm = ask("query-kvm")?;
    if stops_under_tcg(version) && kvm["enabled"] == Value::Bool(false) {
        return Err(CommandError::Failed(format!(
            "QEMU {version} without KVM (TCG) hangs after its first checkpoint, with every secondary: use KVM \
             or QEMU 11"
        )));
    }
    Ok(())
}

/// What QEMU itself says cannot be migrated.
fn check_blockers(migration: &Value) -> Result<(), CommandError> {
    let reasons = migration["blocked-reasons"].as_array();
    let reasons: Vec<_> = reasons.into_iter().flatten().filter_map(Value::as_str).collect();
    if reasons.is_empty() {
        return Ok(());
    }
    Err(CommandError::Failed(format!(
        "this guest cannot be migrated, so it cannot be protected: {}; remove what is named and try again",
        reasons.join("; ")
    )))
}

fn not_started(qmp: &mut Qmp, error: &QmpError) -> CommandError {
    let hint = match error.refusal() {
        Some(said) if said.contains("non-migratable") || said.contains("does not support live migration") => {
            "; remove what is named and try again"
        }
        _ => "",
    };
    CommandError::Failed(format!("{error}{hint}; {}", give_up(qmp)))
}

impl Beginning<'_> {
    fn set_parameters(&self, qmp: &mut Qmp, compression: PageCompression) -> Result<(), QmpError> {
        let args = self.primary;
        let mut parameters = json!({
            "x-checkpoint-delay": self.interval_ms,
            "max-bandwidth": args.bandwidth.0,
        });
        if args.channels > 0 {
            parameters["multifd-channels"] = args.channels.into();
            // Whatever was set before.
            let method = compression.method.name();
            parameters["multifd-compression"] = method.into();
            if let Some(level) = compression.level {
                parameters[format!("multifd-{method}-level")] = level.into();
            }
        }
        qmp.execute("migrate-set-parameters", &parameters).map(drop)
    }

    /// Watches the migration until the guest is protected. Returns QEMU's last word on it.
    fn watch(
        &self,
        qmp: &mut Qmp,
        mirrors: &Mirrors,
        wished: &mpsc::Receiver<()>,
    ) -> Result<Value, CommandError> {
        let began = Instant::now();
        let limit = self.wait;
        let mut line = ProgressLine::new(self.shows);
        let (mut state, mut answered) = (json!({}), began);
        // In the last pass QEMU may answer nothing, and for ever if its receiver is lost: what is wished must end that.
        // It is asked one question at a time: what it has not answered would keep it from reading that its connections are to be cut.
        let mut unanswered: Option<Asked> = None;
        loop {
            let mut question = match unanswered.take() {
                Some(question) => question,
                None => qmp
                    .ask("query-migrate", &json!({}))
                    .map_err(CommandError::failed)?,
            };
            match question.wait(ANSWER_LIMIT).map_err(CommandError::failed)? {
                Some(now) => {
                    (state, answered) = (now, Instant::now());
                    if self.is_done(qmp, mirrors, &state)? {
                        return Ok(state);
                    }
                    line.show(&progress(&state));
                }
                None if answered.elapsed() < SILENCE_LIMIT => unanswered = Some(question),
                None => {
                    return Err(CommandError::Failed(format!(
                        "QEMU has answered nothing for {SILENCE_LIMIT:?}"
                    )));
                }
            }
            let stopped = match wished.recv_timeout(POLL) {
                Ok(()) => "interrupted",
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)
                    if limit.is_some_and(|limit| began.elapsed() > limit) =>
                {
                    "not protected within --wait"
                }
                Err(_) => continue,
            };
            line.clear();
            return Err(CommandError::Failed(format!(
                "{stopped}: the migration goes on, in state {}; the guest {}. QMP `query-migrate` shows how far it is, \
             `migrate_cancel` ends it and lets the guest run on",
                progress(&state),
                guest_state(&mut qmp.within(ANSWER_LIMIT))
            )));
        }
    }

    /// Whether the guest is protected, or that is not waited for.
    ///
    /// # Errors
    /// If it has failed.
    fn is_done(&self, qmp: &mut Qmp, mirrors: &Mirrors, state: &Value) -> Result<bool, CommandError> {
        let to = &self.primary.to;
        if let Some(exit) = qmp.events().iter().find(|event| event.name == "COLO_EXIT") {
            let reason = exit.data["reason"].as_str().unwrap_or("unknown").to_owned();
            return Err(left(qmp, &format!("it left COLO again ({reason})"), to));
        }
        check_mirrors(qmp, mirrors, status_of(state))?;
        match status_of(state) {
            "colo" => match runs(&mut qmp.within(ANSWER_LIMIT)) {
                Ok(true) => return Ok(true),
                // In a checkpoint: it is looked at again.
                Ok(false) | Err(QmpError::Timeout { .. }) => {}
                Err(error) => return Err(CommandError::failed(error)),
            },
            "failed" | "cancelled" | "completed" => {
                let reason = state["error-desc"].as_str().unwrap_or("QEMU does not say why");
                let what = format!("the migration {}: {reason}", status_of(state));
                return Err(left(qmp, &what, to));
            }
            _ => {}
        }
        Ok(self.wait == Some(Duration::ZERO))
    }
}

/// Memory without its disks is no protection: if a mirror has ended, so does the migration.
fn check_mirrors(qmp: &mut Qmp, mirrors: &Mirrors, status: &str) -> Result<(), CommandError> {
    let mut quick = qmp.within(ANSWER_LIMIT);
    let looked = (!mirrors.is_empty()).then(|| mirrors.state(&mut quick));
    let lost = match looked.transpose() {
        Ok(_) | Err(MirrorError::Qmp(QmpError::Timeout { .. })) => return Ok(()),
        Err(lost) => lost,
    };
    let end = match status {
        "colo" => "x-colo-lost-heartbeat",
        _ => "migrate_cancel",
    };
    let ended = match qmp.execute(end, &json!({})) {
        Ok(_) => String::new(),
        Err(error) => format!("; the migration goes on: {error}"),
    };
    Err(CommandError::Failed(format!("{lost}{ended}; {}", give_up(qmp))))
}

fn runs(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let status = qmp.execute("query-status", &json!({}))?;
    Ok(status["status"] == "running")
}

/// What the guest does, in words that follow "the guest".
fn guest_state(qmp: &mut Qmp) -> String {
    match qmp.execute("query-status", &json!({})) {
        Ok(status) if status["status"] == "running" => "runs".to_owned(),
        Ok(status) => format!("stopped ({})", status["status"].as_str().unwrap_or("unknown")),
        Err(error) => format!("is in an unknown state ({error})"),
    }
}

/// The migration is over without protection: why, and how the primary is left.
fn left(qmp: &mut Qmp, what: &str, to: &Address) -> CommandError {
    let hint = reach_hint(what, to);
    let then = match guest_state(qmp).as_str() {
        "runs" => "the guest runs on, unprotected".to_owned(),
        "stopped (colo)" => "the guest is stopped: `x-colo-lost-heartbeat` lets it continue".to_owned(),
        "stopped (postmigrate)" => {
            "the guest is stopped, handed over: `cont` lets it continue here".to_owned()
        }
        other => format!("the guest {other}"),
    };
    let mirrors = match guest_disks::remove_all(qmp) {
        Ok(0) => String::new(),
        Ok(_) => "; its disks are no longer mirrored".to_owned(),
        Err(error) => format!("; the mirrors of its disks cannot be removed: {error}"),
    };
    CommandError::Failed(format!("{what}; {hint} On the primary {then}{mirrors}"))
}

/// What to look at where the primary did not reach the receiver, or was closed by it. Only that one has a log with the reason.
fn reach_hint(what: &str, to: &Address) -> String {
    let says = |parts: &[&str]| parts.iter().any(|part| what.contains(part));
    if says(&[
        "not known",
        "name resolution",
        "No address associated",
        "address resolution",
    ]) {
        return format!("the name in {to} is not known on the primary's host.");
    }
    if says(&["Connection refused", "No such file"]) {
        return format!("is a receiver listening on {to}?");
    }
    if says(&["timed out", "No route", "unreachable", "Permission denied"]) {
        return format!("the primary does not reach {to}.");
    }
    format!("the receiver at {to} has printed the reason where it runs.")
}

fn progress(state: &Value) -> String {
    let mebibytes = |key: &str| state["ram"][key].as_u64().map_or(0, |bytes| bytes >> 20);
    format!(
        "{}: {} MiB sent, {} of {} MiB left",
        status_of(state),
        mebibytes("transferred"),
        mebibytes("remaining"),
        mebibytes("total")
    )
}

fn refuse(why: &str) -> Result<(), CommandError> {
    Err(CommandError::Failed(why.to_owned()))
}

#[cfg(test)]
mod tests;
