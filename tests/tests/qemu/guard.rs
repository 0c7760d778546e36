//! Output commit: a guest's connections survive its primary, its receiver and its guard.

mod beginnings;
mod bulk;
mod busy;
mod campaign;
mod colo_compare;
mod faults;
mod frames;
mod latency;
mod losses;
mod scene;
mod sessions;

use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Client, Company, Guard, Load, delete_tap, join_networks, make_tap, net_experiment, wait_for,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use scene::{OFTEN, Scene, Way, ask, end_well, guard, receiver, wait_stands};
use serde_json::json;
use std::time::Duration;

/// How long a connection that cannot go on is watched for it.
const HANGS_FOR: Duration = Duration::from_secs(5);

/// An interval that nobody would wait for.
const INTERVAL_MS: u64 = 2000;

/// A guest that has survived one primary survives the next, and so does its connection.
#[test]
fn a_failover_guards_its_guest_again() {
    net_experiment(Company::Others, |lab| {
        let (scene, client) = Scene::set_asked(lab, Way::Relay, &[])?;
        let scene = scene.fail_over_and_guard()?;
        client.wait_answers(20)?;
        let (_receiver, _fresh) = scene.fail_over()?;
        client.wait_answers(20)?;
        end_well(client, "the connection");
        Ok(())
    });
}

/// What the guard is for: without it the guest that lives on has never sent what its client has read.
#[test]
fn a_connection_does_not_survive_without_a_gate() {
    // The kill may fall into the moment after a checkpoint, before the guest has sent anything.
    const ATTEMPTS: u32 = 5;
    net_experiment(Company::Others, |lab| {
        for attempt in 0..ATTEMPTS {
            let scene = Scene::set(lab, Way::None, attempt, &[])?;
            let client = Client::start(Load::Count(Duration::ZERO))?;
            client.wait_answers(50)?;
            let (_receiver, _fresh) = scene.fail_over()?;
            if !client.goes_on(1, HANGS_FOR) {
                return Ok(());
            }
            println!("it goes on, {} answers", client.answers());
        }
        panic!("the connection has survived {ATTEMPTS} times");
    });
}

#[test]
fn a_lost_receiver_costs_the_guest_and_its_connections_nothing() {
    net_experiment(Company::Others, |lab| {
        let Scene {
            way,
            address,
            receiver: first,
            mut primary,
            mut guard,
            ..
        } = Scene::set(
            lab,
            Way::Filter,
            0,
            &["--on-loss", "echo told of $COLO_RING_NAME: $COLO_RING_REASON"],
        )?;
        let client = ask()?;
        drop(first);
        guard.wait_state("unprotected")?;
        wait_for("the hook", HANG_LIMIT, || {
            Ok(guard.log().contains("told of guest: ").then_some(()))
        })?;
        client.wait_answers(20)?;
        let second = receiver(lab, &address)?;
        let status = guard.wait_state("protected")?;
        assert_eq!(status["protections"], 2, "{status} {way:?}");
        client.wait_answers(20)?;
        // How long frames wait is known of a filter, too.
        wait_for("frames that were held", HANG_LIMIT, || {
            let status = guard.status()?;
            let is_measured =
                status["held"]["p50_us"].as_u64() > Some(0) && status["stopped_share"].as_f64() > Some(0.0);
            Ok(is_measured.then_some(()))
        })?;
        end_well(client, "the connection");
        let session = &second.status()?["sessions"][0];
        assert_eq!(
            session["guard"],
            json!({"name": "guest", "linked": true}),
            "{session}"
        );
        // The guard's end is the protection's: nothing of it stays in QEMU.
        assert!(guard.end(Signal::SIGTERM)?.success(), "{}", guard.log());
        assert_eq!(guard.log().matches("told of").count(), 1, "{}", guard.log());
        assert!(!guard.control().exists(), "its socket is left");
        let session = wait_for("the end of the session", HANG_LIMIT, || {
            let session = second.status()?["sessions"][0].clone();
            Ok((session["state"] == "ended").then_some(session))
        })?;
        let end = session["end"].as_str().unwrap_or_default();
        assert!(
            session["lost"] == false && end.contains("runs on at its primary"),
            "{session}"
        );
        let state = primary.qmp().execute("query-migrate", &json!({}))?;
        assert_ne!(state["status"], "colo", "{state}");
        let objects = primary.qmp().execute("qom-list", &json!({"path": "/objects"}))?;
        assert!(!objects.to_string().contains("colo-ring"), "{objects}");
        let runs = primary.qmp().execute("query-status", &json!({}))?;
        assert_eq!(runs["status"], "running");
        let client = Client::start(Load::Count(OFTEN))?;
        client.wait_answers(5)
    });
}

