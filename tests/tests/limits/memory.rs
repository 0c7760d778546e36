//! Memory: what one guest asks for is refused in words where there is not so much, and the others stay protected.

use super::sessions::with_memory;
use super::socket_address;
use colo_ring::units::PACKET_PAGES;
use colo_ring::wire::colo::Message;
use colo_ring::wire::ram::{BlockRef, RamRecord};
use colo_ring::wire::stream::Section;
use colo_ring_skip::skip;
use colo_ring_tests::cgroup::MemoryGroup;
use colo_ring_tests::command::{RunningReceiver, guest, until, wrapped};
use colo_ring_tests::hostile::{
    HostilePrimary, Link, PAGE, RAM, answers_to_checkpoint, answers_to_precopy, end_of_body, header,
    list_of_one_block, message, packet, ram_start, record, section,
};
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary};

const MIB: u64 = 1 << 20;

/// A receiver whose cgroup has so much memory, and to which the operator has promised more. None if that cannot be tried here.
fn in_cgroup(test: &str, bytes: u64, args: &[&str]) -> Option<(MemoryGroup, RunningReceiver)> {
    let group = match MemoryGroup::new(test, bytes) {
        Ok(group) => group,
        Err(error) => {
            skip(test, &format!("it needs root and a memory cgroup: {error}"));
            return None;
        }
    };
    let wrap = group.wrap();
    let wrap: Vec<_> = wrap.iter().map(String::as_str).collect();
    let args = [&["--hugepages", "off"], args].concat();
    let receiver = RunningReceiver::start(wrapped(&wrap), &args);
    Some((group, receiver))
}

/// A primary whose guest has one block of so many bytes: connected, and its list of blocks sent.
fn announced(receiver: &RunningReceiver, bytes: u64) -> HostilePrimary {
    let mut primary = HostilePrimary::connect(socket_address(receiver), 2);
    let list = [
        ram_start(),
        list_of_one_block("pc.ram", bytes),
        primary.marker(),
        end_of_body(),
    ];
    for (_, part) in &primary.precopy_parts()[..2] {
        primary.main.send(part);
    }
    primary.main.send(&list.concat());
    primary
}

/// The same after its first copy, in which it sends no page.
fn protected(receiver: &RunningReceiver, bytes: u64) -> HostilePrimary {
    let mut primary = announced(receiver, bytes);
    for (_, part) in &primary.precopy_parts()[3..] {
        primary.main.send(part);
    }
    primary.sync();
    primary.sync();
    primary.main.expect(&answers_to_precopy());
    primary
}

/// A protected guest that goes on whatever happens to others.
fn neighbour(receiver: &RunningReceiver, options: &SynthOptions) -> SynthPrimary {
    let mut primary = SynthPrimary::connect(receiver.address(), options).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    primary
}

/// Checkpoint 2 of the first session is committed and right.
fn goes_on(receiver: &RunningReceiver, mut primary: SynthPrimary) {
    primary.checkpoint().expect("a guest beside it goes on");
    receiver.check_dump(&primary, &receiver.protected(), 2);
}

#[test]
fn a_guest_larger_than_the_cgroup_is_refused() {
    let test = "a_guest_larger_than_the_cgroup_is_refused";
    // With and without an option that promises more.
    for args in [&["--ram-limit", "64G"][..], &[]] {
        let Some((_group, receiver)) = in_cgroup(test, 300 * MIB, args) else {
            return;
        };
        let first = neighbour(&receiver, &guest());
        let mut large = announced(&receiver, 1 << 30);
        receiver.wait_for_log("exceed the part of --ram-limit that fits cgroup");
        assert!(large.is_closed());
        goes_on(&receiver, first);
        let warned = receiver.log().contains("--ram-limit is 64G");
        assert_eq!(warned, !args.is_empty(), "{}", receiver.log());
        let limit = receiver.status()["ram_limit_bytes"].as_u64().expect("a number");
        assert!(limit > 150 * MIB && limit < 300 * MIB, "{limit}");
    }
}

