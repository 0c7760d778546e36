//! `colo-ring receive`: the secondary.

mod args;
mod event_log;
mod hook_output;
mod hook_queue;
mod hook_runner;
mod metrics;
mod on_loss;
mod reload;
mod service;
#[cfg(test)]
mod tests;
mod tls;

use crate::log;
use crate::metrics_server::{MetricsListener, MetricsServer};
use crate::options::{Size, Switch};
use crate::output::{CommandError, ProgressLine, print, print_json, tell};
use crate::{session_text, signals, stderr};
use args::Described;
pub use args::ReceiveArgs;
pub(crate) use args::command;
use colo_ring::metrics::{Report, SampleQueue};
use colo_ring::receiver::{
    Event, Outcome, RamLimit, Receiver, Request, Response, SessionStatus, StatusReport,
};
use colo_ring::sandbox::{Sandbox, ThreadKind, spare_capabilities};
use colo_ring::text::mebibytes;
use colo_ring::tls::ServerCredentials;
use event_log::EventLog;
use hook_runner::HookRunner;
pub(crate) use hook_runner::serve as run_hooks;
use metrics::ReceiverSource;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use on_loss::{Hook, OnLoss};
use reload::InForce;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use service::Service;
use std::borrow::Cow;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// The report of a receiver, whose options are known.
pub(crate) struct DescribedReport;

impl JsonSchema for DescribedReport {
    fn schema_name() -> Cow<'static, str> {
        "Report".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Report::json_schema(generator);
        let mut options = generator.subschema_for::<Described>();
        options.insert("description".to_owned(), "The options in force.".into());
        if let Some(fields) = schema.get_mut("properties") {
            fields["options"] = options.to_value();
        }
        schema
    }
}

/// What a receiver leaves at its end.
#[derive(Serialize, JsonSchema)]
pub(crate) struct ReceiveReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The sessions as they were at the end.
    sessions: &'a [SessionStatus],
    /// Numbers of the sessions whose last checkpoint is in `--ram-dir`, for the next receiver; those of others ended with this one.
    kept: &'a [u32],
    /// Figures of all checkpoints, as in the file `PREFIX.json` of `--hist`.
    #[schemars(with = "DescribedReport")]
    report: &'a Report,
}

/// A guest takes a descriptor for each of its channels and RAM blocks: what the hard limit allows is used. Where even
/// that is refused, the limit is as it was, and connections over it are refused with a message.
fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What the operator wants of a running receiver, by a signal.
enum Wish {
    End,
    Reload,
}

