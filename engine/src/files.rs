//! New files, made so that what is at their name already is never written through: neither a link nor another user's file.
//!
//! A file is made beside its place, as `PATH~part`, by this process alone, and takes its name by a rename. What had the name
//! before must be a file of this user; its content is left alone, whoever else has it open or linked.

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Who may read a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Its owner alone: it has a guest's memory, and so the guest's secrets.
    Owner,
    /// Whoever the umask allows.
    ByUmask,
}

impl Readers {
    fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::ByUmask => 0o666,
        }
    }
}

/// Makes a file at a name that is free. It can be read and written, and no link is followed.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if anything has the name, also a link that leads nowhere.
pub fn create_new(path: &Path, readers: Readers) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    options.mode(readers.mode()).open(path)
}

/// Makes an empty file in place of one of this user, or where there is none. A device or a FIFO is opened instead.
///
/// # Errors
/// If something else is there: a link, a directory, another user's file; and those of the system.
pub fn replace(path: &Path, readers: Readers) -> io::Result<File> {
    if let Some(stream) = open_stream(path)? {
        return Ok(stream);
    }
    let new = NewFile::create(path, readers)?;
    let file = new.file.try_clone()?;
    new.rename()?;
    Ok(file)
}

/// Writes a file, which appears whole or not at all, in place of one of this user. A device or a FIFO is written to instead.
///
/// # Errors
/// Those of [`replace`].
pub fn write(path: &Path, content: &[u8], readers: Readers) -> io::Result<()> {
    if let Some(mut stream) = open_stream(path)? {
        return stream.write_all(content);
    }
    let new = NewFile::create(path, readers)?;
    new.file().write_all(content)?;
    new.rename()
}

/// Makes a directory for this user alone, or takes one of this user that is there.
///
/// # Errors
/// If something else is there: a link to a directory, another user's; and those of the system.
pub fn directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => check_own(path, Metadata::is_dir),
        made => made,
    }
}

/// A file that gets its name only when it is complete. Dropped before, it is removed.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    part: PathBuf,
    file: File,
    replaces: bool,
}

impl NewFile {
    /// Begins a file that is to be at `path`, in place of one of this user.
    ///
    /// # Errors
    /// If something else than a file of this user is there, and those of the system.
    pub fn create(path: &Path, readers: Readers) -> io::Result<Self> {
        check_own(path, Metadata::is_file)?;
        Self::begin(path, readers, true)
    }

    /// Begins a file that is to be at `path` and replaces nothing there, neither now nor when it gets its name.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if anything has the name, also a link that leads nowhere; and those of the system.
    pub fn create_free(path: &Path, readers: Readers) -> io::Result<Self> {
        match find(path)? {
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => Self::begin(path, readers, false),
        }
    }

    fn begin(path: &Path, readers: Readers, replaces: bool) -> io::Result<Self> {
        let part = part_of(path);
        // Left by a killed process. Removed rather than opened: it might be a link.
        match fs::remove_file(&part) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = create_new(&part, readers)?;
        Ok(Self {
            path: path.to_owned(),
            part,
            file,
            replaces,
        })
    }

    /// To write its content.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is until then.
    pub fn part(&self) -> &Path {
        &self.part
    }

    /// Waits until its content is on the disk: some file systems report only then that they are full.
    ///
    /// # Errors
    /// Those of the system.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// Those of the system, and [`io::ErrorKind::AlreadyExists`] if it is to replace nothing and another file has got the name. It is
    /// removed then.
    pub fn rename(&self) -> io::Result<()> {
        match self.replaces {
            true => fs::rename(&self.part, &self.path),
            false => self.rename_to_free(),
        }
    }

    fn rename_to_free(&self) -> io::Result<()> {
        match renameat_with(CWD, &self.part, CWD, &self.path, RenameFlags::NOREPLACE) {
            // Some file systems cannot do both in one step.
            Err(Errno::INVAL) => match find(&self.path)? {
                Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
                None => fs::rename(&self.part, &self.path),
            },
            renamed => Ok(renamed?),
        }
    }
}

