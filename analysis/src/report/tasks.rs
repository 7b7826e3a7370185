//! Answers that masks lose, task by task.

use super::figures::percent;
use super::{Table, TaskRecord, TasksFile};
use crate::Result;
use crate::eval::TaskResult;
use crate::eval::tasks::Accuracy;
use polars::prelude::Column;

/// A row for each mask of each task, if there are any.
pub(crate) fn table(files: &[TasksFile]) -> Result<Option<Table>> {
    let rows: Vec<(&TasksFile, &TaskRecord, &TaskResult)> = files
        .iter()
        .flat_map(|f| f.tasks.iter().map(move |t| (f, t)))
        .flat_map(|(f, t)| t.results.iter().map(move |r| (f, t, r)))
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let text = |name: &str, of: &dyn Fn(&TasksFile, &TaskRecord, &TaskResult) -> String| {
        Column::new(name.into(), rows.iter().map(|(f, t, r)| of(f, t, r)).collect::<Vec<String>>())
    };
    let none = || "\u{2013}".to_owned();
    let by_bytes = |of: fn(&Accuracy) -> String| {
        move |_: &TasksFile, _: &TaskRecord, r: &TaskResult| r.accuracy_by_bytes.as_ref().map_or_else(none, of)
    };
    let columns = vec![
        text("model", &|f, _, _| f.model.clone()),
        text("neurons", &|f, _, _| f.encoding.clone()),
        text("task", &|_, t, _| format!("{}, {}, {} examples", t.task, t.file, t.examples)),
        text("masked", &|f, _, _| f.positions.clone()),
        text("mask", &|_, _, r| r.mask.clone()),
        text("active", &|_, _, r| r.active.map_or_else(none, percent)),
        text("bytes", &|_, _, r| r.bytes_share.map_or_else(none, percent)),
        text("accuracy", &|_, _, r| share(&r.accuracy)),
        text("less dense", &|_, _, r| difference(&r.accuracy)),
        text("lost, gained", &|_, _, r| format!("{}, {}", r.accuracy.lost, r.accuracy.gained)),
        text("by bytes", &by_bytes(share)),
        text("less dense, by bytes", &by_bytes(difference)),
        Column::new("nats an answer".into(), rows.iter().map(|r| r.2.answer_loss).collect::<Vec<f64>>()),
        Column::new("word perplexity".into(), rows.iter().map(|r| r.2.word_perplexity).collect::<Vec<Option<f64>>>()),
    ];
    let caption = "zero-shot tasks, in percent and points with 95 % intervals; masked: at all positions, or at those behind the \
                   context only (decoded)";
    Table::new(caption, columns).map(Some)
}

fn share(a: &Accuracy) -> String {
    format!("{:.1} ({:.1}\u{2013}{:.1})", 100.0 * a.share, 100.0 * a.ci95[0], 100.0 * a.ci95[1])
}

fn difference(a: &Accuracy) -> String {
    let [low, high] = a.difference_ci95;
    format!("{:+.1} ({:+.1} to {:+.1})", 100.0 * a.difference, 100.0 * low, 100.0 * high)
}
