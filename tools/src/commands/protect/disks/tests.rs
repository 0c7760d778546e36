//! Which disks are mirrored under which name, and what is refused.

use super::copy::progress;
use super::*;
use crate::guest_disks::MirrorState;
use crate::qmp::tests::{Responder, SocketPath, monitor};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

fn entry(device: &str, node: &str, read_only: bool) -> Value {
    json!({
        "device": device, "qdev": device, "inserted":
        {"node-name": node, "ro": read_only, "file": format!("{device}.raw"), "image": {"virtual-size": 1 << 30}},
    })
}

/// What a QEMU was asked to do.
type Commands = Arc<Mutex<Vec<String>>>;

/// A guest with two writable disks and a CD. `refuses` names a command that QEMU refuses. Mirrors are ready at once, and
/// backups ended; each disk's record has 20 MiB at first and 1 MiB after a backup. While a mirror stands, its filter is listed
/// in place of the disk. The first export that is asked for after a mirror was removed is still in use.
fn guest(name: Option<&'static str>, uuid: &'static str, refuses: &'static str) -> (SocketPath, Commands) {
    let done = Commands::default();
    let seen = done.clone();
    let respond: Responder = Box::new(move |command, arguments| {
        if !command.starts_with("query") && command != "qom-get" {
            let what = ["node-name", "job-id", "id", "name", "target"].map(|key| arguments[key].as_str());
            let what = what.into_iter().flatten().next().unwrap_or("");
            let node = arguments["node"].as_str().map(|node| format!("{node} "));
            seen.lock()
                .unwrap()
                .push(format!("{command} {}{what}", node.unwrap_or_default()));
        }
        if command == refuses {
            return Err(format!("{command}: no"));
        }
        let done = seen.lock().unwrap();
        let was_cancelled = done.iter().any(|line| line.starts_with("job-cancel"));
        let before = done.len().checked_sub(2).map(|at| done[at].as_str());
        let was_removed = before.is_some_and(|line| line.starts_with("blockdev-del"));
        if command == "blockdev-add" && was_cancelled && was_removed {
            return Err("Requested export not available".to_owned());
        }
        let named = |verb: &str| -> Vec<String> {
            let with = done.iter().filter_map(|line| line.strip_prefix(verb));
            with.map(str::to_owned).collect()
        };
        // Whether there is what one verb made and the other removes.
        let is_there = |name: &String, makes: &str, removes: &str| {
            let count = |verb| named(verb).iter().filter(|other| *other == name).count();
            count(makes) > count(removes)
        };
        let listed = |node: &str, number: usize| {
            let mirror = format!("colo-ring-disk{number}");
            match is_there(&mirror, "blockdev-mirror ", "job-cancel ") {
                true => format!("colo-ring-top{number}"),
                false => node.to_owned(),
            }
        };
        match command {
            "query-block" => Ok(json!([
                entry("vda", &listed("n0", 0), false),
                entry("cd0", "n1", true),
                entry("vdb", &listed("n2", 1), false)
            ])),
            "query-name" => Ok(name.map_or(json!({}), |name| json!({"name": name}))),
            "query-uuid" => Ok(json!({"UUID": uuid})),
            "query-named-block-nodes" => {
                let nodes: BTreeSet<_> = named("blockdev-add ").into_iter().collect();
                let nodes = nodes
                    .iter()
                    .filter(|node| is_there(node, "blockdev-add ", "blockdev-del "));
                let targets =
                    nodes.map(|node| json!({"node-name": node, "image": {"virtual-size": 1 << 30}}));
                let count = if named("blockdev-backup ").is_empty() {
                    20
                } else {
                    1
                } << 20;
                let disks = ["n0", "n2"].map(|node| {
                    let verbs = ["add", "remove"].map(|verb| format!("block-dirty-bitmap-{verb} {node} "));
                    let mut records = named(&verbs[0]);
                    records.retain(|name| is_there(name, &verbs[0], &verbs[1]));
                    let records = records
                        .iter()
                        .map(|name| json!({"name": name, "recording": true, "count": count}));
                    json!({"node-name": node, "drv": "raw", "dirty-bitmaps": records.collect::<Value>()})
                });
                Ok(targets.chain(disks).collect())
            }
            "query-block-jobs" => {
                let jobs: BTreeSet<_> = named("blockdev-mirror ").into_iter().collect();
                let jobs = jobs
                    .iter()
                    .filter(|job| is_there(job, "blockdev-mirror ", "job-cancel "));
                Ok(jobs
                    .map(|job| json!({"device": job, "offset": 9, "len": 9, "ready": true, "actively-synced": true}))
                    .collect())
            }
            "query-status" => Ok(json!({"running": true})),
            "qom-get" => Ok(json!("virtio-blk-device")),
            _ => Ok(json!({})),
        }
    });
    (monitor((11, 1, 3), respond), done)
}

