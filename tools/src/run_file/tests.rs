use super::*;
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

fn run() -> RunFile {
    let checkpoint = |n: u64| Checkpoint {
        n,
        at_ns: n * 300_000_000,
        phases_ns: [
            ("loaded".to_owned(), n * 1_000_000),
            ("received".to_owned(), n * 900_000),
        ]
        .into(),
        pages: 10,
        bytes: 41_000,
        ..Checkpoint::default()
    };
    let started = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let options = serde_json::json!({ "pace": "max" });
    RunFile {
        secondary: Some(SecondaryUse {
            pid: 1,
            cpu_ns: 2,
            rss_bytes_max: 3,
        }),
        checkpoints: (1..=10).map(checkpoint).collect(),
        dropped: 1,
        notes: vec!["a note".to_owned()],
        ..RunFile::new(
            "colo-ring uring",
            "colo-ring replay",
            options,
            Clock::Primary,
            started,
        )
    }
}

/// What the primary sees of a reply includes the network: it has a name of its own, also in files from before.
#[test]
fn a_reply_is_the_receivers_alone() {
    let path = Path::new("old.run.json");
    for (clock, name) in [(Clock::Primary, "replied"), (Clock::Receiver, "reply")] {
        let mut old = RunFile { clock, ..run() };
        for checkpoint in &mut old.checkpoints {
            checkpoint.phases_ns.insert("reply".to_owned(), 7);
        }
        let read = RunFile::parse(path, &serde_json::to_vec(&old).unwrap()).unwrap();
        assert!(
            read.phases().contains(name) && read.phases().len() == 3,
            "{:?}",
            read.phases()
        );
    }
}

#[test]
fn a_run_comes_back_and_its_logs_lie_beside_it() {
    let scratch = tempfile::tempdir().unwrap();
    let prefix = scratch.path().join("run.1");
    run().write(&prefix).unwrap();
    assert_eq!(
        RunFile::read(&scratch.path().join("run.1.run.json")).unwrap(),
        run()
    );
    for phase in ["loaded", "received"] {
        let text = std::fs::read(scratch.path().join(format!("run.1.{phase}.hlog"))).unwrap();
        let entries = IntervalLogIterator::new(&text).collect::<Result<Vec<_>, _>>();
        let starts: Vec<_> = entries
            .unwrap()
            .iter()
            .filter_map(|entry| match entry {
                LogEntry::Interval(interval) => Some(interval.start_timestamp().as_secs()),
                _ => None,
            })
            .collect();
        assert_eq!(starts, [0, 1, 2, 3]);
    }
    let mut names: Vec<_> = std::fs::read_dir(scratch.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["run.1.loaded.hlog", "run.1.received.hlog", "run.1.run.json"]
    );
}

#[test]
fn what_is_no_run_is_refused_with_the_reason() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("x.run.json");
    let good = serde_json::to_value(run()).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = good.clone();
        change(&mut value);
        std::fs::write(&path, value.to_string()).unwrap();
        RunFile::read(&path).unwrap_err().to_string()
    };
    for (change, says) in [
        (
            &(|v: &mut serde_json::Value| v["schema"] = "x".into()) as &dyn Fn(&mut serde_json::Value),
            "the schema is \"x\"",
        ),
        (&|v| v["schema_version"] = 2.into(), "knows 1"),
        (&|v| v["name"] = "a\u{1b}[2J".into(), "control character"),
        (&|v| v["name"] = "".into(), "cannot be a run's name"),
        (&|v| v["clock"] = "mine".into(), "unknown variant"),
        (&|v| v["checkpoints"][3]["at_ns"] = (-1).into(), "invalid value"),
        (
            &|v| v["checkpoints"][3]["phases_ns"]["../x"] = 1.into(),
            "cannot be a phase",
        ),
        (&|v| *v = 1.into(), "line 1 column 1"),
    ] {
        let said = refused(change);
        assert!(
            said.contains(says) && said.contains("x.run.json"),
            "{says}: {said}"
        );
    }
    std::fs::write(&path, &good.to_string()[..200]).unwrap();
    assert!(RunFile::read(&path).unwrap_err().to_string().contains("EOF"));
    let missing = RunFile::read(&scratch.path().join("none"))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("No such file"), "{missing}");
}

#[test]
fn a_run_that_could_not_be_read_is_not_written() {
    let scratch = tempfile::tempdir().unwrap();
    let mut bad = run();
    bad.checkpoints[0].phases_ns.insert("../escape".to_owned(), 1);
    assert!(bad.write(&scratch.path().join("x")).is_err());
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

/// Whatever a file contains, it is read or refused.
#[test]
fn damaged_runs_never_panic() {
    use rand::rngs::Xoshiro256PlusPlus;
    use rand::{RngExt, SeedableRng};
    let good = serde_json::to_vec(&run()).unwrap();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(6);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut bad = good.clone();
        let at = rng.random_range(0..bad.len());
        match rng.random_range(0..4) {
            0 => bad[at] = rng.random(),
            1 => bad.truncate(at),
            2 => {
                bad.remove(at);
            }
            _ => bad[at] ^= 1 << rng.random_range(0..7),
        }
        match RunFile::parse(Path::new("x"), &bad) {
            // What is taken can be used.
            Ok(run) => {
                read += 1;
                run.phases().iter().for_each(|phase| drop(run.histogram(phase)));
            }
            Err(_) => refused += 1,
        }
    }
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
}
