//! Wrong bytes on the main channel after precopy: in a checkpoint, between two, and in plain mode.

use crate::{BACKENDS, be32, be64, good_packet};
use colo_ring::ring::BackendKind;
use colo_ring::wire::colo::Message;
use colo_ring::wire::ram::{BlockRef, RamRecord};
use colo_ring::wire::stream::{Section, encode_footer};
use colo_ring_tests::hostile::bench::{At, Bench};
use colo_ring_tests::hostile::{
    PAGE, RAM, device_state, end_of_body, message, page_record, ram_start, record, section,
};

/// What is good, what is wrong behind it, and what the message says.
pub(crate) type MainCase = (&'static str, Vec<Vec<u8>>, Vec<u8>, &'static str);

fn footer(id: u32) -> Vec<u8> {
    let mut out = Vec::new();
    encode_footer(&mut out, id);
    out
}

/// Of a checkpoint after its REPLY.
fn checkpoint_cases() -> Vec<MainCase> {
    let send = || message(Message::VmstateSend);
    let end = || section(Section::End { id: RAM });
    let flush = || record(RamRecord::MultifdFlush);
    let eos = || record(RamRecord::Eos);
    let round = || vec![send(), end(), flush(), end_of_body()];
    let to_size = || [round(), vec![section(Section::Eof)]].concat();
    let state = device_state(1);
    let to_state = |size| [to_size(), vec![message(Message::VmstateSize(size))]].concat();
    let size = |bytes: u64| [be32(4), be64(bytes)].concat();
    let page = |name: &[u8], offset| page_record(BlockRef::Named(name), offset, 1);
    let xbzrle = record(RamRecord::Xbzrle {
        block: BlockRef::Named(b"pc.ram"),
        offset: 0,
        delta: &[0, 1, 7],
    });
    let mut first = state.clone();
    first[0] = 9;
    let mut last = state.clone();
    *last.last_mut().unwrap() = 1;
    let bytes = state.len() as u64;
    vec![
        (
            "asked again",
            vec![],
            message(Message::CheckpointRequest),
            "CheckpointRequest instead of VmstateSend",
        ),
        ("size at once", vec![], size(bytes), "instead of VmstateSend"),
        (
            "an answer",
            vec![],
            message(Message::VmstateLoaded),
            "VmstateLoaded instead of VmstateSend",
        ),
        (
            "unknown message",
            vec![],
            be32(7),
            "a COLO message id is 0x7, expected 0 to 6",
        ),
        (
            "SEND twice",
            vec![send()],
            send(),
            "Eof in the RAM part of a checkpoint",
        ),
        (
            "unknown section",
            vec![send()],
            vec![0x7f],
            "a section's type is 0x7f",
        ),
        (
            "foreign section",
            vec![send()],
            section(Section::Part { id: 2 }),
            "the id of a section part is 2, expected 1",
        ),
        (
            "a device",
            vec![send()],
            state.clone(),
            "in the RAM part of a checkpoint",
        ),
        (
            "a second START",
            vec![send()],
            ram_start(),
            "in the RAM part of a checkpoint",
        ),
        ("postcopy", vec![send()], vec![8, 0, 3, 0, 16], "POSTCOPY_ADVISE"),
        (
            "unknown command",
            vec![send()],
            vec![8, 0, 99, 0, 0],
            "the unknown command 99",
        ),
        (
            "command with data",
            vec![send()],
            vec![8, 0, 11, 0, 4],
            "the data length of a command is 4, expected 0",
        ),
        (
            "no flags",
            vec![send(), end()],
            be64(0),
            "a RAM record's word is 0x0",
        ),
        (
            "compress",
            vec![send(), end()],
            be64(0x100),
            "capability compress off",
        ),
        (
            "block list",
            vec![send(), end()],
            be64(0x4_8004),
            "a second block list",
        ),
        (
            "EOS with address",
            vec![send(), end()],
            be64(0x1010),
            "a RAM record's word is 0x1010",
        ),
        (
            "unknown block",
            vec![send(), end()],
            page(b"pc.rom", 0),
            "block \"pc.rom\" is not in the block list",
        ),
        (
            "beyond",
            vec![send(), end()],
            page(b"pc.ram2", 0x8000),
            "offset 0x8000 is not a page of block pc.ram2",
        ),
        (
            "last page of all",
            vec![send(), end()],
            page(b"pc.ram", u64::MAX - 4095),
            "is not a page of block pc.ram",
        ),
        (
            "nothing to continue",
            vec![send(), end()],
            page_record(BlockRef::Continue, 0, 1),
            "continues the block",
        ),
        (
            "fill byte",
            vec![send(), end()],
            [be64(2), vec![6], b"pc.ram\x01".to_vec()].concat(),
            "zero page is 0x1",
        ),
        ("XBZRLE", vec![send(), end()], xbzrle, "capability xbzrle off"),
        (
            "no marker",
            vec![send(), end()],
            eos(),
            "without a MULTIFD_FLUSH before it",
        ),
        (
            "no footer",
            vec![send(), end(), flush(), eos()],
            vec![0; 5],
            "a section without footer",
        ),
        (
            "foreign footer",
            vec![send(), end(), flush(), eos()],
            footer(9),
            "a footer is 9, expected 1",
        ),
        (
            "a round too many",
            round(),
            end(),
            "End { id: 1 } in the RAM part of a checkpoint",
        ),
        (
            "no size",
            to_size(),
            message(Message::CheckpointRequest),
            "instead of VMSTATE_SIZE",
        ),
        (
            "size 0",
            to_size(),
            size(0),
            "VMSTATE_SIZE is 0x0, expected at least 2 bytes",
        ),
        ("size 1", to_size(), size(1), "VMSTATE_SIZE is 0x1"),
        (
            "size over 1 GiB",
            to_size(),
            size((1 << 30) + 1),
            "VMSTATE_SIZE is 1073741825, expected at most 1073741824",
        ),
        (
            "all size",
            to_size(),
            size(u64::MAX),
            "VMSTATE_SIZE is 18446744073709551615",
        ),
        (
            "begins otherwise",
            to_state(bytes),
            first,
            "the first byte of the device state is 0x9, expected 0x4",
        ),
        (
            "ends otherwise",
            to_state(bytes),
            last,
            "the last byte of the device state is 0x1, expected 0x0",
        ),
        (
            "size too small",
            to_state(bytes - 1),
            state[..state.len() - 1].to_vec(),
            "the last byte of the device state",
        ),
    ]
}

