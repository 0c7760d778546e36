//! The JSON Schemas of all that the command prints or writes as JSON. They are made of the types that are serialized, whose comments become the
//! descriptions; docs/schema has them as files, and docs/json.md says what holds for all of them.

use crate::commands::{
    capture, check, demo, discard, doctor, end, failover, guard, import, inspect, protect, receive, replay,
    sink, status, synth, unprotect,
};
use crate::comparison::Comparison;
use crate::flight::SlowReport;
use crate::output::ErrorReport;
use crate::run_file::{self, RunFile};
use colo_ring::metrics;
use colo_ring::receiver::{DUMP_SCHEMA, DUMP_VERSION, Dumped, STATUS_SCHEMA, STATUS_VERSION, StatusReport};
use schemars::generate::SchemaSettings;
use schemars::transform::{Transform, transform_subschemas};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// Every schema, by what the key `schema` of its documents says, as `colo-ring.status`.
pub fn json_schemas() -> BTreeMap<&'static str, Value> {
    type Synth = Either<synth::LiveReport, synth::CaptureReport<'static>>;
    let list = [
        of::<failover::BlockdevReport<'static>>("colo-ring.blockdev", 1),
        of::<capture::CaptureReport<'static>>("colo-ring.capture", 1),
        of::<check::CheckReport<'static>>("colo-ring.check", 1),
        of::<Dumped>(DUMP_SCHEMA, DUMP_VERSION),
        of::<Comparison<'static>>("colo-ring.compare", 1),
        of::<demo::DemoReport<'static>>("colo-ring.demo", 3),
        of::<discard::DiscardReport>("colo-ring.discard", 1),
        of::<doctor::DoctorReport<'static>>("colo-ring.doctor", 1),
        of::<end::EndReport>("colo-ring.end", 1),
        of::<ErrorReport<'static>>("colo-ring.error", 1),
        of::<status::Event<'static>>("colo-ring.event", 1),
        of::<failover::FailoverReport<'static>>("colo-ring.failover", 1),
        of::<guard::GuardReport>("colo-ring.guard", 1),
        of::<guard::Plan>("colo-ring.guard-plan", 1),
        of::<receive::DescribedReport>(metrics::SCHEMA, metrics::SCHEMA_VERSION),
        of::<import::ImportReport<'static>>("colo-ring.import", 1),
        of::<inspect::AnyInspection>("colo-ring.inspect", 1),
        of::<protect::ProtectReport<'static>>("colo-ring.protect", 1),
        of::<receive::ReceiveReport<'static>>("colo-ring.receive", 1),
        of::<replay::Report>("colo-ring.replay", 1),
        of::<RunFile>(run_file::SCHEMA, run_file::SCHEMA_VERSION),
        of::<sink::SinkReport<'static>>("colo-ring.sink", 1),
        of::<SlowReport>("colo-ring.slow", 1),
        of::<StatusReport>(STATUS_SCHEMA, STATUS_VERSION),
        of::<Synth>("colo-ring.synth", 1),
        of::<unprotect::UnprotectReport<'static>>("colo-ring.unprotect", 1),
    ];
    list.into_iter().collect()
}

/// What the two keys are that identify a document.
const SCHEMA_TEXT: &str = "Which schema the document has.";
const VERSION_TEXT: &str = "The schema's version.";

/// The schema of a type as it is written.
fn of<T: JsonSchema>(name: &'static str, version: u32) -> (&'static str, Value) {
    let settings = SchemaSettings::draft2020_12()
        .for_serialize()
        .with_transform(Describe);
    let mut schema = settings.into_generator().into_root_schema_for::<T>();
    schema.insert("title".to_owned(), format!("{name}, version {version}").into());
    let mut schema = schema.to_value();
    set_identity(&mut schema, name, version);
    (name, schema)
}

