//! Giving a session's last committed checkpoint to a fresh QEMU, or to a file: the receiver writes it, because the
//! memory is its own.
#![forbid(unsafe_code)]

use super::end::SessionEnd;
use super::guest::Guest;
use super::promotion::ClientId;
use crate::failover::{Form, StreamError, StreamReport, write_stream};
use crate::session::SessionRecord;
use crate::store::CheckpointView;
use crate::units::BlockId;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a QEMU may take nothing of the stream before it counts as hung.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// How long the session's connections may take to end.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// What is to be given, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The session's number.
    pub session: u32,
    /// Where it goes: `unix:PATH` or `tcp:HOST:PORT` of a QEMU that waits for a migration, or `file:PATH`, absolute.
    pub to: String,
    /// Name of the block whose file that QEMU has mapped; without one everything goes into the stream.
    pub shared: Option<String>,
    /// A file, absolute, that gets a complete stream first: what is given to a QEMU with its memory is consumed.
    pub keep: Option<PathBuf>,
}

/// What was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The session.
    #[serde(rename = "fed")]
    pub session: u32,
    /// The checkpoint's number; 0 is the state at the end of precopy.
    pub checkpoint: u64,
    /// The stream.
    pub stream: StreamReport,
    /// Nanoseconds for ending the session and holding the checkpoint.
    pub hold_ns: u64,
    /// Nanoseconds for the copy that was asked for.
    pub keep_ns: u64,
    /// Nanoseconds for writing the stream, which QEMU loads meanwhile.
    pub write_ns: u64,
}

/// Writes what `request` says, for the conversation that has claimed it. Ends the session if it is still running. Blocks.
///
/// # Errors
/// In words for an operator. The guest does not run from a stream that was not written whole.
pub(super) fn restore(
    guest: &Guest,
    by: ClientId,
    request: &RestoreRequest,
) -> Result<RestoreReport, String> {
    let began = Instant::now();
    end_session(guest)?;
    let lost = || format!("session {} has no committed checkpoint", guest.id);
    let committed = guest.committed().ok_or_else(lost)?;
    let record = guest.record.get().ok_or_else(lost)?;
    let form = match &request.shared {
        None => Form::Complete,
        Some(name) => Form::Shared(shared_block(guest, record, name)?),
    };
    let held = committed.checkpoint_view().ok_or_else(lost)?;
    let hold_ns = nanoseconds(began);
    let began = Instant::now();
    if let Some(path) = &request.keep {
        write_file(path, record, &held, Form::Complete)?;
    }
    let keep_ns = nanoseconds(began);
    let began = Instant::now();
    // Before a guest can run: also for a receiver that finds the checkpoint when this one is gone.
    committed.set_given(true);
    let written = write_to(&request.to, record, &held, form);
    let complete = written.as_ref().map_or_else(|failed| failed.complete, |_| true);
    if complete {
        guest.promotion().given(by, request.to.clone());
    } else {
        committed.set_given(false);
    }
    Ok(RestoreReport {
        session: guest.id,
        checkpoint: held.checkpoint().0,
        stream: written.map_err(|failed| failed.text)?,
        hold_ns,
        keep_ns,
        write_ns: nanoseconds(began),
    })
}

/// The primary is listened to no more.
fn end_session(guest: &Guest) -> Result<(), String> {
    guest.finish(SessionEnd::Promoted);
    let began = Instant::now();
    while !guest.is_over() {
        if began.elapsed() > END_PATIENCE {
            return Err(format!(
                "the connections of session {} did not end within {END_PATIENCE:?}",
                guest.id
            ));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn shared_block(guest: &Guest, record: &SessionRecord, name: &str) -> Result<BlockId, String> {
    let id = record.blocks.by_name(name.as_bytes());
    let id = id.ok_or_else(|| format!("session {} has no ram block {name}", guest.id))?;
    let file = guest.committed().and_then(|committed| committed.image_file(id));
    file.map(|_| id).ok_or_else(|| {
        format!(
            "ram block {name} of session {} is not in a file that has a name",
            guest.id
        )
    })
}

/// A stream that was not written, or not known to be.
struct Failed {
    text: String,
    complete: bool,
}

impl Failed {
    fn before(text: String) -> Self {
        Self {
            text,
            complete: false,
        }
    }
}

fn write_to(
    to: &str,
    record: &SessionRecord,
    held: &CheckpointView<'_>,
    form: Form,
) -> Result<StreamReport, Failed> {
    let connected = match to.split_once(':') {
        Some(("unix", path)) => connect_unix(Path::new(path)),
        Some(("tcp", address)) => connect_tcp(address),
        Some(("file", path)) => {
            return write_file(Path::new(path), record, held, form).map_err(Failed::before);
        }
        _ => {
            return Err(Failed::before(format!(
                "'{to}' is no place for a stream: unix:PATH, tcp:HOST:PORT or file:PATH"
            )));
        }
    };
    let socket = connected.map_err(|error| Failed::before(format!("cannot connect to {to}: {error}")))?;
    write(record, held, form, socket).map_err(|StreamError { source, complete }| {
        let hint = match source.kind() {
            io::ErrorKind::WouldBlock => format!("it took nothing for {WRITE_PATIENCE:?}"),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                format!("{source}: it closed the connection, its own words say why")
            }
            _ => source.to_string(),
        };
        let text = format!("{to} did not take the checkpoint: {hint}");
        Failed { text, complete }
    })
}

fn connect_unix(path: &Path) -> io::Result<Box<dyn Write>> {
    let stream = UnixStream::connect(path)?;
    stream.set_write_timeout(Some(WRITE_PATIENCE))?;
    Ok(Box::new(stream))
}

fn connect_tcp(address: &str) -> io::Result<Box<dyn Write>> {
    let stream = TcpStream::connect(address)?;
    stream.set_write_timeout(Some(WRITE_PATIENCE))?;
    Ok(Box::new(stream))
}

fn write(
    record: &SessionRecord,
    held: &CheckpointView<'_>,
    form: Form,
    out: impl Write,
) -> Result<StreamReport, StreamError> {
    write_stream(
        record,
        held.device_state(),
        |page, out| held.read(page, out),
        form,
        out,
    )
}

/// Writes a stream to a file, which has its name only when it is complete and on the disk.
fn write_file(
    path: &Path,
    record: &SessionRecord,
    held: &CheckpointView<'_>,
    form: Form,
) -> Result<StreamReport, String> {
    if !path.is_absolute() {
        return Err(format!("{} is not an absolute path", path.display()));
    }
    let mut part = path.as_os_str().to_owned();
    part.push("~part");
    let part = PathBuf::from(part);
    let failed = |error: io::Error| format!("writing {}: {error}", part.display());
    // Of an attempt that was killed. Never written through: it might be a link.
    match std::fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut options = File::options();
    // The owner's alone: it holds a guest's secrets.
    let file = options.write(true).create_new(true).mode(0o600).open(&part);
    let file = file.map_err(failed)?;
    let written = write(record, held, form, &file)
        .map_err(|error| error.source)
        .and_then(|report| file.sync_all().map(|()| report))
        .and_then(|report| std::fs::rename(&part, path).map(|()| report));
    written.map_err(|error| {
        // Half a file, of which the error tells.
        drop(std::fs::remove_file(&part));
        failed(error)
    })
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