#[test]
fn a_guest_that_is_to_stop_stands_until_it_is_protected_again() {
    net_experiment(Company::Others, |lab| {
        let (mut scene, client) = Scene::set_asked(lab, Way::Relay, &["--on-receiver-lost", "stop"])?;
        scene.receiver.kill();
        scene.guard.wait_state("unprotected")?;
        wait_stands(&mut scene.primary)?;
        let before = client.answers();
        std::thread::sleep(10 * OFTEN);
        assert!(client.answers() <= before + 1, "the guest ran meanwhile");
        scene.receiver = receiver(lab, &scene.address)?;
        scene.guard.wait_state("protected")?;
        client.wait_answers(20)?;
        assert_eq!(client.end().error, None);
        Ok(())
    });
}

#[test]
fn a_guard_that_was_killed_is_replaced_by_the_next() {
    for way in [Way::Filter, Way::Relay] {
        net_experiment(Company::Others, |lab| {
            let (mut scene, client) = Scene::set_asked(lab, way, &[])?;
            scene.restart_guard(&[])?;
            let status = scene.guard.wait_state("protected")?;
            assert_eq!(status["session"], 1, "it is the same protection: {status}");
            client.wait_answers(20)?;
            // Output is held as before.
            let (_receiver, _fresh) = scene.fail_over()?;
            client.wait_answers(20)?;
            end_well(client, &format!("{way:?}"));
            Ok(())
        });
    }
}

/// What the filters of a killed guard hold does not wait for a guard with filters.
#[test]
fn the_next_guard_may_hold_nothing() {
    net_experiment(Company::Others, |lab| {
        let (mut scene, client) = Scene::set_asked(lab, Way::Filter, &[])?;
        scene.guard.end(Signal::SIGKILL)?;
        scene.guard = guard(lab, Way::None, 0, &scene.primary, &scene.address, &[])?;
        scene.guard.wait_state("protected")?;
        client.wait_answers(20)?;
        assert_eq!(client.end().error, None);
        let objects = json!({"path": "/objects"});
        let objects = scene.primary.qmp().execute("qom-list", &objects)?;
        assert!(!objects.to_string().contains("colo-ring"), "{objects}");
        Ok(())
    });
}

/// Nobody starts another guard: its supervisor does, and what was held is released.
#[test]
fn a_guard_that_dies_is_replaced_by_itself() {
    for way in [Way::Filter, Way::Relay] {
        net_experiment(Company::Others, |lab| {
            let (mut scene, client) = Scene::set_asked(lab, way, &[])?;
            scene.guard.lose_worker(Signal::SIGKILL)?;
            wait_for("the next worker", HANG_LIMIT, || {
                Ok(scene.guard.log().contains("the guard died").then_some(()))
            })?;
            client.wait_answers(20)?;
            let status = scene.guard.wait_state("protected")?;
            assert_eq!(status["session"], 1, "it is the same protection: {status}");
            let (_receiver, _fresh) = scene.fail_over()?;
            client.wait_answers(20)?;
            end_well(client, &format!("{way:?}"));
            Ok(())
        });
    }
}

