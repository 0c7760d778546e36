//! A monitor with scripted answers, and the client connected to it.

use super::*;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use tempfile::TempDir;

/// A socket's path in a directory of its own, which is removed when this is dropped.
pub(crate) struct SocketPath(
    pub(crate) PathBuf,
    #[expect(dead_code, reason = "removes the directory when dropped")] TempDir,
);

impl SocketPath {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self(directory.path().join("qmp"), directory)
    }
}

/// What a monitor answers to a command with these arguments: what it returns, or why it refuses. A name that begins
/// with "event " is sent as an event.
pub(crate) type Responder = Box<dyn FnMut(&str, &Value) -> Result<Value, String> + Send>;

/// A monitor of a QEMU of that version, for one client. It is there when this returns.
pub(crate) fn monitor(version: (u64, u64, u64), mut respond: Responder) -> SocketPath {
    let path = SocketPath::new();
    let listener = UnixListener::bind(&path.0).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (major, minor, micro) = version;
        let qemu = json!({"major": major, "minor": minor, "micro": micro});
        writeln!(
            stream,
            "{}",
            json!({"QMP": {"version": {"qemu": qemu}, "capabilities": []}})
        )
        .unwrap();
        let requests = serde_json::Deserializer::from_reader(stream.try_clone().unwrap());
        for request in requests.into_iter::<Value>().map_while(Result::ok) {
            let command = request["execute"].as_str().unwrap();
            let answer = match command {
                "qmp_capabilities" => Ok(json!({})),
                _ => respond(command, &request["arguments"]),
            };
            let id = &request["id"];
            let line = match answer {
                Ok(value) => json!({"return": value, "id": id}),
                Err(description) => {
                    json!({"error": {"class": "GenericError", "desc": description}, "id": id})
                }
            };
            // The client may have seen enough.
            let _ = match (command, line.get("return")) {
                // A backup that has nothing to do.
                ("blockdev-backup", Some(_)) => {
                    writeln!(stream, "{}\n{line}", completed(&request["arguments"]))
                }
                _ => writeln!(stream, "{line}"),
            };
        }
    });
    path
}

/// That a job has ended.
fn completed(job: &Value) -> Value {
    json!({
        "event": "BLOCK_JOB_COMPLETED", "timestamp": {"seconds": 1, "microseconds": 0},
        "data": {"device": job["job-id"], "type": "backup"},
    })
}

fn connect(path: &SocketPath) -> Result<Qmp, QmpError> {
    Qmp::connect(&path.0, Duration::from_secs(300))
}

/// Listens, says that, and closes; where it answers something, after it was asked.
fn says(text: &'static str) -> SocketPath {
    let path = SocketPath::new();
    let listener = UnixListener::bind(&path.0).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (greeting, answers) = text.split_at(text.find('\n').map_or(text.len(), |end| end + 1));
        stream.write_all(greeting.as_bytes()).unwrap();
        if !answers.is_empty() {
            let _ = stream.read(&mut [0; 64]);
            stream.write_all(answers.as_bytes()).unwrap();
        }
    });
    path
}

#[test]
fn commands_are_answered_or_refused() {
    let respond: Responder = Box::new(|command, arguments| match command {
        "query-status" => Ok(json!({"status": "running"})),
        _ => Err(format!("{command} with {arguments}? no")),
    });
    let path = monitor((11, 1, 3), respond);
    let mut qmp = connect(&path).unwrap();
    assert_eq!(qmp.version().to_string(), "11.1.3");
    assert!(
        qmp.version()
            < Version {
                major: 12,
                minor: 0,
                micro: 0
            }
    );
    assert_eq!(
        qmp.execute("query-status", &json!({})).unwrap()["status"],
        "running"
    );
    let refused = qmp.execute("migrate", &json!({"uri": "x"})).unwrap_err();
    assert_eq!(refused.refusal(), Some("migrate with {\"uri\":\"x\"}? no"));
    assert!(!qmp.wait_event("RESUME", Duration::from_millis(1)));
}

