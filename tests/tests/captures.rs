//! Captured sessions of QEMU 7.2 and 10.0, given to the real session, wire and store without a socket, in the order
//! and pieces in which they were recorded. What is committed must equal a simple reading of the same bytes.

use colo_ring::session::{
    Action, MultifdChannel, PacketAction, PageContent, Rendezvous, Session, SessionLimits, SessionMethod,
    Ticket,
};
use colo_ring::store::{
    CacheKind, CommitMode, CopyMethod, DumpTargets, Flusher, HugePages, Store, StoreOptions,
};
use colo_ring::units::{ChannelId, CheckpointId, PAGE_SIZE};
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, Init, PacketHeader, PageList};
use colo_ring::wire::vmdesc::Evidence;
use colo_ring_tests::capture::Capture;
use colo_ring_tests::model::Model;
use std::fs::File;
use std::os::unix::fs::FileExt;

const CHANNELS: u8 = 4;

/// A multifd channel without a socket.
struct Channel {
    id: Option<ChannelId>,
    arrived: Vec<u8>,
    protocol: MultifdChannel,
    parked: Option<Ticket>,
}

/// The secondary without sockets.
struct Secondary {
    kind: (CacheKind, CommitMode),
    session: Session,
    rendezvous: Rendezvous,
    method: SessionMethod,
    main: Vec<u8>,
    channels: Vec<Channel>,
    at_marker: bool,
    store: Option<Store>,
    flusher: Flusher,
    committed: Vec<CheckpointId>,
    zero_over_content: usize,
}

impl Secondary {
    fn new(connections: usize, kind: (CacheKind, CommitMode)) -> Self {
        let channel = |_| Channel {
            id: None,
            arrived: Vec::new(),
            protocol: MultifdChannel::default(),
            parked: None,
        };
        Self {
            kind,
            session: Session::new(SessionLimits::of_protocol(CHANNELS)),
            rendezvous: Rendezvous::new(CHANNELS),
            method: SessionMethod::default(),
            main: Vec::new(),
            channels: (0..connections).map(channel).collect(),
            at_marker: false,
            store: None,
            flusher: Flusher::new(CopyMethod::NonTemporal, 1, &[]).unwrap(),
            committed: Vec::new(),
            zero_over_content: 0,
        }
    }

    /// Drives all channels until none can proceed.
    fn run(&mut self) {
        loop {
            let before = (self.session.position(), self.progress());
            self.drive_main();
            for position in 0..self.channels.len() {
                while self.packet(position) {}
            }
            if before == (self.session.position(), self.progress()) {
                return;
            }
        }
    }

    fn progress(&self) -> (usize, usize) {
        let waiting = self.channels.iter().map(|channel| channel.arrived.len()).sum();
        (
            waiting,
            self.channels
                .iter()
                .filter(|channel| channel.parked.is_some())
                .count(),
        )
    }

    fn drive_main(&mut self) {
        loop {
            if self.at_marker {
                if !self.rendezvous.all_arrived() {
                    return;
                }
                self.rendezvous.release();
                self.at_marker = false;
            }
            let (consumed, action) = self.session.step(&self.main).unwrap();
            let mut device_state_complete = None;
            match action {
                Action::NeedMore => {
                    self.main.drain(..consumed);
                    return;
                }
                Action::Continue | Action::TransferBegins | Action::Send(_) => {}
                Action::Memory(table) => {
                    let options = StoreOptions {
                        hugepages: HugePages::Off,
                        cache: self.kind.0,
                        commit: self.kind.1,
                        ..StoreOptions::default()
                    };
                    self.store = Some(Store::create(table, "capture", &options).unwrap().0);
                }
                Action::Page(page) => {
                    let store = self.store.as_ref().unwrap();
                    match page.content {
                        PageContent::Zero => {
                            let mut content = [0; PAGE_SIZE];
                            store.read_newest(page.page, &mut content);
                            self.zero_over_content += usize::from(content != [0; PAGE_SIZE]);
                            store.zero(0, page.page);
                        }
                        PageContent::Bytes(bytes) => store.write(0, page.page, bytes).unwrap(),
                        PageContent::Xbzrle(_) => panic!("no XBZRLE in these captures"),
                    }
                }
                Action::Marker => self.at_marker = true,
                Action::RamComplete => self.rendezvous.close_gate().unwrap(),
                Action::LooksEnded(evidence) => {
                    assert_eq!(evidence, Evidence::Described);
                    self.session.silence();
                }
                Action::Commit(id) => device_state_complete = Some(id),
                Action::FinishFlush => {
                    self.store.as_ref().unwrap().finish_flush();
                    self.session.flush_finished();
                }
                Action::OpenGate => self.rendezvous.open_gate(),
            }
            self.main.drain(..consumed);
            if let Some(id) = device_state_complete {
                self.commit(id);
            }
        }
    }

    fn commit(&mut self, id: CheckpointId) {
        let store = self.store.as_ref().unwrap();
        if id == CheckpointId(0) {
            assert_eq!(store.unseen_pages(), 0, "precopy sends every page");
            store.begin_colo();
        }
        store.commit(id, self.session.device_state(), &self.flusher);
        self.session.committed();
        self.committed.push(id);
    }

