//! A guest with a service, its receiver and its guard.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Client, Guard, Guest, Lab, LabError, LinkProxy, Load, Machine, NetGuest, Nic, Qemu, Receiver,
    ReceiverOptions, TAP, Transport, wait_for, wait_tap_free,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;

/// A pause with which a client asks some 50 times a second.
pub(super) const OFTEN: Duration = Duration::from_millis(20);

/// A client of the guest that asks often, and was answered some times.
pub(super) fn ask() -> Result<Client, LabError> {
    let client = Client::start(Load::Count(OFTEN))?;
    client.wait_answers(20)?;
    Ok(client)
}

/// The client's connection has gone on all the time.
pub(super) fn end_well(client: Client, what: &str) {
    let seen = client.end();
    println!("{what}: longest gap {:?}", seen.longest_gap);
    assert_eq!(seen.error, None, "{what}");
}

/// Waits until the guest stands.
pub(super) fn wait_stands(primary: &mut Qemu) -> Result<(), LabError> {
    wait_for("the guest to stand", HANG_LIMIT, || {
        let state = primary.qmp().execute("query-status", &json!({}))?;
        Ok((state["status"] == "paused").then_some(()))
    })
}

/// A primary whose service answers. It stands during the first copy: with TCG, QEMU may miss pages that it dirties meanwhile.
pub(super) fn primary(lab: &Lab, name: &str, way: Way, number: u32) -> Result<Qemu, LabError> {
    let mut primary = Qemu::start(lab, name, &machine(lab, way, number))?;
    primary.wait_serial("listening", HANG_LIMIT)?;
    primary.stop()?;
    Ok(primary)
}

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
        let address = Address::free(lab, Transport::Unix)?;
        let receiver = receiver(lab, &address)?;
        Self::set_around(lab, way, number, receiver, address, extra)
    }

    /// The same, and a client that asks often.
    pub(super) fn set_asked(lab: &'a Lab, way: Way, extra: &[&str]) -> Result<(Self, Client), LabError> {
        let scene = Self::set(lab, way, 0, extra)?;
        Ok((scene, ask()?))
    }

    /// Kills all of its guard, if there is one, and starts another.
    pub(super) fn restart_guard(&mut self, extra: &[&str]) -> Result<(), LabError> {
        // It may have been killed before.
        let _ = self.guard.end(Signal::SIGKILL);
        self.guard = guard(
            self.lab,
            self.way,
            self.number,
            &self.primary,
            &self.address,
            extra,
        )?;
        Ok(())
    }

    /// The same with a proxy between primary and guard on one side, and the receiver on the other.
    pub(super) fn set_with_proxy(
        lab: &'a Lab,
        way: Way,
        number: u32,
        extra: &[&str],
    ) -> Result<(Self, LinkProxy), LabError> {
        let address = Address::free(lab, Transport::Unix)?;
        let receiver = receiver(lab, &address)?;
        let proxy = LinkProxy::start(lab, &address)?;
        let scene = Self::set_around(lab, way, number, receiver, proxy.address(), extra)?;
        Ok((scene, proxy))
    }

    /// The same over TCP, on loopback.
    pub(super) fn set_over_tcp(lab: &'a Lab, way: Way, extra: &[&str]) -> Result<Self, LabError> {
        let address = Address::free(lab, Transport::Tcp)?;
        let receiver = receiver(lab, &address)?;
        Self::set_around(lab, way, 0, receiver, address, extra)
    }

    fn set_around(
        lab: &'a Lab,
        way: Way,
        number: u32,
        receiver: Receiver,
        address: Address,
        extra: &[&str],
    ) -> Result<Self, LabError> {
        let primary = primary(lab, &format!("primary{number}"), way, number)?;
        let mut guard = guard(lab, way, number, &primary, &address, extra)?;
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
        let session = self.receiver.sessions()?[0];
        self.fail_over_from(session)
    }

    /// The same from a session that need not be its receiver's first.
    pub(super) fn fail_over_from(self, session: u64) -> Result<(Receiver, Qemu), LabError> {
        let (lost, fresh) = self.lose_primary(session)?;
        let monitor = fresh.free_monitor().display().to_string();
        lost.receiver.failover(session, ["--qmp", &monitor])?;
        Ok((lost.receiver, fresh))
    }

    /// Moves the guest to a fresh QEMU on another host's tap device ([`colo_ring_tests::lab::join_networks`]) by a planned failover. Returns its report, too.
    pub(super) fn hand_over(self) -> Result<(Value, (Receiver, Qemu)), LabError> {
        let Self {
            lab,
            receiver,
            primary,
            mut guard,
            number,
            ..
        } = self;
        let session = receiver.sessions()?[0];
        let fresh = Machine {
            nic: Some(Nic::OtherTap),
            ..machine(lab, Way::Filter, number)
        };
        let fresh = Qemu::start_incoming(lab, &format!("fresh{number}"), &fresh)?;
        let monitor = fresh.free_monitor().display().to_string();
        let moved = receiver.failover(session, ["--planned", "--qmp", &monitor])?;
        assert!(guard.wait_end()?.success(), "{}", guard.log());
        assert!(guard.log().contains("handed over"), "{}", guard.log());
        drop(primary);
        Ok((moved, (receiver, fresh)))
    }

    /// Where a stream could be written to.
    pub(super) fn somewhere(&self) -> String {
        format!("file:{}", self.lab.file("moved").display())
    }

    /// The same, and the failover becomes the guard of the fresh QEMU, which is protected by the same receiver.
    pub(super) fn fail_over_and_guard(self) -> Result<Self, LabError> {
        let session = self.receiver.sessions()?[0];
        let (lost, primary) = self.lose_primary(session)?;
        let mut guard = Guard::by_failover(lost.lab, &lost.receiver, session, &primary, &lost.address)?;
        guard.wait_state("protected")?;
        Ok(Self {
            lab: lost.lab,
            way: Way::Filter,
            number: lost.number,
            address: lost.address,
            receiver: lost.receiver,
            primary,
            guard,
        })
    }

    /// Kills the primary, and starts a fresh QEMU that waits with the same tap device. Returns what is left.
    fn lose_primary(self, session: u64) -> Result<(Lost<'a>, Qemu), LabError> {
        let Self {
            lab,
            address,
            receiver,
            primary,
            mut guard,
            number,
            ..
        } = self;
        let _ = primary.kill();
        // It ends with its QEMU.
        guard.wait_end()?;
        wait_tap_free()?;
        let fresh = Machine {
            nic: Some(Nic::Tap),
            ..machine(lab, Way::Filter, number)
        };
        let fresh = Qemu::start_incoming(lab, &format!("fresh{number}-{session}"), &fresh)?;
        wait_for("the end of the session", HANG_LIMIT, || {
            let status = receiver.status()?;
            let mut sessions = status["sessions"].as_array().into_iter().flatten();
            Ok(sessions
                .any(|one| one["session"] == session && one["state"] == "ended")
                .then_some(()))
        })?;
        let lost = Lost {
            lab,
            number,
            address,
            receiver,
        };
        Ok((lost, fresh))
    }
}

/// A scene without its primary.
struct Lost<'a> {
    lab: &'a Lab,
    number: u32,
    address: Address,
    receiver: Receiver,
}

fn socket(lab: &Lab, number: u32) -> String {
    lab.file(&format!("card{number}.sock")).display().to_string()
}

pub(super) fn machine(lab: &Lab, way: Way, number: u32) -> Machine {
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

pub(super) const RECEIVER_TIMEOUT: &str = "--receiver-timeout";

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
    // A receiver that is not let run for a second on a busy machine is not lost.
    let patience: &[&str] = match extra.contains(&RECEIVER_TIMEOUT) {
        true => &[],
        false => &[RECEIVER_TIMEOUT, "30000"],
    };
    Guard::start(lab, primary, address, &[own, patience, extra].concat())
}
