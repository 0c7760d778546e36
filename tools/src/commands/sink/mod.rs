//! `colo-ring sink`: a secondary that discards all data. It reads every byte into one small buffer per connection and
//! answers as early as the protocol allows. The time of a checkpoint with it is the transport's lower bound for every
//! secondary.
//!
//! The engine's own session reads the main channel and decides when to answer. On the other channels packet headers are
//! read, payload is skipped, and SYNCs are counted. No channel waits at a SYNC: pages that are discarded have no order.

mod connections;
mod serve;

use crate::options::CoreList;
use crate::output::{CommandError, print_json, tell};
use clap::Args;
use colo_ring::host::Machine;
use colo_ring::receiver::ListenAddress;
use connections::Listener;
use schemars::JsonSchema;
use serde::Serialize;
use std::process::ExitCode;

/// Options of `colo-ring sink`.
#[derive(Debug, Args, Serialize, JsonSchema)]
pub struct SinkArgs {
    /// Where primaries connect to: tcp:ADDRESS:PORT (port 0 takes a free one) or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    #[serde(serialize_with = "as_text")]
    #[schemars(with = "String")]
    listen: ListenAddress,

    /// The primaries' multifd-channels; 0 = plain mode
    #[arg(long, value_name = "N", default_value_t = 4)]
    channels: u8,

    /// Read with one thread on each of these cores, like 2-5,8 [default: one thread, anywhere]
    #[arg(long, value_name = "LIST", value_parser = CoreList::parse)]
    cores: Option<CoreList>,

    /// End after this many sessions [default: never]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    sessions: Option<u64>,

    /// Print a report at the end as JSON (schema colo-ring.sink, version 1)
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

fn as_text<S: serde::Serializer>(address: &ListenAddress, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(address)
}

/// What a sink has received.
#[derive(Serialize, JsonSchema)]
pub(crate) struct SinkReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: &'a SinkArgs,
    /// Where it ran.
    machine: Machine,
    /// Sessions that have ended.
    sessions: u64,
    /// Checkpoints of all sessions.
    checkpoints: u64,
    /// Bytes received.
    bytes: u64,
}

/// Serves sessions on a thread of this process until that ends, as without options, on a free port of this host.
///
/// # Errors
/// If it cannot listen.
pub(crate) fn serve_in_background(channels: u8) -> std::io::Result<ListenAddress> {
    let listener = Listener::bind(&ListenAddress::Tcp(([127, 0, 0, 1], 0).into()))?;
    let address = listener.address()?;
    let serve = move || {
        // A session that fails fails at its primary, too, which says so.
        while let Ok(connections) = listener.accept_session(channels) {
            let _ = serve::session(connections, &[]);
        }
    };
    std::thread::Builder::new()
        .name("colo-sink".into())
        .spawn(serve)?;
    Ok(address)
}

/// Serves one session after the other.
///
/// # Errors
/// If it cannot listen. A session that fails is reported, and the next one is served.
pub fn run(args: &SinkArgs) -> Result<ExitCode, CommandError> {
    let cannot =
        |error: std::io::Error| CommandError::Failed(format!("cannot listen on {}: {error}", args.listen));
    let listener = Listener::bind(&args.listen).map_err(cannot)?;
    tell(&format!("listening on {}", listener.address().map_err(cannot)?));
    let cores = args.cores.as_ref().map_or(&[][..], |list| &list.0[..]);
    let (mut sessions, mut checkpoints, mut bytes) = (0, 0, 0);
    while args.sessions.is_none_or(|wanted| sessions < wanted) {
        let served = listener
            .accept_session(args.channels)
            .and_then(|connections| serve::session(connections, cores));
        sessions += 1;
        match served {
            Ok(served) => {
                tell(&format!("session {sessions}: {} checkpoints", served.checkpoints));
                checkpoints += served.checkpoints;
                bytes += served.bytes;
            }
            Err(error) => tell(&format!("session {sessions} failed: {error}")),
        }
    }
    if args.json {
        print_json(&SinkReport {
            schema: "colo-ring.sink",
            schema_version: 1,
            options: args,
            machine: Machine::read(),
            sessions,
            checkpoints,
            bytes,
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
