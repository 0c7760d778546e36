//! Which disks are connected, and whose they are.
//!
//! A disk exists as long as its connection, its session or its kept checkpoint does; the registry only knows of it. So that no guest gets
//! another guest's disk, connections go to a session by UUID, or by origin where that is unique.

use super::attribution::{Identity, Unclaimed, doubts, find_own};
use super::reserve::Reserve;
use super::session_disks::DiskState;
use crate::disk::{
    Base, Binding, Disk, DiskError, DiskOptions, Link, OnBaseFull, Ownership, RamPlace, RamShare, is_name,
    names_in, path_of,
};
use crate::net::{Origin, is_gone};
use crate::receiver::end::SessionEnd;
use crate::receiver::guest::SessionTitle;
use crate::receiver::live_session::LiveSession;
use crate::receiver::remark::Remark;
use crate::receiver::uuid::{Uuid, format_uuid, parse_uuid};
use crate::receiver::{Event, Events};
use crate::sandbox::ThreadKind;
use crate::store::memory::ram_dir::RamFiles;
use crate::threads::Threads;
use nix::sys::socket::{Shutdown, shutdown};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use thiserror::Error;

/// Most exports that are listed.
const NAMES_MAX: usize = 1024;

/// Most lost connections that are remembered, so that clients cannot make it take memory without end.
const LOST_MAX: usize = 1024;

/// A disk that no session has taken yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UnboundDisk {
    /// Its export's name.
    pub name: String,
    /// Its base, absolute.
    pub base: PathBuf,
    /// The size of the disk.
    pub size_bytes: u64,
    /// Always [`DiskState::Copying`].
    pub state: DiskState,
    /// Where its connection comes from.
    pub from: String,
    /// The UUID that its client gave.
    pub uuid: Option<String>,
    /// Bytes written since it was connected.
    pub written_bytes: u64,
}

/// A client of a disk.
pub(super) struct Client {
    pub(super) from: String,
    pub(super) origin: Origin,
    pub(super) socket: Arc<OwnedFd>,
}

struct Entry {
    disk: Weak<Disk>,
    name: String,
    client: Option<Client>,
    uuid: Option<Uuid>,
    session: Option<u32>,
}

/// A disk on its way to a session.
struct Claimed {
    disk: Arc<Disk>,
    link: Option<Link>,
}

impl Entry {
    /// Gives the disk to a session, if it is still open.
    fn claim(&mut self, session: u32) -> Option<Claimed> {
        let disk = self.disk.upgrade()?;
        self.session = Some(session);
        Some(Claimed {
            disk,
            link: self.client.as_ref().map(link),
        })
    }

    /// As a connection that no session has taken, if it is one.
    fn unclaimed(&self) -> Option<Unclaimed> {
        let client = self.client.as_ref().filter(|_| self.session.is_none())?;
        Some(Unclaimed {
            name: self.name.clone(),
            from: client.from.clone(),
            identity: Identity {
                origin: client.origin,
                uuid: self.uuid,
            },
        })
    }
}

/// A connection that ended in the first copy of its disk.
struct LostCopy {
    connection: Unclaimed,
    /// The sessions that had begun then.
    sessions: Vec<u32>,
}

/// A session that has not committed yet.
struct Candidate {
    session: u32,
    origin: Origin,
}

#[derive(Default)]
struct Known {
    entries: Vec<Entry>,
    /// Names of disks that are being opened.
    opening: Vec<String>,
    candidates: Vec<Candidate>,
    lost: Vec<LostCopy>,
}

impl Known {
    /// The disks of a session that could not bind them belong to nobody again.
    fn unclaim(&mut self, session: u32) {
        let own = |entry: &&mut Entry| entry.session == Some(session);
        for entry in self.entries.iter_mut().filter(own) {
            entry.session = None;
        }
    }

    fn forget_candidate(&mut self, session: u32) {
        self.candidates.retain(|candidate| candidate.session != session);
        for lost in &mut self.lost {
            lost.sessions.retain(|other| *other != session);
        }
        self.lost.retain(|lost| !lost.sessions.is_empty());
    }
}

/// See the module.
pub(in crate::receiver) struct DiskRegistry {
    directory: PathBuf,
    options: DiskOptions,
    memory: DiskMemory,
    events: Arc<Events>,
    threads: Threads,
    known: Mutex<Known>,
}