/// Where a file is that is to be at `path`, until it is complete.
pub fn part_of(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push("~part");
    PathBuf::from(part)
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After the rename nothing is there. Before, it is half a file, and an error was returned.
        drop(fs::remove_file(&self.part));
    }
}

/// What is at a path itself, without following a link.
fn find(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

fn is_stream(about: &Metadata) -> bool {
    about.file_type().is_char_device() || about.file_type().is_fifo()
}

/// A device or a FIFO, which cannot be replaced and has nothing to lose.
fn open_stream(path: &Path) -> io::Result<Option<File>> {
    if !find(path)?.is_some_and(|about| is_stream(&about)) {
        return Ok(None);
    }
    let mut options = OpenOptions::new();
    let file = options.write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    // It may have become another file in the meantime.
    match is_stream(&file.metadata()?) {
        true => Ok(Some(file)),
        false => Err(not_own(path)),
    }
}

fn check_own(path: &Path, is_kind: fn(&Metadata) -> bool) -> io::Result<()> {
    let is_own = |about: Metadata| is_kind(&about) && about.uid() == nix::unistd::geteuid().as_raw();
    match find(path)?.is_none_or(is_own) {
        true => Ok(()),
        false => Err(not_own(path)),
    }
}

fn not_own(path: &Path) -> io::Error {
    let text = format!(
        "{} is a link, or not of this user, or of another kind: it is not replaced",
        path.display()
    );
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let [victim, name] = ["victim", "name"].map(|name| directory.path().join(name));
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, &name).unwrap();
        for refused in [
            create_new(&name, Readers::Owner).err(),
            replace(&name, Readers::Owner).err(),
            write(&name, b"x", Readers::Owner).err(),
            NewFile::create(&name, Readers::Owner).err(),
        ] {
            assert!(refused.is_some());
        }
        // Where it is made beside its place, too.
        fs::rename(&name, directory.path().join("out~part")).unwrap();
        let out = directory.path().join("out");
        write(&out, b"x", Readers::Owner).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert_eq!(fs::read(&out).unwrap(), b"x");
        assert!(fs::symlink_metadata(&out).unwrap().is_file());
    }

    #[test]
    fn a_replaced_file_keeps_its_content_under_other_names() {
        let directory = tempfile::tempdir().unwrap();
        let [name, other] = ["name", "other"].map(|name| directory.path().join(name));
        fs::write(&name, "before").unwrap();
        fs::hard_link(&name, &other).unwrap();
        replace(&name, Readers::Owner)
            .unwrap()
            .write_all(b"after")
            .unwrap();
        assert_eq!(fs::read(&name).unwrap(), b"after");
        assert_eq!(fs::read(&other).unwrap(), b"before");
        assert_eq!(mode(&name), 0o600);
    }

    #[test]
    fn a_link_to_a_directory_is_none() {
        let scratch = tempfile::tempdir().unwrap();
        let [own, link] = ["own", "link"].map(|name| scratch.path().join(name));
        directory(&own).unwrap();
        directory(&own).unwrap();
        assert_eq!(mode(&own), 0o700);
        symlink(&own, &link).unwrap();
        assert!(directory(&link).unwrap_err().to_string().contains("is a link"));
    }

    #[test]
    fn half_a_file_has_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let new = NewFile::create(&path, Readers::Owner).unwrap();
        new.file().write_all(b"half").unwrap();
        assert_eq!(mode(new.part()), 0o600);
        drop(new);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_came_meanwhile_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let new = NewFile::create_free(&path, Readers::Owner).unwrap();
        fs::write(&path, "another's").unwrap();
        let refused = new.rename().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        drop(new);
        assert_eq!(fs::read(&path).unwrap(), b"another's");
        let refused = NewFile::create_free(&path, Readers::Owner).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        fs::remove_file(&path).unwrap();
        let new = NewFile::create_free(&path, Readers::Owner).unwrap();
        new.file().write_all(b"whole").unwrap();
        new.rename().unwrap();
        drop(new);
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_device_is_written_to() {
        write(Path::new("/dev/null"), b"x", Readers::Owner).unwrap();
        assert!(
            replace(Path::new("/dev/full"), Readers::Owner)
                .unwrap()
                .write_all(b"x")
                .is_err()
        );
    }
}
