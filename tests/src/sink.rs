//! A secondary that keeps nothing: it reads every byte into one small buffer and answers as soon as it may. What a
//! checkpoint takes with it is the floor of the transport, below which no secondary can get.
//!
//! A thread for each connection. The main channel is read by the engine's own state machine, so that answers come
//! where they must.

use colo_ring::ring::quick_ack;
use colo_ring::session::{Action, Session, SessionLimits};
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, PacketHeader};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Small enough to stay in a core's cache.
const BUFFER_BYTES: usize = 64 << 10;

/// The first bytes of a main channel, which were read to tell it from the others.
const MAIN_MAGIC: [u8; 4] = *b"QEVM";

/// Serves one session and returns when its main channel has ended.
///
/// # Errors
/// When a connection cannot be accepted, or the primary does not speak the protocol.
pub fn serve(listener: &TcpListener, channels: u8) -> io::Result<()> {
    let meeting = Arc::new(Meeting::default());
    let mut main = None;
    let mut threads = Vec::new();
    for _ in 0..=channels {
        let (mut stream, _) = listener.accept()?;
        // All answers are a few bytes, and a guest waits for them.
        stream.set_nodelay(true)?;
        let mut magic = [0; MAIN_MAGIC.len()];
        stream.read_exact(&mut magic)?;
        let meeting = Arc::clone(&meeting);
        if magic == MAIN_MAGIC {
            main = Some(std::thread::spawn(move || {
                main_channel(stream, channels, &meeting)
            }));
        } else {
            threads.push(std::thread::spawn(move || channel(stream, &meeting)));
        }
    }
    let main = main.ok_or_else(|| io::Error::other("none of the connections was a main channel"))?;
    join(main)?;
    threads.into_iter().try_for_each(join)
}

fn join(thread: JoinHandle<io::Result<()>>) -> io::Result<()> {
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread of the sink panicked")))
}

/// Where channels wait at a SYNC until the main channel has read its marker and all of them are there.
#[derive(Default)]
struct Meeting {
    state: Mutex<MeetingState>,
    changed: Condvar,
}

#[derive(Default)]
struct MeetingState {
    arrived: u8,
    generation: u64,
}

impl Meeting {
    /// On a channel.
    fn arrive(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = state.generation;
        state.arrived += 1;
        self.changed.notify_all();
        let waiting = |state: &mut MeetingState| state.generation == generation;
        drop(self.changed.wait_while(state, waiting));
    }

    /// On the main channel.
    fn release(&self, channels: u8) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.changed.wait_while(state, |state| state.arrived < channels);
        let mut state = waiting.unwrap_or_else(PoisonError::into_inner);
        state.arrived = 0;
        state.generation += 1;
        self.changed.notify_all();
    }
}

fn channel(mut stream: TcpStream, meeting: &Meeting) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    stream.read_exact(&mut buffer[MAIN_MAGIC.len()..INIT_LEN])?;
    let mut header = [0; HEADER_LEN];
    loop {
        match stream.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let packet = PacketHeader::decode(&header).map_err(io::Error::other)?;
        let mut left = usize::try_from(packet.payload_len()).map_err(io::Error::other)?;
        while left > 0 {
            let length = left.min(BUFFER_BYTES);
            match stream.read(&mut buffer[..length])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => left -= read,
            }
        }
        if packet.is_sync() {
            meeting.arrive();
        }
    }
}

fn main_channel(mut stream: TcpStream, channels: u8, meeting: &Meeting) -> io::Result<()> {
    let mut session = Session::new(SessionLimits {
        channels,
        ram_limit_bytes: u64::MAX,
    });
    let mut buffer = vec![0; BUFFER_BYTES];
    buffer[..MAIN_MAGIC.len()].copy_from_slice(&MAIN_MAGIC);
    let (mut begin, mut end) = (0, MAIN_MAGIC.len());
    let mut answer_bytes = Vec::new();
    loop {
        let (consumed, action) = session.step(&buffer[begin..end]).map_err(io::Error::other)?;
        begin += consumed;
        match action {
            Action::Send(answer) => {
                answer.encode(&mut answer_bytes);
                stream.write_all(&answer_bytes)?;
            }
            Action::Marker => meeting.release(channels),
            Action::Commit(_) => session.committed(),
            Action::NeedMore => {
                buffer.copy_within(begin..end, 0);
                (begin, end) = (0, end - begin);
                if end == buffer.len() {
                    // A single element that is larger: a page of the device state's description.
                    buffer.resize(2 * end, 0);
                }
                let read = stream.read(&mut buffer[end..])?;
                quick_ack(stream.as_raw_fd());
                if read == 0 {
                    return Ok(());
                }
                end += read;
            }
            Action::Continue
            | Action::Memory(_)
            | Action::Page(_)
            | Action::TransferBegins
            | Action::RamComplete => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring_tools::synth::{self, SynthOptions, Version};
    use std::time::Duration;

    #[test]
    fn a_whole_session_is_answered() {
        for channels in [0, 1, 4] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
            let sink = std::thread::spawn(move || serve(&listener, channels));
            let options = SynthOptions {
                ram_bytes: 8 << 20,
                channels,
                interval: Duration::ZERO,
                checkpoints: 5,
                ..SynthOptions::new(Version::V11_1)
            };
            let report = synth::run(&address, &options).unwrap();
            assert_eq!(report.checkpoints.len(), 5, "{channels} channels");
            sink.join().unwrap().unwrap();
        }
    }
}