/// Each extent of the pool is kept in use by one page of it, as all others come again and again.
#[test]
fn thinly_filled_packets_are_refused() {
    let test = "thinly_filled_packets_are_refused";
    let Some((_group, receiver)) = in_cgroup(test, 600 * MIB, &["--ram-limit", "64G"]) else {
        return;
    };
    let first = neighbour(&receiver, &guest());
    let mut hostile = protected(&receiver, 128 * MIB);
    hostile.request();
    let same: Vec<_> = (1..=PACKET_PAGES as u64)
        .map(|page| (128 * MIB - page * PAGE, 7))
        .collect();
    let mut kept = 0;
    until("its end", || {
        let mut pages = same.clone();
        hostile.channels[0].send_packet(&packet("pc.ram", &pages, &[]));
        pages[0] = (kept * PAGE, 7);
        hostile.channels[0].send_packet(&packet("pc.ram", &pages, &[]));
        kept += 1;
        receiver.log().contains("session 2 ended").then_some(())
    });
    receiver.wait_for_log("exceed the part of --ram-limit that fits cgroup");
    assert!(hostile.is_closed());
    goes_on(&receiver, first);
    // What it had for its packets is given back, if not at once.
    let mut third = until("room for a third", || {
        SynthPrimary::connect(receiver.address(), &guest()).ok()
    });
    third.checkpoint().expect("a checkpoint");
}

/// At the end of a first copy it has no length, and takes what there is; that of a checkpoint is refused by its length.
#[test]
fn a_device_state_without_end_is_refused() {
    let test = "a_device_state_without_end_is_refused";
    let Some((_group, receiver)) = in_cgroup(test, 300 * MIB, &[]) else {
        return;
    };
    let first = neighbour(&receiver, &guest());
    let endless = section(Section::Full {
        id: 5,
        idstr: b"cpu",
        instance: 0,
        version: 1,
    });
    let piece = vec![1; 1 << 20];
    let mut initial = announced(&receiver, PAGE);
    for (_, part) in &initial.precopy_parts()[3..5] {
        initial.main.send(part);
    }
    initial.sync();
    initial.sync();
    initial.main.send(&endless);
    until("its end", || {
        initial.main.send(&piece);
        receiver.log().contains("session 2 ended").then_some(())
    });
    receiver.wait_for_log("exceed the part of --ram-limit that fits cgroup");
    assert!(initial.is_closed());
    let mut later = HostilePrimary::protected(socket_address(&receiver), 2);
    later.request();
    later.sync();
    let begin = [
        message(Message::VmstateSend),
        later.round(&[]),
        section(Section::Eof),
        message(Message::VmstateSize(1 << 29)),
    ];
    later.main.send(&begin.concat());
    receiver.wait_for_log("(the receiver's --device-state-max) is 536870912");
    assert!(later.is_closed());
    goes_on(&receiver, first);
}