/// Receives until a signal ends it, or --once does.
///
/// # Errors
/// If it cannot start or go on.
pub fn run(mut args: ReceiveArgs, given: Vec<OsString>) -> Result<ExitCode, CommandError> {
    log::begin(args.log);
    // While the process may still open and connect.
    let mut service = Service::begin();
    let in_force = InForce::read(given)?;
    in_force.tell_files();
    args.guest_files = in_force.guest_files().to_vec();
    let (once, json, hist) = (args.once, args.json, args.hist.clone());
    let ram_limit_asked = args.ram_limit;
    let (switch, hooks) = (args.sandbox, [Hook::on_loss(&args), Hook::on_stall(&args)]);
    let keeps_checkpoints = args.ram_dir.is_some();
    let created = args.create_ram_dir.then(|| args.ram_dir.clone()).flatten();
    let metrics = args.metrics.clone();
    let mut options = args.into_options().map_err(|error| in_force.located(error))?;
    if let Some(directory) = created {
        create_ram_dir(&directory)?;
    }
    let split_off = |hook: Option<Hook>| {
        let runner = hook.as_ref().map(Hook::split_off).transpose();
        runner.map(|runner| hook.zip(runner))
    };
    let [on_loss, on_stall] = hooks.map(split_off);
    let hooks = [
        on_loss.map_err(CommandError::failed)?,
        on_stall.map_err(CommandError::failed)?,
    ];
    raise_open_files();
    signals::survive_file_limit()?;
    // Before there is another thread. From here on no program can be started.
    let (sandbox, lacks) = begin_sandbox(switch)?;
    options.sandbox = sandbox.clone();
    let (wish, wished) = mpsc::channel();
    let hang_up = wish.clone();
    signals::on_end_alone(enter(&sandbox, ThreadKind::Signals), move || {
        // Without a receiver it is ending already.
        let _ = wish.send(Wish::End);
    })?;
    signals::on_hangup_alone(enter(&sandbox, ThreadKind::Signals), move || {
        let _ = hang_up.send(Wish::Reload);
    })?;
    stderr::never_wait(enter(&sandbox, ThreadKind::Log)).map_err(CommandError::failed)?;
    tell_limit(ram_limit_asked, &options.ram_limit);
    lacks.iter().for_each(|lack| tell(&format!("warning: {lack}")));
    let start = |hook: Option<(Hook, HookRunner)>| {
        let started = hook.map(|(hook, runner)| {
            let enter = enter(&sandbox, ThreadKind::Hooks);
            OnLoss::start(hook, runner, enter)
        });
        started.transpose().map_err(CommandError::failed)
    };
    let [on_loss, on_stall] = hooks.map(start);
    let (on_loss, on_stall) = (on_loss?, on_stall?);
    let log = Arc::new(EventLog::new(keeps_checkpoints));
    let event_log = log.clone();
    let [losses, stalls] = [&on_loss, &on_stall].map(|hook| hook.as_ref().map(OnLoss::sender));
    let on_event = move |event: Event| {
        event_log.tell(&event);
        match (&event, &losses, &stalls) {
            (Event::Ended(status), Some(losses), _) => losses.session_ended(status),
            (Event::Stall(stall), _, Some(stalls)) => stalls.stalled(stall),
            _ => {}
        }
    };
    let wanted: Vec<_> = options.addresses().chain(metrics.clone()).collect();
    service.close_others(&wanted);
    // Before the process may bind no more.
    let listen = |address| MetricsListener::obtain(address, &service.passed);
    let metrics = metrics.as_ref().map(listen).transpose();
    let metrics = metrics.map_err(CommandError::failed)?;
    options.samples = metrics.as_ref().map(|_| Arc::default());
    let samples = options.samples.clone();
    options.passed = service.passed.clone();
    let (credentials, serves_disks) = (options.tls.clone(), options.disks.is_some());
    let receiver = Receiver::start(options, on_event).map_err(CommandError::failed)?;
    let metrics = metrics.zip(samples);
    let metrics = metrics.map(|(listener, samples)| serve_metrics(listener, &receiver, samples, &sandbox));
    let metrics = metrics.transpose()?;
    for address in receiver.addresses() {
        tell(&format!("listening on {address}"));
    }
    for address in receiver.disk_addresses() {
        tell(&format!("serving disks on {address}"));
    }
    tell(&format!("receiving on {}", receiver.placement()));
    if let Some(credentials) = &credentials {
        tls::tell_of(credentials, serves_disks);
    }
    service.ready();
    enter(&sandbox, ThreadKind::Main)();
    let in_force = (in_force, credentials);
    watch(&receiver, &wished, &log, in_force, &mut service);
    service.stopping();
    let outcome = receiver.wait();
    drop(metrics);
    [on_loss, on_stall].into_iter().flatten().for_each(OnLoss::finish);
    let outcome = outcome.map_err(CommandError::failed)?;
    if json {
        print_json(&ReceiveReport {
            schema: "colo-ring.receive",
            schema_version: 1,
            sessions: &outcome.sessions,
            kept: &outcome.kept,
            report: &outcome.report,
        })?;
    } else {
        print(&render(&outcome, hist.as_ref()))?;
    }
    // Only now: what could not be written is on standard output.
    outcome.written.map_err(CommandError::failed)?;
    let failed = once && !outcome.sessions.iter().any(was_protected);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Makes the directory for guests' memory. Nobody else may read what will be in it.
fn create_ram_dir(directory: &Path) -> Result<(), CommandError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|error| {
        CommandError::Failed(format!(
            "{}, the --ram-dir, cannot be made: {error}",
            directory.display()
        ))
    })
}

/// Begins to confine this process, if that is wanted. Returns what is not as it should be, too.
fn begin_sandbox(switch: Switch) -> Result<(Sandbox, Vec<String>), CommandError> {
    let mut lacks = Vec::new();
    let spare = spare_capabilities();
    if !spare.is_empty() {
        let shown = if spare.len() > SPARE_SHOWN {
            format!(
                "{} and {} more",
                spare[..SPARE_SHOWN].join(", "),
                spare.len() - SPARE_SHOWN
            )
        } else {
            spare.join(", ")
        };
        lacks.push(format!(
            "this process has capabilities that a receiver does not need ({shown}): run it as a user of its own (docs/threat-model.md)"
        ));
    }
    let sandbox = match switch {
        Switch::On => {
            let (sandbox, missing) = Sandbox::begin().map_err(CommandError::failed)?;
            lacks.extend(missing);
            sandbox
        }
        Switch::Off => {
            lacks.push("--sandbox off: an intruder in this process can do what its user can".to_owned());
            Sandbox::off()
        }
    };
    Ok((sandbox, lacks))
}

