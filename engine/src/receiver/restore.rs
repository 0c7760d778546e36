//! Restores a session's last committed checkpoint to a fresh QEMU, or to a file, as an incoming migration stream. The
//! receiver writes the stream, because the memory is its own. The client has opened where to: the receiver connects to nothing.

use super::disks::RestoredDisk;
use super::end::SessionEnd;
use super::kept_checkpoint::KeptCheckpoint;
use super::live_session::LiveSession;
use super::outlet::{Outlet, Stopping};
use super::promotion::{ClientId, Given};
use crate::disk::{DiskError, copy_base};
use crate::failover::{Form, StreamError, StreamReport, write_stream};
use crate::session::GuestDescription;
use crate::store::CheckpointView;
use crate::units::BlockId;
use crate::wire::run_state;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a QEMU may read nothing of the stream before it counts as hung.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the session's connections may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What to restore. The open destination comes with it: the connection to a QEMU that waits for a migration, or a file that is empty;
/// and then what [`KeepRequest`] says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The session's number.
    pub session: u32,
    /// What the destination is called, in messages and in the status.
    pub to: String,
    /// Name of the block whose file that QEMU has mapped; without one everything goes into the stream.
    pub shared: Option<String>,
    /// A copy is made first: a QEMU that maps the memory changes the checkpoint.
    pub keep: Option<KeepRequest>,
}

/// A copy of a checkpoint. An empty file for a complete stream comes with the request, and one for each of the disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepRequest {
    /// The guest's disks, by their names, in the order of their files.
    pub disks: Vec<String>,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The session.
    #[serde(rename = "restored")]
    pub session: u32,
    /// The checkpoint's number; 0 is the state at the end of precopy.
    pub checkpoint: u64,
    /// The stream.
    pub stream: StreamReport,
    /// The guest's disks; their bases are at the checkpoint.
    #[serde(default)]
    pub disks: Vec<RestoredDisk>,
    /// Nanoseconds for opening the destination, ending the session, applying what is left of the disks' logs, and locking the checkpoint.
    pub hold_ns: u64,
    /// Nanoseconds for the copy that was asked for.
    pub keep_ns: u64,
    /// Nanoseconds for writing the stream, which QEMU loads meanwhile.
    pub write_ns: u64,
}

/// Why a checkpoint was not restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The session goes on.
    #[error("the connections of session {0} did not end within {END_TIMEOUT:?}")]
    NotEnded(u32),
    /// There is no whole checkpoint.
    #[error("session {0} has no committed checkpoint")]
    NoCheckpoint(u32),
    /// A disk is not at the checkpoint.
    #[error("session {session}: {source}")]
    Disk {
        /// The session.
        session: u32,
        /// Which disk, and why.
        source: DiskError,
    },
    /// The shared block does not exist.
    #[error("session {session} has no ram block {name}")]
    NoBlock {
        /// The session.
        session: u32,
        /// The block.
        name: String,
    },
    /// The shared block cannot be mapped by a QEMU.
    #[error("ram block {name} of session {session} is not in a file that has a name")]
    NotInFile {
        /// The session.
        session: u32,
        /// The block.
        name: String,
    },
    /// Other files than the request needs.
    #[error(
        "the request needs {needed} open files with it (the destination, and with `keep` one for the stream and one for each disk), and \
         {came} came"
    )]
    Files {
        /// Files that it needs.
        needed: usize,
        /// Files that came.
        came: usize,
    },
    /// A disk is not to be kept.
    #[error("session {session}: there is no file for a copy of disk {disk}")]
    DiskNotKept {
        /// The session.
        session: u32,
        /// The disk.
        disk: String,
    },
    /// A file was not written.
    #[error("writing {what}: {source}")]
    File {
        /// What was to be written.
        what: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The QEMU did not read the stream to its end.
    #[error("{to} did not take the checkpoint: {}", reason(.error))]
    Stream {
        /// The destination.
        to: String,
        /// What failed, and whether a guest may run nevertheless.
        error: StreamError,
    },
}

impl RestoreError {
    /// Whether all was written that a QEMU needs to run the guest.
    fn is_complete(&self) -> bool {
        matches!(self, Self::Stream { error, .. } if error.complete)
    }
}

fn reason(error: &StreamError) -> String {
    let source = &error.source;
    match source.kind() {
        io::ErrorKind::WouldBlock => format!("it read nothing for {WRITE_TIMEOUT:?}"),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            format!("{source}: it closed the connection, its own messages say why")
        }
        _ => source.to_string(),
    }
}

