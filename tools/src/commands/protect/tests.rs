//! A primary with scripted answers: the settings that it receives, and the errors where it cannot be protected.

use super::*;
use crate::qmp::tests::{Responder, SocketPath, monitor};
use colo_ring::wire::codec::Method;
use std::sync::{Arc, Mutex};

fn args(path: &SocketPath) -> PrimaryArgs {
    PrimaryArgs {
        qmp: path.0.clone(),
        to: "tcp:192.0.2.2:4444".parse().unwrap(),
        channels: 4,
        tls: TlsArgs::default(),
        compression: CompressionArgs::default(),
        bandwidth: Size(10 << 30),
        disks: DiskArgs::default(),
    }
}

fn beginning(primary: &PrimaryArgs) -> Beginning<'_> {
    Beginning {
        primary,
        xbzrle: false,
        interval_ms: 300,
        wait: None,
        shows: false,
    }
}

fn watch(
    path: &SocketPath,
    wait: Option<Duration>,
    wished: &mpsc::Receiver<()>,
) -> Result<Value, CommandError> {
    let args = args(path);
    let beginning = Beginning {
        wait,
        ..beginning(&args)
    };
    beginning.watch(&mut connect(path), &Mirrors::default(), wished)
}

/// A QEMU in this state; `kvm` says whether it uses it.
fn primary(version: (u64, u64, u64), status: &'static str, migration: Value, kvm: bool) -> SocketPath {
    let respond: Responder = Box::new(move |command, _| match command {
        "query-status" => Ok(json!({"status": status})),
        "query-migrate" => Ok(migration.clone()),
        "query-kvm" => Ok(json!({"enabled": kvm, "present": kvm})),
        other => Err(format!("{other}: not now")),
    });
    monitor(version, respond)
}

fn connect(path: &SocketPath) -> Qmp {
    Qmp::connect(&path.0, Duration::from_secs(300)).unwrap()
}

#[test]
fn a_primary_that_cannot_be_protected_is_reported_why() {
    let blocked = json!({"blocked-reasons": ["non-migratable device: amd-iommu"]});
    for (version, status, migration, kvm, says) in [
        ((11, 1, 3), "inmigrate", json!({}), true, "-incoming"),
        ((11, 1, 3), "postmigrate", json!({}), true, "`cont`"),
        (
            (11, 1, 3),
            "running",
            json!({"status": "colo"}),
            true,
            "colo-ring unprotect",
        ),
        (
            (11, 1, 3),
            "running",
            json!({"status": "active"}),
            true,
            "in state active",
        ),
        ((11, 1, 3), "running", blocked, true, "amd-iommu"),
        ((10, 0, 7), "running", json!({}), false, "TCG"),
        ((7, 2, 22), "running", json!({}), false, "QEMU 7.2.22"),
    ] {
        let path = primary(version, status, migration, kvm);
        let refused = check_can_begin(&mut connect(&path), false)
            .unwrap_err()
            .to_string();
        assert!(refused.contains(says), "{refused}");
    }
    for (version, kvm) in [((11, 1, 3), false), ((10, 0, 7), true)] {
        let path = primary(version, "running", json!({"status": "failed"}), kvm);
        check_can_begin(&mut connect(&path), false).unwrap();
    }
}

#[test]
fn xbzrle_is_refused_while_the_guest_runs() {
    let version = (11, 1, 3);
    let path = primary(version, "running", json!({}), true);
    let refused = check_can_begin(&mut connect(&path), true).unwrap_err();
    assert!(refused.to_string().contains("give it QMP `stop`"), "{refused}");
    let path = primary(version, "paused", json!({}), true);
    check_can_begin(&mut connect(&path), true).unwrap();
}

#[test]
fn the_way_it_fails_and_what_the_guest_does_are_reported() {
    let refused = json!({"status": "failed", "error-desc": "Failed to connect: Connection refused"});
    let closed = json!({"status": "failed", "error-desc": "Unable to write to socket: Broken pipe"});
    for (migration, status, says) in [
        (
            refused,
            "running",
            [
                "is a receiver listening on tcp:192.0.2.2:4444?",
                "runs on, unprotected",
            ],
        ),
        (
            closed,
            "running",
            ["Broken pipe", "printed the reason where it runs"],
        ),
        (
            json!({"status": "completed"}),
            "postmigrate",
            ["migration completed", "`cont`"],
        ),
    ] {
        let path = primary((11, 1, 3), status, migration, true);
        let (_wish, wished) = mpsc::channel();
        let error = watch(&path, None, &wished).unwrap_err().to_string();
        for part in says {
            assert!(error.contains(part), "{error}");
        }
    }
}

#[test]
fn an_interrupted_watch_says_how_the_primary_is_left() {
    let migration =
        json!({"status": "active", "ram": {"transferred": 5 << 20, "remaining": 1 << 20, "total": 9 << 20}});
    let path = primary((11, 1, 3), "running", migration.clone(), true);
    let (wish, wished) = mpsc::channel();
    wish.send(()).unwrap();
    let error = watch(&path, None, &wished).unwrap_err().to_string();
    assert!(
        error.starts_with("interrupted: the migration goes on, in state active: 5 MiB sent, 1 of 9 MiB left"),
        "{error}"
    );
    assert!(
        error.contains("the guest runs") && error.contains("migrate_cancel"),
        "{error}"
    );
    let path = primary((11, 1, 3), "running", migration, true);
    let state = watch(&path, Some(Duration::ZERO), &wished).unwrap();
    assert_eq!(status_of(&state), "active");
}

