//! `colo-ring discard`: giving up what an ended session left.

use crate::control::{Conversation, WhichSession};
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json};
use clap::Args;
use colo_ring::receiver::Request;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::process::ExitCode;

/// Options of `colo-ring discard`.
#[derive(Debug, Args)]
pub struct DiscardArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    #[command(flatten)]
    which: WhichSession,

    /// Print the number as JSON (schema colo-ring.discard, version 1)
    #[arg(long)]
    json: bool,
}

/// A session whose checkpoint was given up.
#[derive(Serialize, JsonSchema)]
pub(crate) struct DiscardReport {
    schema: &'static str,
    schema_version: u32,
    /// The session's number.
    discarded: u32,
}

/// Makes the receiver release the checkpoint and the memory of an ended session.
///
/// # Errors
/// If the receiver does not answer or refuses.
pub fn run(args: &DiscardArgs) -> Result<ExitCode, CommandError> {
    #[derive(Deserialize)]
    struct Discarded {
        discarded: u32,
    }
    let mut conversation = Conversation::open(&args.control)?;
    let title = args.which.find(&mut conversation)?;
    let session = title.session;
    let done: Discarded = conversation.ask(&Request::Discard { session })?;
    if args.json {
        print_json(&DiscardReport {
            schema: "colo-ring.discard",
            schema_version: 1,
            discarded: done.discarded,
        })?;
    } else {
        print(&format!(
            "session {title}: its checkpoint and memory are given up\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