/// Restores `checkpoint` as `request` says to the `files` that came with it, for the client that has claimed it. Ends its session, if that is
/// still live. Blocks; once the receiver ends, only as long as what was opened takes something.
///
/// # Errors
/// See [`RestoreError`]. No guest runs from a stream that was not written whole.
pub(super) fn restore(
    checkpoint: &KeptCheckpoint,
    live: Option<&LiveSession>,
    by: ClientId,
    request: &RestoreRequest,
    files: Vec<OwnedFd>,
    stopping: &Stopping,
) -> Result<RestoreReport, RestoreError> {
    let began = Instant::now();
    let form = match &request.shared {
        None => Form::Complete,
        Some(name) => Form::Shared(shared_block(checkpoint, name)?),
    };
    let Files { target, keep } = Files::of(request, files, stopping)?;
    if let Some(live) = live {
        end_session(live)?;
        if live.end().is_some_and(SessionEnd::spoils_checkpoint) {
            return Err(RestoreError::NoCheckpoint(checkpoint.session));
        }
    }
    let view = checkpoint.image.checkpoint_view();
    let view = view.ok_or(RestoreError::NoCheckpoint(checkpoint.session))?;
    let description = &*checkpoint.description;
    checkpoint.disks.end_session();
    let disks = checkpoint.disks.restored(view.checkpoint());
    let disks = disks.map_err(|source| RestoreError::Disk {
        session: checkpoint.session,
        source,
    })?;
    let hold_ns = nanoseconds(began);
    let began = Instant::now();
    if let Some(keep) = keep {
        write_file(&keep.stream, KEPT_STREAM, description, &view, Form::Complete)?;
        keep_disks(checkpoint, &keep.disks)?;
    }
    let keep_ns = nanoseconds(began);
    let began = Instant::now();
    // Before a guest can run: also for a later receiver that finds the checkpoint after a crash of this one.
    checkpoint.image.set_given(true);
    if matches!(form, Form::Shared(_)) {
        checkpoint.share();
    }
    let written = write_target(&target, &request.to, description, &view, form);
    let complete = written.as_ref().map_or_else(RestoreError::is_complete, |_| true);
    if complete {
        let memory = match form {
            Form::Complete => Given::Copy,
            Form::Shared(_) => Given::Image,
        };
        checkpoint.promotion().given(by, request.to.clone(), memory);
    } else {
        checkpoint.image.set_given(false);
    }
    Ok(RestoreReport {
        session: checkpoint.session,
        checkpoint: view.checkpoint().0,
        stream: written?,
        disks,
        hold_ns,
        keep_ns,
        write_ns: nanoseconds(began),
    })
}

/// The files that came with a request.
struct Files {
    target: Outlet,
    keep: Option<KeepFiles>,
}

struct KeepFiles {
    stream: Outlet,
    /// By the disks' names.
    disks: Vec<(String, File)>,
}

impl Files {
    fn of(request: &RestoreRequest, files: Vec<OwnedFd>, stopping: &Stopping) -> Result<Self, RestoreError> {
        let disks = request.keep.as_ref().map(|keep| &keep.disks[..]);
        let (needed, came) = (1 + disks.map_or(0, |disks| 1 + disks.len()), files.len());
        let mut files = files.into_iter().map(File::from);
        let outlet = |file, what: &str| {
            Outlet::new(file, stopping.clone(), WRITE_TIMEOUT).map_err(|source| RestoreError::File {
                what: what.to_owned(),
                source,
            })
        };
        let target = files.next().filter(|_| came == needed);
        let target = outlet(target.ok_or(RestoreError::Files { needed, came })?, &request.to)?;
        let keep = match disks.zip(files.next()) {
            Some((disks, stream)) => Some(KeepFiles {
                stream: outlet(stream, KEPT_STREAM)?,
                disks: disks.iter().cloned().zip(files).collect(),
            }),
            None => None,
        };
        Ok(Self { target, keep })
    }
}

/// What it is called in messages.
const KEPT_STREAM: &str = "the kept stream";

/// Copies the disks, each to its file. No guest has them yet.
fn keep_disks(checkpoint: &KeptCheckpoint, files: &[(String, File)]) -> Result<(), RestoreError> {
    for disk in checkpoint.disks.all() {
        let file = files.iter().find(|(name, _)| name == disk.name());
        let (_, file) = file.ok_or_else(|| RestoreError::DiskNotKept {
            session: checkpoint.session,
            disk: disk.name().to_owned(),
        })?;
        copy_base(disk.base(), file).map_err(|source| RestoreError::File {
            what: format!("the copy of disk {}", disk.name()),
            source,
        })?;
    }
    Ok(())
}

/// Nothing more is received from the primary.
fn end_session(session: &LiveSession) -> Result<(), RestoreError> {
    session.finish(SessionEnd::Promoted);
    let began = Instant::now();
    while !session.is_over() {
        if began.elapsed() > END_TIMEOUT {
            return Err(RestoreError::NotEnded(session.id));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn shared_block(checkpoint: &KeptCheckpoint, name: &str) -> Result<BlockId, RestoreError> {
    let (session, name) = (checkpoint.session, name.to_owned());
    let Some(id) = checkpoint.description.blocks.by_name(name.as_bytes()) else {
        return Err(RestoreError::NoBlock { session, name });
    };
    match checkpoint.image.image_file(id) {
        Some(_) => Ok(id),
        None => Err(RestoreError::NotInFile { session, name }),
    }
}

/// Writes to the destination.
fn write_target(
    target: &Outlet,
    to: &str,
    description: &GuestDescription,
    view: &CheckpointView<'_>,
    form: Form,
) -> Result<StreamReport, RestoreError> {
    match target.is_socket() {
        false => write_file(target, to, description, view, form),
        true => write(description, view, form, target).map_err(|error| {
            let to = to.to_owned();
            RestoreError::Stream { to, error }
        }),
    }
}

fn write(
    description: &GuestDescription,
    view: &CheckpointView<'_>,
    form: Form,
    out: impl Write,
) -> Result<StreamReport, StreamError> {
    // It is to go on, and COLO has let it run or would have, whatever it did before it was protected.
    let device_state = run_state::running(view.device_state()).map_err(io::Error::other)?;
    write_stream(
        description,
        &device_state,
        |page, out| view.read(page, out),
        form,
        out,
    )
}

/// Writes a stream to a file, and waits until it is on the disk.
fn write_file(
    file: &Outlet,
    what: &str,
    description: &GuestDescription,
    view: &CheckpointView<'_>,
    form: Form,
) -> Result<StreamReport, RestoreError> {
    write(description, view, form, file)
        .map_err(|error| error.source)
        .and_then(|report| file.sync().map(|()| report))
        .map_err(|source| RestoreError::File {
            what: what.to_owned(),
            source,
        })
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
