//! What else may be lost than the primary, at every step of a checkpoint: the receiver, its host, the link, the guard, the monitor. The guest
//! runs on, or stands where that is asked for, over one connection all the time; and it is protected again without a hand.

use super::scene::{OFTEN, RECEIVER_TIMEOUT, Scene, Way, ask, end_well, primary, receiver, wait_stands};
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Client, Company, Guard, Lab, LabError, LinkMoment, LinkProxy, Load, MonitorProxy, Receiver,
    Transport, net_experiment, set_loopback, unprotect_by_command, wait_for,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::time::{Duration, Instant};

/// What a guard says of a receiver that does not answer.
const SILENT: &str = "the receiver has not answered for";

/// Each step of a checkpoint.
const MOMENTS: [LinkMoment; 5] = [
    LinkMoment::Begin,
    LinkMoment::Barrier,
    LinkMoment::Placed,
    LinkMoment::Committed,
    LinkMoment::Releasing(Duration::from_micros(200)),
];

/// Checkpoints before a loss.
const SKIP: u32 = 3;

/// A guest that is asked again and again, and what it is protected by.
pub(super) struct Guarded<'a> {
    lab: &'a Lab,
    pub(super) scene: Scene<'a>,
    pub(super) proxy: LinkProxy,
    pub(super) client: Client,
}

impl<'a> Guarded<'a> {
    pub(super) fn start(lab: &'a Lab, way: Way, extra: &[&str]) -> Result<Self, LabError> {
        let (scene, proxy) = Scene::set_with_proxy(lab, way, 0, extra)?;
        let client = ask()?;
        Ok(Self {
            lab,
            scene,
            proxy,
            client,
        })
    }

    /// Something is lost at a moment, and the guest answers again. Returns after how long.
    fn lose(&self, moment: LinkMoment, act: impl FnOnce() + Send + 'static) -> Result<Duration, LabError> {
        self.proxy.at(moment, SKIP, act);
        self.proxy.wait_acted()?;
        let lost = Instant::now();
        // The first may have left already.
        self.client.wait_answers(2)?;
        let answered = lost.elapsed();
        println!(
            "{:?}, {moment:?}: the second answer {answered:?} after the loss",
            self.scene.way
        );
        Ok(answered)
    }

    /// Another receiver is there, and protects the guest without a hand.
    fn protect_again(&mut self) -> Result<(), LabError> {
        self.scene.guard.wait_state("unprotected")?;
        self.scene.receiver.kill();
        self.proxy.come_back();
        self.scene.receiver = receiver(self.lab, &self.proxy.behind())?;
        self.scene.guard.wait_state("protected")?;
        self.client.wait_answers(20)
    }

    /// Waits until the guard has printed that so often.
    fn wait_told(&self, what: &str, times: usize) -> Result<(), LabError> {
        wait_for(&format!("{what}, {times} times"), HANG_LIMIT, || {
            Ok((self.scene.guard.log().matches(what).count() >= times).then_some(()))
        })
    }

    /// Its connection has gone on all the time.
    fn end(self) {
        end_well(self.client, &format!("{:?}", self.scene.way));
    }
}

/// What is given as `--receiver-timeout` where receivers are lost.
const TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const SOON: [&str; 2] = [RECEIVER_TIMEOUT, "1000"];

/// What the end of a protection is taken to last at least.
const LEAST: Duration = Duration::from_millis(100);

/// How a receiver is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReceiverLoss {
    Killed,
    /// It stands, and its connections stay.
    Hangs,
    /// Nothing arrives at its host.
    Vanishes,
}

impl ReceiverLoss {
    fn act(self, receiver: &Receiver, proxy: &LinkProxy) -> impl FnOnce() + Send + 'static {
        let receiver =
            Pid::from_raw(i32::try_from(receiver.pid()).expect("process ids are below 2^22 on Linux"));
        let proxy = proxy.clone();
        move || match self {
            Self::Killed => kill(receiver, Signal::SIGKILL).expect("it runs"),
            Self::Hangs => kill(receiver, Signal::SIGSTOP).expect("it runs"),
            Self::Vanishes => proxy.vanish(),
        }
    }
}