/// A guard that cannot live strands nothing: the guest runs on without.
#[test]
fn a_guard_that_dies_again_and_again_is_given_up() {
    net_experiment(Company::Others, |lab| {
        let (mut scene, client) = Scene::set_asked(lab, Way::Filter, &[])?;
        let deaths = |guard: &Guard| guard.log().matches("the guard died").count();
        for death in 1..=3 {
            // The first worker may have lived for longer than counts as quickly.
            let _ = scene.guard.lose_worker(Signal::SIGKILL);
            wait_for("a worker's death", HANG_LIMIT, || {
                Ok((deaths(&scene.guard) >= death).then_some(()))
            })?;
        }
        while scene.guard.lose_worker(Signal::SIGKILL).is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(!scene.guard.wait_end()?.success());
        let log = scene.guard.log();
        assert!(
            log.contains("dies again and again") && log.contains("runs on"),
            "{log}"
        );
        client.wait_answers(20)?;
        assert_eq!(client.end().error, None);
        let state = scene.primary.qmp().execute("query-migrate", &json!({}))?;
        assert_ne!(state["status"], "colo", "{state}");
        Ok(())
    });
}

/// QEMU hangs while its receiver is lost, for longer than anything waits for it: what was held is released all the same.
#[test]
fn a_protection_that_cannot_be_ended_at_once_is_ended_later() {
    net_experiment(Company::Others, |lab| {
        let (mut scene, client) = Scene::set_asked(lab, Way::Filter, &[])?;
        let qemu =
            Pid::from_raw(i32::try_from(scene.primary.pid()).expect("process ids are below 2^22 on Linux"));
        kill(qemu, Signal::SIGSTOP).expect("it runs");
        scene.receiver.kill();
        wait_for("the first worker's end", HANG_LIMIT, || {
            Ok(scene.guard.log().contains("the guard died").then_some(()))
        })?;
        assert!(
            scene.guard.log().contains("could not be ended"),
            "{}",
            scene.guard.log()
        );
        kill(qemu, Signal::SIGCONT).expect("it is there");
        client.wait_answers(20)?;
        assert_eq!(client.end().error, None);
        let _second = receiver(lab, &scene.address)?;
        scene.guard.wait_state("protected")?;
        Ok(())
    });
}

/// A worker was replaced before.
#[test]
fn the_end_of_qemu_is_not_taken_for_the_guard_s() {
    net_experiment(Company::Others, |lab| {
        let mut scene = Scene::set(lab, Way::Filter, 0, &[])?;
        scene.guard.lose_worker(Signal::SIGKILL)?;
        wait_for("the next worker", HANG_LIMIT, || {
            Ok(scene.guard.log().contains("the guard died").then_some(()))
        })?;
        scene.guard.wait_state("protected")?;
        let _ = scene.primary.kill();
        assert_eq!(scene.guard.wait_end()?.code(), Some(4), "{}", scene.guard.log());
        let log = scene.guard.log();
        assert!(
            log.contains("QEMU has ended") && log.matches("the guard died").count() == 1,
            "{log}"
        );
        Ok(())
    });
}

/// Its tap device is deleted under the guard: that is said once, and the connection goes on when there is one again.
#[test]
fn a_relay_survives_its_tap_device() {
    net_experiment(Company::Others, |lab| {
        let (mut scene, client) = Scene::set_asked(lab, Way::Relay, &[])?;
        delete_tap();
        scene.guard.wait_state("unprotected")?;
        // Some attempts to protect it again.
        std::thread::sleep(Duration::from_secs(5));
        let told = scene.guard.log().matches("was deleted").count();
        assert!((1..=10).contains(&told), "{told} times: {}", scene.guard.log());
        make_tap();
        scene.guard.wait_state("protected")?;
        client.wait_answers(20)?;
        assert_eq!(client.end().error, None);
        Ok(())
    });
}

