//! The plug: output is held in the kernel of the primary's host, for a card with several queues and vhost. The host is a guest of the
//! laboratory, because not every kernel has the queue.

use colo_ring_tests::lab::{Company, Host, HostGuest, net_experiment};

#[test]
fn a_card_with_queues_and_vhost_is_held_by_the_kernel() {
    net_experiment(Company::Others, |lab| {
        let host = Host::with_plug(lab)?;
        let guest = HostGuest::run(lab, &host, &["plug"])?;
        let told = guest.printed("plug", "scene");
        println!("{told}");
        assert_eq!(guest.code("plug"), "0", "{told}");
        // Chosen because QEMU refuses a filter, with QEMU's reason.
        let plan = told
            .lines()
            .find(|line| line.starts_with("plan: "))
            .unwrap_or_default();
        assert!(
            plan.contains("plug, by the kernel before the tap device plug0: QEMU refused object-add"),
            "{plan}"
        );
        assert!(
            told.lines()
                .any(|line| line.starts_with("status: ") && line.contains(r#""gate":"plug""#))
        );
        Ok(())
    });
}
