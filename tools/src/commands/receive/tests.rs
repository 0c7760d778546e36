use super::*;
use crate::test_status;
use clap::Parser;
use colo_ring::host::Machine;
use colo_ring::receiver::{ListenAddress, ReceiverOptions, SessionState};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ReceiveArgs,
}

fn parse(line: &[&str]) -> Result<ReceiverOptions, String> {
    let words = ["receive"].iter().chain(line);
    let parsed = Line::try_parse_from(words).map_err(|error| error.to_string())?;
    parsed.args.into_options().map_err(|error| error.to_string())
}

#[test]
fn the_least_that_must_be_said_is_where_to_listen() {
    let options = parse(&["--listen", "tcp:[::1]:4444"]).unwrap();
    assert_eq!(options.channels, 4);
    assert_eq!(options.identify_deadline, Duration::from_secs(10));
    assert!(options.ram_limit.bytes() <= Machine::read().memory_bytes / 4 * 3);
    assert_eq!(options.device_state_max_bytes, 64 << 20);
    let little = parse(&["--listen", "unix:/tmp/x", "--ram-limit", "32M"]).unwrap();
    assert_eq!(little.device_state_max_bytes, 32 << 20);
    assert!(!options.cores.is_empty() && options.cores.len() <= 4);
    assert!(parse(&[]).unwrap_err().contains("--listen"));
}

#[test]
fn what_is_asked_for_is_what_is_used_and_reported() {
    let line = "--listen tcp:127.0.0.1:0 --listen unix:/tmp/x --channels 0 --cores 1,0 --backend threads \
                --registered off --hugepages thp --ram-limit 256M --device-state-max 8M --accept-timeout 3 --once --ram-dir /dev/shm";
    let options = parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap();
    assert_eq!(options.listen.len(), 2);
    assert_eq!(options.cores, [1, 0]);
    assert_eq!(options.ram_limit.bytes(), 256 << 20);
    assert_eq!(options.device_state_max_bytes, 8 << 20);
    assert_eq!(options.store.ram_dir, Some(PathBuf::from("/dev/shm")));
    assert!(options.once && !options.registered);
    for (key, value) in [
        ("backend", serde_json::json!("threads")),
        ("hugepages", serde_json::json!("thp")),
        ("ram_limit_bytes", serde_json::json!(256u64 << 20)),
        ("device_state_max_bytes", serde_json::json!(8u64 << 20)),
        ("accept_timeout_s", serde_json::json!(3)),
        ("precopy_timeout_s", serde_json::json!(300)),
        ("sessions_per_origin", serde_json::json!(64)),
        ("registered", serde_json::json!(false)),
    ] {
        assert_eq!(options.described[key], value, "{key}");
    }
}

#[test]
fn disks_are_served_beside_where_primaries_connect_to() {
    let line = "--listen tcp:[::1]:4444 --listen unix:/tmp/x --disks /srv --disk-log-max 1G";
    let disks = parse(&line.split_whitespace().collect::<Vec<_>>())
        .unwrap()
        .disks
        .unwrap();
    let listen: Vec<String> = disks.listen.iter().map(ToString::to_string).collect();
    assert_eq!(listen, ["tcp:[::1]:10809", "unix:/tmp/x.nbd"]);
    assert_eq!(
        (disks.directory, disks.log_max_bytes),
        (PathBuf::from("/srv"), 1 << 30)
    );
    let own = parse(&[
        "--listen",
        "tcp:[::1]:4444",
        "--disks",
        "/srv",
        "--nbd",
        "unix:/tmp/n",
    ])
    .unwrap();
    assert_eq!(own.disks.unwrap().listen, [ListenAddress::Unix("/tmp/n".into())]);
    assert!(parse(&["--listen", "unix:/tmp/x"]).unwrap().disks.is_none());
}

