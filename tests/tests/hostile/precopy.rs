//! Wrong bytes on the main channel in precopy, from the header to the device state.

use crate::main_channel::MainCase;
use crate::{BACKENDS, be32, be64};
use colo_ring::ring::BackendKind;
use colo_ring::wire::ram::{BlockEntry, BlockRef, RamRecord};
use colo_ring::wire::stream::Command;
use colo_ring_tests::hostile::bench::{At, Bench};
use colo_ring_tests::hostile::{
    HostilePrimary, PAGE, answers_to_precopy, commands, device_state, forged_end, header, page_record,
    ram_start, record,
};

fn subsection(name: &[u8], body: &[u8]) -> Vec<u8> {
    let length = u8::try_from(name.len()).unwrap();
    [&[5, length], name, &[0, 0, 0, 1], body].concat()
}

fn entry(name: &[u8], used_length: u64) -> Vec<u8> {
    let mut out = Vec::new();
    BlockEntry { name, used_length }.encode(&mut out);
    out
}

/// Before anything is committed.
fn precopy_cases() -> Vec<MainCase> {
    let changed = |at: usize, byte: u8| {
        let mut bytes = header();
        bytes[at] = byte;
        bytes
    };
    let open = || commands(&[Command::OpenReturnPath]);
    let to_list = || vec![header(), open(), ram_start()];
    let list = |total: u64| [to_list(), vec![record(RamRecord::MemSize { total })]].concat();
    let capability = subsection(b"configuration/capabilities", b"\0\0\0\x01\x0fx-ignore-shared");
    let bitmap = [
        &[1, 0, 0, 0, 3, 12],
        &b"dirty-bitmap"[..],
        &[0, 0, 0, 0, 0, 0, 0, 1],
    ]
    .concat();
    let with = |more: &[u8]| [&header()[..], more].concat();
    let both = vec![
        header(),
        commands(&[Command::OpenReturnPath, Command::EnableColo]),
    ];
    let state = device_state(0);
    vec![
        (
            "old version",
            vec![],
            changed(7, 2),
            "the version of the stream is 0x2",
        ),
        (
            "no configuration",
            vec![],
            changed(8, 8),
            "a stream without configuration section",
        ),
        (
            "long machine",
            vec![],
            changed(11, 1),
            "the length of the machine type is 0x1",
        ),
        (
            "capability",
            vec![],
            with(&capability),
            "capability x-ignore-shared",
        ),
        (
            "page size",
            vec![],
            with(&subsection(b"configuration/target-page-bits", &be32(16))),
            "page bits is 0x10",
        ),
        (
            "unknown configuration",
            vec![],
            with(&subsection(b"configuration/x", &[])),
            "\"configuration/x\"",
        ),
        (
            "QEMU 10 with return path",
            both,
            ram_start(),
            "switch its capability return-path off",
        ),
        ("no COLO", vec![header()], ram_start(), "a migration without COLO"),
        (
            "PING unasked",
            vec![header()],
            commands(&[Command::Ping(1)]),
            "PING before OPEN_RETURN_PATH",
        ),
        (
            "many PINGs",
            vec![header(), open(), commands(&[Command::Ping(1); 16])],
            commands(&[Command::Ping(1)]),
            "PINGs",
        ),
        (
            "bitmaps",
            vec![header(), open()],
            bitmap,
            "switch its capability dirty-bitmaps off",
        ),
        (
            "early device",
            vec![header(), open()],
            state,
            "the state of device \"cpu\" before RAM",
        ),
        ("no RAM", to_list(), be64(4), "add up to 0 bytes"),
        (
            "marker first",
            to_list(),
            record(RamRecord::MultifdFlush),
            "a sync marker before the block list",
        ),
        (
            "page first",
            to_list(),
            page_record(BlockRef::Named(b"pc.ram"), 0, 1),
            "a page before the block list",
        ),
        (
            "EOS first",
            to_list(),
            record(RamRecord::Eos),
            "before the block list",
        ),
        (
            "more than all",
            list(2 * PAGE),
            entry(b"a", 3 * PAGE),
            "add up to 12288 bytes, but 8192 were announced",
        ),
        (
            "wraps",
            list(2 * PAGE),
            entry(b"a", u64::MAX - 4095),
            "add up to 18446744073709547520 bytes",
        ),
        (
            "no length",
            list(2 * PAGE),
            entry(b"a", 0),
            "which is not a positive multiple of 4096",
        ),
        (
            "odd length",
            list(2 * PAGE),
            entry(b"a", 2 * PAGE + 1),
            "which is not a positive multiple of 4096",
        ),
        (
            "no name",
            list(2 * PAGE),
            entry(b"", 2 * PAGE),
            "has an empty name",
        ),
        (
            "twice",
            [list(2 * PAGE), vec![entry(b"a", PAGE)]].concat(),
            entry(b"a", PAGE),
            "occurs twice in the block list",
        ),
    ]
}