fn receiver_is_lost(loss: ReceiverLoss) {
    for way in [Way::Relay, Way::Filter] {
        net_experiment(Company::Others, |lab| {
            let mut guarded = Guarded::start(lab, way, &SOON)?;
            for (before, moment) in MOMENTS.into_iter().enumerate() {
                let lost = guarded.lose(moment, loss.act(&guarded.scene.receiver, &guarded.proxy))?;
                if loss != ReceiverLoss::Killed {
                    // By nothing else it is noticed before it is waited for half a minute.
                    guarded.wait_told(SILENT, before + 1)?;
                    guarded.protect_again()?;
                    // What the same machine takes for one that is noticed at once.
                    let killed = ReceiverLoss::Killed.act(&guarded.scene.receiver, &guarded.proxy);
                    let killed = guarded.lose(moment, killed)?;
                    let limit = 4 * (TIMEOUT + killed.max(LEAST));
                    assert!(
                        lost < limit,
                        "{way:?}, {moment:?}: {lost:?}, and {killed:?} of one that was killed"
                    );
                }
                guarded.protect_again()?;
            }
            guarded.end();
            Ok(())
        });
    }
}

#[test]
fn a_receiver_that_is_killed_at_any_step_costs_nothing() {
    receiver_is_lost(ReceiverLoss::Killed);
}

#[test]
fn a_receiver_that_hangs_at_any_step_costs_a_second() {
    receiver_is_lost(ReceiverLoss::Hangs);
}

#[test]
fn a_receiver_that_vanishes_at_any_step_costs_a_second() {
    receiver_is_lost(ReceiverLoss::Vanishes);
}

/// Packets are dropped, and no end of a connection is heard of.
#[test]
fn a_receiver_behind_a_network_that_is_down_is_given_up() {
    net_experiment(Company::Others, |lab| {
        let mut scene = Scene::set_over_tcp(lab, Way::Relay, &SOON)?;
        let client = Client::start(Load::Count(Duration::ZERO))?;
        client.wait_answers(20)?;
        set_loopback(false);
        let lost = Instant::now();
        // Some may have left already.
        client.wait_answers(5)?;
        println!("five answers {:?} after the loss", lost.elapsed());
        wait_for("the guard to notice", HANG_LIMIT, || {
            Ok(scene.guard.log().contains(SILENT).then_some(()))
        })?;
        scene.receiver.kill();
        set_loopback(true);
        scene.receiver = receiver(lab, &scene.address)?;
        scene.guard.wait_state("protected")?;
        client.wait_answers(20)?;
        assert_eq!(client.end().error, None);
        Ok(())
    });
}

/// QEMU sends a large checkpoint to a host that is gone, and answers nothing but what is out of band.
#[test]
fn a_guest_whose_qemu_hangs_in_a_checkpoint_runs_on() {
    for way in [Way::Relay, Way::Filter] {
        net_experiment(Company::Others, |lab| {
            let extra = ["--output-checkpoints", "off", "--interval-max", "300"];
            let mut guarded = Guarded::start(lab, way, &[&extra[..], &SOON].concat())?;
            let bulk = Client::start(Load::Exchange)?;
            bulk.wait_answers(1000)?;
            let proxy = guarded.proxy.clone();
            guarded
                .proxy
                .at(LinkMoment::Barrier, SKIP, move || proxy.vanish());
            guarded.proxy.wait_acted()?;
            let mut monitor = guarded.scene.primary.qmp().clone();
            let asked = Instant::now();
            monitor.execute("query-status", &json!({}))?;
            let answered = asked.elapsed();
            println!("{way:?}: QEMU answered {answered:?} after the loss");
            guarded.client.wait_answers(2)?;
            println!("{way:?}: the second answer {:?} after the loss", asked.elapsed());
            guarded.protect_again()?;
            bulk.wait_answers(1000)?;
            assert_eq!(bulk.end().error, None);
            guarded.end();
            Ok(())
        });
    }
}

/// The link alone: there is another at once, to the same session.
#[test]
fn a_link_that_is_cut_at_any_step_is_replaced() {
    for way in [Way::Relay, Way::Filter] {
        net_experiment(Company::Others, |lab| {
            let mut guarded = Guarded::start(lab, way, &[])?;
            for (before, moment) in MOMENTS.into_iter().enumerate() {
                let proxy = guarded.proxy.clone();
                guarded.lose(moment, move || proxy.cut_link())?;
                guarded.wait_told("the link to the receiver is back", before + 1)?;
                guarded.client.wait_answers(20)?;
            }
            let status = guarded.scene.guard.wait_state("protected")?;
            assert_eq!(
                (&status["session"], &status["protections"]),
                (&json!(1), &json!(1))
            );
            guarded.end();
            Ok(())
        });
    }
}