const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";
const UUID: &str = "11111111-2222-3333-4444-555555555555";

fn connect(path: &SocketPath) -> Qmp {
    Qmp::connect(&path.0, Duration::from_secs(300)).unwrap()
}

fn plan(path: &SocketPath, args: &DiskArgs) -> Result<DiskPlan, CommandError> {
    DiskPlan::make(&mut connect(path), args, &"tcp:192.0.2.2:4444".parse().unwrap())
}

fn exports(plan: &DiskPlan) -> Vec<(&str, &str)> {
    let pairs = plan.wanted.iter();
    pairs
        .map(|mirror| (mirror.disk.name.as_str(), mirror.export.as_str()))
        .collect()
}

fn disks(names: &[&str]) -> DiskArgs {
    DiskArgs {
        disk: names.iter().map(|name| name.parse().unwrap()).collect(),
        ..DiskArgs::default()
    }
}

#[test]
fn every_writable_disk_is_mirrored_by_default() {
    let made = plan(&guest(Some("web 3"), UUID, "").0, &disks(&[])).unwrap();
    assert_eq!(exports(&made), [("vda", "web-3-vda"), ("vdb", "web-3-vdb")]);
    assert!(made.has_uuid() && made.unprotected.is_empty());
    assert_eq!(made.read_only[0].name, "cd0");
    assert_eq!(made.to.to_string(), "tcp:192.0.2.2:10809");
    let made = plan(&guest(None, NO_UUID, "").0, &disks(&[])).unwrap();
    assert_eq!(exports(&made), [("vda", "vda"), ("vdb", "vdb")]);
    assert!(!made.has_uuid());
}

#[test]
fn disks_are_named_by_the_operator_and_the_rest_is_unprotected() {
    let made = plan(&guest(None, UUID, "").0, &disks(&["n2=web3-root"])).unwrap();
    assert_eq!(exports(&made), [("vdb", "web3-root")]);
    assert_eq!(made.unprotected[0].name, "vda");
    let none = DiskArgs {
        no_disks: true,
        ..DiskArgs::default()
    };
    let made = plan(&guest(None, UUID, "").0, &none).unwrap();
    assert!(made.wanted.is_empty() && made.has_uuid());
    assert_eq!(made.unprotected.len(), 2);
    for (names, says) in [
        (&["vdc"][..], "it has vda (vda.raw, 1G), cd0 (cd0.raw, 1G), vdb"),
        (&["cd0"], "read-only"),
        (&["vda=x", "vdb=x"], "twice"),
        (&["vda=x", "n0=y"], "twice"),
    ] {
        let refused = plan(&guest(None, UUID, "").0, &disks(names)).unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
    }
    for text in ["", "=x", "vda=", "vda=a/b", "vda=.x", "vda=a@b"] {
        assert!(text.parse::<DiskName>().is_err(), "{text}");
    }
}

#[test]
fn names_that_are_made_up_are_valid() {
    for (name, export) in [("a/b#c", "a-b-c"), (".x", "-x"), ("straße", "stra-e")] {
        assert_eq!(export_name(name), export);
        assert!(is_export_name(export));
    }
    assert_eq!(export_name(&"x".repeat(500)).len(), NAME_MAX);
}

