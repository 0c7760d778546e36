//! Two guests in one receiver: the death of one, and a stranger at the port, do not touch the other; and the dead one's
//! last checkpoint stays.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use std::io::Write;
use std::net::TcpStream;

use colo_ring_tests::lab::{
    Address, Dump, Guest, Lab, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, TestGuest,
    Transport, check_test_guest_image, experiment,
};

const CHANNELS: u8 = 2;

#[test]
fn a_guest_that_dies_leaves_the_other_and_its_own_checkpoint() {
    experiment(|lab| {
        let load = TestGuest::random(5000, 48);
        let address = Address::free(lab, Transport::Tcp)?;
        let options = ReceiverOptions {
            channels: CHANNELS,
            backend: BackendKind::Uring,
            once: false,
            extra: Vec::new(),
        };
        let mut receiver = Receiver::start(lab, &address, &options)?;
        let mut pc = start(lab, "pc", "6f1c6ac4-4a5c-4d0e-9b36-1f3c26f7a001", &load)?;
        let mut q35 = start(lab, "q35", "6f1c6ac4-4a5c-4d0e-9b36-1f3c26f7a002", &load)?;
        for primary in [&mut pc, &mut q35] {
            let protection = Protection::every_ms(200, CHANNELS);
            primary.protect(&address, &protection)?;
        }
        pc.wait_checkpoints(5, HANG_LIMIT)?;
        q35.wait_checkpoints(5, HANG_LIMIT)?;
        visit_with_a_browser(&address);

        let pc_checkpoints = u64::try_from(pc.checkpoints()?).expect("a count");
        drop(pc);
        let q35_checkpoints = q35.checkpoints()?;
        q35.wait_checkpoints(q35_checkpoints + 10, HANG_LIMIT)?;

        let saved = q35.commit_stopped(&lab.file("saved.ram"))?;
        saved.assert_equal(&dump_of(lab, &receiver, "pc-q35-")?.block("pc.ram")?)?;
        q35.check_guest()?;

        let dead = dump_of(lab, &receiver, "pc-i440fx-")?;
        assert!(
            dead.checkpoint() >= pc_checkpoints,
            "{} of {pc_checkpoints} were kept",
            dead.checkpoint()
        );
        check_test_guest_image(&dead.block("pc.ram")?, &load)?;

        let status = receiver.terminate()?;
        assert!(status.code().is_some(), "a signal ended it: {status}");
        Ok(())
    });
}

fn start(lab: &Lab, machine: &str, uuid: &str, load: &TestGuest) -> Result<Qemu, LabError> {
    let machine = Machine {
        uuid: Some(uuid.to_owned()),
        ..Machine::bare(machine, 64, Guest::Test(load.clone()))
    };
    let qemu = Qemu::start(lab, &machine.machine, &machine)?;
    qemu.wait_serial("tick 2 ", HANG_LIMIT)?;
    Ok(qemu)
}

fn visit_with_a_browser(address: &Address) {
    let Address::Tcp(port) = *address else {
        panic!("a browser speaks TCP")
    };
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the receiver accepts connections");
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .expect("a few bytes fit a socket's buffer");
}

/// The dump of the session whose machine type starts so.
fn dump_of(lab: &Lab, receiver: &Receiver, machine_prefix: &str) -> Result<Dump, LabError> {
    let sessions = receiver.sessions()?;
    for session in &sessions {
        let dump = receiver.dump(*session, &lab.file(&format!("dump-{machine_prefix}{session}")))?;
        if dump.machine().starts_with(machine_prefix) {
            return Ok(dump);
        }
    }
    panic!("none of the sessions {sessions:?} is a {machine_prefix}");
}