/// Where the memory of disks' logs is taken.
pub(in crate::receiver) struct DiskMemory {
    /// Of their segments. What is more lies beside the bases.
    pub(in crate::receiver) segments: Arc<dyn RamShare>,
    /// Of their indexes.
    pub(in crate::receiver) indexes: Arc<dyn RamShare>,
}

/// Why a client does not get a disk.
#[derive(Debug, Error)]
pub(super) enum ExportError {
    #[error("'{0}' is not a UUID")]
    Uuid(String),
    #[error("'{0}' is not a disk's name: 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot")]
    Name(String),
    #[error(
        "disk {name} belongs to the checkpoint of session {session}; `colo-ring discard --session {session}` gives that up once the \
         session has ended"
    )]
    Kept { name: String, session: u32 },
    #[error("disk {name} is in use by {client}")]
    Client { name: String, client: String },
    #[error("disk {0} is in use")]
    InUse(String),
    #[error(transparent)]
    Base(#[from] DiskError),
}

/// `NAME` or `NAME@UUID`, as a client asks for.
fn parse(name: &str) -> Result<(&str, Option<Uuid>), ExportError> {
    let (name, uuid) = match name.split_once('@') {
        None => (name, None),
        Some((name, uuid)) => {
            let parsed = parse_uuid(uuid).ok_or_else(|| ExportError::Uuid(uuid.to_owned()))?;
            (name, Some(parsed))
        }
    };
    match is_name(name) {
        true => Ok((name, uuid)),
        false => Err(ExportError::Name(name.to_owned())),
    }
}

impl DiskRegistry {
    /// The disks of a directory, absolute.
    pub(in crate::receiver) fn new(
        directory: PathBuf,
        options: DiskOptions,
        memory: DiskMemory,
        events: Arc<Events>,
        threads: Threads,
    ) -> Self {
        Self {
            directory,
            options,
            memory,
            events,
            threads,
            known: Mutex::default(),
        }
    }

    /// Starts and confines the threads of disks.
    pub(super) fn threads(&self) -> &Threads {
        &self.threads
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing that panics is done under it.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.entries.retain(|entry| entry.disk.strong_count() > 0);
        known
    }

    pub(in crate::receiver) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn warn(&self, remark: impl Into<Remark>) {
        (self.events)(Event::warning(remark));
    }

    // --- clients ---------------------------------------------------------------------------------------------------

    pub(super) fn names(&self) -> Vec<String> {
        match names_in(&self.directory, NAMES_MAX) {
            Ok(names) => names,
            Err(error) => {
                self.warn(format!("{}: {error}", self.directory.display()));
                Vec::new()
            }
        }
    }

    /// The size of an export.
    ///
    /// # Errors
    /// If there is no such disk.
    pub(super) fn size(&self, asked: &str) -> Result<u64, ExportError> {
        let (name, _) = parse(asked)?;
        let disk = (self.known().entries.iter())
            .find(|entry| entry.name == name)
            .and_then(|entry| entry.disk.upgrade());
        match disk {
            Some(disk) => Ok(disk.base().size()),
            None => Ok(Base::open_shared(&path_of(&self.directory, name))?.size()),
        }
    }

    /// Opens a disk for a client.
    ///
    /// # Errors
    /// If there is no such disk, or it belongs to another client or a checkpoint.
    pub(super) fn open(&self, asked: &str, client: Client) -> Result<Arc<Disk>, ExportError> {
        let (name, uuid) = parse(asked)?;
        let mut known = self.known();
        if known.opening.iter().any(|opening| opening == name) {
            return Err(ExportError::InUse(name.to_owned()));
        }
        if let Some(entry) = known.entries.iter().find(|entry| entry.name == name) {
            let name = name.to_owned();
            return Err(match (&entry.client, entry.session) {
                (_, Some(session)) => ExportError::Kept { name, session },
                (Some(client), None) => ExportError::Client {
                    name,
                    client: client.from.clone(),
                },
                (None, None) => ExportError::InUse(name),
            });
        }
        // Not under the lock: a session that commits takes it.
        known.opening.push(name.to_owned());
        drop(known);
        let opened = Disk::open(&self.directory, name, self.options);
        let mut known = self.known();
        known.opening.retain(|opening| opening != name);
        let disk = Arc::new(opened?);
        known.entries.push(Entry {
            disk: Arc::downgrade(&disk),
            name: name.to_owned(),
            client: Some(client),
            uuid,
            session: None,
        });
        Ok(disk)
    }

