//! One session in the simulation: the model primary with the real guest, and the question whether they agree.

use super::disks::{RecoveredDisks, SimDisks};
use super::guard::SimGuard;
use super::hostile::Hostility;
use super::memory::{Content, PAGE};
use super::primary::{Primary, Stage};
use super::stranger::Stranger;
use crate::budget::Budget;
use crate::metrics::CheckpointSample;
use crate::receiver::dump::{self, DumpDisks};
use crate::receiver::dump_files::DumpFiles;
use crate::receiver::end::{ChannelError, SessionEnd};
use crate::receiver::live_session::LiveSession;
use crate::receiver::recovery::label;
use crate::receiver::session_codec::{StoredSession, decode};
use crate::ring::sim::{Network, Pipe};
use crate::session;
use crate::store::{Recoverable, RecoverableCheckpoint};
use crate::units::PageIndex;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub(super) struct SimSession {
    pub(super) live: Arc<LiveSession>,
    pub(super) primary: Primary,
    /// The other ends of the descriptors; the main channel's first.
    pub(super) peers: Vec<OwnedFd>,
    /// Its connections among the network's; the main channel's first.
    pub(super) pipes: std::ops::Range<usize>,
    /// How much of each connection was sent by the primary: less than all for a cut or damaged one.
    pub(super) genuine: Vec<usize>,
    /// Whether something was done to it, so that it need not come to its end.
    pub(super) is_touched: bool,
    /// Whether it may lack memory, and end by that.
    pub(super) may_lack: bool,
    /// All connections and tenants are dropped, and what was not committed is dropped.
    pub(super) is_over: bool,
    /// A packet that the primary should not have sent.
    pub(super) intruder: Option<Intruder>,
    pub(super) disks: Option<SimDisks>,
    pub(super) guard: Option<SimGuard>,
    /// Of a primary that sends what none should.
    pub(super) hostility: Option<Hostility>,
    /// A channel that is not the primary's.
    pub(super) stranger: Option<Stranger>,
    committed: usize,
    samples: usize,
}

/// A page sent between the last sync of a checkpoint and CHECKPOINT_REPLY. It may arrive before the receiver can know that, and
/// then belongs to that checkpoint; or, if it was sent after the request, after the gate was opened, and then belongs to the
/// next. Else the session must end by it.
pub(super) struct Intruder {
    pub(super) channel: usize,
    /// The only state that it may belong to.
    pub(super) state: usize,
    pub(super) page: usize,
    pub(super) content: Content,
    /// It came in time.
    is_in: bool,
}

impl Intruder {
    pub(super) fn new(channel: usize, state: usize, page: usize, content: Content) -> Self {
        Self {
            channel,
            state,
            page,
            content,
            is_in: false,
        }
    }
}

impl SimSession {
    pub(super) fn new(
        live: Arc<LiveSession>,
        primary: Primary,
        peers: Vec<OwnedFd>,
        pipes: std::ops::Range<usize>,
        may_lack: bool,
    ) -> Self {
        Self {
            genuine: vec![usize::MAX; peers.len()],
            live,
            primary,
            peers,
            pipes,
            is_touched: false,
            may_lack,
            is_over: false,
            intruder: None,
            disks: None,
            guard: None,
            hostility: None,
            stranger: None,
            committed: 0,
            samples: 0,
        }
    }

    /// Gives what the primary has written to the network.
    pub(super) fn send(&mut self, net: &mut Network) {
        if let Some(hostility) = &mut self.hostility {
            hostility.corrupt(&mut self.primary);
        }
        if let Some(stranger) = &self.stranger {
            stranger.send(&mut self.primary);
        }
        for (stream, pipe) in self
            .primary
            .streams
            .iter_mut()
            .zip(&mut net.pipes[self.pipes.clone()])
        {
            pipe.seam = stream.false_end;
            // A connection that ends takes nothing more.
            let out = std::mem::take(&mut stream.out);
            if pipe.end == crate::ring::sim::StreamEnd::Open {
                pipe.sent.extend_from_slice(&out);
            }
        }
    }

