//! Sessions of the synthetic primary, recorded on their way to a receiver.

use super::*;
use crate::capture_file::{CaptureWriter, Compression};
use crate::net::Address;
use crate::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use colo_ring::receiver::{ListenAddress, Receiver, ReceiverOptions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, mpsc};
use std::time::Instant;

pub(crate) const CHECKPOINTS: usize = 4;

pub(crate) fn options(version: Version, channels: u8) -> SynthOptions {
    SynthOptions {
        ram_bytes: 4 << 20,
        channels,
        dirty_pages: Distribution::Fixed(300),
        interval: Duration::ZERO,
        zero_share: 0.2,
        ..SynthOptions::new(version)
    }
}

/// Copies one direction and records it.
fn relay(mut from: UnixStream, mut to: UnixStream, flow: &Mutex<Flow>, started: Instant) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        flow.lock().unwrap().push(started.elapsed(), &buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Runs a session through a relay and returns its connections, main first.
pub(crate) fn recorded(options: &SynthOptions) -> Vec<Connection> {
    let directory = tempfile::tempdir().unwrap();
    let path = |side: &str| directory.path().join(side);
    let (front, back) = (path("front"), path("back"));
    let receiver = Receiver::start(
        ReceiverOptions {
            listen: vec![ListenAddress::Unix(back.clone())],
            cores: vec![0],
            ..colo_ring_tests::receiver_options(colo_ring::ring::BackendKind::Epoll, options.channels)
        },
        drop,
    )
    .unwrap();
    let listener = UnixListener::bind(&front).unwrap();
    let started = Instant::now();
    let flows: Vec<_> = (0..=options.channels)
        .map(|_| <[Mutex<Flow>; 2]>::default())
        .collect();
    std::thread::scope(|scope| {
        let (done, session) = mpsc::channel();
        scope.spawn(move || {
            let mut primary = SynthPrimary::connect(&Address::Unix(front), options).unwrap();
            for _ in 0..CHECKPOINTS {
                primary.checkpoint().unwrap();
            }
            done.send(primary.close()).unwrap();
        });
        for [up, down] in &flows {
            let (near, _) = listener.accept().unwrap();
            let far = UnixStream::connect(&back).unwrap();
            let clones = (near.try_clone().unwrap(), far.try_clone().unwrap());
            scope.spawn(move || relay(near, far, up, started));
            scope.spawn(move || relay(clones.1, clones.0, down, started));
        }
        session.recv().unwrap().unwrap();
    });
    receiver.stop_handle().stop();
    receiver.wait().unwrap();
    let connection = |(id, [up, down]): (usize, [Mutex<Flow>; 2])| Connection {
        to_secondary: up.into_inner().unwrap(),
        to_primary: down.into_inner().unwrap(),
        ..Connection::new(ConnectionId(u16::try_from(id).unwrap()), "")
    };
    flows.into_iter().enumerate().map(connection).collect()
}

#[test]
fn checkpoints_are_found_on_every_connection() {
    for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
        for channels in [0, 1, 4] {
            let streams = Streams::new(recorded(&options(version, channels))).unwrap();
            assert_eq!(streams.notes, [] as [&str; 0]);
            assert_eq!(streams.channels.len(), usize::from(channels));
            assert_eq!(streams.return_path, version == Version::V11_1);
            assert_eq!(streams.checkpoints.len(), CHECKPOINTS);
            assert_eq!(streams.answers.checkpoints.len(), CHECKPOINTS);
            assert_eq!(streams.answers.wrong_at, None);
            // Every byte belongs to exactly one part.
            let mut end = streams.precopy.main.end;
            let mut packets: Vec<_> = streams.precopy.packets.iter().map(|range| range.end).collect();
            for (checkpoint, answers) in streams.checkpoints.iter().zip(&streams.answers.checkpoints) {
                assert_eq!((checkpoint.request.start, checkpoint.request.len()), (end, 4));
                assert_eq!(checkpoint.transfer.start, checkpoint.request.end);
                end = checkpoint.transfer.end;
                assert_eq!(checkpoint.device_state.end, end);
                let blob = &streams.main.to_secondary.bytes()[checkpoint.device_state.clone()];
                colo_ring::wire::colo::check_device_state(blob).unwrap();
                for (end, range) in packets.iter_mut().zip(&checkpoint.packets) {
                    assert_eq!(std::mem::replace(end, range.end), range.start);
                }
                // 7.2 sends a page in passing again.
                let pages = checkpoint.pages + checkpoint.zero_pages;
                assert!((300..304).contains(&pages), "{pages}");
                let [reply, received, loaded] = [answers.reply, answers.received, answers.loaded];
                assert!(Some(checkpoint.at) <= reply && reply <= received && received <= loaded);
            }
            assert_eq!(end, streams.main.to_secondary.bytes().len());
            let all = streams.channels.iter().map(|channel| channel.packets().len());
            assert!(all.eq(packets));
        }
    }
}

