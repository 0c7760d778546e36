//! Bulk TCP out of the guest and into it, by how the guest is guarded.

use super::colo_compare::ComparedGuest;
use super::scene::{Scene, Way, machine};
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Company, Direction, Lab, LabError, Qemu, add_other_tap, bulk_mib_per_s, net_experiment,
};

/// Rounds, in each of which every contestant has its turn, in another order.
const ROUNDS: usize = 3;

/// Bytes of a transfer, the first of which is not counted.
const BYTES: u64 = 16 << 20;
const WARM_UP_BYTES: u64 = 1 << 20;

const DIRECTIONS: [Direction; 2] = [Direction::OutOfTheGuest, Direction::IntoTheGuest];

/// How a guest is protected.
#[derive(Clone, Copy)]
enum By {
    Nothing,
    Guard(Way),
    ColoCompare,
}

struct Contestant {
    name: &'static str,
    by: By,
    /// MiB a second, of each direction.
    rates: [Vec<f64>; 2],
}

impl Contestant {
    fn new(name: &'static str, by: By) -> Self {
        let rates = [Vec::new(), Vec::new()];
        Self { name, by, rates }
    }

    fn take_turn(&mut self, lab: &Lab, number: u32) -> Result<(), LabError> {
        match self.by {
            By::Nothing => {
                let guest = Qemu::start(lab, &format!("alone{number}"), &machine(lab, Way::None, number))?;
                guest.wait_serial("listening", HANG_LIMIT)?;
                self.transfer()
            }
            By::ColoCompare => {
                let mut guest = ComparedGuest::start(lab, number)?;
                self.transfer()?;
                println!("{}: pauses in us {:?}", self.name, guest.primary.pauses_us());
                Ok(())
            }
            By::Guard(way) => {
                let scene = Scene::set(lab, way, number, &[])?;
                self.transfer()?;
                println!("{}: {}", self.name, scene.guard.status()?);
                Ok(())
            }
        }
    }

    fn transfer(&mut self) -> Result<(), LabError> {
        for (rates, direction) in self.rates.iter_mut().zip(DIRECTIONS) {
            bulk_mib_per_s(direction, WARM_UP_BYTES)?;
            rates.push(bulk_mib_per_s(direction, BYTES)?);
        }
        Ok(())
    }

    fn row(&mut self) -> String {
        let cells = self.rates.iter_mut().map(|rates| {
            rates.sort_by(f64::total_cmp);
            let (least, middle, most) = (rates[0], rates[rates.len() / 2], rates[rates.len() - 1]);
            format!("{middle:.2} ({least:.2} to {most:.2})")
        });
        format!("| {} | {} |", self.name, cells.collect::<Vec<_>>().join(" | "))
    }
}

#[test]
#[ignore = "a measurement: scripts/measure guard"]
fn bulk_data() {
    net_experiment(Company::Nobody, |lab| {
        add_other_tap();
        let mut all = [
            Contestant::new("unprotected", By::Nothing),
            Contestant::new("protected, output not held", By::Guard(Way::None)),
            Contestant::new("`relay`", By::Guard(Way::Relay)),
            Contestant::new("`filter`", By::Guard(Way::Filter)),
            Contestant::new("QEMU's secondary and colo-compare", By::ColoCompare),
        ];
        let mut number = 0;
        for round in 0..ROUNDS {
            for turn in 0..all.len() {
                let which = (turn + round) % all.len();
                all[which].take_turn(lab, number)?;
                number += 1;
            }
        }
        println!("| | out of the guest, MiB/s | into the guest, MiB/s |\n|---|---|---|");
        all.iter_mut()
            .for_each(|contestant| println!("{}", contestant.row()));
        Ok(())
    });
}