/// Nothing is asked for without output, and at once with it.
#[test]
fn checkpoints_follow_the_output() {
    net_experiment(Company::Others, |lab| {
        let scene = Scene::set(lab, Way::Relay, 0, &["--interval-max", &INTERVAL_MS.to_string()])?;
        let client = Client::start(Load::Count(Duration::from_millis(100)))?;
        client.wait_answers(30)?;
        let seen = client.end();
        let mut latencies = seen.latencies_us.clone();
        latencies.sort_unstable();
        let median = latencies[latencies.len() / 2];
        println!(
            "median {median} us at an interval of {INTERVAL_MS} ms: {}",
            scene.guard.status()?
        );
        // At a fixed interval an answer would wait for half of it.
        assert!(median < INTERVAL_MS * 1000 / 4, "{median} us");
        assert_eq!(scene.way, Way::Relay);
        Ok(())
    });
}

/// The primary is well: the guest goes on at the receiver with all that it has done, and its connection goes on.
fn connection_moves(way: Way) {
    net_experiment(Company::Others, |lab| {
        join_networks();
        let (scene, client) = Scene::set_asked(lab, way, &[])?;
        let (moved, (_receiver, fresh)) = scene.hand_over()?;
        client.wait_answers(20)?;
        let seen = client.end();
        println!("{way:?}: longest gap {:?}; {moved}", seen.longest_gap);
        assert_eq!(seen.error, None);
        let wrong = fresh
            .serial()
            .lines()
            .find(|line| line.starts_with("error"))
            .map(str::to_owned);
        assert_eq!(wrong, None);
        Ok(())
    });
}

#[test]
fn a_guest_moves_with_its_connection_through_a_relay() {
    connection_moves(Way::Relay);
}

#[test]
fn a_guest_moves_with_its_connection_through_a_filter() {
    connection_moves(Way::Filter);
}

/// Without a guard nobody ends the primary, so the guest stays there.
#[test]
fn a_guest_without_a_guard_is_not_moved() {
    net_experiment(Company::Others, |lab| {
        let mut scene = Scene::set(lab, Way::None, 0, &[])?;
        scene.guard.end(Signal::SIGKILL)?;
        wait_for("the link to be lost", HANG_LIMIT, || {
            let status = scene.receiver.status()?;
            Ok((status["sessions"][0]["guard"]["linked"] == false).then_some(()))
        })?;
        let to = scene.somewhere();
        let refused = scene.receiver.failover(1, ["--planned", "--to", &to]);
        let text = refused.expect_err("nobody can end the primary").to_string();
        assert!(
            text.contains("no guard of it is linked") && text.contains("nothing was given away"),
            "{text}"
        );
        let runs = scene.primary.qmp().execute("query-status", &json!({}))?;
        assert_eq!(runs["status"], "running");
        Ok(())
    });
}

/// What cannot be written to is noticed before the primary is ended, and so costs nothing.
#[test]
fn a_guest_is_not_moved_to_where_nothing_can_be_written() {
    net_experiment(Company::Others, |lab| {
        let (mut scene, client) = Scene::set_asked(lab, Way::Relay, &[])?;
        let nowhere = lab.file("not-there/moved").display().to_string();
        let (to_nowhere, somewhere) = (format!("file:{nowhere}"), scene.somewhere());
        for to in [
            &["--to", &to_nowhere][..],
            &["--to", &somewhere, "--keep", &nowhere],
        ] {
            let refused = scene.receiver.failover(1, [&["--planned"], to].concat());
            let text = refused.expect_err("no such directory").to_string();
            assert!(
                text.contains("not-there") && text.contains("nothing was given away"),
                "{text}"
            );
            client.wait_answers(20)?;
        }
        let status = scene.guard.wait_state("protected")?;
        assert_eq!(
            (&status["session"], &status["protections"]),
            (&json!(1), &json!(1))
        );
        assert_eq!(client.end().error, None);
        Ok(())
    });
}
