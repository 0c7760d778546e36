//! The state machine driven by hand-made streams, in every fragmentation.

use super::*;
use crate::blocks::BlockTable;
use crate::units::{BlockId, CheckpointId, PAGE_BYTES, PAGE_SIZE};
use crate::wire::colo::Message;
use crate::wire::ram::{RamRecord, encode_block_list};
use crate::wire::stream::{Command, Section, StreamHeader, encode_footer};
use crate::wire::vmdesc::Evidence;

const RAM: u32 = 2;
const VMDESC: &[u8] =
    br#"{"configuration":{},"page_size":4096,"devices":[{"name":"x","instance_id":0,"size":4}]}"#;
const DEVICE_STATE: &[u8] =
    b"\x04\x00\x00\x00\x09\x01x\x00\x00\x00\x00\x00\x00\x00\x01body\x7e\x00\x00\x00\x09\x00";

fn table() -> BlockTable {
    let entries = vec![
        (b"pc.ram"[..].into(), 8 * PAGE_BYTES),
        (b"bios"[..].into(), 2 * PAGE_BYTES),
    ];
    BlockTable::new(entries, 10 * PAGE_BYTES).unwrap()
}

/// Builds the bytes of a primary's main channel.
struct Stream(Vec<u8>);

impl Stream {
    fn begin(commands: &[Command]) -> Self {
        let mut stream = Self(Vec::new());
        let header = StreamHeader {
            machine_type: "pc-i440fx-11.1".into(),
            target_page_bits: false,
            capabilities: false,
            uuid: None,
        };
        header.encode(&mut stream.0);
        commands.iter().for_each(|command| command.encode(&mut stream.0));
        stream
    }

    fn new_qemu() -> Self {
        Self::begin(&[Command::OpenReturnPath, Command::Ping(1)])
    }

    fn section(mut self, section: Section<'_>) -> Self {
        section.encode(&mut self.0);
        self
    }

    fn blocks(mut self) -> Self {
        encode_block_list(&mut self.0, &table());
        self
    }

    fn record(mut self, record: RamRecord<'_>) -> Self {
        record.encode(&mut self.0);
        self
    }

    fn footer(mut self) -> Self {
        encode_footer(&mut self.0, RAM);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn message(mut self, message: Message) -> Self {
        message.encode(&mut self.0);
        self
    }

    /// START with the block list, PART without pages, END, as 11.1 does with multifd.
    fn precopy(self) -> Self {
        self.section(Section::RamStart { id: RAM })
            .blocks()
            .record(RamRecord::MultifdFlush)
            .record(RamRecord::Eos)
            .footer()
            .section(Section::Part { id: RAM })
            .record(RamRecord::Eos)
            .footer()
            .section(Section::Command(Command::SwitchoverStart))
            .round()
    }

    fn round(self) -> Self {
        self.section(Section::End { id: RAM })
            .record(RamRecord::MultifdFlush)
            .record(RamRecord::MultifdFlush)
            .record(RamRecord::Eos)
            .footer()
    }

    fn devices(self) -> Self {
        let length = u32::try_from(VMDESC.len()).unwrap();
        self.bytes(DEVICE_STATE)
            .section(Section::VmDescription { length })
            .bytes(VMDESC)
    }

    fn checkpoint(self) -> Self {
        let size = DEVICE_STATE.len() as u64;
        self.message(Message::CheckpointRequest)
            .message(Message::VmstateSend)
            .round()
            .section(Section::Eof)
            .message(Message::VmstateSize(size))
            .bytes(DEVICE_STATE)
    }
}

fn limits(channels: u8) -> SessionLimits {
    SessionLimits::of_protocol(channels)
}

/// Plays `pieces` and returns the session's actions as text.
fn play<'a>(
    session: &mut Session,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> Result<Vec<String>, SessionError> {
    let mut log = Vec::new();
    let mut buffer = Vec::new();
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        buffer.extend_from_slice(piece);
        loop {
            let announced_bytes = session.state_bytes_after(buffer.len());
            let (consumed, action) = session.step(&buffer)?;
            let held_bytes = session.state_bytes_after(0);
            assert!(
                held_bytes <= announced_bytes,
                "{held_bytes}, and {announced_bytes} were announced"
            );
            match &action {
                Action::NeedMore | Action::Continue => {}
                Action::Page(page) => log.push(match page.content {
                    PageContent::Bytes(bytes) => format!("page {} of {}", page.page.get(), bytes[0]),
                    PageContent::Zero => format!("zero {}", page.page.get()),
                    PageContent::Xbzrle(delta) => format!("delta {} of {}", page.page.get(), delta.len()),
                }),
                Action::Memory(table) => log.push(format!("memory of {}", table.total_bytes())),
                Action::Commit(id) => log.push(format!("commit {id}")),
                Action::LooksEnded(evidence) => assert_eq!(*evidence, Evidence::Described),
                other => log.push(format!("{other:?}")),
            }
            let commit = matches!(action, Action::Commit(_));
            let flush = matches!(action, Action::FinishFlush);
            let done = matches!(action, Action::NeedMore);
            let looks_ended = matches!(action, Action::LooksEnded(_));
            buffer.drain(..consumed);
            // What follows is a request, in a piece of its own, or the rest of a device state.
            if looks_ended && pieces.peek().is_none_or(|next| next.starts_with(&[0])) {
                session.silence();
            }
            if flush {
                session.flush_finished();
            }
            if commit {
                assert_eq!(session.device_state(), DEVICE_STATE);
                session.committed();
            }
            if done {
                break;
            }
        }
    }
    assert!(buffer.is_empty(), "{} bytes were not taken", buffer.len());
    Ok(log)
}