/// Two at a time: of three that die quickly the supervisor would make no fourth.
fn guard_is_lost(way: Way, moments: &[LinkMoment]) {
    net_experiment(Company::Others, |lab| {
        let mut guarded = Guarded::start(lab, way, &[])?;
        for (before, moment) in moments.iter().enumerate() {
            let worker = guarded.scene.guard.worker()?;
            guarded.lose(*moment, move || kill(worker, Signal::SIGKILL).expect("it runs"))?;
            guarded.wait_told("the guard died", before + 1)?;
            let status = guarded.scene.guard.wait_state("protected")?;
            assert_eq!(status["session"], 1, "it is the same protection: {status}");
            guarded.client.wait_answers(20)?;
        }
        guarded.end();
        Ok(())
    });
}

#[test]
fn a_guard_that_is_killed_at_a_barrier_or_before_a_release_is_replaced() {
    for way in [Way::Relay, Way::Filter] {
        guard_is_lost(way, &[MOMENTS[1], MOMENTS[3]]);
    }
}

#[test]
fn a_guard_that_is_killed_behind_a_line_or_at_a_release_is_replaced() {
    for way in [Way::Relay, Way::Filter] {
        guard_is_lost(way, &[MOMENTS[2], MOMENTS[4]]);
    }
}

#[test]
fn a_guard_that_is_killed_while_a_request_is_kept_is_replaced() {
    for way in [Way::Relay, Way::Filter] {
        guard_is_lost(way, &[MOMENTS[0]]);
    }
}

/// Its supervisor ends it, and the receiver has let the guest run long before.
#[test]
fn a_guard_that_hangs_at_a_barrier_is_replaced() {
    net_experiment(Company::Others, |lab| {
        let mut guarded = Guarded::start(lab, Way::Relay, &["--guard-timeout", "500"])?;
        let worker = guarded.scene.guard.worker()?;
        guarded.lose(LinkMoment::Barrier, move || {
            kill(worker, Signal::SIGSTOP).expect("it runs")
        })?;
        guarded.wait_told("the guard died", 1)?;
        let status = guarded.scene.guard.wait_state("protected")?;
        assert_eq!(status["session"], 1, "it is the same protection: {status}");
        guarded.client.wait_answers(20)?;
        guarded.end();
        Ok(())
    });
}

/// Nobody has asked for its end: the worker ends the protection as a lost receiver does, and says to its own what has become of the guest.
#[test]
fn a_guard_whose_supervisor_is_killed_ends_the_protection() {
    let stop = ["--on-receiver-lost", "stop"];
    for (extra, stops) in [(&[][..], false), (&stop[..], true)] {
        net_experiment(Company::Others, |lab| {
            let mut guarded = Guarded::start(lab, Way::Filter, extra)?;
            let worker = guarded.scene.guard.worker()?;
            guarded.scene.guard.kill_supervisor()?;
            wait_for("the end of its worker", HANG_LIMIT, || {
                Ok((kill(worker, None).is_err()).then_some(()))
            })?;
            let ended = wait_for("the end of the session", HANG_LIMIT, || {
                let session = &guarded.scene.receiver.status()?["sessions"][0];
                Ok((session["state"] == "ended").then(|| session.clone()))
            })?;
            // A guest that stands has shown the world nothing that is not in the checkpoint.
            assert_eq!(ended["lost"], stops, "{ended}");
            match stops {
                false => guarded.client.wait_answers(20)?,
                true => wait_stands(&mut guarded.scene.primary)?,
            }
            Ok(())
        });
    }
}

/// The monitor's connection alone: another worker takes its place at QEMU.
#[test]
fn a_monitor_that_is_lost_at_a_step_is_connected_again() {
    net_experiment(Company::Others, |lab| {
        let address = Address::free(lab, Transport::Unix)?;
        let _receiver = receiver(lab, &address)?;
        let proxy = LinkProxy::start(lab, &address)?;
        let primary = primary(lab, "primary", Way::Filter, 0)?;
        let monitor = MonitorProxy::start(lab, primary.free_monitor())?;
        let mut guard = Guard::start_at(lab, monitor.path(), &proxy.address(), &[])?;
        guard.wait_state("protected")?;
        let client = ask()?;
        for (before, moment) in [LinkMoment::Barrier, LinkMoment::Committed]
            .into_iter()
            .enumerate()
        {
            let cut = monitor.clone();
            proxy.at(moment, SKIP, move || cut.cut());
            proxy.wait_acted()?;
            wait_for("another worker", HANG_LIMIT, || {
                Ok((guard.log().matches("QEMU is there still").count() > before).then_some(()))
            })?;
            client.wait_answers(20)?;
            let status = guard.wait_state("protected")?;
            assert_eq!(status["session"], 1, "it is the same protection: {status}");
        }
        end_well(client, "the connection");
        Ok(())
    });
}

