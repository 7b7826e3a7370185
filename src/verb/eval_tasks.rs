//! `eval --task`: a model and files of examples in, accuracies out.

use super::eval::{INTERVALS_OF_TASKS, Model, POSITIONS, encoding, model_name, name, usage};
use crate::cli::{Eval, PositionsName};
use crate::exit::Usage;
use crate::output::{self, Progress};
use anyhow::Context;
use serde::Serialize;
use std::time::Instant;
use thermocline_analysis::eval::tasks::{Accuracy, TaskExample};
use thermocline_analysis::eval::{Mask, Positions, TaskFile, TaskResult, evaluate_task, read_task};
use thermocline_datasets::Tokenizer;

/// What `eval --task --json` prints.
#[derive(Serialize)]
struct Output {
    tasks: Vec<Task>,
    model: String,
    model_digest: String,
    encoding: String,
    positions: Positions,
    masked_positions: &'static str,
    interval: &'static str,
    seconds: f64,
    version: &'static str,
    command: Vec<String>,
}

/// One task's results.
#[derive(Serialize)]
struct Task {
    task: &'static str,
    file: String,
    examples: usize,
    /// Tokens of all contexts.
    context_tokens: usize,
    /// Tokens of all choices, which are what is scored.
    scored_tokens: usize,
    results: Vec<TaskResult>,
}

pub fn eval_tasks(args: &Eval, model: &Model, masks: &[Mask], begin: Instant) -> anyhow::Result<()> {
    let named = || args.model.display().to_string();
    let tokenizer = Tokenizer::from_json(&model.dense().tokenizer_json()?).with_context(named)?;
    let positions = match args.positions {
        PositionsName::All => Positions::All,
        PositionsName::Decoded => Positions::Decoded,
    };
    let (max_context, limit) = (model.dense().config().max_context, args.limit.map(std::num::NonZero::get));
    // All files are read before the first long computation.
    let read = |file: &TaskFile| Ok(read_task(file, &tokenizer, max_context, limit)?);
    let examples: Vec<Vec<TaskExample>> = args.task.iter().map(read).collect::<anyhow::Result<_>>()?;
    let mut tasks = Vec::with_capacity(args.task.len());
    for (file, examples) in args.task.iter().zip(&examples) {
        let progress = Progress::new("eval", args.json);
        let on_step =
            |done: usize, total: usize| progress.set(done as u64, total as u64, format!("step {done}/{total}"));
        let (dense, split) = (model.dense(), model.split());
        let results = evaluate_task(dense, split, (file.kind, examples), masks, positions, &on_step);
        progress.finish();
        let choices = examples.iter().flat_map(|e| &e.choices);
        tasks.push(Task {
            task: file.kind.name(),
            file: name(&file.path),
            examples: examples.len(),
            context_tokens: examples.iter().map(|e| e.context.len()).sum(),
            scored_tokens: choices.map(|c| c.tokens.len()).sum(),
            results: results.map_err(usage)?,
        });
    }
    if args.json {
        return output::json(&Output {
            tasks,
            model: model_name(&args.model),
            model_digest: model.dense().digest()?,
            encoding: encoding(model),
            positions,
            masked_positions: told(positions),
            interval: INTERVALS_OF_TASKS,
            seconds: begin.elapsed().as_secs_f64(),
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().skip(1).collect(),
        });
    }
    let (model_name, encoding) = (model_name(&args.model), encoding(model));
    for task in &tasks {
        let (file, n, scored) = (&task.file, task.examples, task.scored_tokens);
        println!("{model_name} ({encoding}), {} of {file}: {n} examples, {scored} tokens scored", task.task);
        table(&task.results);
    }
    println!("masks at {}; +- is the 95 % interval: {INTERVALS_OF_TASKS}", told(positions));
    Ok(())
}

/// What only says something of a task is not ignored without one.
pub fn refuse_without_task(args: &Eval) -> anyhow::Result<()> {
    let given = [("--limit", args.limit.is_some()), ("--positions decoded", args.positions != PositionsName::All)];
    match given.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) => {
            Err(Usage(format!("{flag} is for --task; a text has --windows, and masks apply everywhere")).into())
        }
        None => Ok(()),
    }
}

/// Where masks were applied, for people who compare figures.
fn told(positions: Positions) -> &'static str {
    match positions {
        Positions::All => POSITIONS,
        Positions::Decoded => {
            "the positions behind the context; the context is computed densely, as a run's prompt, and so is what its last \
             token predicts: the first token of each answer"
        }
    }
}

/// A line a result; `nats` are those of the right answer, in the mean.
fn table(results: &[TaskResult]) {
    let by_bytes = results.iter().any(|r| r.accuracy_by_bytes.is_some());
    print!("{:>15} {:>7} {:>7} {:>7} {:>10}", "mask", "active", "bytes", "nats", "perplexity");
    print!(" {:>8} {:>14} {:>8} {:>16} {:>5} {:>6}", "accuracy", "+-", "of dense", "+-", "lost", "gained");
    println!("{}", if by_bytes { "   by bytes" } else { "" });
    for r in results {
        let or_dash = |v: Option<f64>, digits: usize| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
        let (active, bytes) = (or_dash(r.active, 2), or_dash(r.bytes_share, 3));
        let perplexity = or_dash(r.word_perplexity, 2);
        print!("{:>15} {active:>7} {bytes:>7} {:>7.3} {perplexity:>10} ", r.mask, r.answer_loss);
        print!("{}", columns(&r.accuracy));
        println!("{}", r.accuracy_by_bytes.as_ref().map_or(String::new(), |a| format!("  {}", columns(a))));
    }
}

/// An accuracy in percent, what it is more than the dense model's in points, and what flipped.
fn columns(a: &Accuracy) -> String {
    let (share, difference) = (100.0 * a.share, 100.0 * a.difference);
    let range = |r: [f64; 2]| format!("{:.1}..{:.1}", 100.0 * r[0], 100.0 * r[1]);
    let signed = |r: [f64; 2]| format!("{:+.1}..{:+.1}", 100.0 * r[0], 100.0 * r[1]);
    let (ci95, difference_ci95) = (range(a.ci95), signed(a.difference_ci95));
    format!(
        "{:>8} {ci95:>14} {:>8} {difference_ci95:>16} {:>5} {:>6}",
        format!("{share:.1} %"),
        format!("{difference:+.1}"),
        a.lost,
        a.gained
    )
}
