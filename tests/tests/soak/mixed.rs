//! Everything at once, against one receiver: guests that are protected, dumped, resumed and discarded, with disks; hostile sessions and
//! strangers; clients of the control socket and of disks that make no sense. Each guest's checkpoints are its memory, the guest
//! that stays is protected to the end, and what the receiver takes of the host stays level.
//!
//! `COLO_RING_SOAK_MINUTES` makes it longer; scripts/soak does that.

mod clients;
mod figures;
mod guests;

use clients::{attack, babble, disturb_disks, look};
use colo_ring_tests::command::{RunningReceiver, Scratch, until, wrapped};
use colo_ring_tests::conversation::Conversation;
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tools::net::Address;
use figures::Figures;
use guests::{passing, steady};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CHANNELS: u8 = 2;

/// How long the sample is.
const SAMPLE: Duration = Duration::from_secs(25);

/// How often the operator discards what hostile sessions have left, after which the receiver is looked at.
const ROUND: Duration = Duration::from_secs(5);

/// How often a summary is printed.
const SUMMARY: Duration = Duration::from_secs(120);

/// Hosts of hostile peers: `hostile/attack.rs`.
const HOSTILE_HOSTS: &str = "127.0.1.";

/// Every how many attacks there is a pause: hostile peers and guests share the machine here.
const ATTACK_PACE: Duration = Duration::from_millis(10);

/// What has happened.
#[derive(Default)]
struct Counts {
    checkpoints: AtomicU64,
    dumps: AtomicU64,
    failovers: AtomicU64,
    discards: AtomicU64,
    attacks: AtomicU64,
    babble: AtomicU64,
    disk_clients: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The receiver and what its peers share.
struct Soak {
    receiver: RunningReceiver,
    scratch: Scratch,
    /// Sessions that connect at the same moment from one host could not be told apart.
    connecting: Mutex<()>,
    is_over: AtomicBool,
    counts: Counts,
    #[expect(dead_code, reason = "removed when it is dropped")]
    ram: SharedDirectory,
}

/// Something that goes on until the end of a run.
type Actor = fn(&Soak, Xoshiro256PlusPlus);

impl Soak {
    fn start() -> Self {
        let (scratch, ram) = (Scratch::new(), SharedDirectory::new().expect("a directory"));
        std::fs::create_dir(scratch.path().join("disks")).expect("a directory");
        let [ram_dir, disks] = [
            ram.path().to_str().expect("a path in UTF-8"),
            &scratch.file("disks"),
        ];
        let args = [
            "--ram-dir",
            ram_dir,
            "--disks",
            disks,
            "--nbd",
            "tcp:127.0.0.1:0",
            // For all that hostile hosts may leave: of what is full, guests that come are refused, too.
            "--ram-limit",
            "4G",
        ];
        Self {
            receiver: RunningReceiver::with_channels(wrapped(&[]), CHANNELS, &args),
            scratch,
            connecting: Mutex::default(),
            is_over: AtomicBool::new(false),
            counts: Counts::default(),
            ram,
        }
    }

    fn goes_on(&self) -> bool {
        !self.is_over.load(Ordering::Relaxed)
    }

    fn address(&self) -> SocketAddr {
        match self.receiver.address() {
            Address::Tcp(address) => address.parse().expect("an address"),
            Address::Unix(_) => panic!("it listens on TCP"),
        }
    }

    fn conversation(&self) -> Conversation {
        Conversation::open(self.receiver.control_path().as_ref())
    }

    fn sessions(&self) -> Vec<Value> {
        let mut status = self
            .conversation()
            .ask(&json!({"command": "status"}))
            .expect("a status");
        serde_json::from_value(status["sessions"].take()).expect("a list")
    }

    /// The operator discards the checkpoints that hostile sessions have left, and ends those that stand still.
    fn clean_up(&self) {
        let mut operator = self.conversation();
        for session in self.sessions() {
            let is_hostile = session["peer"]
                .as_str()
                .is_some_and(|peer| peer.starts_with(HOSTILE_HOSTS));
            if is_hostile {
                let number = &session["session"];
                // Either fails where it has changed meanwhile: then the next time.
                let _ = operator.ask(&json!({"command": "end", "session": number}));
                let _ = operator.ask(&json!({"command": "discard", "session": number}));
            }
        }
    }

    fn summary(&self, since: Duration, figures: &Figures) {
        let Counts {
            checkpoints,
            dumps,
            failovers,
            discards,
            attacks,
            babble,
            disk_clients,
        } = &self.counts;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        println!(
            "{:>6.1} min: {} checkpoints, {} dumps, {} failovers, {} discards, {} attacks, {} control and {} disk clients; {figures}",
            since.as_secs_f64() / 60.0,
            get(checkpoints),
            get(dumps),
            get(failovers),
            get(discards),
            get(attacks),
            get(babble),
            get(disk_clients),
        );
    }
}

fn duration() -> Duration {
    let minutes = std::env::var("COLO_RING_SOAK_MINUTES").ok();
    minutes.map_or(SAMPLE, |text| {
        Duration::from_secs(60 * text.parse::<u64>().expect("minutes"))
    })
}

/// Ends the others when one fails, so that the failure is seen at once.
struct EndAtPanic<'a>(&'a Soak);

impl Drop for EndAtPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.is_over.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn everything_at_once_leaves_the_receiver_level() {
    let soak = &Soak::start();
    let before = Figures::of(soak.receiver.pid());
    println!("before: {before}");
    let began = Instant::now();
    let figures = std::thread::scope(|scope| {
        let actors: [(Actor, u64); 8] = [
            (steady, 1),
            (passing, 2),
            (passing, 3),
            (attack, 4),
            (attack, 5),
            (babble, 6),
            (disturb_disks, 7),
            (look, 8),
        ];
        for (actor, seed) in actors {
            scope.spawn(move || {
                let _end = EndAtPanic(soak);
                actor(soak, Xoshiro256PlusPlus::seed_from_u64(seed));
            });
        }
        watch(soak, began)
    });
    until("the end of all sessions", || {
        soak.clean_up();
        soak.sessions().is_empty().then_some(())
    });
    let after = until("the receiver to release what it held", || {
        let figures = Figures::of(soak.receiver.pid());
        figures.is_idle_like(&before).then_some(figures)
    });
    soak.summary(began.elapsed(), &after);
    figures::check_level(&figures);
}

/// Cleans up and looks at the receiver, until the time is over.
fn watch(soak: &Soak, began: Instant) -> Vec<Figures> {
    let _end = EndAtPanic(soak);
    let mut figures = Vec::new();
    let mut said = began;
    while soak.goes_on() && began.elapsed() < duration() {
        std::thread::sleep(ROUND.min(duration().saturating_sub(began.elapsed())));
        soak.clean_up();
        figures.push(Figures::of(soak.receiver.pid()));
        if said.elapsed() >= SUMMARY {
            said = Instant::now();
            soak.summary(began.elapsed(), &figures[figures.len() - 1]);
        }
    }
    soak.is_over.store(true, Ordering::Relaxed);
    figures
}
