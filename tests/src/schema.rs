//! What the command prints as JSON, held against its schema.

use colo_ring_tools::json_schemas;
use jsonschema::Validator;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

static VALIDATORS: LazyLock<BTreeMap<&'static str, Validator>> = LazyLock::new(|| {
    let schemas = json_schemas().into_iter();
    schemas.map(|(name, schema)| (name, validator(schema))).collect()
});

fn validator(mut schema: Value) -> Validator {
    close(&mut schema);
    jsonschema::validator_for(&schema).expect("a schema")
}

/// Parses a document of `colo-ring` and holds it against its schema.
///
/// # Panics
/// If it does not conform.
#[must_use]
pub fn document(text: &[u8]) -> Value {
    parse(text).unwrap_or_else(|wrong| panic!("{wrong}: {}", String::from_utf8_lossy(text)))
}

/// Parses a document of `colo-ring` and holds it against its schema.
///
/// # Errors
/// In what it does not conform.
pub fn parse(text: &[u8]) -> Result<Value, String> {
    let document = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    check(&document)?;
    Ok(document)
}

/// Holds a document against the schema that it names.
fn check(document: &Value) -> Result<(), String> {
    let name = document["schema"].as_str().ok_or("it names no schema")?;
    let validator = VALIDATORS.get(name);
    let validator = validator.ok_or_else(|| format!("there is no schema {name:?}"))?;
    let errors = validator.iter_errors(document);
    let errors: Vec<_> = errors
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    match errors.is_empty() {
        true => Ok(()),
        false => Err(format!("it does not conform to {name}: {}", errors.join("; "))),
    }
}

/// Allows no other fields than those that the schema has: readers ignore what a later version adds, this version's tests do not.
fn close(schema: &mut Value) {
    let mut extended = BTreeSet::new();
    find_extended(schema, false, &mut extended);
    if let Some(Value::Object(types)) = schema.get_mut("$defs") {
        let closed = types.iter_mut().filter(|(name, _)| !extended.contains(*name));
        closed.for_each(|(_, of_type)| close_object(of_type));
    }
    close_object(schema);
}

fn close_object(schema: &mut Value) {
    if schema.get("properties").is_some() {
        schema["unevaluatedProperties"] = false.into();
        return;
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(Value::Array(shapes)) = schema.get_mut(key) {
            shapes.iter_mut().for_each(close_object);
        }
    }
}

/// Types whose fields stand among those of another object.
fn find_extended(schema: &Value, is_part: bool, extended: &mut BTreeSet<String>) {
    let Value::Object(object) = schema else {
        return;
    };
    let is_object = is_part || object.contains_key("properties");
    if let (true, Some(Value::String(name))) = (is_object, object.get("$ref")) {
        extended.insert(name.rsplit('/').next().unwrap_or_default().to_owned());
    }
    for key in ["allOf", "anyOf", "oneOf"] {
        for shape in object.get(key).and_then(Value::as_array).into_iter().flatten() {
            find_extended(shape, is_object, extended);
        }
    }
    let nested = |map: &Map<String, Value>, extended: &mut BTreeSet<String>| {
        map.values()
            .for_each(|schema| find_extended(schema, false, extended));
    };
    for key in ["properties", "$defs"] {
        if let Some(Value::Object(map)) = object.get(key) {
            nested(map, extended);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(schema) = object.get(key) {
            find_extended(schema, false, extended);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error(document: Value) -> Result<(), String> {
        let whole = json!({"schema": "colo-ring.error", "schema_version": 1, "error": "x", "exit_code": 1});
        let mut whole = whole.as_object().unwrap().clone();
        whole.extend(document.as_object().unwrap().clone());
        check(&Value::Object(whole))
    }

    #[test]
    fn what_does_not_conform_is_found() {
        assert_eq!(error(json!({})), Ok(()));
        for (wrong, says) in [
            (json!({"schema": "x"}), "no schema \"x\""),
            (json!({"schema": null}), "names no schema"),
            (json!({"schema_version": 2}), "/schema_version"),
            (json!({"exit_code": "1"}), "/exit_code"),
            (json!({"more": 1}), "more"),
        ] {
            let said = error(wrong.clone()).unwrap_err();
            assert!(said.contains(says), "{wrong}: {said}");
        }
    }
}