/// Others have taken the budget: what the device states of a protected guest grow by was taken before.
#[test]
fn a_device_state_grows_when_others_have_all_memory() {
    let args = ["--hugepages", "off", "--ram-limit", "256M"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let mut guest = HostilePrimary::protected(socket_address(&receiver), 2);
    let left = || {
        let status = receiver.status();
        let bytes = |name: &str| status[name].as_u64().expect("a number");
        bytes("ram_limit_bytes") - bytes("ram_held_bytes")
    };
    // None is refused, which would make room: a guest has at most three times its RAM and some, and a session without one 1 MiB and some.
    const SOME: u64 = 24 * MIB;
    let mut others = Vec::new();
    while left() > 48 * MIB {
        others.push(announced(&receiver, ((left() - SOME) / 4).next_multiple_of(PAGE)));
        until("its memory", || {
            (with_memory(&receiver) == 1 + others.len()).then_some(())
        });
    }
    let mut begun = Vec::new();
    while left() > 2 * MIB {
        let before = left();
        let address = socket_address(&receiver);
        let mut main = Link::connect(address);
        main.send(&header());
        // Each of a guest of its own.
        let uuid = (before + 1).to_le_bytes();
        let channels =
            [0, 1].map(|id| Link::multifd(address, [uuid, uuid].concat().try_into().expect("16"), id));
        begun.push((main, channels));
        until("a session", || (left() < before).then_some(()));
    }
    println!("{} bytes are left", left());
    guest.request();
    guest.sync();
    let mut state = section(Section::Full {
        id: 5,
        idstr: b"cpu",
        instance: 0,
        version: 1,
    });
    state.resize((2 << 20) - 1, 1);
    state.extend(section(Section::Eof));
    let begin = [
        message(Message::VmstateSend),
        guest.round(&[]),
        section(Section::Eof),
        message(Message::VmstateSize(state.len() as u64)),
        state,
    ];
    guest.main.send(&begin.concat());
    guest.main.expect(&answers_to_checkpoint());
    assert_eq!(with_memory(&receiver), 1 + others.len());
}

/// It has the memory of a guest, and sends a byte now and then: another guest that finds none gets it at its next try.
#[test]
fn a_first_copy_that_stands_makes_room() {
    let args = ["--hugepages", "off", "--ram-limit", "256M"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let first = neighbour(&receiver, &guest());
    let mut standing = announced(&receiver, 64 * MIB);
    until("its memory", || (with_memory(&receiver) == 2).then_some(()));
    let options = SynthOptions {
        ram_bytes: 64 * MIB,
        ..guest()
    };
    standing.sync();
    standing.main.send(&section(Section::Part { id: RAM }));
    let drip = record(RamRecord::Zero {
        block: BlockRef::Named(b"pc.ram"),
        offset: 0,
    });
    let mut other = drip.iter().cycle().find_map(|byte| {
        standing.main.send(&[*byte]);
        // The lines about refused ones are limited, and that about the end is among them.
        std::thread::sleep(std::time::Duration::from_millis(300));
        SynthPrimary::connect(receiver.address(), &options).ok()
    });
    receiver.wait_for_log("and there was no memory for another guest");
    assert!(standing.is_closed());
    other
        .as_mut()
        .expect("it is endless")
        .checkpoint()
        .expect("a checkpoint");
    goes_on(&receiver, first);
}

/// Where the address space has an end, an allocation fails that was not expected to. What guests may take ends before.
#[test]
fn a_limit_of_address_space_is_kept() {
    let limit = format!("--as={}", 2048 * MIB);
    let args = ["--hugepages", "off", "--ram-limit", "64G"];
    let receiver = RunningReceiver::start(wrapped(&["prlimit", &limit]), &args);
    // Its checkpoints need more than what its pool begins with.
    let options = SynthOptions {
        ram_bytes: 256 * MIB,
        dirty_pages: Distribution::Fixed(24_000),
        ..guest()
    };
    let mut first = SynthPrimary::connect(receiver.address(), &options).expect("precopy");
    let refusals = || {
        let log = receiver.log();
        ["no memory for this guest", ": closed: "].map(|words| log.matches(words).count())
    };
    let mut others = Vec::new();
    for size in [256 * MIB, 32 * MIB, PAGE] {
        let mut is_refused = false;
        while !is_refused {
            let (guests, refused) = (with_memory(&receiver), refusals());
            others.push(announced(&receiver, size));
            is_refused = until("its memory, or its end", || {
                let is_refused = refusals() != refused;
                (is_refused || with_memory(&receiver) > guests).then_some(is_refused)
            });
        }
    }
    let log = receiver.log();
    assert!(others.len() < 64, "{log}");
    first.checkpoint().expect("memory that was reserved");
    goes_on(&receiver, first);
    // Not the kernel's refusal, which can hit any allocation.
    let refused = "exceed the part of --ram-limit that fits this process's address space";
    assert_eq!(
        log.matches(refused).count(),
        refusals().iter().sum::<usize>(),
        "{log}"
    );
}
