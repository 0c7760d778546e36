//! The guest's memory as its main channel uses it: pages that travel on that channel, the commit of each checkpoint, its
//! flush, and what is measured of it.

use super::end::SessionEnd;
use super::live_session::LiveSession;
use super::main_buffer::MainBuffer;
use super::pool_policy::PoolPolicy;
use super::session_codec::encode;
use crate::metrics::CheckpointSample;
use crate::session::{Page, PageContent, Session};
use crate::store::{Store, StoreError};
use crate::units::{CheckpointId, PAGE_SIZE};
use crate::wire::{WireError, xbzrle};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One guest's checkpoints, from the moment its memory is there.
pub(super) struct Checkpoints {
    session: Arc<LiveSession>,
    store: Arc<Store>,
    /// The last checkpoint's, until its flush has finished.
    sample: Option<CheckpointSample>,
    pool: PoolPolicy,
}

/// Why a page was not applied.
pub(super) enum PageError {
    Wire(WireError),
    Store(StoreError),
}

impl From<WireError> for PageError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<StoreError> for PageError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Checkpoints {
    pub(super) fn new(session: Arc<LiveSession>, store: Arc<Store>) -> Self {
        Self {
            session,
            store,
            sample: None,
            pool: PoolPolicy::default(),
        }
    }

    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Applies a page that came on the main channel. `shard` is the calling thread's.
    pub(super) fn apply(&self, buffer: &MainBuffer, shard: usize, page: Page<'_>) -> Result<(), PageError> {
        let counters = &self.session.counters;
        match page.content {
            PageContent::Zero => {
                self.store.zero(shard, page.page);
                counters.zero_pages.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            PageContent::Bytes(bytes) => buffer.keep(&self.store, shard, page.page, bytes)?,
            PageContent::Xbzrle(delta) => {
                if !self.store.was_received(page.page) {
                    return Err(WireError::Xbzrle("it changes a page that was never received").into());
                }
                let mut content = [0; PAGE_SIZE];
                self.store.read_newest(page.page, &mut content);
                xbzrle::apply(delta, &mut content)?;
                self.store.write(shard, page.page, &content)?;
            }
        }
        counters.pages.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Commits what the session has received.
    ///
    /// # Errors
    /// If a disk of the guest is not whole. Then nothing is committed.
    pub(super) fn commit(&self, checkpoint: CheckpointId, protocol: &mut Session) -> Result<(), SessionEnd> {
        let session = &self.session;
        if let Some(description) = protocol.description().filter(|_| checkpoint == CheckpointId(0)) {
            session.bind(description)?;
            // The end of precopy has no VMSTATE_SEND, but its guest is stopped.
            session.output.ask(checkpoint);
        }
        if let Some(disks) = session.disks() {
            disks.check_commit(checkpoint)?;
        }
        if let Some(description) = protocol.description()
            && session.keep_checkpoint(description)
        {
            let disks = session.disks().map_or_else(Vec::new, |disks| disks.stored());
            self.store
                .record_session(|| encode(&session.peer, description, &disks));
        }
        if checkpoint == CheckpointId(0) {
            let unseen = self.store.unseen_pages();
            if unseen > 0 {
                session.services.warn(format!(
                    "session {}: {unseen} pages were never sent in precopy; they are taken as zero",
                    session.id
                ));
            }
            self.store.begin_colo();
        }
        let flusher = &session.services.shared().flusher;
        self.store.commit(checkpoint, protocol.device_state(), flusher);
        if let Some(disks) = session.disks() {
            disks.commit(checkpoint);
        }
        session.output.committed(checkpoint);
        protocol.committed();
        Ok(())
    }

    /// The primary has stopped its guest, and its disks have answered all writes of the epoch: the epoch of its disks and of
    /// its output ends.
    ///
    /// # Errors
    /// If a disk is not whole.
    pub(super) fn end_epoch(&self, checkpoint: CheckpointId) -> Result<(), SessionEnd> {
        self.session.output.ask(checkpoint);
        match self.session.disks() {
            Some(disks) => Ok(disks.cut(checkpoint)?),
            None => Ok(()),
        }
    }

    /// A checkpoint is acknowledged, and the primary's guest runs again: work that was deferred begins now. `measure`
    /// makes the sample of the checkpoint that it is given.
    pub(super) fn acknowledged(&mut self, measure: impl FnOnce(CheckpointId) -> CheckpointSample) {
        let checkpoint = self.store.committed().checkpoint().unwrap_or(CheckpointId(0));
        self.sample = Some(measure(checkpoint));
        if let Some(disks) = self.session.disks() {
            disks.acknowledged();
        }
        self.is_flushed();
        if let Some(error) = self.store.take_failure() {
            self.session.services.warn(format!(
                "session {}: checkpoints from {checkpoint} on are lost when this receiver ends: {error}",
                self.session.id
            ));
        }
        self.pool.after_checkpoint(&self.session, &self.store);
    }

    /// Whether the last checkpoint's flush has finished; then its sample is delivered.
    pub(super) fn is_flushed(&mut self) -> bool {
        if self.store.is_flushing() {
            return false;
        }
        self.deliver_sample();
        true
    }

    /// The primary waits for the flush: lets other cores help.
    pub(super) fn hurry_flush(&self) {
        if self.store.allow_flush_help() {
            self.session.wake_helpers();
        }
    }

    /// Delivers the last checkpoint's sample if its flush has finished.
    pub(super) fn deliver_if_flushed(&mut self) {
        if self.sample.is_some() {
            self.is_flushed();
        }
    }

    fn deliver_sample(&mut self) {
        if let Some(sample) = self.sample.take() {
            let flush = self.store.flush_time();
            let samples = &self.session.services.shared().samples;
            samples.push(CheckpointSample { flush, ..sample });
        }
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        // The flush goes on without the main channel; the sample has its time so far.
        self.deliver_sample();
    }
}