    /// Takes a packet off a channel, if there is a whole one and the channel may be read.
    fn packet(&mut self, position: usize) -> bool {
        let channel = &mut self.channels[position];
        if let Some(ticket) = channel.parked {
            if !self.rendezvous.is_released(ticket) {
                return false;
            }
            channel.protocol.on_release();
            channel.parked = None;
        }
        let Some(id) = channel.id else {
            let Some(init) = channel.arrived.first_chunk::<INIT_LEN>() else {
                return false;
            };
            channel.id = Some(Init::decode(init).unwrap().channel);
            channel.arrived.drain(..INIT_LEN);
            return true;
        };
        let Some(header) = channel.arrived.first_chunk::<HEADER_LEN>() else {
            return false;
        };
        let header = PacketHeader::decode(header).unwrap();
        let payload = usize::try_from(header.payload_len()).unwrap();
        if channel.arrived.len() < HEADER_LEN + payload {
            return false;
        }
        let mut action = channel.protocol.on_header(&header, &self.method).unwrap();
        if header.has_pages() {
            let store = self.store.as_ref().unwrap();
            let (mut normal, mut zero) = (PageList::default(), PageList::default());
            header.resolve(store.table(), &mut normal, &mut zero).unwrap();
            self.rendezvous.begin_packet(id).unwrap();
            let pages = channel.arrived[HEADER_LEN..HEADER_LEN + payload]
                .as_chunks::<PAGE_SIZE>()
                .0;
            for (page, content) in normal.as_slice().iter().zip(pages) {
                store.write(0, *page, content).unwrap();
            }
            for page in zero.as_slice() {
                store.zero(0, *page);
            }
            self.rendezvous.end_packet(id);
            action = channel.protocol.on_pages();
        }
        channel.arrived.drain(..HEADER_LEN + payload);
        if action == PacketAction::Arrive {
            channel.parked = Some(self.rendezvous.arrive().0);
        }
        true
    }
}

/// Every cache with every commit mode.
const KINDS: [(CacheKind, CommitMode); 4] = [
    (CacheKind::Mirror, CommitMode::Sync),
    (CacheKind::Mirror, CommitMode::Deferred),
    (CacheKind::Pool, CommitMode::Sync),
    (CacheKind::Pool, CommitMode::Deferred),
];

/// Plays a capture with every kind of store, and hands each to `check`.
fn play(name: &str, check: impl Fn(&Secondary, &Model)) {
    let capture = Capture::read(name);
    let model = Model::of(&capture);
    for kind in KINDS {
        let secondary = play_with(&capture, kind);
        compare(&secondary, &model);
        assert!(model.checkpoints >= 4, "{} checkpoints", model.checkpoints);
        check(&secondary, &model);
    }
}

fn play_with(capture: &Capture, kind: (CacheKind, CommitMode)) -> Secondary {
    let mut secondary = Secondary::new(capture.connections.len(), kind);
    for chunk in &capture.chunks {
        let bytes = &capture.connections[chunk.connection][chunk.begin..chunk.begin + chunk.length];
        if chunk.connection == capture.main {
            secondary.main.extend_from_slice(bytes);
        } else {
            secondary.channels[chunk.connection]
                .arrived
                .extend_from_slice(bytes);
        }
        secondary.run();
    }
    secondary
}

/// The committed image and device state equal the model's, block for block.
fn compare(secondary: &Secondary, model: &Model) {
    let committed = secondary.store.as_ref().unwrap().committed();
    let file = || tempfile::tempfile().unwrap();
    let blocks: Vec<_> = committed.table().iter().map(|_| file()).collect();
    let device_state = file();
    let report = committed.dump(&DumpTargets {
        blocks: blocks.iter().collect(),
        device_state: &device_state,
    });
    assert_eq!(report.unwrap().checkpoint.0, model.checkpoints);
    let read = |file: &File| {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert_eq!(blocks.len(), model.blocks.len());
    let dumped = committed.table().iter().zip(&blocks);
    for (((_, block), file), (name, content)) in dumped.zip(&model.blocks) {
        assert_eq!(&*block.name, &name[..]);
        let file = read(file);
        let differing = file
            .chunks(PAGE_SIZE)
            .zip(content.chunks(PAGE_SIZE))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(
            (file.len(), differing),
            (content.len(), 0),
            "block {}",
            String::from_utf8_lossy(name)
        );
    }
    assert_eq!(read(&device_state), model.device_state);
}

#[test]
fn a_session_of_qemu_7_2() {
    play("colo-multifd4-7.2", |secondary, model| {
        assert!(model.twice > 0, "this version sends pages twice");
        assert!(secondary.zero_over_content > 0, "zero pages overwrite content");
        assert_eq!(
            secondary.session.description().unwrap().machine_type,
            "pc-i440fx-7.2"
        );
    });
}

#[test]
fn a_session_of_qemu_10() {
    play("colo-multifd4-10", |secondary, _| {
        assert_eq!(
            secondary.session.description().unwrap().machine_type,
            "pc-i440fx-10.0"
        );
    });
}
