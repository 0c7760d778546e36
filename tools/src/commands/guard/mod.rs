//! `colo-ring guard`: stays beside a primary, holds its output until it is committed, and protects it again when a receiver was lost.

mod dry_run;
pub(super) mod filter;
mod gate;
mod gate_in_use;
mod gates;
mod link;
mod link_watch;
mod logs;
mod measurements;
mod metrics;
mod nics;
mod on_loss;
mod pace;
mod path;
pub(super) mod plug;
mod relay;
mod report;
mod resident;
pub(super) mod stop_mark;
mod supervisor;
mod tap;

use crate::commands::protect::PrimaryArgs;
use crate::log::{self, LogArgs};
use crate::options::{ControlAddress, Switch};
use crate::output::CommandError;
use crate::stderr;
use clap::{Args, ValueEnum};
use colo_ring::net::ListenAddress;
use colo_ring::receiver::GuestName;
pub(crate) use dry_run::Plan;
use gates::{PlugPlan, RelayPlan};
pub(crate) use link::Link;
use path::PathEvent;
pub(crate) use report::GuardReport;
use resident::Guard;
use schemars::JsonSchema;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use supervisor::Heartbeat;

/// Bytes of a MiB.
const MIB: u32 = 1 << 20;

/// Options of `colo-ring guard`.
#[derive(Debug, Args)]
pub struct GuardArgs {
    #[command(flatten)]
    primary: PrimaryArgs,

    /// The guest's name, for the receiver and for messages
    #[arg(long, value_name = "NAME", value_parser = guest_name)]
    name: String,

    /// How the guest's output is held until it is committed
    #[arg(long, value_enum, default_value_t = NetMode::Auto)]
    net: NetMode,

    /// A network card whose QEMU has -netdev stream,id=NETDEV,addr.type=unix,addr.path=PATH,reconnect-ms=1000: this process listens
    /// at PATH and passes its frames to the tap device IFNAME. The card has no connection while no such guard runs, however it has ended.
    /// Repeatable
    #[arg(long, value_name = "NETDEV=PATH,IFNAME", conflicts_with = "net")]
    relay: Vec<RelayPlan>,

    /// A network card whose output is held in the kernel, by a plug before its tap device IFNAME: for a -netdev tap that QEMU was given as
    /// a descriptor, or where it is preferred to a filter. Repeatable
    #[arg(long, value_name = "NETDEV=IFNAME", conflicts_with = "net")]
    plug: Vec<PlugPlan>,

    /// Most MiB of output that a relay or a plug holds of a network card between two checkpoints. What does not fit is dropped
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..4096))]
    held_max: u32,

    /// Most milliseconds between checkpoints: how much work is at risk
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    interval_max: u32,

    /// Whether a packet that waits asks for a checkpoint at once; off, it waits for the next of --interval-max
    #[arg(long, value_enum, default_value_t = Switch::On)]
    output_checkpoints: Switch,

    /// Most of its time that the guest may be stopped for checkpoints, 0.01 to 0.99: with 0.4 it runs
    /// for more than half of the time at worst
    #[arg(long, value_name = "SHARE", default_value_t = 0.4, value_parser = share)]
    pause_share: f64,

    /// What becomes of the guest when its receiver is lost
    #[arg(long, value_enum, default_value_t = OnReceiverLost::Run)]
    on_receiver_lost: OnReceiverLost,

    /// Run by sh when the protection is lost, with COLO_RING_NAME, COLO_RING_REASON, COLO_RING_QMP and COLO_RING_TO in its environment
    #[arg(long, value_name = "CMD")]
    on_loss: Option<String>,

    /// Milliseconds that the receiver waits for this guard at a checkpoint, before it lets the guest run without it
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    guard_timeout: u32,

    /// Milliseconds after which a receiver that does not answer on the link is lost
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    receiver_timeout: u32,

    /// Write the latencies of `stopped` and `held` as PREFIX.stopped.hlog and PREFIX.held.hlog
    #[arg(long, value_name = "PREFIX")]
    hist: Option<PathBuf>,

    /// Answer with the guard's state at this UNIX socket, a line of JSON (schema colo-ring.guard, version 1) for each connection
    #[arg(long, value_name = "unix:PATH")]
    control: Option<ControlAddress>,

    /// Serve measurements to Prometheus at http://ADDRESS:PORT/metrics: tcp:ADDRESS:PORT or unix:PATH. Anyone who can connect reads
    /// them
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<ListenAddress>,

    #[command(flatten)]
    log: LogArgs,

    /// This is the worker of a supervisor, which its standard input leads to
    #[arg(long, hide = true)]
    supervised: bool,

    /// Look at the guest and say how it would be protected; change nothing
    #[arg(long)]
    dry_run: bool,

    /// Print the guard's state as a line of JSON whenever it changes (schema colo-ring.guard, version 1); with --dry-run, the plan (schema
    /// colo-ring.guard-plan, version 1)
    #[arg(long)]
    json: bool,
}

