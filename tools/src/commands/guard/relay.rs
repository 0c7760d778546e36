//! A gate in the way of the frames: QEMU's network card is a `-netdev stream` to this process, which owns the tap device.
//!
//! QEMU sends each frame behind its length, four bytes, big-endian, and takes them in the same form. What the guest sends is held;
//! what comes for it passes at once.

use super::gate::{Counts, GateError, HOLD_TIMES_MAX, OutputGate};
use super::tap::{Tap, TapError};
use colo_ring::link::HeldOutput;
use colo_ring::net::{BoundSocket, Clients, bind_unix};
use colo_ring::units::CheckpointId;
use nix::poll::PollFlags;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;
use thiserror::Error;

/// Longest frame, in bytes: QEMU's own limit is 68 KiB and a few.
const FRAME_MAX: usize = 128 << 10;

/// What a frame costs beside its bytes.
const FRAME_COST: usize = 64;

/// Reads from QEMU before others have their turn.
const READS_AT_A_TIME: usize = 16;

/// Bytes that are read from QEMU at a time.
const READ_BYTES: usize = 256 << 10;

/// Frames from the tap that are passed on at a time, before the link has its turn.
const FRAMES_AT_A_TIME: usize = 64;

/// A frame of the guest.
struct Frame {
    bytes: Box<[u8]>,
    at: Instant,
}

/// A relay cannot be made.
#[derive(Debug, Error)]
pub(super) enum RelayError {
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Socket(#[from] io::Error),
}

/// QEMU's connection.
struct Card {
    socket: UnixStream,
    /// What has arrived of frames that are not whole.
    incoming: Vec<u8>,
    /// What did not fit into the socket.
    outgoing: Vec<u8>,
}

/// See the module.
pub(super) struct Relay {
    nic: String,
    listener: BoundSocket,
    card: Option<Card>,
    tap: Tap,
    /// Its name.
    tap_name: String,
    held: HeldOutput<Frame>,
    /// The tap's queue is full.
    is_tap_full: bool,
    since_line: u64,
    sent: u64,
    hold_times_us: Vec<u64>,
    buffer: Box<[u8]>,
}

impl Relay {
    /// Listens at `path` for QEMU, and passes its frames to the tap device; with `holds` only what is committed. A guest that sends
    /// more than `held_max` bytes between two checkpoints loses some, as on a full queue.
    ///
    /// # Errors
    /// If the tap device cannot be opened, or the socket cannot be made.
    pub(super) fn listen(
        nic: String,
        path: &Path,
        tap_name: &str,
        held_max: u32,
        holds: bool,
    ) -> Result<Self, RelayError> {
        let tap = Tap::open(tap_name)?;
        let listener = bind_unix(path, Clients::Group).map_err(io::Error::other)?;
        listener.set_nonblocking(true)?;
        let mut held = HeldOutput::new(held_max.into());
        if holds {
            held.hold();
        }
        Ok(Self {
            nic,
            listener,
            card: None,
            tap,
            tap_name: tap_name.to_owned(),
            held,
            is_tap_full: false,
            since_line: 0,
            sent: 0,
            hold_times_us: Vec::new(),
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
        })
    }

    fn accept(&mut self) {
        // A QEMU that was restarted connects anew; one that goes on has one connection.
        while let Ok((socket, _)) = self.listener.accept() {
            if socket.set_nonblocking(true).is_ok() {
                self.card = Some(Card {
                    socket,
                    incoming: Vec::new(),
                    outgoing: Vec::new(),
                });
            }
        }
    }