    /// The connection of a disk has ended. If no session had taken it, those that have begun and whose disk it could be must
    /// not commit without it. A client that has only read, and whose guest is not known for certain, was no mirror and is forgotten.
    pub(super) fn disconnected(&self, disk: &Disk) {
        let mut known = self.known();
        let sessions: Vec<u32> = known.candidates.iter().map(|one| one.session).collect();
        let entry = known.entries.iter().find(|entry| entry.name == disk.name());
        let Some(connection) = entry.and_then(Entry::unclaimed) else {
            return;
        };
        let Identity { origin, uuid } = connection.identity;
        let is_mirror = disk.is_changed() || uuid.is_some() || matches!(origin, Origin::Process(_));
        if sessions.is_empty() || !is_mirror {
            return;
        }
        known.lost.retain(|lost| {
            lost.connection.name != connection.name || lost.connection.identity != connection.identity
        });
        if known.lost.len() == LOST_MAX {
            known.lost.remove(0);
        }
        known.lost.push(LostCopy { connection, sessions });
    }

    /// Ends all connections.
    pub(super) fn hang_up_all(&self) {
        for entry in &self.known().entries {
            if let Some(client) = &entry.client {
                hang_up(&client.socket);
            }
        }
    }

    // --- sessions --------------------------------------------------------------------------------------------------

    /// A session may take disks later.
    pub(in crate::receiver) fn session_began(&self, session: u32, origin: Origin) {
        self.known().candidates.push(Candidate { session, origin });
    }

    pub(in crate::receiver) fn session_ended(&self, session: u32) {
        self.known().forget_candidate(session);
    }

    /// A recovered checkpoint has this disk.
    pub(in crate::receiver) fn adopt(&self, disk: &Arc<Disk>, session: u32) {
        self.known().entries.push(Entry {
            disk: Arc::downgrade(disk),
            name: disk.name().to_owned(),
            client: None,
            uuid: None,
            session: Some(session),
        });
    }

    /// Binds the disks of a session that commits for the first time. `ram` are the files of its RAM, where they outlive the process.
    ///
    /// # Errors
    /// If it is not clear which they are, or one of them is not ready.
    pub(in crate::receiver) fn bind(
        &self,
        session: &Arc<LiveSession>,
        uuid: Option<Uuid>,
        ram: Option<&Arc<RamFiles>>,
    ) -> Result<Vec<Arc<Disk>>, DiskError> {
        let mut known = self.known();
        let identity = Identity {
            origin: session.origin,
            uuid,
        };
        let lost: Vec<Unclaimed> = (known.lost.iter())
            .filter(|lost| lost.sessions.contains(&session.id))
            .map(|lost| lost.connection.clone())
            .collect();
        known.forget_candidate(session.id);
        let rivals: Vec<Origin> = known.candidates.iter().map(|one| one.origin).collect();
        let mut positions: Vec<usize> = (0..known.entries.len())
            .filter(|position| known.entries[*position].unclaimed().is_some())
            .collect();
        positions.sort_by(|one, other| known.entries[*one].name.cmp(&known.entries[*other].name));
        let connected = positions
            .iter()
            .filter_map(|position| known.entries[*position].unclaimed());
        let mut all: Vec<Unclaimed> = connected.chain(lost).collect();
        let (own, by) = find_own(&all, identity, &rivals)?;
        if let Some(lost) = own.iter().find(|position| **position >= positions.len()) {
            return Err(DiskError::ConnectionLost {
                disk: all[*lost].name.clone(),
                reason: "in the first copy, after the migration had begun".to_owned(),
            });
        }
        all.truncate(positions.len());
        let doubts = doubts(session.id, identity, &all, &own, by);
        let own = own
            .iter()
            .filter_map(|position| known.entries[positions[*position]].claim(session.id))
            .collect();
        // Not under the lock: a warning may wait for a terminal, and binding for the file systems of bases and logs.
        drop(known);
        let title = session.guest.title();
        let doubts = doubts.into_iter().map(|doubt| Remark::of(&title, doubt));
        doubts.for_each(|doubt| self.warn(doubt));
        let bound = self.bind_own(session, own, ram);
        if bound.is_err() {
            self.known().unclaim(session.id);
        }
        bound
    }

