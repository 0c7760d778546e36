//! Kills of primaries at random instants and at every step of a checkpoint, with three kinds of clients.
//!
//! `COLO_RING_GUARD_KILLS` is how many there are for each gate (otherwise one for each kind of client); `COLO_RING_GUARD_SEED` repeats an
//! earlier campaign.

use super::scene::{Scene, Way};
use colo_ring_tests::lab::{
    Client, ClientError, Company, GUEST_ADDRESS, GUEST_ADDRESS_6, Lab, LabError, LinkMoment, Load,
    net_experiment,
};
use colo_ring_tests::random::generator;
use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use std::time::Duration;

const CLIENTS: [(&str, Load); 3] = [
    ("closed loop", Load::Count(Duration::ZERO)),
    ("200 a second", Load::CountEvery(Duration::from_millis(5))),
    ("bulk both ways", Load::Exchange),
];

/// Over how long the kills at random instants are spread.
const SPREAD_US: u64 = 1_500_000;

/// Over how many checkpoints those at a step of one are.
const SKIP_MAX: u32 = 20;

/// Within what time after the commit a gate lets go.
const RELEASE_US: u64 = 1500;

/// Answers before and after a kill.
const ANSWERS: (u64, u64) = (5, 50);

/// Of so many connections one may end.
const ENDS_ONE_IN: usize = 100;

fn kills() -> usize {
    let given = std::env::var("COLO_RING_GUARD_KILLS").ok();
    given.map_or(CLIENTS.len(), |text| text.parse().expect("a number of kills"))
}

/// When a primary is killed.
#[derive(Clone, Copy, Debug)]
enum Instant {
    /// At any time.
    Any(Duration),
    /// At a message between guard and receiver, after so many others like it.
    At(LinkMoment, u32),
}

impl Instant {
    fn draw(random: &mut Xoshiro256PlusPlus) -> Self {
        let skip = random.random_range(0..SKIP_MAX);
        let micros =
            |random: &mut Xoshiro256PlusPlus, most| Duration::from_micros(random.random_range(0..most));
        match random.random_range(0..7) {
            0 => Self::At(LinkMoment::Barrier, skip),
            1 => Self::At(LinkMoment::Placed, skip),
            2 => Self::At(LinkMoment::Committed, skip),
            3 => Self::At(LinkMoment::Releasing(micros(random, RELEASE_US)), skip),
            4 => Self::At(LinkMoment::Begin, skip),
            _ => Self::Any(micros(random, SPREAD_US)),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Any(_) => "any time",
            Self::At(LinkMoment::Begin, _) => "a checkpoint is wanted",
            Self::At(LinkMoment::Barrier, _) => "the barrier is asked for",
            Self::At(LinkMoment::Placed, _) => "the barrier is in place",
            Self::At(LinkMoment::Committed, _) => "between commit and release",
            Self::At(LinkMoment::Releasing(_), _) => "during the release",
        }
    }
}

/// What became of a connection.
#[derive(Debug)]
enum Outcome {
    GoesOn {
        gap: Duration,
        resumed: Duration,
    },
    /// A byte was wrong, or an answer unmade.
    Wrong(String),
    Ended(String),
}

#[derive(Debug)]
struct Kill {
    client: &'static str,
    load: Load,
    is_ipv6: bool,
    instant: Instant,
}

impl Kill {
    fn draw(number: usize, random: &mut Xoshiro256PlusPlus) -> Self {
        let (client, load) = CLIENTS[number % CLIENTS.len()];
        Self {
            client,
            load,
            is_ipv6: random.random_bool(0.25),
            instant: Instant::draw(random),
        }
    }

    fn carry_out(&self, lab: &Lab, way: Way, number: u32) -> Result<Outcome, LabError> {
        let (scene, proxy) = Scene::set_with_proxy(lab, way, number, &[])?;
        let client = match self.is_ipv6 {
            true => Client::start_at(GUEST_ADDRESS_6, self.load)?,
            false => Client::start_at(GUEST_ADDRESS, self.load)?,
        };
        client.wait_answers(ANSWERS.0)?;
        match self.instant {
            Instant::Any(after) => std::thread::sleep(after),
            Instant::At(moment, skip) => {
                proxy.kill_at(moment, Duration::ZERO, skip, scene.primary.pid());
                proxy.wait_acted()?;
            }
        }
        let killed = std::time::Instant::now();
        let (_receiver, fresh) = scene.fail_over()?;
        let resumed = killed.elapsed();
        let goes_on = client.wait_answers(ANSWERS.1);
        let seen = client.end();
        if let Err(wrong) = fresh.check_guest() {
            return Ok(Outcome::Wrong(wrong.to_string()));
        }
        Ok(match (seen.error, goes_on) {
            (Some(ClientError::Wrong(answer)), _) => Outcome::Wrong(answer),
            (None, Ok(())) => Outcome::GoesOn {
                gap: seen.longest_gap,
                resumed,
            },
            (error, goes_on) => {
                // A guest that has crashed says so.
                let serial = fresh.serial();
                let last = serial.lines().last().unwrap_or_default();
                Outcome::Ended(format!("{error:?}, {goes_on:?}; the guest's last line: {last:?}"))
            }
        })
    }
}