const STOP: [&str; 4] = ["--on-receiver-lost", "stop", RECEIVER_TIMEOUT, "1000"];

#[test]
fn a_guest_that_is_to_stop_stands_whenever_its_receiver_is_lost() {
    net_experiment(Company::Others, |lab| {
        let mut guarded = Guarded::start(lab, Way::Filter, &STOP)?;
        let losses = [ReceiverLoss::Killed, ReceiverLoss::Vanishes];
        for (moment, loss) in MOMENTS.into_iter().zip(losses.into_iter().cycle()) {
            let act = loss.act(&guarded.scene.receiver, &guarded.proxy);
            guarded.proxy.at(moment, SKIP, act);
            guarded.proxy.wait_acted()?;
            guarded.scene.guard.wait_state("unprotected")?;
            wait_stands(&mut guarded.scene.primary)?;
            let before = guarded.client.answers();
            std::thread::sleep(10 * OFTEN);
            assert!(
                guarded.client.answers() <= before + 1,
                "{moment:?}: the guest ran meanwhile"
            );
            guarded.protect_again()?;
        }
        guarded.end();
        Ok(())
    });
}

/// Everything of the guard is killed while its guest stands: the next one keeps it there, and has it go on when it is protected.
#[test]
fn a_guest_that_stands_is_known_to_the_next_guard() {
    for way in [Way::Filter, Way::Relay] {
        net_experiment(Company::Others, |lab| {
            let mut guarded = Guarded::start(lab, way, &STOP)?;
            guarded.scene.receiver.kill();
            guarded.scene.guard.wait_state("unprotected")?;
            guarded.scene.restart_guard(&STOP)?;
            guarded.wait_told("it is stopped until it is protected again", 1)?;
            guarded.scene.guard.wait_state("unprotected")?;
            wait_stands(&mut guarded.scene.primary)?;
            guarded.protect_again()?;
            // Lost while it has no guard.
            assert!(!guarded.scene.guard.end(Signal::SIGKILL)?.success());
            guarded.scene.receiver.kill();
            guarded.scene.restart_guard(&STOP)?;
            wait_stands(&mut guarded.scene.primary)?;
            guarded.protect_again()?;
            guarded.end();
            Ok(())
        });
    }
}

/// The operator's ways out.
#[derive(Clone, Copy, Debug)]
enum WayOut {
    /// A guard that lets it run.
    OtherGuard,
    /// The end of the guard.
    End,
    Unprotect,
}

impl WayOut {
    fn take(self, guarded: &mut Guarded<'_>) -> Result<(), LabError> {
        match self {
            Self::OtherGuard => guarded.scene.restart_guard(&[]),
            Self::End => {
                guarded.scene.restart_guard(&STOP)?;
                guarded.scene.guard.wait_state("unprotected")?;
                assert!(guarded.scene.guard.end(Signal::SIGTERM)?.success());
                Ok(())
            }
            Self::Unprotect => {
                guarded.scene.guard.end(Signal::SIGKILL)?;
                unprotect_by_command(guarded.scene.primary.free_monitor()).map(drop)
            }
        }
    }
}

#[test]
fn a_guest_that_stands_runs_on_where_it_may() {
    net_experiment(Company::Others, |lab| {
        let mut guarded = Guarded::start(lab, Way::Filter, &STOP)?;
        for out in [WayOut::OtherGuard, WayOut::End, WayOut::Unprotect] {
            guarded.scene.receiver.kill();
            guarded.scene.guard.wait_state("unprotected")?;
            wait_stands(&mut guarded.scene.primary)?;
            out.take(&mut guarded)?;
            guarded.client.wait_answers(5)?;
            let objects = json!({"path": "/objects"});
            let objects = guarded.scene.primary.qmp().execute("qom-list", &objects)?;
            assert!(
                !objects.to_string().contains("colo-ring-stop"),
                "{out:?}: {objects}"
            );
            guarded.scene.receiver = receiver(lab, &guarded.proxy.behind())?;
            guarded.scene.restart_guard(&STOP)?;
            guarded.scene.guard.wait_state("protected")?;
            guarded.client.wait_answers(5)?;
        }
        guarded.end();
        Ok(())
    });
}