/// A version that does not say whether it demands return-path is asked.
#[test]
fn return_path_is_switched_on_where_it_is_demanded() {
    let set = Arc::new(Mutex::new(Vec::new()));
    let seen = set.clone();
    let respond: Responder = Box::new(move |command, arguments| match command {
        "query-migrate-capabilities" => Ok(json!([
            {"capability": "x-colo", "state": false}, {"capability": "return-path", "state": false},
            {"capability": "multifd", "state": false}, {"capability": "x-ignore-shared", "state": true}])),
        "migrate-set-capabilities" => {
            let list = arguments["capabilities"].to_string();
            seen.lock().unwrap().push(list.clone());
            match list.contains(r#"{"capability":"return-path","state":true}"#) {
                true => Ok(json!({})),
                false => Err("Capability 'x-colo' requires capability 'return-path'".to_owned()),
            }
        }
        other => Err(format!("{other}: not now")),
    });
    let path = monitor((10, 2, 0), respond);
    let changed = set_capabilities(
        &mut connect(&path),
        Wanted {
            channels: 2,
            xbzrle: false,
            uuid: false,
        },
    )
    .unwrap();
    assert_eq!(
        changed,
        ["x-colo on", "return-path on", "multifd on", "x-ignore-shared off"]
    );
    assert_eq!(set.lock().unwrap().len(), 2);
}

/// The parameters that a primary is given.
fn parameters_of(change: impl FnOnce(&mut PrimaryArgs)) -> Value {
    let set = Arc::new(Mutex::new(Value::Null));
    let seen = set.clone();
    let respond: Responder = Box::new(move |command, arguments| {
        assert_eq!(command, "migrate-set-parameters");
        *seen.lock().unwrap() = arguments.clone();
        Ok(json!({}))
    });
    let path = monitor((11, 1, 3), respond);
    let mut args = args(&path);
    change(&mut args);
    let beginning = beginning(&args);
    let compression = beginning.check_modes().unwrap();
    beginning
        .set_parameters(&mut connect(&path), compression)
        .unwrap();
    set.lock().unwrap().take()
}

#[test]
fn a_primary_is_given_method_and_level() {
    let compressed = |compression, compression_level| {
        parameters_of(|args| {
            args.compression = CompressionArgs {
                compression,
                compression_level,
            }
        })
    };
    let none = compressed(Method::None, None);
    assert_eq!(none["multifd-compression"], "none");
    assert_eq!(none["multifd-zstd-level"], Value::Null);
    let zstd = compressed(Method::Zstd, Some(3));
    assert_eq!(
        (&zstd["multifd-compression"], &zstd["multifd-zstd-level"]),
        (&"zstd".into(), &3.into())
    );
    let zlib = compressed(Method::Zlib, None);
    assert_eq!(
        (&zlib["multifd-compression"], &zlib["multifd-zlib-level"]),
        (&"zlib".into(), &1.into())
    );
    assert_eq!(zlib["multifd-zstd-level"], Value::Null);
    let plain = parameters_of(|args| args.channels = 0);
    assert_eq!(plain["multifd-compression"], Value::Null);
}

#[test]
fn what_makes_pages_smaller_is_refused_in_the_other_mode() {
    let path = SocketPath::new();
    let mut args = args(&path);
    let xbzrle = Beginning {
        xbzrle: true,
        ..beginning(&args)
    };
    let refused = xbzrle.check_modes().unwrap_err().to_string();
    assert!(refused.contains("--channels 0"), "{refused}");
    args.channels = 0;
    args.compression.compression = Method::Zlib;
    let compressed = beginning(&args);
    let refused = compressed.check_modes().unwrap_err().to_string();
    assert!(refused.contains("--channels is 0"), "{refused}");
}

#[test]
fn a_monitor_is_a_path() {
    assert_eq!(socket_path("unix:/run/q"), Ok(PathBuf::from("/run/q")));
    assert_eq!(socket_path("/run/q"), Ok(PathBuf::from("/run/q")));
    assert!(socket_path("unix:").is_err() && socket_path("tcp:h:1").is_err());
}

/// QEMU reads nothing after a few commands that it has not answered, not even one out of band.
#[test]
fn a_qemu_that_hangs_is_asked_once() {
    let (release, hangs) = mpsc::channel::<()>();
    let (seen, sees) = mpsc::channel();
    let respond: Responder = Box::new(move |command, _| {
        seen.send(command.to_owned()).unwrap();
        if command == "query-migrate" {
            hangs.recv().unwrap();
        }
        Ok(json!({}))
    });
    let path = monitor((11, 1, 3), respond);
    let (wish, wished) = mpsc::channel();
    std::thread::spawn(move || {
        std::thread::sleep(4 * ANSWER_LIMIT);
        wish.send(()).unwrap();
    });
    let error = watch(&path, None, &wished).unwrap_err().to_string();
    assert!(error.starts_with("interrupted"), "{error}");
    release.send(()).unwrap();
    // Up to the end of the monitor, whose client is gone.
    let seen: Vec<String> = sees.iter().collect();
    assert_eq!(seen, ["query-migrate", "query-status"]);
}