/// Says in a document's schema which values the keys have that identify it.
fn set_identity(schema: &mut Value, name: &str, version: u32) {
    if let Some(Value::Array(shapes)) = schema.get_mut("anyOf") {
        shapes
            .iter_mut()
            .for_each(|shape| set_identity(shape, name, version));
    }
    let Some(Value::Object(fields)) = schema.get_mut("properties") else {
        return;
    };
    for (key, value, text) in [
        ("schema", Value::from(name), SCHEMA_TEXT),
        ("schema_version", version.into(), VERSION_TEXT),
    ] {
        if let Some(field) = fields.get_mut(key) {
            field["const"] = value;
            field["description"] = text.into();
        }
    }
}

/// One type or another, as the whole document.
struct Either<A, B>(PhantomData<(A, B)>);

impl<A: JsonSchema, B: JsonSchema> JsonSchema for Either<A, B> {
    fn schema_name() -> Cow<'static, str> {
        format!("{}Or{}", A::schema_name(), B::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [A::json_schema(generator), B::json_schema(generator)] })
    }
}

/// Completes the descriptions: with the unit that a field's name has, and without what is for rustdoc alone.
#[derive(Clone, Debug)]
struct Describe;

impl Transform for Describe {
    fn transform(&mut self, schema: &mut Schema) {
        transform_subschemas(self, schema);
        let Some(object) = schema.as_object_mut() else {
            return;
        };
        // What a reader of older documents takes for a field that is not there.
        object.remove("default");
        if let Some(Value::String(text)) = object.get_mut("description") {
            *text = plain(text);
        }
        describe_rest(object);
        let Some(Value::Object(fields)) = object.get_mut("properties") else {
            return;
        };
        for (name, field) in fields {
            if let (Some(unit), Some(Value::String(text))) = (unit(name), field.get_mut("description"))
                && !text.to_lowercase().contains(&unit.to_lowercase())
            {
                let end = if text.ends_with('.') { "" } else { "." };
                *text = format!("{text}{end} In {unit}.");
            }
        }
    }
}

/// What needs no words of its own: the value of a variant is what the variant is, that of a result what it gave; a document may be part of
/// another, and a range has two ends.
fn describe_rest(object: &mut Map<String, Value>) {
    let own = object.get("description").cloned();
    let Some(Value::Object(fields)) = object.get_mut("properties") else {
        return;
    };
    let is_only = fields.len() == 1;
    for (name, field) in fields {
        let text = match name.as_str() {
            "Ok" => Some("What there is.".into()),
            "Err" => Some("Why there is none.".into()),
            "schema" => Some(SCHEMA_TEXT.into()),
            "schema_version" => Some(VERSION_TEXT.into()),
            "start" => Some("The first.".into()),
            "end" => Some("The last.".into()),
            _ => own.clone().filter(|_| is_only),
        };
        if let (Value::Object(field), Some(text)) = (field, text) {
            field.entry("description").or_insert(text);
        }
    }
}

/// A comment as text: its lines joined, its links as what they name.
fn plain(comment: &str) -> String {
    let paragraphs = comment.split("\n\n");
    let joined: Vec<_> = paragraphs.map(|paragraph| paragraph.replace('\n', " ")).collect();
    let mut text = joined.join("\n\n").replace("[`Self::", "`").replace("[`", "`");
    for (link, name) in [
        ("`]", "`"),
        ("crate::ring::", ""),
        ("DiskState::Copying", "copying"),
    ] {
        text = text.replace(link, name);
    }
    text
}

/// The unit of a field, by its name.
fn unit(name: &str) -> Option<&'static str> {
    let words: Vec<_> = name.split('_').collect();
    let has = |word: &str| words.contains(&word);
    Some(match words.as_slice() {
        [.., "gigabits", "per", "s"] => "gigabits a second",
        [.., "mebibytes", "per", "s"] => "MiB a second",
        [.., "bytes", "per", "s"] => "bytes a second",
        [.., "s"] => "seconds",
        _ if has("ns") => "nanoseconds",
        _ if has("us") => "microseconds",
        _ if has("ms") => "milliseconds",
        _ if has("bytes") => "bytes",
        _ => return None,
    })
}
