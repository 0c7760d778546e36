//! What output waits for: request and response over TCP, one packet each way, by how the guest is guarded.

use super::scene::{Scene, Way};
use colo_ring_tests::lab::{Client, Company, LabError, Load, net_experiment};
use serde_json::Value;
use std::time::Duration;

/// Rounds, in each of which every contestant has its turn, in another order.
fn rounds() -> usize {
    std::env::var("COLO_RING_GUARD_ROUNDS").map_or(5, |text| text.parse().expect("a number of rounds"))
}

/// Requests of a turn, of a closed loop as well, and how many before them are not counted. The guard's credit of 100 ms is then a small
/// part of a turn.
const REQUESTS: u64 = 220;
const CLOSED_LOOP_REQUESTS: u64 = 2000;
const WARM_UP: usize = 10;

/// The mean pause between requests: about ten a second.
const PAUSE: Duration = Duration::from_millis(95);

/// A way to be guarded.
struct Contestant {
    name: &'static str,
    way: Way,
    extra: &'static [&'static str],
    pause: Duration,
    latencies_us: Vec<u64>,
    /// The guest's time stopped, and all of it, in microseconds.
    stopped_us: u64,
    all_us: u64,
}

const FIXED: &[&str] = &["--interval-max", "25", "--output-checkpoints", "off"];

fn contestants() -> Vec<Contestant> {
    let contestant = |name, way, extra, pause| Contestant {
        name,
        way,
        extra,
        pause,
        latencies_us: Vec::new(),
        stopped_us: 0,
        all_us: 0,
    };
    vec![
        contestant("output not held", Way::None, &[], PAUSE),
        contestant("relay, asked for by output", Way::Relay, &[], PAUSE),
        contestant("filter, asked for by output", Way::Filter, &[], PAUSE),
        contestant("relay, every 25 ms", Way::Relay, FIXED, PAUSE),
        contestant("relay, closed loop", Way::Relay, &[], Duration::ZERO),
    ]
}

impl Contestant {
    fn take_turn(&mut self, lab: &colo_ring_tests::lab::Lab, number: u32) -> Result<(), LabError> {
        let mut scene = Scene::set(lab, self.way, number, self.extra)?;
        let (load, requests) = match self.pause.is_zero() {
            true => (Load::Count(Duration::ZERO), CLOSED_LOOP_REQUESTS),
            false => (Load::CountIrregularly(self.pause), REQUESTS),
        };
        let client = Client::start(load)?;
        let began = std::time::Instant::now();
        let before = stopped_us(&mut scene);
        client.wait_answers(requests)?;
        self.stopped_us += stopped_us(&mut scene) - before;
        self.all_us += u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let seen = client.end();
        assert_eq!(seen.error, None);
        self.latencies_us.extend(&seen.latencies_us[WARM_UP..]);
        let status: Value = scene.guard.status()?;
        println!("{}: {status}", self.name);
        Ok(())
    }

    fn row(&mut self) -> String {
        self.latencies_us.sort_unstable();
        let count = self.latencies_us.len();
        let at = |percent: usize| self.latencies_us[(count * percent / 100).min(count - 1)] as f64 / 1000.0;
        let runs = 100.0 - self.stopped_us as f64 * 100.0 / self.all_us as f64;
        format!(
            "| {} | {count} | {:.2} | {:.2} | {:.2} | {runs:.0} % |",
            self.name,
            at(50),
            at(99),
            at(100)
        )
    }
}

fn stopped_us(scene: &mut Scene<'_>) -> u64 {
    scene.primary.pauses_us().iter().sum()
}

#[test]
#[ignore = "a measurement: scripts/measure guard"]
fn what_output_waits_for() {
    net_experiment(Company::Nobody, |lab| {
        let mut all = contestants();
        let mut number = 0;
        for round in 0..rounds() {
            for turn in 0..all.len() {
                let which = (turn + round) % all.len();
                all[which].take_turn(lab, number)?;
                number += 1;
            }
        }
        println!("| | n | p50, ms | p99, ms | max, ms | guest runs |\n|---|---|---|---|---|---|");
        all.iter_mut()
            .for_each(|contestant| println!("{}", contestant.row()));
        Ok(())
    });
}
