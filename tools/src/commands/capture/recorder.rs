//! The recording, off the way of what is recorded: a queue that takes at once, and a thread that writes the capture.
//!
//! The queue is bounded in bytes. A disk that is too slow, full or gone ends the recording with what is there; the
//! producer does not fail by it.

use crate::capture_file::{CaptureError, CaptureWriter, ConnectionId, Direction, EndKind, Event, Totals};
use crate::output::tell;
use clap::ValueEnum;
use crossbeam_queue::ArrayQueue;
use schemars::JsonSchema;
use serde::Serialize;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A reader of the growing file sees what is older than this.
const FLUSH_EVERY: Duration = Duration::from_millis(500);

/// Most buffers that wait for their next use.
const SPARE_MAX: usize = 64;

/// A disk that makes no room for so long counts as one that does not keep up, as long as the guest is not protected.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to do when the disk does not keep up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WhenBehind {
    /// End the recording and go on forwarding: a protected guest is never held up. Until it is protected, while its
    /// memory is copied for the first time, its connection waits for the disk
    End,
    /// Hold the connection up until there is room again: nothing is lost, but the guest's pauses may get longer
    Wait,
}

/// What to record.
enum Item {
    Open {
        connection: ConnectionId,
        label: String,
    },
    Data {
        connection: ConnectionId,
        direction: Direction,
        bytes: Vec<u8>,
    },
    End {
        connection: ConnectionId,
        direction: Direction,
        how: EndKind,
    },
    Note(String),
    /// End the recording in an orderly way; early for that reason.
    Stop(Option<String>),
}

/// What both sides of the queue see.
struct Shared {
    /// Bytes that wait to be written.
    queued_bytes: AtomicU64,
    /// Nothing more is recorded.
    ended: AtomicBool,
    /// There is room again, or the recording has ended.
    room: Notify,
    spare: ArrayQueue<Vec<u8>>,
}

/// A recording that goes on.
pub struct Recorder {
    queue: Sender<(Duration, Item)>,
    shared: Arc<Shared>,
    started: Instant,
    queue_bytes_max: u64,
    when_behind: WhenBehind,
    /// The guest is protected: a connection that waits makes its pauses longer.
    guest_protected: Cell<bool>,
    thread: JoinHandle<Recorded>,
}

/// A recording that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// What is in the file.
    pub totals: Totals,
    /// Why it ended early, if it did.
    pub ended_early: Option<String>,
}

impl Recorder {
    /// Starts the thread that writes to `writer`. Times count from now.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        writer: CaptureWriter<File>,
        queue_bytes_max: u64,
        when_behind: WhenBehind,
    ) -> io::Result<Self> {
        let (queue, queued) = channel();
        let shared = Arc::new(Shared {
            queued_bytes: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            room: Notify::new(),
            spare: ArrayQueue::new(SPARE_MAX),
        });
        let thread = std::thread::Builder::new().name("capture-writer".to_owned());
        let of_thread = shared.clone();
        Ok(Self {
            queue,
            shared,
            started: Instant::now(),
            queue_bytes_max,
            when_behind,
            guest_protected: Cell::new(false),
            thread: thread.spawn(move || write_all(writer, &queued, &of_thread))?,
        })
    }

    /// A buffer for the next bytes: one that was used before, if there is one.
    pub fn buffer(&self) -> Vec<u8> {
        self.shared.spare.pop().unwrap_or_default()
    }

    /// From now on nothing is held up for the disk, unless that is wanted.
    pub fn guest_is_protected(&self) {
        self.guest_protected.set(true);
    }

    /// Waits for room in the queue, if that is better than an end.
    pub async fn room(&self) {
        while self.is_full() && self.waits() && !self.has_ended() {
            // In this order nothing is missed: room that is made after the question wakes this.
            let room = self.shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if !self.is_full() || self.has_ended() {
                return;
            }
            let waited = tokio::time::timeout(PATIENCE, room).await;
            if waited.is_err() && self.when_behind == WhenBehind::End {
                self.stop(Some(format!(
                    "the disk did not take any data for {} s",
                    PATIENCE.as_secs()
                )));
            }
        }
    }

    /// Records that a connection was opened.
    pub fn open(&self, connection: ConnectionId, label: String) {
        self.put(Instant::now(), Item::Open { connection, label });
    }

    /// Records what was read at `at`.
    pub fn data(&self, at: Instant, connection: ConnectionId, direction: Direction, bytes: Vec<u8>) {
        if self.has_ended() {
            return give_back(&self.shared, bytes);
        }
        if self.is_full() && !self.waits() {
            give_back(&self.shared, bytes);
            return self.stop(Some(format!(
                "the disk did not keep up: more than {} bytes waited for it; --queue takes more, --when-behind wait \
                 holds the connection up instead",
                self.queue_bytes_max
            )));
        }
        // A message of a few bytes does not take a large buffer along.
        let bytes = if bytes.len() < bytes.capacity() / 4 {
            let small = bytes.to_vec();
            give_back(&self.shared, bytes);
            small
        } else {
            bytes
        };
        let item = Item::Data {
            connection,
            direction,
            bytes,
        };
        self.put(at, item);
    }

    /// Records the end of one direction.
    pub fn end(&self, connection: ConnectionId, direction: Direction, how: EndKind) {
        self.put(
            Instant::now(),
            Item::End {
                connection,
                direction,
                how,
            },
        );
    }

    /// Records something worth knowing.
    pub fn note(&self, text: String) {
        self.put(Instant::now(), Item::Note(text));
    }

    /// Ends the recording with what was handed in so far; early, where a reason is given.
    pub fn stop(&self, early: Option<String>) {
        self.put(Instant::now(), Item::Stop(early));
        self.shared.ended.store(true, Ordering::Relaxed);
    }

    /// Whether nothing more is recorded.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Relaxed)
    }

    /// Ends the recording, if it goes on, and waits until it is written.
    pub fn finish(self) -> Recorded {
        drop(self.queue);
        self.thread.join().expect("the writer's thread does not panic")
    }

    fn waits(&self) -> bool {
        self.when_behind == WhenBehind::Wait || !self.guest_protected.get()
    }

    fn is_full(&self) -> bool {
        self.shared.queued_bytes.load(Ordering::Relaxed) >= self.queue_bytes_max
    }

    fn put(&self, at: Instant, item: Item) {
        if self.has_ended() {
            return;
        }
        self.shared.queued_bytes.fetch_add(cost(&item), Ordering::Relaxed);
        // The other end is gone only where the recording has ended meanwhile.
        let _ = self
            .queue
            .send((at.saturating_duration_since(self.started), item));
    }
}

