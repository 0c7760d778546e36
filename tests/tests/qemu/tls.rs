//! Real primaries over TLS: QEMU's own, with GnuTLS.

use super::failover::{start_primary, test_guest};
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Guard, Guest, Kills, LabError, Machine, Moment, Qemu, Secondary, TestGuest, Way, experiment, wait_for,
};
use colo_ring_tests::tls::{Authority, RECEIVER};
use serde_json::json;

const CHECKPOINTS: usize = 8;

fn directory(authority: &Authority, name: &str) -> String {
    let directory = authority.directory(name);
    directory.to_str().expect("a path in UTF-8").to_owned()
}

/// What `protect` sends arrives, bit for bit, over as many connections as there are.
fn protected(channels: u8) {
    experiment(|lab| {
        let authority = Authority::new();
        let (receiver, client) = (
            directory(&authority, "receiver"),
            directory(&authority, "primary"),
        );
        let allowed = "CN=primary,O=colo-ring laboratory";
        let options = ["--tls", &receiver, "--tls-allow", allowed];
        let secondary = Secondary::start_with(lab, channels, &options)?;
        let machine = Machine::bare("pc", 128, Guest::Test(TestGuest::random(2_000, 32)));
        let mut primary = Qemu::start(lab, "primary", &machine)?;
        primary.wait_serial("tick 2 ", HANG_LIMIT)?;
        primary.end_precopy_early()?;
        // TCG may lose marks of pages that change in precopy.
        primary.stop()?;
        let arguments = ["--tls", &client, "--tls-hostname", RECEIVER, "--name", "web3"];
        let report = secondary.protect_by_command(&primary, &arguments)?;
        assert_eq!((&report["guest"], &report["tls"]), (&json!("web3"), &json!(true)));
        primary.wait_checkpoints(CHECKPOINTS, HANG_LIMIT)?;
        let status = secondary.session(1)?;
        assert_eq!(status["identity"], allowed, "{status}");
        println!("{channels} channels: {}", status["tls"]);
        let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
        let dump = secondary.receiver().dump_only(&lab.file("dump"))?;
        saved.assert_equal(&dump.block("pc.ram")?)?;
        Ok(())
    });
}

#[test]
fn one_channel_over_tls() {
    protected(1);
}

#[test]
fn four_channels_over_tls() {
    protected(4);
}

#[test]
fn sixteen_channels_over_tls() {
    protected(16);
}

#[test]
fn plain_migration_over_tls() {
    protected(0);
}

/// Gives a primary its credentials, as an operator does who protects it without this command.
fn set_credentials(primary: &mut Qemu, directory: &str) -> Result<(), LabError> {
    let object = json!({
        "qom-type": "tls-creds-x509",
        "id": "tls0",
        "dir": directory,
        "endpoint": "client",
    });
    primary.qmp().execute("object-add", &object)?;
    let parameters = json!({"tls-creds": "tls0", "tls-hostname": RECEIVER});
    primary.qmp().execute("migrate-set-parameters", &parameters)?;
    Ok(())
}

fn lives_on(channels: u8) {
    experiment(|lab| {
        let authority = Authority::new();
        let (receiver, client) = (
            directory(&authority, "receiver"),
            directory(&authority, "primary"),
        );
        let machine = test_guest("pc");
        let secondary = Secondary::start_with(lab, channels, &["--tls", &receiver])?;
        let mut kills = Kills::new(lab, &machine);
        let mut running = start_primary(lab, "first", &machine)?;
        for (way, moment) in [(Way::Shared, Moment::MidTransfer), (Way::Stream, Moment::Idle)] {
            set_credentials(&mut running, &client)?;
            running = kills.kill_primary(&secondary, running, way, moment)?;
        }
        assert_eq!(secondary.files(), 0, "images are given up");
        Ok(())
    });
}

#[test]
fn a_guest_lives_on_from_four_channels_over_tls() {
    lives_on(4);
}

#[test]
fn a_guest_lives_on_from_a_plain_migration_over_tls() {
    lives_on(0);
}

/// A guard's link has TLS, too: the receiver waits for it at commits.
#[test]
fn a_guard_over_tls() {
    experiment(|lab| {
        let authority = Authority::new();
        let (receiver, client) = (
            directory(&authority, "receiver"),
            directory(&authority, "primary"),
        );
        let secondary = Secondary::start_with(lab, 2, &["--tls", &receiver])?;
        let machine = test_guest("pc");
        let primary = start_primary(lab, "primary", &machine)?;
        let options = ["--tls", &client, "--tls-hostname", RECEIVER, "--net", "none"];
        let _guard = Guard::start(lab, &primary, secondary.address(), &options)?;
        let status = secondary.wait_state(1, "protected")?;
        assert_eq!(status["guest"], "guest", "{status}");
        wait_for("commits with a guard", HANG_LIMIT, || {
            let status = secondary.session(1)?;
            let is_guarded = status["guard"]["linked"] == true;
            Ok((is_guarded && status["checkpoint"].as_u64() > Some(3)).then_some(()))
        })
    });
}
