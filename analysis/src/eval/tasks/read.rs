//! Files of examples: JSON lines.

use super::encode::{Encoder, TaskExample};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use thermocline_datasets::Tokenizer;

/// Longest line that is read: far more than any model's context.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// How examples are written, and how they are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// `{"text": ...}`: the last word is to be predicted from everything before it.
    Lambada,
    /// `{"context": ..., "choices": [...], "answer": k}`: the choice that goes on from the context, counted from 0.
    Cloze,
}

impl TaskKind {
    /// All, by the names that they have on the command line.
    pub const ALL: [TaskKind; 2] = [TaskKind::Lambada, TaskKind::Cloze];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::Lambada => "lambada",
            TaskKind::Cloze => "cloze",
        }
    }
}

/// A task and its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskFile {
    /// What the file holds.
    pub kind: TaskKind,
    /// The file.
    pub path: PathBuf,
}

/// One line, with what an error about it needs.
pub(super) struct Line<'a> {
    path: &'a Path,
    number: u64,
}

impl Line<'_> {
    pub(super) fn refuse(&self, field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Example { path: self.path.to_owned(), line: self.number, field: field.into(), reason: reason.into() }
    }
}

/// Reads the first `limit` examples of `file` (all without one), as tokens for a model that was trained for at most
/// `max_context` of them. Empty lines are skipped, fields that are not known are ignored.
///
/// # Errors
/// [`Error::Example`] with file, line and field if a field is missing, empty or of another type, an answer is out of range, a
/// choice has no tokens or an example is too long; [`Error::Input`] if there is no example; if the file cannot be read.
pub fn read_task(
    file: &TaskFile,
    tokenizer: &Tokenizer,
    max_context: usize,
    limit: Option<usize>,
) -> Result<Vec<TaskExample>> {
    let path = file.path.as_path();
    let io = |source| Error::Io { path: path.to_owned(), source };
    let encoder = Encoder::new(tokenizer, max_context)?;
    let mut input = BufReader::new(File::open(path).map_err(io)?);
    let (mut text, mut examples) = (Vec::new(), Vec::new());
    for number in 1u64.. {
        if limit.is_some_and(|limit| examples.len() >= limit) {
            break;
        }
        text.clear();
        if (&mut input).take(LINE_BYTES_MAX).read_until(b'\n', &mut text).map_err(io)? == 0 {
            break;
        }
        let line = Line { path, number };
        if text.len() as u64 == LINE_BYTES_MAX {
            return Err(line.refuse("JSON", format!("longer than {LINE_BYTES_MAX} bytes")));
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        // The parser bounds nesting at 128, and wants UTF-8.
        let object: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|e| line.refuse("JSON", format!("no object: {e}")))?;
        examples.push(match file.kind {
            TaskKind::Lambada => lambada(&encoder, &line, &object)?,
            TaskKind::Cloze => cloze(&encoder, &line, &object)?,
        });
    }
    if examples.is_empty() {
        let reason = format!("has no example; {} wants a JSON object a line", file.kind.name());
        return Err(Error::Input { path: path.to_owned(), reason });
    }
    Ok(examples)
}

/// The last word goes with the blank before it.
fn lambada(encoder: &Encoder<'_>, line: &Line<'_>, object: &Map<String, Value>) -> Result<TaskExample> {
    let text = text(line, object, "text")?.trim_end();
    if text.is_empty() {
        return Err(line.refuse("text", "is empty"));
    }
    let context = text.trim_end_matches(|c: char| !c.is_whitespace());
    let word = &text[context.len()..];
    if context.trim().is_empty() {
        return Err(line.refuse("text", "has one word: there is nothing to predict it from"));
    }
    encoder.example(line, ("text", context), &[word], "text", 0)
}

fn cloze(encoder: &Encoder<'_>, line: &Line<'_>, object: &Map<String, Value>) -> Result<TaskExample> {
    let context = text(line, object, "context")?;
    if context.trim().is_empty() {
        return Err(line.refuse("context", "is empty: there is nothing to predict a choice from"));
    }
    let choices = field(line, object, "choices")?;
    let choices = choices.as_array().ok_or_else(|| line.refuse("choices", "is no list of texts"))?;
    if choices.len() < 2 {
        return Err(line.refuse("choices", format!("has {}: it takes two to choose", choices.len())));
    }
    let as_text = |(i, choice): (usize, &Value)| match choice.as_str() {
        Some(text) if text.trim().is_empty() => Err(line.refuse(format!("choices[{i}]"), "is empty")),
        Some(text) => Ok(text.to_owned()),
        None => Err(line.refuse(format!("choices[{i}]"), "is no text")),
    };
    let choices = choices.iter().enumerate().map(as_text).collect::<Result<Vec<_>>>()?;
    let answer = field(line, object, "answer")?;
    let in_range = answer.as_u64().and_then(|k| usize::try_from(k).ok()).filter(|k| *k < choices.len());
    let Some(answer) = in_range else {
        let reason = format!("{answer} is no number of a choice, 0 to {}", choices.len() - 1);
        return Err(line.refuse("answer", reason));
    };
    let choices: Vec<&str> = choices.iter().map(String::as_str).collect();
    encoder.example(line, ("context", context), &choices, "choices", answer)
}

fn field<'a>(line: &Line<'_>, object: &'a Map<String, Value>, name: &str) -> Result<&'a Value> {
    object.get(name).ok_or_else(|| {
        let fields = object.keys().map(String::as_str).take(8).collect::<Vec<_>>().join(", ");
        line.refuse(name, format!("is missing (the line has: {fields})"))
    })
}

fn text<'a>(line: &Line<'_>, object: &'a Map<String, Value>, name: &str) -> Result<&'a str> {
    field(line, object, name)?.as_str().ok_or_else(|| line.refuse(name, "is no text"))
}
