//! A guest with a service, its receiver and its guard.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Guard, Guest, Lab, LabError, Machine, NetGuest, Nic, Qemu, Receiver, ReceiverOptions, TAP,
    Transport, wait_for,
};

/// How a test guards its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Relay,
    Filter,
    /// Its output is not held.
    None,
}

/// A guest with a service, its receiver and its guard.
pub(super) struct Scene<'a> {
    lab: &'a Lab,
    pub(super) way: Way,
    number: u32,
    pub(super) address: Address,
    pub(super) receiver: Receiver,
    pub(super) primary: Qemu,
    pub(super) guard: Guard,
}

impl<'a> Scene<'a> {
    /// Starts all, and waits until the guest is protected.
    pub(super) fn set(lab: &'a Lab, way: Way, number: u32, extra: &[&str]) -> Result<Self, LabError> {
        let primary = Qemu::start(lab, &format!("primary{number}"), &machine(lab, way, number))?;
        let address = Address::free(lab, Transport::Unix)?;
        let receiver = receiver(lab, &address)?;
        let mut guard = guard(lab, way, number, &primary, &address, extra)?;
        primary.wait_serial("listening", HANG_LIMIT)?;
        guard.wait_state("protected")?;
        Ok(Self {
            lab,
            way,
            number,
            address,
            receiver,
            primary,
            guard,
        })
    }

    /// Kills the primary, and resumes its guest in a fresh QEMU with the same tap device.
    pub(super) fn fail_over(self) -> Result<(Receiver, Qemu), LabError> {
        let Self {
            lab,
            receiver,
            primary,
            mut guard,
            number,
            ..
        } = self;
        let session = receiver.sessions()?[0];
        let _ = primary.kill();
        // It ends with its QEMU, and the tap device is free.
        guard.wait_end()?;
        let fresh = Machine {
            nic: Some(Nic::Tap),
            ..machine(lab, Way::Filter, number)
        };
        let fresh = Qemu::start_incoming(lab, &format!("fresh{number}"), &fresh)?;
        let monitor = fresh.free_monitor().display().to_string();
        wait_for("the end of the session", HANG_LIMIT, || {
            let status = receiver.status()?;
            Ok((status["sessions"][0]["state"] == "ended").then_some(()))
        })?;
        receiver.failover(session, ["--qmp", &monitor])?;
        Ok((receiver, fresh))
    }
}

fn socket(lab: &Lab, number: u32) -> String {
    lab.file(&format!("card{number}.sock")).display().to_string()
}

fn machine(lab: &Lab, way: Way, number: u32) -> Machine {
    Machine {
        nic: Some(match way {
            Way::Relay => Nic::Stream(socket(lab, number).into()),
            Way::Filter | Way::None => Nic::Tap,
        }),
        uuid: Some(format!("6c6f636f-0000-4000-8000-{number:012}")),
        ..Machine::bare("q35", 128, Guest::Net(NetGuest))
    }
}

pub(super) fn receiver(lab: &Lab, address: &Address) -> Result<Receiver, LabError> {
    let options = ReceiverOptions {
        channels: 2,
        backend: BackendKind::Uring,
        once: false,
        extra: Vec::new(),
    };
    Receiver::start(lab, address, &options)
}

pub(super) fn guard(
    lab: &Lab,
    way: Way,
    number: u32,
    primary: &Qemu,
    address: &Address,
    extra: &[&str],
) -> Result<Guard, LabError> {
    let relay = format!("net0={},{TAP}", socket(lab, number));
    let own: &[&str] = match way {
        Way::Relay => &["--relay", &relay],
        Way::Filter => &[],
        Way::None => &["--net", "none"],
    };
    Guard::start(lab, primary, address, &[own, extra].concat())
}
