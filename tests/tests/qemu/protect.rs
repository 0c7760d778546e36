//! `colo-ring protect` with what makes pages smaller: the primary uses it, and the receiver holds its RAM bit for bit.

use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{Content, Guest, Lab, LabError, Machine, Qemu, Secondary, TestGuest, experiment};
use serde_json::{Value, json};

const CHECKPOINTS: usize = 8;

/// Protects a busy guest with these arguments. Returns the command's report and the answer of QEMU to `query`.
fn protected(lab: &Lab, channels: u8, arguments: &[&str], query: &str) -> Result<(Value, Value), LabError> {
    let load = TestGuest {
        content: Content::Compressible,
        ..TestGuest::random(2_000, 32)
    };
    let secondary = Secondary::start(lab, channels)?;
    let machine = Machine::bare("pc", 128, Guest::Test(load));
    let mut primary = Qemu::start(lab, "primary", &machine)?;
    primary.wait_serial("tick 2 ", HANG_LIMIT)?;
    primary.end_precopy_early()?;
    // TCG may lose marks of pages that change in precopy, and XBZRLE bytes.
    primary.stop()?;
    let report = secondary.protect_by_command(&primary, arguments)?;
    primary.wait_checkpoints(CHECKPOINTS, HANG_LIMIT)?;
    let answer = primary.qmp().execute(query, &json!({}))?;
    let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
    let dump = secondary.receiver().dump_only(&lab.file("dump"))?;
    saved.assert_equal(&dump.block("pc.ram")?)?;
    Ok((report, answer))
}

fn compressed(method: &str, level: &str) {
    experiment(|lab| {
        let arguments = [
            "--compression",
            method,
            "--compression-level",
            level,
            "--name",
            "web3",
        ];
        let (report, set) = protected(lab, 4, &arguments, "query-migrate-parameters")?;
        assert_eq!(
            (&report["session"], &report["guest"]),
            (&json!(1), &json!("web3")),
            "{report}"
        );
        assert_eq!(report["compression"], method);
        assert_eq!(report["compression_level"].to_string(), level);
        assert_eq!(set["multifd-compression"], method);
        assert_eq!(set[format!("multifd-{method}-level")].to_string(), level);
        Ok(())
    });
}

#[test]
fn the_command_sets_zstd_and_its_level() {
    compressed("zstd", "3");
}

#[test]
fn the_command_sets_zlib_and_its_level() {
    compressed("zlib", "2");
}

#[test]
fn the_command_switches_xbzrle_on() {
    experiment(|lab| {
        let (report, set) = protected(lab, 0, &["--xbzrle"], "query-migrate-capabilities")?;
        assert_eq!(report["xbzrle"], true);
        let changed = report["changed"].as_array().expect("a list");
        assert!(changed.contains(&json!("xbzrle on")), "{report}");
        let set = set.as_array().expect("a list");
        assert!(
            set.contains(&json!({"capability": "xbzrle", "state": true})),
            "{set:?}"
        );
        Ok(())
    });
}
