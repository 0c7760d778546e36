//! Linux guests live on: they write and check files all the while, are killed at random instants, resumed, protected
//! again and killed again, so that each boots once.
//!
//! `COLO_RING_FAILOVER_RUNS` makes more runs of every kind (1 otherwise), `COLO_RING_FAILOVER_SEED` kills at the
//! instants of an earlier run.

use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Guest, Kills, LinuxGuest, Machine, Moment, Qemu, Secondary, Way, experiment, failover_runs,
};

/// One guest, through every kind of failover, to its end in precopy.
fn lives_on(machine: &str, ends_with_multifd: bool) {
    experiment(|lab| {
        let guest = LinuxGuest {
            touch_kib: 512,
            files: 8,
            pause_ms: 50,
        };
        let machine = Machine::bare(machine, 128, Guest::Linux(guest));
        let (multifd, plain) = (Secondary::start(lab, 4)?, Secondary::start(lab, 0)?);
        let mut kills = Kills::new(lab, &machine);
        let mut running = Qemu::start(lab, "linux", &machine)?;
        running.wait_serial("tick 9", HANG_LIMIT)?;
        let kinds = [
            (&multifd, Way::Shared, Moment::Idle),
            (&plain, Way::Stream, Moment::Idle),
            (&multifd, Way::Stream, Moment::MidTransfer),
            (&plain, Way::Shared, Moment::MidTransfer),
        ];
        for run in 0..failover_runs() {
            for (secondary, way, moment) in kinds {
                // Every other time at the other moment.
                let moment = match moment {
                    Moment::Idle if run % 2 == 1 => Moment::MidTransfer,
                    Moment::MidTransfer if run % 2 == 1 => Moment::Idle,
                    first => first,
                };
                running = kills.kill_primary(secondary, running, way, moment)?;
            }
        }
        kills.kill_in_precopy(if ends_with_multifd { &multifd } else { &plain }, running)?;
        assert_eq!(multifd.files() + plain.files(), 0, "images are given up");
        Ok(())
    });
}

#[test]
fn linux_on_pc_lives_on() {
    lives_on("pc", true);
}

#[test]
fn linux_on_q35_lives_on() {
    lives_on("q35", false);
}