#[test]
fn the_primary_writes_what_it_flushes_at_its_own() {
    let streams = Streams::new(recorded(&options(Version::V11_1, 2))).unwrap();
    for checkpoint in &streams.checkpoints {
        let pieces: Vec<_> = streams.pieces(&checkpoint.transfer).collect();
        assert_eq!(
            pieces[0],
            checkpoint.transfer.start..checkpoint.transfer.start + 4
        );
        let ends: Vec<_> = pieces.iter().map(|piece| piece.end).collect();
        assert!(ends.contains(&checkpoint.device_state.start), "{pieces:?}");
        // SEND, one or two markers, EOS to EOF byte, size, device state.
        let syncs = usize::try_from(checkpoint.syncs).unwrap();
        assert!(pieces.len() >= 1 + syncs + 3, "{pieces:?}");
        assert!(pieces.windows(2).all(|two| two[0].end == two[1].start));
        assert_eq!(pieces.last().unwrap().end, checkpoint.transfer.end);
    }
}

/// Ends a flow early, as a capture that was cut does.
fn cut(flow: &mut Flow, length: usize) {
    let mut shorter = Flow::default();
    let mut begin = 0;
    for chunk in flow.chunks() {
        let end = chunk.end.min(length);
        shorter.push(chunk.at, &flow.bytes()[begin.min(end)..end]);
        begin = chunk.end;
    }
    *flow = shorter;
}

#[test]
fn a_cut_capture_is_good_up_to_its_last_complete_checkpoint() {
    let whole = recorded(&options(Version::V11_1, 2));
    let streams = Streams::new(whole.clone()).unwrap();
    let last = &streams.checkpoints[CHECKPOINTS - 1];
    for length in [last.request.start + 1, last.transfer.start, last.transfer.end - 1] {
        let mut connections = whole.clone();
        cut(&mut connections[0].to_secondary, length);
        let streams = Streams::new(connections).unwrap();
        assert_eq!(streams.checkpoints.len(), CHECKPOINTS - 1);
        assert!(
            streams.notes[0].contains(&format!("byte {length}")),
            "{:?}",
            streams.notes
        );
    }
    let mut connections = whole.clone();
    let end = connections[1].to_secondary.bytes().len();
    cut(&mut connections[1].to_secondary, end - 1);
    let streams = Streams::new(connections).unwrap();
    assert_eq!(streams.checkpoints.len(), CHECKPOINTS - 1);
    assert!(
        streams.notes[0].contains("channel 0, byte "),
        "{:?}",
        streams.notes
    );

    for (connection, length) in [(0, streams.precopy.main.end - 1), (2, 64 + 1343)] {
        let mut connections = whole.clone();
        cut(&mut connections[connection].to_secondary, length);
        let error = Streams::new(connections).unwrap_err();
        assert!(matches!(error, StreamsError::NoPrecopy(_)), "{error}");
    }
}

