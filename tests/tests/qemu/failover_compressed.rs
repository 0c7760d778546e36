//! The guest lives on after sessions that compress its pages. See `failover`.

use super::failover::{start_primary, test_guest};
use colo_ring_tests::lab::{Compression, Kills, Moment, Secondary, Way, experiment, failover_runs};

/// Primaries that compress are killed, and then the receiver itself.
fn lives_on_from_a_compressed_session(compression: Compression) {
    experiment(|lab| {
        let machine = test_guest("pc");
        let mut secondary = Secondary::start(lab, 4)?;
        let mut kills = Kills::new(lab, &machine).of_compressed(compression);
        let mut running = start_primary(lab, "first", &machine)?;
        for way in (0..failover_runs()).flat_map(|_| [Way::Shared, Way::Stream]) {
            running = kills.kill_primary(&secondary, running, way, Moment::MidTransfer)?;
            running = kills.kill_receiver(&mut secondary, running, way, Moment::MidTransfer)?;
        }
        assert_eq!(secondary.files(), 0, "images are given up");
        Ok(())
    });
}

#[test]
fn pc_with_zlib_lives_on() {
    lives_on_from_a_compressed_session(Compression::Zlib(1));
}

#[test]
fn pc_with_zstd_lives_on() {
    lives_on_from_a_compressed_session(Compression::Zstd(1));
}

/// Levels, channels, caches and commit modes at the ends of what there is: one primary each.
#[test]
fn pc_lives_on_from_other_compressed_sessions() {
    let sessions = [
        (
            Compression::Zstd(20),
            1,
            ["--cache", "mirror", "--commit", "sync"],
        ),
        (
            Compression::Zlib(9),
            16,
            ["--cache", "mirror", "--commit", "deferred"],
        ),
    ];
    experiment(|lab| {
        let machine = test_guest("pc");
        let mut kills = Kills::new(lab, &machine);
        for (number, (compression, channels, options)) in (0..).zip(sessions) {
            let secondary = Secondary::start_with(lab, channels, &options)?;
            kills = kills.of_compressed(compression);
            let primary = start_primary(lab, &format!("primary{number}"), &machine)?;
            kills.kill_primary(&secondary, primary, Way::Shared, Moment::MidTransfer)?;
            assert_eq!(secondary.files(), 0, "images are given up");
        }
        Ok(())
    });
}

/// Primaries that send deltas are killed, and then the receiver itself.
#[test]
fn pc_with_xbzrle_lives_on() {
    experiment(|lab| {
        let machine = test_guest("pc");
        let mut secondary = Secondary::start(lab, 0)?;
        let mut kills = Kills::new(lab, &machine).of_xbzrle();
        let mut running = start_primary(lab, "first", &machine)?;
        for way in (0..failover_runs()).flat_map(|_| [Way::Shared, Way::Stream]) {
            running = kills.kill_primary(&secondary, running, way, Moment::MidTransfer)?;
            running = kills.kill_receiver(&mut secondary, running, way, Moment::MidTransfer)?;
        }
        assert_eq!(secondary.files(), 0, "images are given up");
        Ok(())
    });
}