#[test]
fn mirrors_are_started_node_before_job() {
    let (path, done) = guest(None, UUID, "");
    let made = plan_and_mirror(&path).unwrap();
    assert_eq!(made.disks().len(), 2);
    let expected = [
        "blockdev-add colo-ring-nbd0",
        "blockdev-add colo-ring-nbd1",
        "block-dirty-bitmap-add n0 colo-ring unix:/run/r.nbd vda unfinished",
        "block-dirty-bitmap-add n2 colo-ring unix:/run/r.nbd vdb unfinished",
        "blockdev-mirror colo-ring-disk0",
        "blockdev-mirror colo-ring-disk1",
        "block-dirty-bitmap-add n0 colo-ring unix:/run/r.nbd vda",
        "block-dirty-bitmap-merge n0 colo-ring unix:/run/r.nbd vda",
        "block-dirty-bitmap-remove n0 colo-ring unix:/run/r.nbd vda unfinished",
        "block-dirty-bitmap-add n2 colo-ring unix:/run/r.nbd vdb",
        "block-dirty-bitmap-merge n2 colo-ring unix:/run/r.nbd vdb",
        "block-dirty-bitmap-remove n2 colo-ring unix:/run/r.nbd vdb unfinished",
    ];
    assert_eq!(*done.lock().unwrap(), expected);
}

#[test]
fn changes_are_copied_while_the_guest_runs_and_the_last_while_it_is_stopped() {
    let (path, done) = guest(None, UUID, "");
    let mut qmp = connect(&path);
    let changed = DiskArgs {
        disk_sync: DiskSync::Changed,
        ..disks(&[])
    };
    let refused = mirror_with(&mut qmp, &changed).unwrap_err().to_string();
    assert!(
        refused.contains("no record") && refused.contains("--disk-sync full"),
        "{refused}"
    );
    mirror_with(&mut qmp, &disks(&[])).unwrap();
    remove_all(&mut qmp).unwrap();
    done.lock()
        .unwrap()
        .retain(|line| line.starts_with("block-dirty"));

    let (_, changes) = mirror_with(&mut qmp, &changed).unwrap();
    assert_eq!(changes.unwrap().bytes, 40 << 20);
    let done = done.lock().unwrap();
    let steps: Vec<_> = done
        .iter()
        .filter(|line| !line.starts_with("block-dirty"))
        .collect();
    let expected = [
        "blockdev-add colo-ring-nbd0",
        "blockdev-add colo-ring-nbd1",
        "blockdev-backup colo-ring-disk0",
        "blockdev-backup colo-ring-disk1",
        "stop ",
        "blockdev-backup colo-ring-disk0",
        "blockdev-backup colo-ring-disk1",
        "blockdev-mirror colo-ring-disk0",
        "blockdev-mirror colo-ring-disk1",
        "cont ",
    ];
    assert_eq!(steps, expected);
}

#[test]
fn a_guest_is_not_left_stopped_when_the_last_of_its_changes_cannot_be_copied() {
    let (path, done) = guest(None, UUID, "blockdev-mirror");
    let mut qmp = connect(&path);
    for node in ["n0", "n2"] {
        let name = format!(
            "colo-ring unix:/run/r.nbd {}",
            if node == "n0" { "vda" } else { "vdb" }
        );
        qmp.execute("block-dirty-bitmap-add", &json!({"node": node, "name": name}))
            .unwrap();
    }
    let changed = DiskArgs {
        disk_sync: DiskSync::Changed,
        ..disks(&[])
    };
    let error = mirror_with(&mut qmp, &changed).unwrap_err().to_string();
    assert!(
        error.contains("blockdev-mirror: no; the guest runs on, unprotected"),
        "{error}"
    );
    let done = done.lock().unwrap();
    let at = |step: &str| done.iter().position(|line| line == step);
    assert!(
        at("stop ") < at("cont ") && at("cont ") < at("blockdev-del colo-ring-nbd0"),
        "{done:?}"
    );
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let (path, done) = guest(None, UUID, "blockdev-mirror");
    let error = plan_and_mirror(&path).unwrap_err().to_string();
    assert!(
        error.contains("blockdev-mirror: no; the guest runs on, unprotected"),
        "{error}"
    );
    let done = done.lock().unwrap().clone();
    assert_eq!(done.last().unwrap(), "blockdev-del colo-ring-nbd1");
    let (path, _) = guest(None, UUID, "blockdev-add");
    let error = plan_and_mirror(&path).unwrap_err().to_string();
    assert!(error.contains("truncate --size 1073741824 vda.raw"), "{error}");
}

