//! JSON in and out of templates.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;

/// Values nest this deep at most when they are written.
const MAX_DEPTH: usize = 64;
/// Longest JSON text that a filter makes, in bytes.
const MAX_JSON_BYTES: usize = 4 << 20;

/// Bytes of text in a JSON value.
pub fn text_len(json: &Json) -> usize {
    match json {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_len).fold(0, usize::saturating_add),
        Json::Object(members) => {
            members.iter().map(|(k, v)| k.len().saturating_add(text_len(v))).fold(0, usize::saturating_add)
        }
        _ => 8,
    }
}

/// A template value of a JSON value.
pub fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (_, Some(n)) => Value::from(n),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(members) => Value::from_pairs(members.iter().map(|(k, v)| (k.as_str(), to_value(v)))),
    }
}

/// The filter: JSON as Python writes it (`", "` and `": "`, no HTML escapes), which is what models were trained on.
pub fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let mut out = String::new();
    write(&mut out, &value, indent.map(|n| n.min(16)), 0)?;
    Ok(out)
}

/// A value as JSON, or an error if it is too long or nests too deep.
pub fn bounded_json(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write(&mut out, value, None, 0).map(|()| out)
}

fn write(out: &mut String, value: &Value, indent: Option<usize>, depth: usize) -> Result<(), Error> {
    let failed = |what: &'static str| Error::new(ErrorKind::BadSerialization, what);
    if depth > MAX_DEPTH {
        return Err(failed("a value nests too deep"));
    }
    if out.len() > MAX_JSON_BYTES {
        return Err(failed("a value is too long"));
    }
    let inner = depth.saturating_add(1);
    let line = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(n.saturating_mul(depth)));
        }
    };
    let comma = |out: &mut String, i: usize| {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(out, inner);
    };
    match value.kind() {
        ValueKind::String => out.push_str(&Json::from(value.as_str().unwrap_or_default()).to_string()),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut n = 0usize;
            for item in value.try_iter()? {
                comma(out, n);
                write(out, &item, indent, inner)?;
                n = n.saturating_add(1);
            }
            if n > 0 {
                line(out, depth);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            let mut n = 0usize;
            for key in value.try_iter()? {
                comma(out, n);
                out.push_str(&Json::from(key.to_string()).to_string());
                out.push_str(": ");
                write(out, &value.get_item(&key)?, indent, inner)?;
                n = n.saturating_add(1);
            }
            if n > 0 {
                line(out, depth);
            }
            out.push('}');
        }
        _ => return Err(failed("a value is no JSON")),
    }
    Ok(())
}
