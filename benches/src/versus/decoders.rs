//! The limit of the decoders: a captured session's payloads decoded in memory, by as many threads as a secondary has
//! cores here, and nothing else done. No secondary that decodes the same streams can be faster with them.

use super::contest::{Session, TurnOf};
use super::replays::bad_run;
use colo_ring::wire::WireError;
use colo_ring::wire::codec::{Decoder, PageBuffer};
use colo_ring_tests::lab::LabError;
use colo_ring_tools::run_file::{Checkpoint, Clock, RunFile, SecondaryUse};
use colo_ring_tools::streams::{Channel, Streams};
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant, SystemTime};

/// Channels are spread over so many threads.
const THREADS: usize = 2;

/// Decodes the session of a capture, checkpoint by checkpoint.
///
/// # Errors
/// When the capture cannot be read or decoded.
pub fn session(capture: &Path, turn: &TurnOf<'_>, prefix: &Path) -> Result<Session, LabError> {
    let malformed = |detail: String| LabError::Malformed {
        what: capture.display().to_string(),
        detail,
    };
    let started = SystemTime::now();
    let streams = Streams::load(capture).map_err(|error| malformed(error.to_string()))?;
    let count = usize::try_from(turn.checkpoints).unwrap_or(usize::MAX);
    let count = count.min(streams.checkpoints.len());
    let (spans, cpu) = decode(&streams, count).map_err(|error| malformed(error.to_string()))?;
    let options = serde_json::json!({ "cell": turn.cell.name(), "threads": THREADS });
    let name = turn.secondary.title("");
    let mut run = RunFile::new(&name, "bench-vs-qemu", options, Clock::Primary, started);
    run.compression = Some(streams.compression().to_owned());
    run.secondary = Some(SecondaryUse {
        pid: std::process::id(),
        cpu_ns: nanoseconds(cpu),
        rss_bytes_max: 0,
    });
    let checkpoint =
        |((n, span), captured): ((u64, &Duration), &colo_ring_tools::streams::Checkpoint)| Checkpoint {
            n,
            phases_ns: BTreeMap::from([("loaded".to_owned(), nanoseconds(*span))]),
            pages: captured.pages,
            zero_pages: captured.zero_pages,
            bytes: captured.bytes,
            ..Checkpoint::default()
        };
    run.checkpoints = (1..)
        .zip(&spans)
        .zip(&streams.checkpoints)
        .map(checkpoint)
        .collect();
    run.write(prefix).map_err(bad_run)?;
    Ok(Session { run, flushed: None })
}

/// Decodes precopy, then so many checkpoints. Returns how long each took, and the threads' processor time for all.
fn decode(streams: &Streams, checkpoints: usize) -> Result<(Vec<Duration>, Duration), WireError> {
    let turn = Barrier::new(THREADS + 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let turn = &turn;
                scope.spawn(move || {
                    let mut group = Group::new(streams, thread);
                    group.decode(|place| streams.precopy.packets[place].clone());
                    turn.wait();
                    let begin = thread_cpu_time();
                    for checkpoint in &streams.checkpoints[..checkpoints] {
                        turn.wait();
                        group.decode(|place| checkpoint.packets[place].clone());
                        turn.wait();
                    }
                    group.failed.map_or(Ok(()), Err)?;
                    Ok::<_, WireError>(thread_cpu_time().saturating_sub(begin))
                })
            })
            .collect();
        turn.wait();
        let mut spans = Vec::with_capacity(checkpoints);
        for _ in 0..checkpoints {
            turn.wait();
            let begin = Instant::now();
            turn.wait();
            spans.push(begin.elapsed());
        }
        let mut cpu = Duration::ZERO;
        for thread in threads {
            cpu += thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok((spans, cpu))
    })
}

/// The channels of one thread, with the decoder of each.
struct Group<'a> {
    channels: Vec<(usize, &'a Channel, Option<Decoder>)>,
    buffer: PageBuffer,
    /// Kept until the end: the others wait for this thread at each checkpoint.
    failed: Option<WireError>,
}

impl<'a> Group<'a> {
    fn new(streams: &'a Streams, thread: usize) -> Self {
        let channels = streams.channels.iter().enumerate().skip(thread).step_by(THREADS);
        Self {
            channels: channels.map(|(place, channel)| (place, channel, None)).collect(),
            buffer: PageBuffer::default(),
            failed: None,
        }
    }

    /// Decodes those packets of each channel.
    fn decode(&mut self, packets: impl Fn(usize) -> Range<usize>) {
        for (place, channel, decoder) in &mut self.channels {
            for number in packets(*place) {
                if self.failed.is_none() {
                    self.failed = decode_packet(channel, number, decoder, &mut self.buffer).err();
                }
            }
        }
    }
}

fn decode_packet(
    channel: &Channel,
    number: usize,
    decoder: &mut Option<Decoder>,
    buffer: &mut PageBuffer,
) -> Result<(), WireError> {
    let normal = channel.packets()[number].normal;
    if normal == 0 {
        return Ok(());
    }
    if decoder.is_none() {
        *decoder = channel.method().map_or(Ok(None), Decoder::open)?;
    }
    match decoder {
        None => Ok(()),
        Some(decoder) => decoder.decode(channel.payload(number), normal, buffer).map(drop),
    }
}

fn thread_cpu_time() -> Duration {
    // It exists on every Linux.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
