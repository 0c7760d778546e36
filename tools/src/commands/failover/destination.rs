//! Where a checkpoint goes. It is opened here and passed to the receiver, which opens nothing and connects to nothing itself.

use crate::output::{CommandError, tell};
use colo_ring::files::{NewFile, Readers};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// An open destination of a stream.
pub(super) enum Destination {
    /// A connection.
    Socket(OwnedFd),
    /// A file, which gets its name only when the stream is complete.
    File(NewFile),
}

impl Destination {
    /// Opens what `to` names: `unix:PATH`, `tcp:HOST:PORT` or `file:PATH`. `overwrite`: a file that is there is replaced.
    pub(super) fn open(to: &str, overwrite: bool) -> Result<Self, CommandError> {
        let connected = match to.split_once(':') {
            Some(("file", path)) => return new_file(Path::new(path), overwrite).map(Self::File),
            Some(("unix", path)) => UnixStream::connect(path).map(OwnedFd::from),
            Some(("tcp", address)) => TcpStream::connect(address).map(OwnedFd::from),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        connected
            .map(Self::Socket)
            .map_err(|error| CommandError::Failed(format!("cannot connect to {to}: {error}")))
    }

    /// Its file as it is called until it is complete, if it is one.
    pub(super) fn parts(&self) -> Vec<PathBuf> {
        match self {
            Self::Socket(_) => Vec::new(),
            Self::File(file) => vec![file.part().to_owned()],
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(socket) => socket.as_fd(),
            Self::File(file) => file.file().as_fd(),
        }
    }

    fn finish(&self) -> Result<(), CommandError> {
        match self {
            Self::Socket(_) => Ok(()),
            Self::File(file) => named(file),
        }
    }
}

/// A copy of the checkpoint that is to be kept: a complete stream, and each of the guest's disks.
pub(super) struct Kept {
    stream: NewFile,
    disks: Vec<(String, NewFile)>,
}

impl Kept {
    /// Begins the file `path`, and `path.NAME.raw` for every disk.
    pub(super) fn create(
        path: &Path,
        disks: impl Iterator<Item = String>,
        overwrite: bool,
    ) -> Result<Self, CommandError> {
        let disk = |name: String| {
            let mut copy = path.as_os_str().to_owned();
            copy.push(format!(".{name}.raw"));
            Ok((name, new_file(&PathBuf::from(copy), overwrite)?))
        };
        Ok(Self {
            stream: new_file(path, overwrite)?,
            disks: disks.map(disk).collect::<Result<_, CommandError>>()?,
        })
    }

    /// The files as they are called until they are complete.
    pub(super) fn parts(&self) -> Vec<PathBuf> {
        let disks = self.disks.iter().map(|(_, file)| file);
        disks
            .chain([&self.stream])
            .map(|file| file.part().to_owned())
            .collect()
    }

    /// The names of the disks, in the order of their files.
    pub(super) fn disks(&self) -> Vec<String> {
        self.disks.iter().map(|(name, _)| name.clone()).collect()
    }
}

/// All that a restore writes to.
pub(super) struct Outputs {
    pub(super) destination: Destination,
    pub(super) kept: Option<Kept>,
}

impl Outputs {
    /// In the order in which a request passes them.
    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut all = vec![self.destination.descriptor()];
        if let Some(kept) = &self.kept {
            all.push(kept.stream.file().as_fd());
            all.extend(kept.disks.iter().map(|(_, file)| file.file().as_fd()));
        }
        all
    }

    /// Gives the files their names: what was to be written is on the disk. A copy that does not get its name is missing, and no reason to
    /// give up a guest that has been given away.
    ///
    /// # Errors
    /// If the destination is a file and does not get its name.
    pub(super) fn finish(&self) -> Result<(), CommandError> {
        self.destination.finish()?;
        let Some(kept) = &self.kept else {
            return Ok(());
        };
        let disks = kept.disks.iter().map(|(_, file)| file);
        for file in disks.chain([&kept.stream]) {
            if let Err(error) = named(file) {
                tell(&format!("warning: this part of --keep is missing: {error}"));
            }
        }
        Ok(())
    }
}

fn new_file(path: &Path, overwrite: bool) -> Result<NewFile, CommandError> {
    let file = match overwrite {
        true => NewFile::create(path, Readers::Owner),
        false => NewFile::create_free(path, Readers::Owner),
    };
    file.map_err(|error| failed(path, &error))
}

fn named(file: &NewFile) -> Result<(), CommandError> {
    file.rename().map_err(|error| failed(file.path(), &error))
}

fn failed(path: &Path, error: &io::Error) -> CommandError {
    let path = path.display();
    CommandError::Failed(match error.kind() {
        io::ErrorKind::AlreadyExists => {
            format!("{path} exists already: give another name, or --overwrite to replace it")
        }
        _ => format!("writing {path}: {error}"),
    })
}
