//! Records that break, end or change in the middle of a session.

use crate::Running;
use colo_ring::ring::BackendKind;
use colo_ring::units::ChannelId;
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::Init;
use colo_ring::wire::stream::{Command, Section};
use colo_ring_tests::hostile::{
    RAM, answers_to_checkpoint, answers_to_precopy, block_list, commands, device_state, end_of_body, header,
    message, ram_start, section, vmdesc,
};
use colo_ring_tests::tls::{Authority, Client, address, options};
use std::net::Shutdown;

/// What a main channel sends until READY, without pages and without multifd channels.
fn precopy() -> Vec<u8> {
    [
        header(),
        commands(&[Command::OpenReturnPath, Command::Ping(1)]),
        ram_start(),
        block_list(),
        end_of_body(),
        section(Section::Part { id: RAM }),
        end_of_body(),
        section(Section::End { id: RAM }),
        end_of_body(),
        device_state(0),
        vmdesc(),
    ]
    .concat()
}

struct Scene {
    authority: Authority,
    running: Running,
}

impl Scene {
    fn new(backend: BackendKind, channels: u8) -> Self {
        let authority = Authority::new();
        let running = Running::start(options(backend, channels, authority.credentials(true, &[])));
        Self { authority, running }
    }

    fn connect(&self) -> Client {
        let mut client = Client::connect(address(&self.running.receiver), self.authority.client("primary"));
        client.shake().expect("a handshake");
        client
    }

    /// A session whose guest has a first checkpoint.
    fn protected(&mut self) -> Client {
        let mut client = self.connect();
        client.send(&precopy());
        self.running.began();
        client.expect(&answers_to_precopy());
        client
    }
}

#[test]
fn what_breaks_a_record_ends_the_session_with_a_reason() {
    for backend in [BackendKind::Uring, BackendKind::Epoll, BackendKind::Threads] {
        let mut scene = Scene::new(backend, 0);
        type Break = fn(&mut Client);
        let faults: [(&str, Break, &str, Option<&str>); 5] = [
            (
                "a bit that was changed",
                |client| {
                    let mut record = client.records(b"anything");
                    record[9] ^= 1;
                    client.send_raw(&record);
                },
                "does not decrypt",
                Some("BadRecordMac"),
            ),
            (
                "a record that comes twice",
                |client| {
                    let record = client.records(&message(Message::CheckpointRequest));
                    client.send_raw(&[record.clone(), record].concat());
                },
                "does not decrypt",
                Some("BadRecordMac"),
            ),
            (
                "bytes that are no record",
                |client| client.send_raw(b"plaintext"),
                "bytes that are no TLS record",
                Some("UnexpectedMessage"),
            ),
            (
                "a record that is too long",
                |client| client.send_raw(&[23, 3, 3, 0xff, 0xff, 0]),
                "a TLS record of 65535 bytes",
                Some("RecordOverflow"),
            ),
            (
                "a record that is not encrypted",
                |client| client.send_raw(&[21, 3, 3, 0, 2, 1, 0]),
                "of type 21 that does not belong there",
                Some("UnexpectedMessage"),
            ),
        ];
        for (name, fault, says, alert) in faults {
            let mut client = scene.protected();
            fault(&mut client);
            let end = scene.running.ended();
            let text = end.end.expect("it has ended");
            println!("{backend}, {name}: {text}");
            assert!(
                text.contains("main channel: ") && text.contains(says),
                "{name}: {text}"
            );
            assert_eq!(end.checkpoint, Some(0));
            let told = client.end();
            if let Some(alert) = alert {
                assert!(
                    told.as_ref().is_some_and(|told| told.contains(alert)),
                    "{name}: {told:?}"
                );
            }
        }
        scene.running.stop();
    }
}

#[test]
fn the_key_changes_in_a_session() {
    let mut scene = Scene::new(BackendKind::Uring, 0);
    let mut client = scene.protected();
    for number in 1..=5 {
        client.connection.refresh_traffic_keys().expect("TLS 1.3");
        checkpoint(&mut client);
        let status = scene.running.status();
        assert_eq!(status.sessions[0].checkpoint, Some(number));
    }
    client.connection.send_close_notify();
    let records = client.records(&[]);
    client.send_raw(&records);
    let end = scene.running.ended();
    assert!(end.end.expect("it has ended").contains("the primary went away"));
    assert_eq!(end.checkpoint, Some(5));
    scene.running.stop();
}

/// A checkpoint without pages.
fn checkpoint(client: &mut Client) {
    client.send(&message(Message::CheckpointRequest));
    client.expect(&message(Message::CheckpointReply));
    let state = device_state(1);
    let size = u64::try_from(state.len()).expect("small");
    let transfer = [
        message(Message::VmstateSend),
        section(Section::End { id: RAM }),
        end_of_body(),
        section(Section::Eof),
        message(Message::VmstateSize(size)),
        state,
    ];
    client.send(&transfer.concat());
    client.expect(&answers_to_checkpoint());
}

/// Cut at any byte of what follows the first checkpoint: its end is the end of the stream, and the checkpoint stays.
#[test]
fn a_cut_at_any_byte_leaves_the_last_checkpoint() {
    let mut scene = Scene::new(BackendKind::Uring, 0);
    let whole = {
        let mut client = scene.protected();
        let length = client.records(&message(Message::CheckpointRequest)).len();
        drop(client);
        scene.running.ended();
        length
    };
    for cut in 0..=whole {
        let mut client = scene.protected();
        let records = client.records(&message(Message::CheckpointRequest));
        client.send_raw(&records[..cut]);
        client.socket.shutdown(Shutdown::Write).expect("a connection");
        let end = scene.running.ended();
        let text = end.end.expect("it has ended");
        assert!(text.contains("the primary went away"), "{cut}: {text}");
        assert_eq!(end.checkpoint, Some(0));
    }
    scene.running.stop();
}

#[test]
fn a_channel_that_breaks_is_named() {
    let mut scene = Scene::new(BackendKind::Uring, 2);
    let mut channels: Vec<_> = (0..2)
        .map(|id| {
            let mut client = scene.connect();
            let channel = ChannelId(id);
            let uuid = [7; 16];
            client.send(&Init { uuid, channel }.encode());
            client
        })
        .collect();
    let mut main = scene.connect();
    main.send(&header());
    scene.running.began();
    channels[1].send_raw(&[
        23, 3, 3, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let said = scene.running.warned("does not decrypt");
    assert!(said.contains("channel 1: "), "{said}");
    scene.running.ended();
    scene.running.stop();
}