#[test]
fn nonsense_is_refused() {
    for (words, hint) in [
        ("--listen 4444", "tcp:"),
        ("--listen unix:/tmp/x --cores 5-2", "2-5,8"),
        ("--listen unix:/tmp/x --channels 256", "256"),
        ("--listen unix:/tmp/x --numa-node 0 --cores 0", "--cores"),
        ("--listen unix:/tmp/x --numa-node 1023", "NUMA node"),
        ("--listen unix:/tmp/x --ram-limit 0", "--ram-limit"),
        ("--listen unix:/tmp/x --ram-limit 1.5G", "512M"),
        (
            "--listen unix:/tmp/x --ram-limit 32M --device-state-max 33M",
            "--ram-limit is 32 MiB",
        ),
        ("--listen unix:/tmp/x --device-state-max 8K", "at least 1M"),
        ("--listen unix:/tmp/x --nbd unix:/tmp/n", "--disks"),
        ("--listen unix:/tmp/x --disks /srv --disk-log-max 1M", "8M"),
        ("--listen unix:/tmp/x --accept-timeout 0", "0"),
        ("--listen unix:/tmp/x --user-timeout 2", "--keepalive"),
        ("--listen unix:/tmp/x --sessions-per-origin 0", "0"),
        ("--listen unix:/tmp/x --on-loss-unprotected", "--on-loss"),
        ("--listen unix:/tmp/x --control tcp:1:2", "unix:PATH"),
        (
            "--listen unix:/tmp/x --cores 0,8190-8191",
            "cores 8190, 8191 are not there",
        ),
        (
            "--listen unix:/tmp/x --ram-limit 6",
            "--ram-limit 6 is 6 bytes, in which no guest fits",
        ),
        (
            "--listen unix:/tmp/x --ram-limit 15M",
            "is 15 MiB, in which no guest fits",
        ),
        (
            "--listen unix:/tmp/x --backend epoll --registered on",
            "for --backend uring",
        ),
        ("--listen unix:/tmp/x --create-ram-dir", "--ram-dir"),
        ("--listen unix:/tmp/x --backend rdma", "uring"),
    ] {
        let refused = parse(&words.split_whitespace().collect::<Vec<_>>()).unwrap_err();
        assert!(refused.contains(hint), "{words}: {refused}");
    }
    assert!(
        parse(&["--listen", "unix:/tmp/x", "--cores", ""])
            .unwrap_err()
            .contains("2-5,8")
    );
}

/// A report of no measurement.
fn report() -> Report {
    let value = serde_json::json!({
        "schema": "colo-ring.latency", "schema_version": 1, "started_unix_ms": 0, "duration_ms": 0, "options": null,
        "machine": Machine::read(), "samples_dropped": 0, "total": colo_ring::metrics::Accumulator::new().summary(),
        "sessions": [], "sessions_not_listed": 0
    });
    serde_json::from_value(value).unwrap()
}

#[test]
fn the_last_report_says_what_has_become_of_each_checkpoint() {
    let session = |number, state, guest: &str| SessionStatus {
        guest: Some(guest.to_owned()),
        state,
        checkpoint: Some(7),
        checkpoint_age_ms: Some(2500),
        end: Some("the primary closed its connections".to_owned()),
        ..test_status::session(number)
    };
    let outcome = Outcome {
        sessions: vec![
            session(1, SessionState::Discarded, "a"),
            session(2, SessionState::Promoted, "b"),
            session(3, SessionState::Ended, "c"),
            session(4, SessionState::Ended, "d"),
        ],
        kept: vec![4],
        report: report(),
        written: Ok(()),
    };
    let text = render(&outcome, None);
    let lines: Vec<_> = text.lines().collect();
    let of = |name: &str| format!("({name}) of 192.0.2.7:40000: the primary closed its connections; ");
    assert_eq!(
        lines,
        [
            format!("session 1 {}checkpoint 7 was given up", of("a")),
            format!(
                "session 2 {}its guest went on elsewhere, from checkpoint 7",
                of("b")
            ),
            format!(
                "session 3 {}checkpoint 7 was the last, and ended with this receiver",
                of("c")
            ),
            format!("session 4 {}checkpoint 7, 2.5 s old, is kept", of("d")),
        ]
    );
}
