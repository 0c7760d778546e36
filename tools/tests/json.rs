//! What is printed as JSON: the schemas in docs/schema are current and describe every field, and errors are JSON, too.

use colo_ring_tests::command::{RunningReceiver, guest, run, wrapped};
use colo_ring_tests::schema;
use colo_ring_tools::json_schemas;
use colo_ring_tools::primary::SynthPrimary;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;

#[test]
fn the_schemas_in_the_docs_are_current() {
    let directory = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/schema"));
    let read = |path: PathBuf| -> (String, Value) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
    };
    let files = fs::read_dir(directory).unwrap();
    let files: BTreeMap<_, _> = files.map(|entry| read(entry.unwrap().path())).collect();
    let name = |schema: &str| format!("{}.json", schema.strip_prefix("colo-ring.").unwrap());
    let schemas = json_schemas().into_iter();
    let schemas: BTreeMap<_, _> = schemas.map(|(schema, value)| (name(schema), value)).collect();
    let differs = |name: &&String| files.get(*name) != schemas.get(*name);
    let differing: Vec<_> = files.keys().chain(schemas.keys()).filter(differs).collect();
    assert!(
        differing.is_empty(),
        "{differing:?} in docs/schema are not what the types are: run `cargo run -p colo-ring-tools --example generate -- --schemas docs/schema`, \
         remove what is no schema any more, and raise schema_version where a field was removed or changed"
    );
}

/// Every schema of a field below this one, with where it is.
fn fields(at: &str, schema: &Value, found: &mut Vec<(String, Value)>) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                if let ("properties", Value::Object(fields)) = (key.as_str(), value) {
                    found.extend(
                        fields
                            .iter()
                            .map(|(name, field)| (format!("{at}/{name}"), field.clone())),
                    );
                }
                fields(&format!("{at}/{key}"), value, found);
            }
        }
        Value::Array(shapes) => {
            for shape in shapes {
                fields(at, shape, found);
            }
        }
        _ => {}
    }
}

#[test]
fn every_field_is_described() {
    let mut found = Vec::new();
    for (name, schema) in json_schemas() {
        fields(name, &schema, &mut found);
    }
    assert!(found.len() > 500, "{}", found.len());
    let is_bare = |field: &Value| match field.get("const") {
        // The tag of a variant.
        Some(_) => false,
        None => field["description"].as_str().is_none_or(str::is_empty),
    };
    let bare: Vec<_> = found
        .iter()
        .filter(|(_, field)| is_bare(field))
        .map(|(at, _)| at)
        .collect();
    assert!(bare.is_empty(), "no description: {bare:#?}");
    let rustdoc = |field: &Value| {
        field["description"]
            .as_str()
            .is_some_and(|text| text.contains("[`"))
    };
    let rustdoc: Vec<_> = found.iter().filter(|(_, field)| rustdoc(field)).collect();
    assert!(rustdoc.is_empty(), "a link of rustdoc: {rustdoc:#?}");
}

#[test]
fn numbers_with_a_unit_in_their_names_have_it_in_their_descriptions() {
    let mut found = Vec::new();
    for (name, schema) in json_schemas() {
        fields(name, &schema, &mut found);
    }
    for (suffix, unit) in [
        ("_ns", "nanosecond"),
        ("_us", "microsecond"),
        ("_ms", "millisecond"),
        ("_bytes", "byte"),
        ("_s", "second"),
    ] {
        let mut with: Vec<_> = found.iter().filter(|(at, _)| at.ends_with(suffix)).collect();
        assert!(!with.is_empty(), "{suffix}");
        with.retain(|(_, field)| {
            !field["description"]
                .as_str()
                .is_some_and(|text| text.to_lowercase().contains(unit))
        });
        assert!(with.is_empty(), "{unit}: {with:#?}");
    }
}

#[test]
fn errors_are_json_where_that_is_asked_for() {
    let nowhere = ["--control", "unix:/nonexistent/socket"];
    for (args, code, says) in [
        (&["status", "--json"][..], 2, "--control"),
        (&["nonsense", "--json"][..], 2, "nonsense"),
        (
            &["receive", "--listen", "unix:/x", "--ram-limit", "0", "--json"][..],
            2,
            "--ram-limit",
        ),
        (
            &[&["status", "--json"], &nowhere[..]].concat()[..],
            1,
            "/nonexistent/socket",
        ),
        (
            &[&["status", "--events"], &nowhere[..]].concat()[..],
            1,
            "/nonexistent/socket",
        ),
        (
            &["inspect", "/nonexistent/file", "--json"][..],
            1,
            "/nonexistent/file",
        ),
    ] {
        let output = run(args);
        let report = schema::document(&output.stdout);
        assert_eq!(report["schema"], "colo-ring.error", "{args:?}");
        assert_eq!(
            (output.status.code(), &report["exit_code"]),
            (Some(code), &code.into()),
            "{args:?}"
        );
        let error = report["error"].as_str().unwrap();
        assert!(error.contains(says), "{args:?}: {error}");
        // People have it where they had it.
        assert!(String::from_utf8_lossy(&output.stderr).contains(says), "{args:?}");
    }
    let stream = ["failover", "--session", "1", "--to", "-", "--json"];
    for args in [
        // Not asked for; another program's word; and where standard output is the stream.
        &[&["status"], &nowhere[..]].concat(),
        &[
            &["failover", "--session", "1"],
            &nowhere[..],
            &["--", "qemu", "--json"],
        ]
        .concat(),
        &[&stream, &nowhere[..]].concat(),
    ] {
        let output = run(args);
        assert_eq!(
            (output.status.code(), output.stdout.len()),
            (Some(1), 0),
            "{args:?}"
        );
    }
    assert!(run(&["status", "--json", "--help"]).status.success());
}

#[test]
fn events_are_documents_to_the_last() {
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).unwrap();
    primary.checkpoint().unwrap();
    let control = format!("unix:{}", receiver.control_path());
    let mut command = wrapped(&[]);
    command.args(["status", "--events", "--control", &control]);
    let mut events = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let mut next = || schema::document(lines.next().unwrap().unwrap().as_bytes());
    let first = next();
    assert_eq!(
        (&first["schema"], &first["state"]),
        (&"colo-ring.event".into(), &"protected".into())
    );
    drop(primary);
    assert_eq!(next()["state"], "ended");
    drop(receiver);
    assert_eq!(next()["schema"], "colo-ring.error");
    assert_eq!(events.wait().unwrap().code(), Some(1));
}
