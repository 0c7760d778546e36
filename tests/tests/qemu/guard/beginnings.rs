//! A protection that begins while something is lost: nothing of the guest's output leaves that the new session has not committed.

use super::losses::{Guarded, SOON};
use super::scene::{Scene, Way, guard, primary, receiver};
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{Address, Company, Receiver, Transport, net_experiment, wait_for};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;

fn session(receiver: &Receiver, number: u64) -> Value {
    let status = receiver.status().unwrap_or_default();
    let sessions = status["sessions"].as_array().cloned().unwrap_or_default();
    let found = sessions.into_iter().find(|session| session["session"] == number);
    found.unwrap_or_default()
}

/// A network was down, and the receiver has not seen the end of the first session: the guard gets the second one, and holds its output.
#[test]
fn a_receiver_that_was_away_has_the_guest_guarded_again() {
    for way in [Way::Relay, Way::Filter] {
        net_experiment(Company::Others, |lab| {
            let mut guarded = Guarded::start(lab, way, &SOON)?;
            guarded.proxy.vanish();
            guarded.scene.guard.wait_state("unprotected")?;
            guarded.proxy.pass_new_connections();
            let status = guarded.scene.guard.wait_state("protected")?;
            assert_eq!(status["session"], 2, "{status}");
            let [first, second] = [1, 2].map(|number| session(&guarded.scene.receiver, number));
            assert_ne!(first["state"], "ended", "it was to be there still: {first}");
            assert_eq!(second["guard"]["linked"], true, "{second}");
            guarded.client.wait_answers(20)?;
            // Its output survives the primary.
            let Guarded { scene, client, .. } = guarded;
            let (_receiver, _fresh) = scene.fail_over_from(2)?;
            client.wait_answers(20)?;
            super::end_well(client, "the connection");
            Ok(())
        });
    }
}

/// Nothing has held the guest's output yet, and nothing would.
#[test]
fn a_guest_whose_guard_is_killed_in_the_first_copy_is_not_protected() {
    for way in [Way::Relay, Way::Filter] {
        net_experiment(Company::Others, |lab| {
            let address = Address::free(lab, Transport::Unix)?;
            let receiver = receiver(lab, &address)?;
            let mut primary = primary(lab, "primary", way, 0)?;
            let mut guard = guard(lab, way, 0, &primary, &address, &["--bandwidth", "1M"])?;
            guard.wait_state("copying")?;
            wait_for("the session to begin", HANG_LIMIT, || {
                Ok((session(&receiver, 1) != Value::Null).then_some(()))
            })?;
            assert!(!guard.end(Signal::SIGKILL)?.success());
            let fast = json!({"max-bandwidth": 1_u64 << 40});
            primary.qmp().execute("migrate-set-parameters", &fast)?;
            wait_for("the end of the session", HANG_LIMIT, || {
                Ok((session(&receiver, 1) == Value::Null).then_some(()))
            })?;
            for said in ["nothing would hold its guest's output", "nothing was committed"] {
                assert!(receiver.log().contains(said), "{}", receiver.log());
            }
            wait_for("QEMU to give it up", HANG_LIMIT, || {
                let migration = primary.qmp().execute("query-migrate", &json!({}))?;
                Ok((migration["status"] == "failed").then_some(()))
            })
        });
    }
}

/// What its host asks of it, it answers, and nothing else asks for checkpoints but the interval.
#[test]
fn an_idle_guest_is_left_alone() {
    const SECONDS: u64 = 5;
    // Two a second, and one more at each end.
    const CHECKPOINTS_MAX: u64 = 2 * SECONDS + 2;
    net_experiment(Company::Others, |lab| {
        let mut scene = Scene::set(lab, Way::Relay, 0, &[])?;
        let before = scene.guard.wait_state("protected")?;
        std::thread::sleep(Duration::from_secs(SECONDS));
        let after = scene.guard.wait_state("protected")?;
        let grown = |what: &str| after[what].as_u64().unwrap() - before[what].as_u64().unwrap();
        println!("{} checkpoints in {SECONDS} s", grown("checkpoints"));
        let of_interval = grown("checkpoints").saturating_sub(grown("asked_for_output"));
        assert!((1..=CHECKPOINTS_MAX).contains(&of_interval), "{after}");
        Ok(())
    });
}