/// Serves measurements until what is returned is dropped.
fn serve_metrics(
    listener: MetricsListener,
    receiver: &Receiver,
    samples: Arc<SampleQueue>,
    sandbox: &Sandbox,
) -> Result<MetricsServer, CommandError> {
    tell(&format!("serving metrics on {}", listener.address()));
    let source = ReceiverSource::new(receiver.status_handle(), samples);
    let server = listener.serve(source, enter(sandbox, ThreadKind::Metrics));
    server.map_err(CommandError::failed)
}

/// What confines a thread of this kind, to be called by it.
fn enter(sandbox: &Sandbox, kind: ThreadKind) -> impl FnOnce() + Send + 'static {
    let sandbox = sandbox.clone();
    move || {
        if let Err(error) = sandbox.enter(kind) {
            tell(&format!(
                "warning: a thread is confined less than it should be: {error}"
            ));
        }
    }
}

/// Warns where guests may take less than what the operator has asked for.
fn tell_limit(asked: Option<Size>, limit: &RamLimit) {
    if let Some(asked) = asked.filter(|_| limit.is_cut()) {
        tell(&format!(
            "warning: --ram-limit is {asked}, and guests may take {} together: that is {}",
            mebibytes(limit.bytes()),
            limit.name()
        ));
    }
}

/// Names of capabilities in a line of the log.
const SPARE_SHOWN: usize = 3;

/// Shows progress until the receiver has ended, and does what signals ask for.
fn watch(
    receiver: &Receiver,
    wished: &mpsc::Receiver<Wish>,
    log: &EventLog,
    (mut in_force, credentials): (InForce, Option<Arc<ServerCredentials>>),
    service: &mut Service,
) {
    const REFRESH: Duration = Duration::from_millis(250);
    let mut line = ProgressLine::new(true);
    while !receiver.is_finished() {
        match wished.recv_timeout(REFRESH) {
            Ok(Wish::Reload) => {
                line.clear();
                in_force.reload(receiver);
                credentials
                    .as_deref()
                    .inspect(|credentials| tls::reload(credentials));
            }
            Ok(Wish::End) => {
                line.clear();
                service.stopping();
                log.ending();
                tell("ending: sockets are closed, histograms written");
                receiver.stop_handle().stop();
            }
            // The signals' thread never ends, so the other end is always there.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        log.count_up();
        service.look(receiver);
        // Without an answer it is about to end.
        if let (true, Ok(Response::Status(status))) = (line.is_shown(), receiver.ask(Request::Status)) {
            line.show(&progress(&status));
        }
    }
}

fn progress(status: &StatusReport) -> String {
    let sessions = status.sessions.iter().filter(|session| session.end.is_none());
    let sessions: Vec<_> = sessions.map(session_text::brief).collect();
    match sessions.len() {
        0 => "waiting for a primary".to_owned(),
        1..=3 => sessions.join(" | "),
        many => format!("{many} sessions; colo-ring status lists them"),
    }
}

fn render(outcome: &Outcome, hist: Option<&PathBuf>) -> String {
    let mut text: String = outcome
        .sessions
        .iter()
        .map(|session| {
            format!(
                "session {} of {}: {}\n",
                session.title(),
                session.peer,
                session_text::at_the_end(session, outcome.kept.contains(&session.session))
            )
        })
        .collect();
    if outcome.report.total.checkpoints > 0 {
        text.push_str(&format!("\n{}", outcome.report.total));
    }
    if outcome.report.samples_dropped > 0 {
        text.push_str(&format!(
            "{} checkpoints are missing above: the queue of samples was full\n",
            outcome.report.samples_dropped
        ));
    }
    if outcome.report.intervals_lost > 0 {
        text.push_str(&format!(
            "{} intervals of a second are missing in the logs: they could not be written\n",
            outcome.report.intervals_lost
        ));
    }
    if let Some(prefix) = hist {
        text.push_str(&format!(
            "histograms: {0}.<phase>.hlog and {0}.json\n",
            prefix.display()
        ));
    }
    text
}

fn was_protected(session: &SessionStatus) -> bool {
    session.checkpoint.is_some() && session.orderly == Some(true)
}