#[test]
fn wrong_bytes_in_a_checkpoint() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let step = if backend == BackendKind::Uring { 1 } else { 5 };
        for (case, good, wrong, says) in checkpoint_cases().into_iter().step_by(step) {
            let (session, mut primary) = bench.protected();
            primary.request();
            primary.channels[0].send_packet(&good_packet());
            primary.sync();
            good.iter().for_each(|bytes| primary.main.send(bytes));
            let place = At::main(&primary);
            primary.main.send(&wrong);
            bench.survives(case, session, &mut primary, place, &[says]);
        }
        bench.end();
    }
}

#[test]
fn wrong_messages_between_checkpoints() {
    let mut bench = Bench::start(BackendKind::Uring, 2);
    for (case, wrong, says) in [
        (
            "SEND unasked",
            message(Message::VmstateSend),
            "VmstateSend instead of CheckpointRequest",
        ),
        (
            "an answer",
            message(Message::CheckpointReady),
            "CheckpointReady instead of CheckpointRequest",
        ),
        ("unknown", be32(u32::MAX), "a COLO message id is 0xffffffff"),
        (
            "a section",
            section(Section::End { id: RAM }),
            "a COLO message id is 0x3000000",
        ),
    ] {
        let (session, mut primary) = bench.protected();
        let place = At::main(&primary);
        primary.main.send(&wrong);
        bench.survives(case, session, &mut primary, place, &[says]);
    }
    bench.end();
}

#[test]
fn wrong_bytes_in_plain_mode() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 0);
        let delta = |offset, delta: &[u8]| {
            let block = BlockRef::Named(b"pc.ram");
            record(RamRecord::Xbzrle { block, offset, delta })
        };
        for (case, wrong, says) in [
            (
                "unknown block",
                page_record(BlockRef::Named(b"x"), 0, 1),
                "block \"x\" is not in the block list",
            ),
            (
                "beyond",
                page_record(BlockRef::Continue, 0x8000, 1),
                "offset 0x8000 is not a page of block pc.ram2",
            ),
            (
                "delta of nothing",
                delta(5 * PAGE, &[0, 1, 7]),
                "changes a page that was never received",
            ),
            (
                "delta over the page",
                delta(PAGE, &[0xff, 0x1f, 2, 1, 1]),
                "a run reaches beyond the page",
            ),
            ("delta cut short", delta(PAGE, &[0, 9, 1]), "a bad XBZRLE delta"),
            (
                "marker",
                record(RamRecord::MultifdFlush),
                "switch its capability multifd off",
            ),
        ] {
            let (session, mut primary) = bench.protected();
            primary.request();
            primary.main.send(&message(Message::VmstateSend));
            primary.main.send(&section(Section::End { id: RAM }));
            primary
                .main
                .send(&page_record(BlockRef::Named(b"pc.ram"), PAGE, 0x77));
            primary
                .main
                .send(&page_record(BlockRef::Named(b"pc.ram2"), 0, 0x78));
            let place = At::main(&primary);
            primary.main.send(&wrong);
            bench.survives(case, session, &mut primary, place, &[says]);
        }
        bench.end();
    }
}
