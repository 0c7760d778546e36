//! A guard that finds its QEMU busy: with another client of its monitor, or with a migration of the operator's.

use super::scene::{Way, guard, primary, receiver};
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{Address, Company, Guard, LabError, Qemu, Transport, net_experiment, wait_for};
use nix::sys::signal::Signal;
use serde_json::json;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// How long a monitor is kept from the guard.
const KEPT: Duration = Duration::from_millis(1500);

#[test]
fn a_monitor_that_another_client_has_is_waited_for() {
    net_experiment(Company::Others, |lab| {
        let address = Address::free(lab, Transport::Unix)?;
        let _receiver = receiver(lab, &address)?;
        let primary = primary(lab, "primary", Way::Filter, 0)?;
        let mut other = UnixStream::connect(primary.free_monitor()).expect("its monitor is free");
        // It is served once it is greeted.
        assert!(other.read(&mut [0]).expect("a greeting") > 0);
        let mut guard = guard(lab, Way::Filter, 0, &primary, &address, &[])?;
        std::thread::sleep(KEPT);
        assert!(!guard.control().exists(), "it has begun without a monitor");
        drop(other);
        guard.wait_state("protected")?;
        assert!(guard.end(Signal::SIGTERM)?.success(), "{}", guard.log());
        Ok(())
    });
}

/// It is not the guard's to cancel, neither when it begins nor when it is ended.
#[test]
fn a_migration_of_the_operator_is_waited_for() {
    net_experiment(Company::Others, |lab| {
        let address = Address::free(lab, Transport::Unix)?;
        let _receiver = receiver(lab, &address)?;
        let mut primary = primary(lab, "primary", Way::Filter, 0)?;
        // A destination that reads nothing.
        let elsewhere = lab.file("elsewhere.sock");
        let _listener = UnixListener::bind(&elsewhere).map_err(LabError::io("listen for a migration"))?;
        let uri = format!("unix:{}", elsewhere.display());
        primary.qmp().execute("migrate", &json!({"uri": uri}))?;
        wait_migration(&mut primary, "active")?;
        let mut ended = guard(lab, Way::Filter, 0, &primary, &address, &[])?;
        wait_refused(&ended)?;
        assert!(ended.end(Signal::SIGTERM)?.success(), "{}", ended.log());
        let mut guard = guard(lab, Way::Filter, 0, &primary, &address, &[])?;
        wait_refused(&guard)?;
        wait_migration(&mut primary, "active")?;
        primary.qmp().execute("migrate_cancel", &json!({}))?;
        guard.wait_state("protected")?;
        Ok(())
    });
}

fn wait_refused(guard: &Guard) -> Result<(), LabError> {
    wait_for("the guard to see the migration", HANG_LIMIT, || {
        Ok(guard
            .log()
            .contains("a migration is under way already")
            .then_some(()))
    })
}

fn wait_migration(primary: &mut Qemu, wanted: &str) -> Result<(), LabError> {
    wait_for(&format!("a migration that is {wanted}"), HANG_LIMIT, || {
        let state = primary.qmp().execute("query-migrate", &json!({}))?;
        assert_ne!(state["status"], "cancelled");
        Ok((state["status"] == wanted).then_some(()))
    })
}