#[test]
fn commands_that_are_sent_together_are_run_in_turn() {
    let done = Arc::new(Mutex::new(Vec::new()));
    let seen = done.clone();
    let respond: Responder = Box::new(move |command, arguments| {
        seen.lock().unwrap().push(arguments["value"].clone());
        match command {
            "qom-set" => Ok(json!({})),
            _ => Err("no".to_owned()),
        }
    });
    let path = monitor((11, 1, 3), respond);
    let mut qmp = connect(&path).unwrap();
    let set = |value: &str| ("qom-set", json!({"value": value}));
    let limit = Duration::from_secs(300);
    qmp.execute_together(&[set("off"), set("on")], limit).unwrap();
    let refused = qmp.execute_together(&[("quit", json!({})), set("off")], limit);
    assert_eq!(refused.unwrap_err().refusal(), Some("no"));
    // The answer to the last of those is not taken for this one's.
    let again = qmp.execute("qom-set", &json!({"value": "on"}));
    assert_eq!(again.unwrap(), json!({}));
    assert_eq!(
        *done.lock().unwrap(),
        ["off", "on", "null", "off", "on"].map(|word| match word {
            "null" => Value::Null,
            word => json!(word),
        })
    );
}

/// A caller whose command hangs does not hold up another one.
#[test]
fn commands_are_answered_in_any_order() {
    let path = SocketPath::new();
    let listener = UnixListener::bind(&path.0).unwrap();
    let (comes, has_come) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let qemu = json!({"major": 11, "minor": 1, "micro": 3});
        let greeting = json!({"QMP": {"version": {"qemu": qemu}, "capabilities": ["oob"]}});
        writeln!(stream, "{greeting}").unwrap();
        let requests = serde_json::Deserializer::from_reader(stream.try_clone().unwrap());
        let mut hangs = None;
        for request in requests.into_iter::<Value>().map_while(Result::ok) {
            if request["execute"] == "query-migrate" {
                hangs = Some(request["id"].clone());
                comes.send(()).unwrap();
                continue;
            }
            writeln!(stream, "{}", json!({"return": {}, "id": request["id"]})).unwrap();
            if request["exec-oob"] == "yank" {
                let answer = json!({"return": {"status": "failed"}, "id": hangs.take()});
                writeln!(stream, "{answer}").unwrap();
            }
        }
    });
    let limit = Duration::from_secs(300);
    let mut qmp = connect(&path).unwrap();
    let mut other = qmp.clone();
    let hangs = std::thread::spawn(move || other.execute_within("query-migrate", &json!({}), limit));
    has_come.recv().unwrap();
    qmp.execute("query-status", &json!({})).unwrap();
    qmp.execute_out_of_band("yank", &json!({}), limit).unwrap();
    assert_eq!(hangs.join().unwrap().unwrap()["status"], "failed");
}

#[test]
fn events_are_waited_for() {
    const SAID: &str = concat!(
        r#"{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}}}"#,
        "\n",
        r#"{"return": {}}"#,
        "\n",
        r#"{"event": "RESUME", "timestamp": {"seconds": 2, "microseconds": 5}}"#,
        "\n",
    );
    let path = says(SAID);
    let qmp = connect(&path).unwrap();
    assert!(qmp.wait_event("RESUME", Duration::from_secs(300)));
    assert_eq!(qmp.events()[0].at_us, 2_000_005);
    // It has closed: no answer is waited for.
    let began = Instant::now();
    assert!(!qmp.wait_event("STOP", Duration::from_secs(600)));
    assert!(began.elapsed() < Duration::from_secs(300));
}

#[test]
fn what_is_no_monitor_is_reported() {
    let absent = Qmp::connect(Path::new("/nonexistent/qmp"), Duration::ZERO).unwrap_err();
    assert!(
        absent.to_string().contains("-qmp unix:/nonexistent/qmp"),
        "{absent}"
    );
    for (text, says_what) in [
        (
            "QEMU 11.1.3 monitor - type 'help'\n",
            "it sent \"QEMU 11.1.3 monitor",
        ),
        ("{\"hello\": 1}\n", "it sent \"{\\\"hello\\\":1}\""),
        ("", "closed its monitor at the greeting"),
    ] {
        let path = says(text);
        let error = connect(&path).unwrap_err().to_string();
        assert!(error.contains(says_what), "{text:?}: {error}");
    }
}