/// All kills through one gate.
#[derive(Default)]
struct Campaign {
    kills: Vec<(Kill, Outcome)>,
}

impl Campaign {
    /// A line of a table for those kills.
    fn row(&self, name: &str, which: impl Fn(&Kill) -> bool) -> String {
        let those = || {
            self.kills
                .iter()
                .filter(|(kill, _)| which(kill))
                .map(|(_, outcome)| outcome)
        };
        let survivors = those().filter_map(|outcome| match outcome {
            Outcome::GoesOn { gap, resumed } => Some((gap.as_millis(), resumed.as_millis())),
            _ => None,
        });
        let (mut gaps, mut resumed): (Vec<u128>, Vec<u128>) = survivors.unzip();
        gaps.sort_unstable();
        resumed.sort_unstable();
        let wrong = those()
            .filter(|outcome| matches!(outcome, Outcome::Wrong(_)))
            .count();
        let middle_and_most = |times: &[u128]| match times.last() {
            Some(most) => format!("{} | {most}", times[times.len() / 2]),
            None => " | ".to_owned(),
        };
        format!(
            "| {name} | {} | {} | {wrong} | {} | {} |",
            those().count(),
            gaps.len(),
            middle_and_most(&resumed),
            middle_and_most(&gaps)
        )
    }

    fn print(&self, way: Way) {
        println!(
            "| {way:?} | kills | goes on | wrong | runs again after, p50, ms | max | longest gap p50, ms | max |\n\
             |---|---|---|---|---|---|---|---|"
        );
        for (client, _) in CLIENTS {
            println!("{}", self.row(client, |kill| kill.client == client));
        }
        println!("{}", self.row("of these over IPv6", |kill| kill.is_ipv6));
        let mut instants: Vec<&str> = self.kills.iter().map(|(kill, _)| kill.instant.name()).collect();
        instants.sort_unstable();
        instants.dedup();
        for instant in instants {
            println!("{}", self.row(instant, |kill| kill.instant.name() == instant));
        }
    }

    /// No byte is wrong, and hardly a connection ends.
    fn check(&self) {
        let (mut wrong, mut ended) = (0, 0);
        for (kill, outcome) in &self.kills {
            let (count, what, reason) = match outcome {
                Outcome::GoesOn { .. } => continue,
                Outcome::Wrong(reason) => (&mut wrong, "wrong", reason),
                Outcome::Ended(reason) => (&mut ended, "ended", reason),
            };
            *count += 1;
            println!("{what}: {reason}: {kill:?}");
        }
        assert_eq!(wrong, 0, "wrong answers, listed above");
        assert!(
            ended * ENDS_ONE_IN <= self.kills.len(),
            "{ended} connections have ended, listed above"
        );
    }
}

fn connections_survive(way: Way) {
    net_experiment(Company::Others, |lab| {
        let mut random = generator("COLO_RING_GUARD_SEED");
        let mut campaign = Campaign::default();
        for number in 0..kills() {
            let kill = Kill::draw(number, &mut random);
            let outcome = kill.carry_out(lab, way, u32::try_from(number).expect("a count"));
            // One that could not be made is no reason to end the others.
            let outcome = outcome.unwrap_or_else(|error| Outcome::Ended(error.to_string()));
            println!("{way:?} {number}: {kill:?} {outcome:?}");
            campaign.kills.push((kill, outcome));
        }
        campaign.print(way);
        campaign.check();
        Ok(())
    });
}

#[test]
fn connections_survive_the_primary_through_a_relay() {
    connections_survive(Way::Relay);
}

#[test]
fn connections_survive_the_primary_through_a_filter() {
    connections_survive(Way::Filter);
}
