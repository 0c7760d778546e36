//! `colo-ring end`: ending a session whose primary is connected.

use crate::control::{Conversation, WhichSession};
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json};
use clap::Args;
use colo_ring::receiver::Request;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::process::ExitCode;

/// Options of `colo-ring end`.
#[derive(Debug, Args)]
pub struct EndArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    #[command(flatten)]
    which: WhichSession,

    /// Print the number and the checkpoint that is kept as JSON (schema colo-ring.end, version 1)
    #[arg(long)]
    json: bool,
}

/// A session that was ended.
#[derive(Serialize, JsonSchema)]
pub(crate) struct EndReport {
    schema: &'static str,
    schema_version: u32,
    /// The session's number.
    ended: u32,
    /// Its last committed checkpoint, which is kept; null if nothing was committed.
    checkpoint: Option<u64>,
}

/// Makes the receiver end a session, and waits until it is over.
///
/// # Errors
/// If the receiver does not answer or refuses.
pub fn run(args: &EndArgs) -> Result<ExitCode, CommandError> {
    #[derive(Deserialize)]
    struct Ended {
        ended: u32,
        checkpoint: Option<u64>,
    }
    let mut conversation = Conversation::open(&args.control)?;
    let title = args.which.find_running(&mut conversation)?;
    let session = title.session;
    let done: Ended = conversation.ask(&Request::End { session })?;
    if args.json {
        print_json(&EndReport {
            schema: "colo-ring.end",
            schema_version: 1,
            ended: done.ended,
            checkpoint: done.checkpoint,
        })?;
    } else {
        let left = match done.checkpoint {
            Some(checkpoint) => format!("checkpoint {checkpoint} is kept"),
            None => "nothing was committed".to_owned(),
        };
        print(&format!("session {title} has ended; {left}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
