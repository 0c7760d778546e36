//! The guest's memory as its main channel uses it: pages that travel on that channel, the commit of each checkpoint, its
//! flush, and what is measured of it.

use super::end::SessionEnd;
use super::live_session::LiveSession;
use super::main_buffer::MainBuffer;
use super::pool_policy::PoolPolicy;
use super::session_codec::encode;
use super::timeline::Measured;
use crate::metrics::CheckpointSample;
use crate::session::{Page, PageContent, Session};
use crate::store::{FlightRecord, Store, StoreError};
use crate::text::mebibytes;
use crate::units::{CheckpointId, PAGE_SIZE};
use crate::wire::{WireError, xbzrle};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One guest's checkpoints, from the moment its memory is there.
pub(super) struct Checkpoints {
    session: Arc<LiveSession>,
    store: Arc<Store>,
    /// Of the last checkpoint, until its flush has finished.
    measured: Option<Measured>,
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
            measured: None,
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

    /// Has another thread write the device state of the next checkpoint to its file, if that takes longer than other guests should
    /// wait for. False if there is nothing to wait for; else the main channel is woken for
    /// [`LiveSession::written_device_state`].
    pub(super) fn write_apart(&self, checkpoint: CheckpointId, protocol: &mut Session) -> bool {
        let session = &self.session;
        let is_small = protocol.device_state().len() <= session.services.shared().inline_state_bytes;
        if is_small || !self.store.outlives_process() {
            return false;
        }
        let store = self.store.clone();
        let write = move |device_state: &[u8]| store.write_device_state(checkpoint, device_state);
        let device_state = std::mem::take(protocol.device_state());
        let bytes = device_state.len();
        match session.write_apart(device_state, write) {
            Ok(()) => true,
            Err(device_state) => {
                *protocol.device_state() = device_state;
                session.warn(format!(
                    "there is no thread to write {} of device state: the receiving core does it, and \
                     other guests wait",
                    mebibytes(bytes as u64)
                ));
                false
            }
        }
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
                .record_session(|| encode(&session.guest.stored(), description, &disks));
        }
        if checkpoint == CheckpointId(0) {
            let unseen = self.store.unseen_pages();
            if unseen > 0 {
                session.warn(format!(
                    "{unseen} pages were never sent in precopy; they are taken as zero"
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
    /// says what is known of the checkpoint that it is given.
    pub(super) fn acknowledged(&mut self, measure: impl FnOnce(CheckpointId) -> Measured) {
        let checkpoint = self.store.committed().checkpoint().unwrap_or(CheckpointId(0));
        let measured = measure(checkpoint);
        // Now, so that it is there if this process is killed, and once more when its flush has finished.
        self.write_record(&measured.record);
        self.measured = Some(measured);
        if let Some(disks) = self.session.disks() {
            disks.acknowledged();
        }
        self.is_flushed();
        if let Some(error) = self.store.take_failure() {
            self.session.warn(format!(
                "checkpoints from {checkpoint} on are lost when this receiver ends: {error}"
            ));
        }
        if let Some(error) = self.store.take_unknown_room() {
            self.session.warn(format!(
                "it is not known what room the RAM directory has, so it may be filled up: {error}"
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
        if self.measured.is_some() {
            self.is_flushed();
        }
    }

    fn deliver_sample(&mut self) {
        if let Some(Measured { sample, record }) = self.measured.take() {
            let flush = self.store.flush_time();
            let flush_ns = u64::try_from(flush.as_nanos()).unwrap_or(u64::MAX);
            self.write_record(&FlightRecord { flush_ns, ..record });
            let samples = &self.session.services.shared().samples;
            samples.push(CheckpointSample { flush, ..sample });
        }
    }

    fn write_record(&self, record: &FlightRecord) {
        if let Ok(flight) = self.store.committed().flight() {
            flight.write(record);
        }
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        // The flush goes on without the main channel; the sample has its time so far.
        self.deliver_sample();
    }
}
