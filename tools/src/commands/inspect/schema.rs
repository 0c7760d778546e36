//! The schema of all that `inspect --json` prints: an overview for each kind of file, and each of its lists.

use super::{Inspection, NoContent, capture, flight, log, report};
use crate::run_file::Checkpoint;
use colo_ring::store::FlightRecord;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use std::borrow::Cow;

/// Any of them.
pub(crate) struct AnyInspection;

impl JsonSchema for AnyInspection {
    fn schema_name() -> Cow<'static, str> {
        "Inspection".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        type Element = capture::ElementItem<'static>;
        let shapes = [
            overview::<capture::Content<'static>>("capture", generator),
            list::<capture::CheckpointItem>("capture", "checkpoints", generator),
            list::<Element>("capture", "sections", generator),
            list::<capture::PacketItem>("capture", "packets", generator),
            // Without multifd, pages are on the main channel.
            list::<Element>("capture", "packets", generator),
            overview::<log::LogContent>("interval log", generator),
            list::<log::IntervalContent>("interval log", "intervals", generator),
            overview::<flight::Content>("flight recorder", generator),
            list::<FlightRecord>("flight recorder", "checkpoints", generator),
            overview::<report::RunContent<'static>>("run", generator),
            list::<Checkpoint>("run", "checkpoints", generator),
            overview::<report::ReportContent<'static>>("receiver's report", generator),
        ];
        json_schema!({
            "description": "What is in a file: an overview, or a list of one kind.",
            "anyOf": shapes,
        })
    }
}

fn overview<T: JsonSchema>(file_kind: &str, generator: &mut SchemaGenerator) -> Schema {
    let mut schema = Inspection::<T>::json_schema(generator);
    if let Some(fields) = schema.get_mut("properties") {
        fields["file_kind"]["const"] = file_kind.into();
    }
    schema.insert(
        "description".to_owned(),
        format!("The overview of a {file_kind}.").into(),
    );
    schema
}

fn list<T: JsonSchema>(file_kind: &str, key: &str, generator: &mut SchemaGenerator) -> Schema {
    let mut schema = overview::<NoContent>(file_kind, generator);
    let mut items = generator.subschema_for::<Vec<T>>();
    items.insert(
        "description".to_owned(),
        "What was asked for, in the order of the file.".into(),
    );
    if let Some(fields) = schema.get_mut("properties") {
        fields[key] = items.to_value();
    }
    if let Some(required) = schema
        .get_mut("required")
        .and_then(|required| required.as_array_mut())
    {
        required.push(key.into());
    }
    schema.insert(
        "description".to_owned(),
        format!("The {key} of a {file_kind}.").into(),
    );
    schema
}
