//! The methods of Python's strings and dictionaries that chat templates call.

use super::budget::{Budget, replace};
use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind};

pub fn call(budget: &Budget, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => string(budget, value.as_str().unwrap_or_default(), method, arguments),
        ValueKind::Map => map(value, method, arguments),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn string(budget: &Budget, text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let trimmed = |start: bool, end: bool| -> Result<Value, Error> {
        let (set,): (Option<String>,) = from_args(arguments)?;
        let drop = |c: char| set.as_ref().map_or(c.is_whitespace(), |set| set.contains(c));
        let text = if start { text.trim_start_matches(drop) } else { text };
        let text = if end { text.trim_end_matches(drop) } else { text };
        budget.build(text.len())?;
        Ok(Value::from(text))
    };
    match method {
        "strip" => trimmed(true, true),
        "lstrip" => trimmed(true, false),
        "rstrip" => trimmed(false, true),
        "startswith" => from_args(arguments).map(|(prefix,): (String,)| Value::from(text.starts_with(&prefix))),
        "endswith" => from_args(arguments).map(|(suffix,): (String,)| Value::from(text.ends_with(&suffix))),
        "upper" | "lower" => {
            let () = from_args(arguments)?;
            budget.build(text.len())?;
            Ok(Value::from(if method == "upper" { text.to_uppercase() } else { text.to_lowercase() }))
        }
        "replace" => {
            let (from, to): (String, String) = from_args(arguments)?;
            replace(budget, text, &from, &to).map(Value::from)
        }
        "split" => {
            let (separator, limit): (Option<String>, Option<usize>) = from_args(arguments)?;
            // Each part costs a value besides its text.
            let n = separator
                .as_ref()
                .map_or_else(|| text.split_whitespace().count(), |s| text.matches(s.as_str()).count());
            budget.build(n.saturating_mul(48).saturating_add(text.len()))?;
            match (separator, limit) {
                (Some(s), _) if s.is_empty() => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
                (Some(s), Some(limit)) => Ok(text.splitn(limit.saturating_add(1), &s).map(Value::from).collect()),
                (Some(s), None) => Ok(text.split(&s).map(Value::from).collect()),
                (None, _) => Ok(text.split_whitespace().map(Value::from).collect()),
            }
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn map(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match method {
        "get" => {
            let (key, default): (Value, Option<Value>) = from_args(arguments)?;
            let found = value.get_item(&key)?;
            Ok(if found.is_undefined() { default.unwrap_or_else(|| Value::from(())) } else { found })
        }
        "keys" => Ok(value.try_iter()?.collect()),
        "values" => value.try_iter()?.map(|k| value.get_item(&k)).collect::<Result<Vec<_>, _>>().map(Value::from),
        "items" => {
            let pair = |key: Value| Ok(Value::from(vec![key.clone(), value.get_item(&key)?]));
            value.try_iter()?.map(pair).collect::<Result<Vec<_>, Error>>().map(Value::from)
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}