    /// Takes what QEMU has written, in at most so many reads.
    fn read_card(&mut self, reads_max: usize) {
        let Some(card) = &mut self.card else { return };
        let mut reads = 0;
        let is_open = loop {
            if reads == reads_max {
                break true;
            }
            reads += 1;
            match card.socket.read(&mut self.buffer) {
                Ok(0) => break false,
                Ok(count) => card.incoming.extend_from_slice(&self.buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
            let Some(taken) = take_frames(&card.incoming, |bytes| {
                self.sent += 1;
                let frame = Frame {
                    bytes: bytes.into(),
                    at: Instant::now(),
                };
                if self.held.push(frame, bytes.len() + FRAME_COST) && self.held.is_holding() {
                    self.since_line += 1;
                }
            }) else {
                break false;
            };
            card.incoming.drain(..taken);
        };
        if !is_open {
            self.card = None;
        }
    }

    /// Gives the tap what may leave.
    fn release(&mut self) -> Result<(), GateError> {
        self.is_tap_full = false;
        while let Some(frame) = self.held.front() {
            match self.tap.write(&frame.bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.is_tap_full = true;
                    return Ok(());
                }
                Err(error) if is_gone(&error) => return Err(self.failed(error)),
                // A device that is down loses frames, as a cable that is not plugged in.
                Ok(()) | Err(_) => {}
            }
            if let Some(frame) = self.held.pop()
                && self.held.is_holding()
                && self.hold_times_us.len() < HOLD_TIMES_MAX
            {
                let held_us = u64::try_from(frame.at.elapsed().as_micros());
                self.hold_times_us.push(held_us.unwrap_or(u64::MAX));
            }
        }
        Ok(())
    }

    /// Passes on what comes for the guest.
    fn read_tap(&mut self) -> Result<(), GateError> {
        for _ in 0..FRAMES_AT_A_TIME {
            if !self.write_card() {
                return Ok(());
            }
            let count = match self.tap.read(&mut self.buffer) {
                Ok(count) => count,
                Err(error) if is_gone(&error) => return Err(self.failed(error)),
                // Nothing is there, or the device is down.
                Err(_) => return Ok(()),
            };
            // Without a card there is nowhere to send it.
            let (Some(card), Ok(length)) = (&mut self.card, u32::try_from(count)) else {
                continue;
            };
            card.outgoing.extend_from_slice(&length.to_be_bytes());
            card.outgoing.extend_from_slice(&self.buffer[..count]);
        }
        self.write_card();
        Ok(())
    }

    /// The tap device was deleted, or has another error.
    fn failed(&self, source: io::Error) -> GateError {
        if is_gone(&source) {
            return self.has_no_tap(TapError::Gone(self.tap_name.clone()));
        }
        GateError::Io {
            nic: self.nic.clone(),
            source,
        }
    }

    fn has_no_tap(&self, source: TapError) -> GateError {
        GateError::Tap {
            nic: self.nic.clone(),
            source,
        }
    }

    /// Writes what is left for QEMU. Whether nothing is.
    fn write_card(&mut self) -> bool {
        let Some(card) = &mut self.card else { return true };
        while !card.outgoing.is_empty() {
            match card.socket.write(&card.outgoing) {
                Ok(count) => drop(card.outgoing.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => {
                    self.card = None;
                    return true;
                }
            }
        }
        true
    }
}

/// Whether the tap device was deleted.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EBADFD)
}

/// Gives `take` every whole frame, and returns how many bytes they had; none if a length is no frame's.
fn take_frames(bytes: &[u8], mut take: impl FnMut(&[u8])) -> Option<usize> {
    let mut taken = 0;
    while let Some((length, rest)) = bytes[taken..].split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        if length > FRAME_MAX {
            return None;
        }
        let Some(frame) = rest.get(..length) else { break };
        take(frame);
        taken += 4 + length;
    }
    Some(taken)
}

impl OutputGate for Relay {
    fn nic(&self) -> &str {
        &self.nic
    }

    fn kind(&self) -> &'static str {
        "relay"
    }

    fn wait_for<'a>(&'a self, fds: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        fds.push((self.listener.as_fd(), PollFlags::POLLIN));
        let mut tap = PollFlags::empty();
        if let Some(card) = &self.card {
            let is_full = !card.outgoing.is_empty();
            let writes = if is_full {
                PollFlags::POLLOUT
            } else {
                PollFlags::empty()
            };
            fds.push((card.socket.as_fd(), PollFlags::POLLIN | writes));
            // What comes for the guest waits in the tap's queue as long as QEMU takes nothing.
            tap.set(PollFlags::POLLIN, !is_full);
        } else {
            tap.insert(PollFlags::POLLIN);
        }
        tap.set(PollFlags::POLLOUT, self.is_tap_full);
        fds.push((self.tap.as_fd(), tap));
    }

    fn go_on(&mut self) -> Result<(), GateError> {
        self.accept();
        self.read_card(READS_AT_A_TIME);
        self.release()?;
        self.read_tap()
    }

    fn place(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        // The guest is stopped: what it has sent is in the socket. A frame of which QEMU holds a part belongs behind the line.
        self.read_card(usize::MAX);
        self.held.place(checkpoint);
        self.since_line = 0;
        Ok(())
    }

    fn committed(&mut self, checkpoint: CheckpointId) -> Result<(), GateError> {
        self.held.committed(checkpoint);
        self.release()
    }

    fn forget_barriers(&mut self) {
        self.held.forget_barriers();
    }

    fn open(&mut self) -> Result<(), GateError> {
        self.held.open();
        self.since_line = 0;
        self.release()
    }

    /// Its frames end with it.
    fn outlives_guard(&self) -> bool {
        false
    }

    fn recover(&mut self) -> Result<(), GateError> {
        self.tap = Tap::reopen(&self.tap_name).map_err(|error| self.has_no_tap(error))?;
        Ok(())
    }

    fn waiting(&self) -> u64 {
        self.since_line
    }

    fn counts(&self) -> Counts {
        let held = self.held.held();
        Counts {
            sent: self.sent,
            held: held.frames,
            held_bytes: held.bytes,
            dropped: self.held.dropped(),
        }
    }

    fn take_hold_times_us(&mut self, into: &mut Vec<u64>) {
        into.append(&mut self.hold_times_us);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_taken_whole() {
        let mut bytes = Vec::new();
        for frame in [&b"one"[..], b"", b"three"] {
            bytes.extend_from_slice(&u32::try_from(frame.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(frame);
        }
        for cut in 0..=bytes.len() {
            let mut frames = Vec::new();
            let taken = take_frames(&bytes[..cut], |frame| frames.push(frame.to_vec())).unwrap();
            let whole = [7, 11, bytes.len()].iter().filter(|end| **end <= cut).count();
            assert_eq!(frames.len(), whole, "{cut}");
            assert_eq!(taken, [0, 7, 11, bytes.len()][whole]);
        }
        assert_eq!(take_frames(&[0xff, 0, 0, 0], |_| ()), None);
    }
}