    /// Reads answers; whether there were any.
    pub(super) fn read_answers(&mut self) -> Result<bool, String> {
        let mut bytes = [0; 64];
        match recv(self.peers[0].as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN | Errno::ECONNRESET) => Ok(false),
            Ok(_) if self.hostility.is_some() => Ok(self.primary.ignore_answers()),
            Ok(count) => self.primary.read_answers(&bytes[..count]).map(|()| true),
            Err(errno) => Err(format!("reading answers: {errno}")),
        }
    }

    /// Pages that have come on the main channel so far, where that is known at once.
    pub(super) fn main_channel_pages(&self) -> u64 {
        let counters = &self.live.counters;
        match self.live.channels() {
            0 => counters.pages.load(Ordering::Relaxed) + counters.zero_pages.load(Ordering::Relaxed),
            _ => 0,
        }
    }

    /// Checkpoints of which everything is here, the initial state counted.
    fn delivered(&self, pipes: &[Pipe]) -> usize {
        let snapshots = &self.primary.snapshots;
        let is_here = |at: &usize| {
            let mut parts = snapshots[*at].complete_at.iter().zip(&self.genuine).zip(pipes);
            parts.all(|((end, genuine), pipe)| end <= genuine && *end <= pipe.taken)
        };
        (0..snapshots.len()).take_while(is_here).count()
    }

    /// Of each connection, in order: where the next state ends, what the primary has sent, and what was taken.
    fn places(&self, pipes: &[Pipe], state: usize) -> String {
        let Some(snapshot) = self.primary.snapshots.get(state) else {
            return "the primary has sent no more".to_owned();
        };
        let parts = snapshot.complete_at.iter().zip(&self.genuine).zip(pipes);
        let places = parts.map(|((end, genuine), pipe)| format!("{end}/{genuine}/{}", pipe.taken));
        places.collect::<Vec<_>>().join(" ")
    }

    /// Whether a checkpoint is here that is not committed yet.
    pub(super) fn commits_soon(&self, net: &Network) -> bool {
        self.live.end().is_none() && self.delivered(&net.pipes[self.pipes.clone()]) > self.committed
    }

    /// Whether everything that the primary has sent on its main channel was taken.
    pub(super) fn is_main_channel_empty(&self, net: &Network) -> bool {
        let main = &net.pipes[self.pipes.start];
        main.taken == main.sent.len() && !main.is_filling()
    }

    /// Compares what is committed with what the primary has sent, whole.
    pub(super) fn check(&mut self, net: &Network) -> Result<(), String> {
        if let Some(hostility) = &mut self.hostility {
            let store = self.live.store();
            return store.map_or(Ok(()), |store| hostility.check(store));
        }
        if self.stranger.is_some() {
            let committed = self.live.store().and_then(|store| store.committed().checkpoint());
            return match committed {
                None => Ok(()),
                Some(state) => Err(format!(
                    "state {state} is committed with a stranger among its channels"
                )),
            };
        }
        let delivered = self.delivered(&net.pipes[self.pipes.clone()]);
        let acknowledged = self.primary.acknowledged;
        let store = self.live.store();
        let committed = store.and_then(|store| store.committed().checkpoint());
        let committed = committed.map_or(0, |id| usize::try_from(id.0).expect("few") + 1);
        if committed < acknowledged {
            return Err(format!(
                "{acknowledged} states are acknowledged and {committed} committed"
            ));
        }
        if committed > 0 && !self.live.admission.has_begun() {
            return Err(format!("{committed} states are committed without an admission"));
        }
        if committed > delivered {
            let places = self.places(&net.pipes[self.pipes.clone()], delivered);
            return Err(format!(
                "{committed} states are committed and {delivered} here: {places}"
            ));
        }
        if committed < self.committed {
            return Err(format!(
                "{} states were committed, now {committed}",
                self.committed
            ));
        }
        let now = std::mem::replace(&mut self.committed, committed) != committed;
        let Some(store) = store.filter(|_| committed > 0).cloned() else {
            return Ok(());
        };
        if let Some(intruder) = &mut self.intruder
            && (now && intruder.state + 1 == committed)
        {
            let mut page = [0; PAGE];
            store.read_committed(PageIndex::new(intruder.page as u64), &mut page);
            intruder.is_in = page == *intruder.content;
        }
        let read = |page, content: &mut _| store.read_committed(page, content);
        self.compare(read, &store.committed().device_state())?;
        match &self.disks {
            Some(disks) => disks.check(committed - 1),
            None => Ok(()),
        }
    }

    /// What a failover would find now: the checkpoint that is committed.
    pub(super) fn recover(&self) -> Result<(), String> {
        if self.hostility.is_some() {
            return Ok(());
        }
        let view = self
            .live
            .checkpoint()
            .and_then(|checkpoint| checkpoint.image.checkpoint_view());
        let is_spoilt = self.is_spoilt();
        match (self.committed.checked_sub(1), view) {
            (None, None) => Ok(()),
            // What came behind the initial state was no request: it may have been the rest of it.
            (Some(0), None) if is_spoilt => Ok(()),
            (Some(state), Some(view)) if view.checkpoint().0 == state as u64 => {
                let read = |page, content: &mut _| view.read(page, content);
                self.compare(read, view.device_state())
                    .map_err(|error| format!("in a failover: {error}"))
            }
            (state, view) => {
                let view = view.map(|view| view.checkpoint());
                Err(format!(
                    "a failover finds {view:?} where state {state:?} is committed"
                ))
            }
        }
    }

    /// What the next receiver finds in a directory, where `before` states were committed before the step in which this one
    /// was killed.
    pub(super) fn found(&self, directory: &Path, before: u64) -> Result<(), String> {
        if self.is_spoilt() {
            return Ok(());
        }
        let files = RecoverableCheckpoint::find(directory, &label(self.live.id))
            .map_err(|error| error.to_string())?;
        let files = match files {
            Recoverable::Checkpoint(files) => files,
            Recoverable::InUse => return Err("another process uses it".to_owned()),
            Recoverable::Nothing | Recoverable::Unknown => {
                return match before {
                    0 => Ok(()),
                    _ => Err(format!("nothing is found where {before} states were committed")),
                };
            }
        };
        let StoredSession {
            guest,
            description,
            disks,
        } = decode(files.session()).map_err(|error| error.to_string())?;
        let committed = files
            .recover(description.blocks.clone(), &Budget::unlimited())
            .map_err(|error| error.to_string())?;
        let view = committed.checkpoint_view().ok_or("nothing was recovered")?;
        let state = view.checkpoint().0;
        if state + 1 < before || state >= self.committed as u64 {
            return Err(format!(
                "state {state} is found where between {before} and {} were committed",
                self.committed
            ));
        }
        if guest != self.live.guest.stored()
            || self
                .live
                .checkpoint()
                .is_none_or(|known| *known.description != description)
        {
            return Err("what is found is of another session".to_owned());
        }
        let state = usize::try_from(state).expect("few");
        self.compare_with(
            state,
            |page, content: &mut _| view.read(page, content),
            view.device_state(),
        )?;
        match (&self.disks, committed.files()) {
            (Some(own), Some(ram)) => own.found(
                &RecoveredDisks {
                    stored: &disks,
                    directory,
                    ram,
                },
                state,
            ),
            _ => Ok(()),
        }
    }

    /// Whether the primary may go on: an intruder that is still on its way could pass for a page of the next checkpoint.
    pub(super) fn may_act(&self, net: &Network) -> bool {
        let Some(intruder) = &self.intruder else {
            return self.primary.may_act();
        };
        let pipe = &net.pipes[self.pipes.start + 1 + intruder.channel];
        let is_through = pipe.taken == pipe.sent.len() && net.outstanding().1 == 0 && !pipe.is_filling();
        self.primary.may_act() && (is_through || self.live.end().is_some())
    }

    /// Whether a page may have this content though it is not the snapshot's.
    fn is_intruder(&self, at: usize, page: &[u8; PAGE]) -> bool {
        let intruder = self.intruder.as_ref().filter(|intruder| intruder.is_in);
        intruder.is_some_and(|intruder| intruder.page == at && *intruder.content == *page)
    }

    fn compare(&self, read: impl Fn(PageIndex, &mut [u8; PAGE]), device_state: &[u8]) -> Result<(), String> {
        self.compare_with(self.committed - 1, read, device_state)
    }

    fn compare_with(
        &self,
        state: usize,
        read: impl Fn(PageIndex, &mut [u8; PAGE]),
        device_state: &[u8],
    ) -> Result<(), String> {
        let snapshot = &self.primary.snapshots[state];
        let mut page = [0; PAGE];
        for (at, expected) in snapshot.pages.iter().enumerate() {
            read(PageIndex::new(at as u64), &mut page);
            if page != **expected && !self.is_intruder(at, &page) {
                return Err(format!(
                    "page {at} of {} is not what state {state} had there: {}",
                    snapshot.pages.len(),
                    self.what_is(at, &page)
                ));
            }
        }
        match device_state == snapshot.device_state {
            true => Ok(()),
            false => Err(format!("the device state is not that of state {state}")),
        }
    }

    /// What is known of a page that should not be there.
    fn what_is(&self, at: usize, page: &[u8; PAGE]) -> String {
        let states = self.primary.snapshots.iter();
        let known = states.enumerate().find(|(_, state)| *state.pages[at] == *page);
        match known {
            Some((state, _)) => format!("it is what state {state} had"),
            None if page.iter().all(|byte| *byte == 0) => "it is zero".to_owned(),
            None => "no state had this".to_owned(),
        }
    }

    /// A measurement of a checkpoint: as many pages as were sent for it.
    pub(super) fn measured(&mut self, sample: &CheckpointSample) -> Result<(), String> {
        if self.hostility.is_some() {
            return Ok(());
        }
        self.samples += 1;
        let number = usize::try_from(sample.checkpoint).expect("few");
        if number != self.samples {
            return Err(format!("measurement {} is of checkpoint {number}", self.samples));
        }
        let (sent, seen) = (
            self.primary.snapshots[number].sent,
            (sample.pages, sample.zero_pages),
        );
        if sent != seen && self.intruder.is_none() {
            return Err(format!(
                "checkpoint {number}: {sent:?} pages and zero pages sent, {seen:?} counted"
            ));
        }
        Ok(())
    }

    /// Dumps the committed checkpoint and compares the files.
    pub(super) fn dump(&self, directory: &Path) -> Result<(), String> {
        let checkpoint = self.live.checkpoint().ok_or("nothing to dump")?;
        let files = DumpFiles::create(directory, dump::contents(checkpoint, DumpDisks::Live));
        let files = files.map_err(|error| error.to_string())?;
        let open = files.descriptors().into_iter();
        let open = open
            .map(|file| file.try_clone_to_owned())
            .collect::<Result<_, _>>();
        let open = open.map_err(|error| error.to_string())?;
        let dumped = dump::dump(checkpoint, open, files.disks(), DumpDisks::Live);
        let dumped = files.finish(dumped.map_err(|error| error.to_string())?);
        let dumped = dumped.map_err(|error| error.to_string())?;
        let snapshot = &self.primary.snapshots[self.committed - 1];
        if dumped.checkpoint != self.committed as u64 - 1 {
            return Err(format!("a dump of checkpoint {}", dumped.checkpoint));
        }
        let read = |file: &str| std::fs::read(directory.join(file)).map_err(|error| error.to_string());
        let mut ram = Vec::new();
        for block in &dumped.blocks {
            ram.extend(read(&block.file)?);
        }
        let pages = ram.as_chunks::<PAGE>().0;
        let mut both = pages.iter().zip(&snapshot.pages).enumerate();
        let is_equal = both.all(|(at, (page, expected))| *page == **expected || self.is_intruder(at, page));
        if pages.len() != snapshot.pages.len() || !is_equal {
            return Err("a dump is not its checkpoint's memory".to_owned());
        }
        if read(&dumped.device_state_file)? != snapshot.device_state {
            return Err("a dump is not its checkpoint's device state".to_owned());
        }
        Ok(())
    }

    /// Whether what is committed is still on its way to the image.
    pub(super) fn is_flushing(&self) -> bool {
        self.live.store().is_some_and(|store| store.is_flushing())
    }

    /// Whether what is committed was given up with its session.
    fn is_spoilt(&self) -> bool {
        self.live.end().is_some_and(SessionEnd::spoils_checkpoint)
    }

    /// Whether something is committed that could be dumped.
    pub(super) fn is_committed(&self) -> bool {
        self.committed > 0 && !self.is_spoilt()
    }

    pub(super) fn commits(&self) -> u64 {
        self.committed as u64
    }

    /// How it ended, in a word.
    pub(super) fn end(&self) -> &'static str {
        match self.live.end() {
            None => "not",
            Some(SessionEnd::PrimaryLost(_)) => "primary lost",
            Some(SessionEnd::Broken { .. }) => "broken",
            Some(SessionEnd::MainChannel(_)) => "main channel",
            Some(SessionEnd::Channel {
                error: ChannelError::Protocol(session::ChannelError::GateClosed),
                ..
            }) => "gate closed",
            Some(SessionEnd::Channel {
                error: ChannelError::NoMemory(_),
                ..
            }) => "no memory",
            Some(SessionEnd::Channel { .. }) => "channel",
            Some(SessionEnd::NotQuiet { .. }) => "not quiet",
            Some(SessionEnd::NoMemory(_)) => "no memory",
            Some(SessionEnd::Stopped) => "stopped",
            Some(SessionEnd::Contradicted { .. }) => "contradicted",
            Some(SessionEnd::Disk(_)) => "disk",
            Some(SessionEnd::GuardLost) => "guard lost",
            Some(_) => "another",
        }
    }

    /// Whether it must come to its end: nothing was done to it, and it has not ended for want of memory or of its guard where that may be.
    pub(super) fn must_be_done(&self) -> bool {
        let has_lost_guard = self.guard.as_ref().is_some_and(SimGuard::is_lost_early);
        let may_end = match self.end() {
            "no memory" => self.may_lack,
            "guard lost" => has_lost_guard,
            _ => false,
        };
        !(self.is_touched || may_end)
    }

    /// What the control thread does when all connections and tenants are dropped.
    pub(super) fn finish_if_over(&mut self) -> Result<bool, String> {
        if self.is_over || !self.live.is_over() {
            return Ok(false);
        }
        self.is_over = true;
        // A primary may be in the middle of a write, and what is left to do may take long.
        if !self.live.is_closed() {
            return Err("a socket of a session that is over is open".to_owned());
        }
        self.live.services.shared().links.session_ended(self.live.id);
        let end = self.live.end().map(ToString::to_string);
        let end = end.ok_or("all connections have left a session that has not ended")?;
        if self.must_be_done() && self.primary.stage != Stage::Done {
            return Err(format!("the session has ended by itself: {end}"));
        }
        let is_measured = self.samples + 1 >= self.primary.acknowledged && self.samples <= self.committed;
        if !is_measured && self.hostility.is_none() {
            return Err(format!(
                "{} measurements of {} states",
                self.samples, self.committed
            ));
        }
        if let Some(disks) = &self.disks {
            disks.end(self.live.disks(), self.committed.checked_sub(1))?;
        }
        self.recover()?;
        if let Some(store) = self.live.store() {
            store.drop_uncommitted();
            if store.dirty_pages() > 0 {
                return Err("what was not committed was not dropped".to_owned());
            }
            let pool = store.pool_use().filter(|pool| pool.free_extents != pool.extents);
            if let Some(pool) = pool {
                return Err(format!("extents of the pool are never given back: {pool:?}"));
            }
        }
        self.recover()?;
        Ok(true)
    }
}