#[test]
fn wrong_bytes_in_precopy() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let step = if backend == BackendKind::Uring { 1 } else { 5 };
        for (case, good, wrong, says) in precopy_cases().into_iter().step_by(step) {
            let mut primary = HostilePrimary::connect(bench.address, 2);
            primary.sync();
            good.iter().for_each(|bytes| primary.main.send(bytes));
            let place = At::main(&primary);
            primary.main.send(&wrong);
            let session = bench.began();
            bench.survives(case, session, &mut primary, place, &[says]);
            assert!(bench.dump(session).is_err(), "nothing was committed");
        }
        bench.end();
    }
}

#[test]
fn a_primary_without_vmdesc() {
    let mut bench = Bench::start(BackendKind::Uring, 2);
    let mut primary = HostilePrimary::connect(bench.address, 2);
    primary.sync();
    primary.sync();
    for (_, bytes) in primary
        .precopy_parts()
        .iter()
        .take_while(|(part, _)| *part != "vmdesc")
    {
        primary.main.send(bytes);
    }
    let session = bench.began();
    let end = bench.ended(session).end.unwrap();
    assert!(
        end.contains("start it without -machine suppress-vmdesc=on"),
        "{end}"
    );
    assert!(primary.is_closed());
    bench.end();
}

/// A primary whose guest stands still: all of its RAM is sent.
fn before_devices(bench: &mut Bench) -> (u32, HostilePrimary) {
    let mut primary = HostilePrimary::connect(bench.address, 2);
    for (part, bytes) in primary.precopy_parts() {
        if part != "device state" && part != "vmdesc" {
            primary.main.send(&bytes);
        }
    }
    primary.sync();
    primary.sync();
    (bench.began(), primary)
}

/// What a guest has in the buffer of a device is not taken for the end of its state, though its primary's write ends there.
#[test]
fn an_end_inside_a_device_is_none() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let (forged, rest) = forged_end();
        // A busy machine may take longer from one write to the next than a primary.
        let is_whole = (0..50).any(|_| {
            let (session, mut primary) = before_devices(&mut bench);
            primary.main.send(&forged);
            // It may be closed.
            let sent = primary.main.try_send(&rest);
            let answered = sent.and_then(|()| primary.main.try_expect(&answers_to_precopy()));
            let session = match answered {
                Ok(())
                    if bench
                        .status_of(session)
                        .is_some_and(|status| status.end.is_none()) =>
                {
                    session
                }
                _ => {
                    let status = bench.ended(session);
                    assert!(status.end.unwrap().contains("behind what looked like its end"));
                    assert_eq!(status.checkpoint, None);
                    return false;
                }
            };
            let end = rest
                .windows(6)
                .position(|six| six == b"\x7e\0\0\0\x05\0")
                .unwrap()
                + 6;
            assert_eq!(bench.device_state(session), [&forged, &rest[..end]].concat());
            primary.main.half_close();
            assert_eq!(bench.ended(session).checkpoint, Some(0));
            bench.discard(session);
            true
        });
        assert!(is_whole, "{backend:?}: it was taken for the end each time");
        bench.end();
    }
}

/// Where it was taken for the end all the same, because the primary stood still behind it, what follows shows it. Nothing of that is kept.
#[test]
fn what_follows_a_false_end_spoils_the_checkpoint() {
    for (backend, at_once) in BACKENDS
        .into_iter()
        .flat_map(|backend| [(backend, true), (backend, false)])
    {
        let mut bench = Bench::start(backend, 2);
        let (session, mut primary) = before_devices(&mut bench);
        let (forged, mut rest) = forged_end();
        primary.main.send(&forged);
        primary.main.expect(&answers_to_precopy());
        if !at_once {
            // Without the request that would follow an end.
            rest.drain(..4);
        }
        primary.main.send(&rest);
        let status = bench.ended(session);
        let end = status.end.unwrap();
        assert!(end.contains("behind what looked like its end"), "{end}");
        assert_eq!(status.checkpoint, None);
        assert!(primary.is_closed());
        let refused = bench.dump(session).unwrap_err();
        assert!(refused.contains("left no checkpoint"), "{refused}");
        bench.end();
    }
}