    /// Binds these disks, which are in the order of their names.
    fn bind_own(
        &self,
        session: &Arc<LiveSession>,
        own: Vec<Claimed>,
        ram: Option<&Arc<RamFiles>>,
    ) -> Result<Vec<Arc<Disk>>, DiskError> {
        let Some(first) = own.first() else {
            return Ok(Vec::new());
        };
        let owner = Ownership {
            session: u64::from(session.id),
            leader: first.disk.name().to_owned(),
            ram_dir: ram.map(|files| files.directory().display().to_string()),
        };
        let mut disks: Vec<Arc<Disk>> = Vec::new();
        for Claimed { disk, link } in own {
            let reserve = Reserve::take(self.memory.indexes.clone()).ok_or_else(|| DiskError::NoRoom {
                disk: disk.name().to_owned(),
                source: Box::new(DiskError::NoIndex),
            });
            let bound = reserve.and_then(|reserve| {
                disk.bind(Binding {
                    owner: owner.clone(),
                    ram: ram.map(|files| RamPlace {
                        files: files.clone(),
                        share: self.memory.segments.clone(),
                    }),
                    index: Arc::new(reserve),
                    on_loss: on_loss(session),
                    on_full: self.on_full(session.guest.title()),
                    on_base_full: self.on_base_full(session.guest.title()),
                    link,
                })
            });
            if let Err(error) = bound.and_then(|()| start_applying(&disk, &self.threads)) {
                disks.iter().chain([&disk]).for_each(|disk| disk.end_session());
                return Err(error);
            }
            disks.push(disk);
        }
        Ok(disks)
    }

    fn on_full(&self, title: SessionTitle) -> Box<dyn Fn(String) + Send + Sync> {
        let events = self.events.clone();
        Box::new(move |disk| {
            let text = format!(
                "session {title}: the log of disk {disk} is full; its guest's writes wait until some of it is applied. If this lasts, \
                 give more with --disk-log-max or a faster disk"
            );
            events(Event::warning(Remark::of(&title, text)));
        })
    }

    fn on_base_full(&self, title: SessionTitle) -> OnBaseFull {
        let events = self.events.clone();
        Box::new(move |disk, error| {
            let text = format!(
                "session {title}: what is committed cannot be written to the base of disk {disk}: {error}. It stays in the log, and is tried again \
                 every second: make room on that file system"
            );
            events(Event::warning(Remark::of(&title, text)));
        })
    }

    pub(in crate::receiver) fn unbound(&self) -> Vec<UnboundDisk> {
        let known = self.known();
        let entries = known.entries.iter().filter(|entry| entry.session.is_none());
        let status = |entry: &Entry| {
            let (disk, client) = (entry.disk.upgrade()?, entry.client.as_ref()?);
            Some(UnboundDisk {
                name: entry.name.clone(),
                base: disk.base().path().to_owned(),
                size_bytes: disk.base().size(),
                state: DiskState::Copying,
                from: client.from.clone(),
                uuid: entry.uuid.as_ref().map(format_uuid),
                written_bytes: disk.figures().written_bytes,
            })
        };
        entries.filter_map(status).collect()
    }
}

/// What a disk does with the connection of its client.
fn link(client: &Client) -> Link {
    let [ended, looked_at] = [client.socket.clone(), client.socket.clone()];
    Link {
        hang_up: Box::new(move || hang_up(&ended)),
        is_gone: Box::new(move || is_gone(looked_at.as_fd())),
    }
}

fn on_loss(session: &Arc<LiveSession>) -> Box<dyn Fn(Arc<DiskError>) + Send + Sync> {
    let session = Arc::downgrade(session);
    Box::new(move |error| {
        if let Some(session) = session.upgrade() {
            session.finish(SessionEnd::Disk(error));
        }
    })
}

fn hang_up(socket: &OwnedFd) {
    // It fails only where the peer has closed already.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
}

fn start_applying(disk: &Arc<Disk>, threads: &Threads) -> Result<(), DiskError> {
    let own = disk.clone();
    let started = threads.start(ThreadKind::Disk, "disk-apply", move || {
        crate::disk::apply_all(&own);
    });
    started.map(drop).map_err(|source| DiskError::Thread {
        disk: disk.name().to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_are_named_with_or_without_a_uuid() {
        let uuid = "0c5a1f00-0000-4000-8000-0000000000ff";
        let asked = format!("web3-root@{uuid}");
        let (name, parsed) = parse(&asked).unwrap();
        assert_eq!(name, "web3-root");
        assert_eq!(format_uuid(&parsed.unwrap()), uuid);
        assert_eq!(parse("root").unwrap(), ("root", None));
        for wrong in [
            "root@",
            "root@0c5a",
            "../root",
            "",
            "a@0c5a1f00-0000-4000-8000-0000000000fg",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