/// The same session from a file, whole and torn.
#[test]
fn a_file_holds_the_session() {
    let whole = recorded(&options(Version::V11_1, 2));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session.cap");
    let info = CaptureInfo::now("test", serde_json::Value::Null);
    let mut writer = CaptureWriter::create(&path, &info, Compression::Zstd).unwrap();
    let mut events = Vec::new();
    for connection in &whole {
        let (id, label) = (connection.id, "127.0.0.1:1");
        events.push((
            Duration::ZERO,
            0,
            Event::Open {
                connection: id,
                label,
            },
        ));
        for (direction, flow) in [
            (Direction::ToSecondary, &connection.to_secondary),
            (Direction::ToPrimary, &connection.to_primary),
        ] {
            let mut begin = 0;
            for chunk in flow.chunks() {
                let bytes = &flow.bytes()[std::mem::replace(&mut begin, chunk.end)..chunk.end];
                let data = Event::Data {
                    connection: id,
                    direction,
                    bytes,
                };
                events.push((chunk.at, 1, data));
            }
        }
    }
    events.sort_by_key(|(at, rank, _)| (*at, *rank));
    for (at, _, event) in events {
        writer.write(at, event).unwrap();
        writer.flush().unwrap();
    }
    drop(writer);
    let read = Streams::load(&path).unwrap();
    let direct = Streams::new(whole).unwrap();
    assert_eq!(read.checkpoints, direct.checkpoints);
    assert_eq!(read.answers, direct.answers);
    assert!(read.notes[0].contains("not finished"), "{:?}", read.notes);

    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(length - 100)
        .unwrap();
    // The last record is an answer, or the end of the device state.
    let torn = Streams::load(&path).unwrap();
    assert!(torn.checkpoints.len() >= CHECKPOINTS - 1, "{:?}", torn.notes);
    assert!(torn.notes[0].contains("not complete"), "{:?}", torn.notes);
    std::fs::write(&path, b"something else").unwrap();
    assert!(matches!(Streams::load(&path), Err(StreamsError::File(_))));
}

#[test]
fn what_is_no_session_is_refused() {
    let whole = recorded(&options(Version::V11_1, 2));
    assert!(matches!(Streams::new(Vec::new()), Err(StreamsError::NoMain(0))));
    let channels_only = whole[1..].to_vec();
    assert!(matches!(
        Streams::new(channels_only),
        Err(StreamsError::NoMain(2))
    ));
    let twice = [&whole[..], &whole[..1]].concat();
    assert!(matches!(Streams::new(twice), Err(StreamsError::ManyMains(2, _))));
    let missing = vec![whole[0].clone(), whole[2].clone()];
    assert!(matches!(Streams::new(missing), Err(StreamsError::Channels(ids)) if ids == [1]));
    let mut stranger = whole.clone();
    stranger.push(Connection::new(ConnectionId(9), ""));
    assert_eq!(Streams::new(stranger).unwrap().notes.len(), 1);
}

/// Plain mode: CONTINUE refers to the last page record, which is another one when the first checkpoint follows the last.
#[test]
fn checkpoints_again_name_the_block_where_the_capture_continues_another() {
    const WANTED: u32 = 2;
    let mut differed = 0;
    for seed in 1..=100 {
        if differed == WANTED {
            break;
        }
        let mut options = options(Version::V11_1, 0);
        (options.seed, options.dirty_pages) = (seed, Distribution::Fixed(3));
        // A third of this guest is in small blocks.
        options.ram_bytes = 1 << 20;
        let streams = Streams::new(recorded(&options)).unwrap();
        let Some(again) = streams.again().unwrap() else {
            continue;
        };
        differed += 1;
        let transfer = &streams.checkpoints[again.checkpoint].transfer;
        let captured = &streams.main.to_secondary.bytes()[transfer.clone()];
        assert!(again.bytes.len() > captured.len());
        let ends: Vec<_> = again.pieces.iter().map(|piece| piece.end).collect();
        assert_eq!(ends.last(), Some(&again.bytes.len()));
        // All checkpoints once more behind the capture: the session reads the same pages again.
        let mut connection = streams.main.clone();
        for (number, checkpoint) in streams.checkpoints.iter().enumerate() {
            let bytes = streams.main.to_secondary.bytes();
            let flow = &mut connection.to_secondary;
            flow.push(Duration::ZERO, &bytes[checkpoint.request.clone()]);
            let transfer = if number == again.checkpoint {
                &again.bytes[..]
            } else {
                &bytes[checkpoint.transfer.clone()]
            };
            flow.push(Duration::ZERO, transfer);
        }
        let twice = Streams::new(vec![connection]).unwrap();
        assert_eq!(twice.checkpoints.len(), 2 * CHECKPOINTS);
        let (first, second) = twice.on_main.split_at(CHECKPOINTS);
        for (first, second) in first.iter().zip(second) {
            let block = |checkpoint: &MainCheckpoint| checkpoint.first_page.map(|page| page.block);
            assert_eq!(block(first), block(second));
            assert_eq!((first.pages, first.last_block), (second.pages, second.last_block));
        }
    }
    assert_eq!(differed, WANTED, "too few sessions needed it");
}
