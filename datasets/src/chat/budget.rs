//! What bounds the text that a template builds: everything that it writes, joins, repeats or replaces is counted,
//! and more than the budget is an error before it is built wherever its length can be known before.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How often the whole budget of output may be built on the way to it.
const BUILT_PER_OUTPUT: usize = 16;

/// Bytes that may still be written and built.
#[derive(Debug)]
pub struct Budget {
    output: AtomicUsize,
    built: AtomicUsize,
}

impl Budget {
    pub fn new(output_bytes: usize) -> Self {
        let built = output_bytes.saturating_mul(BUILT_PER_OUTPUT);
        Self { output: AtomicUsize::new(output_bytes), built: AtomicUsize::new(built) }
    }

    /// Takes the length of a text that is about to be built.
    pub fn build(&self, bytes: usize) -> Result<(), Error> {
        take(&self.built, bytes, "it builds too much text")
    }

    fn write(&self, bytes: usize) -> Result<(), Error> {
        take(&self.output, bytes, "its output is too long")
    }
}

fn take(left: &AtomicUsize, bytes: usize, what: &'static str) -> Result<(), Error> {
    let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
    taken.map(|_| ()).map_err(|_| Error::new(ErrorKind::InvalidOperation, what))
}

/// The length of a text, or of the texts in a list.
fn text_len(value: &Value) -> usize {
    match value.kind() {
        ValueKind::String => value.as_str().map_or(0, str::len),
        // The engine's own lists hold references: only their length is new.
        ValueKind::Seq | ValueKind::Map => value.len().unwrap_or(0).saturating_mul(16),
        _ => 0,
    }
}

/// Replaces the filters that make long texts of short ones by counted ones, and counts what is written. Filters that
/// multiply lengths and that no chat template needs are taken away.
pub fn install(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    let b = budget.clone();
    environment.add_filter("_built", move |value: Value| b.build(text_len(&value)).map(|()| value));
    let b = budget.clone();
    environment.add_filter("replace", move |text: String, from: String, to: String| replace(&b, &text, &from, &to));
    let b = budget.clone();
    environment.add_filter("join", move |values: Value, separator: Option<String>, _options: Kwargs| {
        let mut out = String::new();
        for (i, item) in values.try_iter()?.enumerate() {
            let item = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
            let separator = separator.as_deref().filter(|_| i > 0).unwrap_or_default();
            b.build(item.len().saturating_add(separator.len()))?;
            out.push_str(separator);
            out.push_str(&item);
        }
        Ok::<_, Error>(out)
    });
    for filter in ["indent", "format", "pprint", "urlencode", "batch", "slice", "chain", "zip"] {
        environment.remove_filter(filter);
    }
    environment.remove_global("debug");
    let b = budget.clone();
    environment.set_formatter(move |out, state, value| {
        if !matches!(value.kind(), ValueKind::Undefined | ValueKind::None) {
            // A list or map is written as its parts, which its own length does not bound: refuse the odd case.
            if matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
                let text = super::json::bounded_json(value)?;
                b.write(text.len())?;
            } else {
                b.write(value.as_str().map_or(32, str::len))?;
            }
        }
        minijinja::escape_formatter(out, state, value)
    });
}

/// Replaces every `from` by `to`, after counting what that makes.
pub fn replace(budget: &Budget, text: &str, from: &str, to: &str) -> Result<String, Error> {
    let n = text.matches(from).count();
    budget.build(text.len().saturating_add(n.saturating_mul(to.len())))?;
    Ok(text.replace(from, to))
}