/// Memory that an item takes while it waits.
fn cost(item: &Item) -> u64 {
    let content = match item {
        Item::Data { bytes, .. } => bytes.capacity(),
        Item::Open { label: text, .. } | Item::Note(text) => text.capacity(),
        Item::End { .. } | Item::Stop(_) => 0,
    };
    (content + size_of::<(Duration, Item)>()) as u64
}

fn give_back(shared: &Shared, bytes: Vec<u8>) {
    // Where there are enough it is freed.
    let _ = shared.spare.push(bytes);
}

/// The writer's thread, from start to end.
fn write_all(
    mut writer: CaptureWriter<File>,
    queued: &Receiver<(Duration, Item)>,
    shared: &Shared,
) -> Recorded {
    let ended = write_items(&mut writer, queued, shared).and_then(|early| {
        if let Some((at, reason)) = &early {
            writer.write(*at, Event::Note(&format!("the recording ended early: {reason}")))?;
        }
        Ok(early.map(|(_, reason)| reason))
    });
    // Handed in from now on it is dropped, and no writer waits for room.
    shared.ended.store(true, Ordering::Relaxed);
    shared.room.notify_waiters();
    let written = writer.totals();
    let recorded = ended.and_then(|ended_early| {
        let totals = writer.finish()?;
        Ok(Recorded { totals, ended_early })
    });
    let recorded = recorded.unwrap_or_else(|error: CaptureError| Recorded {
        totals: written,
        ended_early: Some(error.to_string()),
    });
    if let Some(reason) = &recorded.ended_early {
        tell(&format!(
            "warning: the recording has ended: {reason}. Forwarding goes on"
        ));
    }
    recorded
}

/// Writes until the recording is to end. Returns when and why that is early, if it is.
fn write_items(
    writer: &mut CaptureWriter<File>,
    queued: &Receiver<(Duration, Item)>,
    shared: &Shared,
) -> Result<Option<(Duration, String)>, CaptureError> {
    let mut flushed = Instant::now();
    loop {
        let wait = FLUSH_EVERY.saturating_sub(flushed.elapsed());
        match queued.recv_timeout(wait) {
            Ok((at, Item::Stop(early))) => return Ok(early.map(|reason| (at, reason))),
            Ok((at, item)) => {
                let cost = cost(&item);
                write_item(writer, at, item, shared)?;
                shared.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
                shared.room.notify_waiters();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
        if flushed.elapsed() >= FLUSH_EVERY {
            writer.flush()?;
            flushed = Instant::now();
        }
    }
}

fn write_item(
    writer: &mut CaptureWriter<File>,
    at: Duration,
    item: Item,
    shared: &Shared,
) -> Result<(), CaptureError> {
    match item {
        Item::Open { connection, label } => writer.write(
            at,
            Event::Open {
                connection,
                label: &label,
            },
        ),
        Item::Data {
            connection,
            direction,
            bytes,
        } => {
            let event = Event::Data {
                connection,
                direction,
                bytes: &bytes,
            };
            let written = writer.write(at, event);
            give_back(shared, bytes);
            written
        }
        Item::End {
            connection,
            direction,
            how,
        } => writer.write(
            at,
            Event::End {
                connection,
                direction,
                how,
            },
        ),
        Item::Note(text) => writer.write(at, Event::Note(&text)),
        Item::Stop(_) => Ok(()),
    }
}
