//! Restores a session's last committed checkpoint to a fresh QEMU, or to a file, as an incoming migration stream. The
//! receiver writes the stream, because the memory is its own.

use super::disks::RestoredDisk;
use super::end::SessionEnd;
use super::kept_checkpoint::KeptCheckpoint;
use super::live_session::LiveSession;
use super::promotion::ClientId;
use crate::disk::{DiskError, copy_base};
use crate::failover::{Form, StreamError, StreamReport, write_stream};
use crate::files::{NewFile, Readers};
use crate::session::GuestDescription;
use crate::store::CheckpointView;
use crate::units::BlockId;
use crate::wire::run_state;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a QEMU may read nothing of the stream before it counts as hung.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the session's connections may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What to restore, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The session's number.
    pub session: u32,
    /// The destination: `unix:PATH` or `tcp:HOST:PORT` of a QEMU that waits for a migration, or `file:PATH`, absolute.
    pub to: String,
    /// Name of the block whose file that QEMU has mapped; without one everything goes into the stream.
    pub shared: Option<String>,
    /// A file, absolute, that gets a complete stream first: a QEMU that maps the memory changes the checkpoint. One of the
    /// receiver's user is replaced.
    pub keep: Option<PathBuf>,
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
    /// The destination is not understood.
    #[error("'{0}' is not a destination for a stream: unix:PATH, tcp:HOST:PORT or file:PATH")]
    Destination(String),
    /// A relative path means nothing to the receiver.
    #[error("{} is not an absolute path", .0.display())]
    RelativePath(PathBuf),
    /// A file was not written.
    #[error("writing {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// No QEMU listens there.
    #[error("cannot connect to {to}: {source}")]
    Connect {
        /// The destination.
        to: String,
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

/// Restores `checkpoint` as `request` says, for the client that has claimed it. Ends its session, if that is still live, once
/// the destination is open: a destination that is mistyped or not there costs nothing. Blocks.
///
/// # Errors
/// See [`RestoreError`]. No guest runs from a stream that was not written whole.
pub(super) fn restore(
    checkpoint: &KeptCheckpoint,
    live: Option<&LiveSession>,
    by: ClientId,
    request: &RestoreRequest,
) -> Result<RestoreReport, RestoreError> {
    let began = Instant::now();
    let form = match &request.shared {
        None => Form::Complete,
        Some(name) => Form::Shared(shared_block(checkpoint, name)?),
    };
    let keep = request.keep.as_deref().map(new_file).transpose()?;
    let target = Target::open(&request.to)?;
    if let Some(live) = live {
        end_session(live)?;
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
    if let Some(kept) = keep {
        let path = kept.path().to_owned();
        write_file(kept, description, &view, Form::Complete)?;
        keep_disks(&path, &disks)?;
    }
    let keep_ns = nanoseconds(began);
    let began = Instant::now();
    // Before a guest can run: also for a later receiver that finds the checkpoint after a crash of this one.
    checkpoint.image.set_given(true);
    let written = target.write(&request.to, description, &view, form);
    let complete = written.as_ref().map_or_else(RestoreError::is_complete, |_| true);
    if complete {
        checkpoint.promotion().given(by, request.to.clone());
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

/// Copies the disks, each to a file that is named after the kept stream. No guest has them yet.
fn keep_disks(stream: &Path, disks: &[RestoredDisk]) -> Result<(), RestoreError> {
    for disk in disks {
        let mut path = stream.as_os_str().to_owned();
        path.push(format!(".{}.raw", disk.name));
        let path = PathBuf::from(path);
        copy_base(&disk.path, &path).map_err(|source| RestoreError::File { path, source })?;
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

/// An open destination.
enum Target {
    Socket(Box<dyn Write>),
    File(NewFile),
}

impl Target {
    fn open(to: &str) -> Result<Self, RestoreError> {
        let connected = match to.split_once(':') {
            Some(("unix", path)) => connect_unix(Path::new(path)),
            Some(("tcp", address)) => connect_tcp(address),
            Some(("file", path)) => return new_file(Path::new(path)).map(Self::File),
            _ => return Err(RestoreError::Destination(to.to_owned())),
        };
        let to = to.to_owned();
        connected
            .map(Self::Socket)
            .map_err(|source| RestoreError::Connect { to, source })
    }

    fn write(
        self,
        to: &str,
        description: &GuestDescription,
        view: &CheckpointView<'_>,
        form: Form,
    ) -> Result<StreamReport, RestoreError> {
        match self {
            Self::File(file) => write_file(file, description, view, form),
            Self::Socket(socket) => write(description, view, form, socket).map_err(|error| {
                let to = to.to_owned();
                RestoreError::Stream { to, error }
            }),
        }
    }
}

fn connect_unix(path: &Path) -> io::Result<Box<dyn Write>> {
    let stream = UnixStream::connect(path)?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    Ok(Box::new(stream))
}

fn connect_tcp(address: &str) -> io::Result<Box<dyn Write>> {
    let stream = TcpStream::connect(address)?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    Ok(Box::new(stream))
}

fn write(
    description: &GuestDescription,
    view: &CheckpointView<'_>,
    form: Form,
    out: impl Write,
) -> Result<StreamReport, StreamError> {
    // It is to go on, and COLO has let it run or would have, whatever it did before it was protected.
    let device_state = run_state::running(view.device_state());
    write_stream(
        description,
        &device_state,
        |page, out| view.read(page, out),
        form,
        out,
    )
}

/// Begins a file, which gets its name only when it is complete and on the disk.
fn new_file(path: &Path) -> Result<NewFile, RestoreError> {
    if !path.is_absolute() {
        return Err(RestoreError::RelativePath(path.to_owned()));
    }
    NewFile::create(path, Readers::Owner).map_err(|source| RestoreError::File {
        path: path.to_owned(),
        source,
    })
}

/// Writes a stream to a file.
fn write_file(
    file: NewFile,
    description: &GuestDescription,
    view: &CheckpointView<'_>,
    form: Form,
) -> Result<StreamReport, RestoreError> {
    let path = file.path().to_owned();
    write(description, view, form, file.file())
        .map_err(|error| error.source)
        .and_then(|report| file.sync().map(|()| report))
        .and_then(|report| file.rename().map(|()| report))
        .map_err(|source| RestoreError::File { path, source })
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