fn play_whole(channels: u8, stream: Stream) -> Result<Vec<String>, SessionError> {
    play_with(limits(channels), &stream)
}

fn play_with(limits: SessionLimits, stream: &Stream) -> Result<Vec<String>, SessionError> {
    // The initial device state ends where the primary stops sending: what follows is in pieces of its own.
    let mut session = Session::new(limits);
    let end = find(&stream.0, VMDESC).map_or(stream.0.len(), |at| at + VMDESC.len());
    let (first, rest) = stream.0.split_at(end);
    play(
        &mut session,
        [first, rest].into_iter().filter(|piece| !piece.is_empty()),
    )
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

const MULTIFD: [&str; 17] = [
    "Send(Pong(1))",
    "memory of 40960",
    "Marker",
    "Marker",
    "Marker",
    "RamComplete",
    "commit 0",
    "Send(Ready { return_path: true })",
    "FinishFlush",
    "OpenGate",
    "Send(Reply)",
    "TransferBegins",
    "Marker",
    "Marker",
    "RamComplete",
    "commit 1",
    "Send(Loaded)",
];

#[test]
fn a_session_of_11_1_with_multifd() {
    let stream = Stream::new_qemu().precopy().devices().checkpoint();
    assert_eq!(play_whole(4, stream).unwrap(), MULTIFD);
}

#[test]
fn fragmentation_changes_nothing() {
    let stream = Stream::new_qemu().precopy().devices().checkpoint();
    let end = find(&stream.0, VMDESC).unwrap() + VMDESC.len();
    for size in 1..64 {
        let mut session = Session::new(limits(4));
        let pieces = stream.0[..end].chunks(size).chain(stream.0[end..].chunks(size));
        assert_eq!(
            play(&mut session, pieces).unwrap(),
            MULTIFD,
            "in pieces of {size}"
        );
    }
}

#[test]
fn every_cut_is_an_ending_and_no_error() {
    let stream = Stream::new_qemu().precopy().devices().checkpoint();
    let end = find(&stream.0, VMDESC).unwrap() + VMDESC.len();
    for cut in 0..=stream.0.len() {
        let mut session = Session::new(limits(4));
        let mut buffer = Vec::new();
        for &byte in &stream.0[..cut] {
            buffer.push(byte);
            loop {
                let (consumed, action) = session.step(&buffer).unwrap();
                let commit = matches!(action, Action::Commit(_));
                let flush = matches!(action, Action::FinishFlush);
                let done = matches!(action, Action::NeedMore);
                let looks_ended = matches!(action, Action::LooksEnded(_));
                buffer.drain(..consumed);
                if looks_ended {
                    session.silence();
                }
                if flush {
                    session.flush_finished();
                }
                if commit {
                    session.committed();
                }
                if done {
                    break;
                }
            }
        }
        let last = CheckpointId(u64::from(cut == stream.0.len()));
        let expected = match cut {
            _ if cut < end => Ending::InPrecopy,
            _ if cut < end + 4 => Ending::PlainMigration,
            _ if cut == stream.0.len() => Ending::BetweenCheckpoints { last },
            _ => Ending::DuringCheckpoint { last },
        };
        assert_eq!(session.ending(), expected, "cut at {cut}");
    }
}

/// A guest has the end of a device state in the buffer of one of its devices, and the request that comes behind a real one.
#[test]
fn an_end_inside_a_device_is_withdrawn_by_what_follows() {
    let forged = Stream(Vec::new()).devices().message(Message::CheckpointRequest).0;
    let body = [&b"\x01"[..], &forged].concat();
    let section = Section::Full {
        id: 9,
        idstr: b"nic",
        instance: 0,
        version: 1,
    };
    let text = format!(
        r#"{{"devices":[{{"name":"nic","instance_id":0,"size":{}}}]}}"#,
        body.len()
    );
    let length = u32::try_from(text.len()).unwrap();
    let mut device_state = Stream(Vec::new()).section(section).bytes(&body).0;
    encode_footer(&mut device_state, 9);
    device_state.push(0);
    let stream = Stream::new_qemu()
        .precopy()
        .bytes(&device_state)
        .section(Section::VmDescription { length })
        .bytes(text.as_bytes())
        .0;
    let forged_end = find(&stream, VMDESC).unwrap() + VMDESC.len();
    let mut session = Session::new(limits(4));
    let (mut from, mut ends) = (0, Vec::new());
    for to in [forged_end, stream.len()] {
        let mut input = &stream[from..to];
        from = to;
        loop {
            let (consumed, action) = session.step(input).unwrap();
            input = &input[consumed..];
            match action {
                Action::LooksEnded(evidence) => ends.push((session.position(), evidence)),
                Action::NeedMore => break,
                Action::Commit(_) => panic!("committed"),
                _ => {}
            }
        }
    }
    assert!(
        matches!(
            ends[..],
            [(_, Evidence::Undescribed(_)), (_, Evidence::Described)]
        ),
        "{ends:?}"
    );
    assert_eq!(
        ends.iter().map(|(at, _)| *at).collect::<Vec<_>>(),
        [forged_end as u64, stream.len() as u64]
    );
    assert!(!session.is_end_in_doubt());
    session.silence();
    assert_eq!(session.step(&[]).unwrap(), (0, Action::Commit(CheckpointId(0))));
    assert_eq!(*session.device_state(), device_state);
    session.committed();
    assert!(session.is_end_in_doubt());
}

#[test]
fn a_session_of_7_2_syncs_at_every_end_of_section() {
    let stream = Stream::begin(&[Command::EnableColo])
        .section(Section::RamStart { id: RAM })
        .blocks()
        .record(RamRecord::Eos)
        .footer()
        .section(Section::End { id: RAM })
        .record(RamRecord::Zero {
            block: crate::wire::ram::BlockRef::Named(b"bios"),
            offset: PAGE_BYTES,
        })
        .record(RamRecord::Eos)
        .footer()
        .devices();
    let log = play_whole(4, stream).unwrap();
    let expected = [
        "memory of 40960",
        "Marker",
        "zero 9",
        "Marker",
        "RamComplete",
        "commit 0",
    ];
    assert_eq!(log[..6], expected);
    assert_eq!(log[6], "Send(Ready { return_path: false })");
}

#[test]
fn plain_mode_carries_pages_and_continues_blocks_over_sections() {
    use crate::wire::ram::BlockRef::{Continue, Named};
    let page = [7; PAGE_SIZE];
    let stream = Stream::new_qemu()
        .section(Section::RamStart { id: RAM })
        .blocks()
        .record(RamRecord::Eos)
        .footer()
        .section(Section::Part { id: RAM })
        .record(RamRecord::Page {
            block: Named(b"pc.ram"),
            offset: 0,
            content: &page,
        })
        .record(RamRecord::Eos)
        .footer()
        .section(Section::End { id: RAM })
        .record(RamRecord::Zero {
            block: Continue,
            offset: PAGE_BYTES,
        })
        .record(RamRecord::Xbzrle {
            block: Continue,
            offset: 0,
            delta: &[3, 1, 9],
        })
        .record(RamRecord::Eos)
        .footer()
        .devices();
    let log = play_whole(0, stream).unwrap();
    let expected = [
        "Send(Pong(1))",
        "memory of 40960",
        "page 0 of 7",
        "zero 1",
        "delta 0 of 3",
        "RamComplete",
    ];
    assert_eq!(log[..6], expected);
}

/// Plays a stream that must be refused, and returns the error's text.
fn refusal(channels: u8, stream: Stream) -> String {
    play_whole(channels, stream).unwrap_err().to_string()
}

#[test]
fn settings_that_cannot_work_are_named() {
    let start = |stream: Stream| stream.section(Section::RamStart { id: RAM });
    let both = start(Stream::begin(&[Command::OpenReturnPath, Command::EnableColo]));
    assert!(refusal(4, both).contains("switch its capability return-path off"));
    assert!(refusal(4, start(Stream::begin(&[]))).contains("switch its capability x-colo on"));
    let plain = start(Stream::new_qemu()).blocks().record(RamRecord::MultifdFlush);
    assert!(refusal(0, plain).contains("switch its capability multifd off"));
    let delta = start(Stream::new_qemu())
        .blocks()
        .record(RamRecord::MultifdFlush)
        .record(RamRecord::Xbzrle {
            block: crate::wire::ram::BlockRef::Named(b"bios"),
            offset: 0,
            delta: &[0, 1, 9],
        });
    assert!(refusal(4, delta).contains("switch its capability xbzrle off"));
    let device = Stream::new_qemu().section(Section::Full {
        id: 1,
        idstr: b"virtio-mem",
        instance: 0,
        version: 1,
    });
    assert!(refusal(4, device).contains("virtio-mem"));
}

/// The initial one as it arrives, that of a checkpoint when it is announced.
#[test]
fn a_device_state_over_the_limit_is_refused() {
    let refused = |limit, stream: Stream| {
        let limits = SessionLimits {
            device_state_max_bytes: limit,
            ..limits(4)
        };
        let played = play_with(limits, &stream);
        played.err().map(|error| error.to_string())
    };
    let initial = || Stream::new_qemu().precopy().devices();
    assert_eq!(refused(1000, initial()), None);
    let error = refused(10, initial()).expect("it is longer");
    assert!(
        error.contains("--device-state-max") && error.contains("at most 10"),
        "{error}"
    );
    let announced = initial()
        .message(Message::CheckpointRequest)
        .message(Message::VmstateSend)
        .round()
        .section(Section::Eof)
        .message(Message::VmstateSize(1001));
    let error = refused(1000, announced).expect("it is longer");
    assert!(
        error.contains("--device-state-max") && error.contains("is 1001"),
        "{error}"
    );
}

#[test]
fn order_is_kept() {
    let ready = || Stream::new_qemu().precopy().devices();
    let wrong = [
        ready().message(Message::VmstateSend),
        ready().message(Message::CheckpointReply),
        ready()
            .message(Message::CheckpointRequest)
            .message(Message::CheckpointRequest),
        ready()
            .message(Message::CheckpointRequest)
            .message(Message::VmstateSend)
            .section(Section::Eof),
        ready()
            .message(Message::CheckpointRequest)
            .message(Message::VmstateSend)
            .round()
            .round(),
        ready()
            .message(Message::CheckpointRequest)
            .message(Message::VmstateSend)
            .round()
            .section(Section::Eof)
            .message(Message::CheckpointRequest),
        ready().checkpoint().message(Message::VmstateSend),
    ];
    for stream in wrong {
        let length = stream.0.len() as u64;
        let error = play_whole(4, stream).unwrap_err();
        assert!(error.position < length && error.position > 0, "{error}");
    }
}

#[test]
fn a_round_without_its_last_marker_is_refused() {
    let stream = Stream::new_qemu()
        .section(Section::RamStart { id: RAM })
        .blocks()
        .record(RamRecord::MultifdFlush)
        .record(RamRecord::Eos)
        .footer()
        .section(Section::End { id: RAM })
        .record(RamRecord::MultifdFlush)
        .record(RamRecord::Zero {
            block: crate::wire::ram::BlockRef::Named(b"bios"),
            offset: 0,
        })
        .record(RamRecord::Eos);
    assert!(refusal(4, stream).contains("without a MULTIFD_FLUSH"));
}

#[test]
fn device_state_that_is_none_is_refused() {
    let ready = || Stream::new_qemu().precopy().devices();
    let begin = || {
        ready()
            .message(Message::CheckpointRequest)
            .message(Message::VmstateSend)
            .round()
            .section(Section::Eof)
    };
    for (size, blob) in [(3, b"\x05\x00\x00"), (3, b"\x04\x00\x01")] {
        let stream = begin().message(Message::VmstateSize(size)).bytes(blob);
        assert!(refusal(4, stream).contains("byte of the device state"));
    }
}

#[test]
fn the_reply_waits_for_the_flush_and_the_open_gate() {
    let mut session = Session::new(limits(4));
    let stream = Stream::new_qemu().precopy().devices();
    play(&mut session, [&stream.0[..]].into_iter()).unwrap();
    let request = Stream(Vec::new()).message(Message::CheckpointRequest).0;
    assert_eq!(session.step(&request).unwrap(), (4, Action::FinishFlush));
    let kept = session.ending();
    assert!(matches!(kept, Ending::BetweenCheckpoints { .. }), "{kept}");
    session.flush_finished();
    assert_eq!(session.step(&[]).unwrap(), (0, Action::OpenGate));
    assert_eq!(session.step(&[]).unwrap(), (0, Action::Send(Outbound::Reply)));
    assert_eq!(session.step(&[]).unwrap(), (0, Action::NeedMore));
}

#[test]
#[should_panic(expected = "finishes the flush")]
fn nothing_is_read_before_the_flush_has_finished() {
    let mut session = Session::new(limits(4));
    let stream = Stream::new_qemu().precopy().devices();
    play(&mut session, [&stream.0[..]].into_iter()).unwrap();
    let request = Stream(Vec::new()).message(Message::CheckpointRequest).0;
    session.step(&request).unwrap();
    let _ = session.step(&[]);
}

#[test]
fn the_description_has_what_a_restart_needs() {
    let stream = Stream::new_qemu().precopy().devices();
    let mut session = Session::new(limits(4));
    play(&mut session, [&stream.0[..]].into_iter()).unwrap();
    let description = session.description().unwrap();
    assert_eq!(
        (description.machine_type.as_str(), description.ram_section),
        ("pc-i440fx-11.1", RAM)
    );
    assert_eq!(description.header, Stream::begin(&[]).0);
    assert_eq!(description.vmdesc, VMDESC);
    assert_eq!(description.blocks.block(BlockId(1)).used_length, 2 * PAGE_BYTES);
}