#[test]
fn a_guest_without_a_uuid_is_warned_of() {
    let doubt = |uuid, to: Option<&str>| {
        let args = DiskArgs {
            disk_to: to.map(|to| to.parse().unwrap()),
            ..disks(&[])
        };
        plan(&guest(None, uuid, "").0, &args).unwrap().doubt()
    };
    assert_eq!(doubt(UUID, Some("tcp:192.0.2.9:10809")), None);
    assert!(doubt(NO_UUID, Some("unix:/run/r.nbd")).is_some());
    let elsewhere = doubt(NO_UUID, Some("tcp:192.0.2.9:10809")).unwrap();
    assert!(elsewhere.contains("tcp:192.0.2.9:10809"), "{elsewhere}");
    let one_host = doubt(NO_UUID, None).unwrap();
    assert!(one_host.contains("only one such guest"), "{one_host}");
    let none = DiskArgs {
        no_disks: true,
        ..disks(&[])
    };
    assert_eq!(plan(&guest(None, NO_UUID, "").0, &none).unwrap().doubt(), None);
}

#[test]
fn mirrors_that_are_left_over_are_removed_before_disks_are_listed() {
    let (path, done) = guest(None, UUID, "");
    let mut qmp = connect(&path);
    mirror_with(&mut qmp, &disks(&[])).unwrap();
    let named = disks(&["n2=web3-root"]);
    let made = DiskPlan::make(&mut qmp, &named, &"unix:/run/r".parse().unwrap()).unwrap();
    assert_eq!(exports(&made), [("vdb", "web3-root")]);
    assert_eq!(
        (&*made.wanted[0].disk.node, &*made.unprotected[0].node),
        ("n2", "n0")
    );
    let removed = [
        "job-cancel colo-ring-disk0",
        "job-cancel colo-ring-disk1",
        "blockdev-del colo-ring-nbd0",
        "blockdev-del colo-ring-nbd1",
    ];
    assert!(done.lock().unwrap().ends_with(&removed.map(str::to_owned)));
    // The receiver refuses its export once more before it has noticed.
    let (_wish, wished) = mpsc::channel();
    made.mirror(&mut qmp, &named, &wished, false).unwrap();
    let done = done.lock().unwrap();
    let asked = done.iter().filter(|line| *line == "blockdev-add colo-ring-nbd0");
    assert_eq!(asked.count(), 1 + 2, "{done:?}");
}

/// One connection, as the monitor takes one client.
fn plan_and_mirror(path: &SocketPath) -> Result<Mirrors, CommandError> {
    mirror_with(&mut connect(path), &disks(&[])).map(|(mirrors, _)| mirrors)
}

fn mirror_with(qmp: &mut Qmp, args: &DiskArgs) -> Result<(Mirrors, Option<Changes>), CommandError> {
    let (_wish, wished) = mpsc::channel();
    let plan = DiskPlan::make(qmp, args, &"unix:/run/r".parse().unwrap())?;
    plan.mirror(qmp, args, &wished, false)
}

#[test]
fn progress_names_the_rate_and_the_time_left() {
    let state = MirrorState {
        done: 512 << 20,
        all: 1 << 30,
        is_synced: false,
    };
    assert_eq!(
        progress(state, Duration::from_secs(4)),
        "disks [==========          ] 512 of 1024 MiB, 128 MiB/s, 4 s left"
    );
    assert!(progress(MirrorState::default(), Duration::ZERO).ends_with("? left"));
}