/// How output is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum NetMode {
    /// The first way that fits each network card
    Auto,
    /// Not at all: connections of the guest may not survive a failover
    None,
}

/// What becomes of a guest without a receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum OnReceiverLost {
    /// It runs on, unprotected, and its output is let go
    Run,
    /// It is stopped, until it is protected again
    Stop,
}

/// What the guard waits for.
#[derive(Debug)]
enum GuardEvent {
    Path(PathEvent),
    /// The guest was stopped, at that time of QEMU's clock in microseconds.
    Stopped(u64),
    /// It runs again.
    Resumed(u64),
    /// QEMU has left COLO, for this reason.
    LeftColo(String),
    /// QEMU has closed its monitor.
    QemuEnded,
    /// The guard is to end.
    End,
}

/// Whether a guard is to end, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    GoOn,
    /// The operator ends it.
    End,
    /// Its supervisor is gone, which the operator has not asked for.
    Abandoned,
}

/// A [`Wish`] that threads share.
#[derive(Debug)]
struct SharedWish(AtomicU8);

impl SharedWish {
    fn set(&self, wish: Wish) {
        self.0.store(wish as u8, Ordering::Relaxed);
    }

    fn get(&self) -> Wish {
        [Wish::GoOn, Wish::End, Wish::Abandoned][usize::from(self.0.load(Ordering::Relaxed))]
    }
}

/// Sends events to the guard.
#[derive(Clone)]
struct EventSender {
    events: mpsc::Sender<GuardEvent>,
    /// Interrupts a first copy.
    interrupt: mpsc::Sender<()>,
}

impl GuardArgs {
    fn receiver_timeout(&self) -> Duration {
        Duration::from_millis(self.receiver_timeout.into())
    }
}

impl EventSender {
    fn send(&self, event: GuardEvent) {
        use GuardEvent::{Path, Resumed, Stopped};
        use PathEvent::{Bound, HandedOver, HandoverAsked, OutputBegins};
        let is_usual = matches!(
            event,
            Path(Bound { .. } | OutputBegins | HandoverAsked | HandedOver) | Stopped(_) | Resumed(_)
        );
        // A guard that has ended needs neither.
        let _ = self.events.send(event);
        if !is_usual {
            let _ = self.interrupt.send(());
        }
    }
}

/// What reaches the guard.
struct Channels {
    sender: EventSender,
    events: mpsc::Receiver<GuardEvent>,
    interrupted: mpsc::Receiver<()>,
    wish: Arc<SharedWish>,
    heartbeat: Heartbeat,
}

/// Guards the guest until the operator ends the guard, or its QEMU ends.
///
/// # Errors
/// If QEMU cannot be reached or what is asked for cannot be done with it. A receiver that is not there is waited for.
pub fn run(args: &GuardArgs) -> Result<ExitCode, CommandError> {
    if args.dry_run {
        return dry_run::run(args);
    }
    log::begin(args.log);
    stderr::never_wait(|| ()).map_err(CommandError::failed)?;
    match args.supervised {
        true => guard(args),
        false => supervisor::run(args),
    }
}

/// The guard itself.
fn guard(args: &GuardArgs) -> Result<ExitCode, CommandError> {
    let (events, received) = mpsc::channel();
    let (interrupt, interrupted) = mpsc::channel();
    let sender = EventSender { events, interrupt };
    let wish = Arc::new(SharedWish(AtomicU8::new(Wish::GoOn as u8)));
    let (of_supervisor, wished) = (sender.clone(), wish.clone());
    let heartbeat = Heartbeat::of_worker(move |wish| {
        wished.set(wish);
        of_supervisor.send(GuardEvent::End);
    })?;
    let channels = Channels {
        sender,
        events: received,
        interrupted,
        wish,
        heartbeat,
    };
    Guard::start(args, channels)?.run()
}

/// A guard's options alone.
#[cfg(test)]
#[derive(clap::Parser)]
struct OnlyGuard {
    #[command(flatten)]
    args: GuardArgs,
}

/// A name that the receiver takes.
pub(crate) fn guest_name(text: &str) -> Result<String, String> {
    let name: Result<GuestName, _> = text.parse();
    name.map(String::from).map_err(|error| error.to_string())
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.01..=0.99).contains(&share) => Ok(share),
        _ => Err("write a number from 0.01 to 0.99, like 0.2".to_owned()),
    }
}
