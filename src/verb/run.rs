//! `run`: a prompt in, an answer out, and what it cost.

use super::load::load;
use crate::cli::{Run, Threads};
use crate::exit::Usage;
use crate::output::{self, Progress};
use anyhow::Context;
use serde::Serialize;
use std::error::Error;
use std::io::Write;
use thermocline_datasets::{ChatMessage, ChatTemplate, Tokenizer};
use thermocline_kernels::Pool;
use thermocline_runtime::budget::format_bytes;
use thermocline_runtime::{
    AuditReport, Decoder, GenerateSettings, RunReport, SamplerSettings, TierBytes, check_audit, generate,
};
use thermocline_split::{Promise, Split};

/// Prompt tokens that are computed at once: enough to amortise decoding the weights, small enough for small budgets.
const BATCH: usize = 128;

/// Flawed tensors that are named one by one.
const FLAWS_SAID_MAX: usize = 8;

/// What `run --json` prints.
#[derive(Serialize)]
struct Output<'a> {
    command: Vec<String>,
    model: String,
    planted: bool,
    text: &'a str,
    warnings: Vec<String>,
    #[serde(flatten)]
    report: &'a RunReport,
    plan: serde_json::Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    promise: Option<Promise>,
}

pub fn run(args: &Run) -> anyhow::Result<()> {
    // Before anything is loaded.
    check_audit(args.audit_every, super::load::request(&args.placement, 0, 1).mode)?;
    let split = super::load::placed_split(&args.placement)?;
    let named = || split.dir().display().to_string();
    let tokenizer = Tokenizer::from_json(&split.tokenizer_json()?).with_context(named)?;
    let text = prompt(args)?;
    let text = if args.chat { chat(args, &split, &tokenizer, &text).with_context(named)? } else { text };
    let config = &split.manifest().config;
    // The tokenizer adds what its model wants in front of a text; a chat template has written it already.
    let prompt = tokenizer.encode(&text, !args.chat).with_context(named)?;
    let stop = if args.ignore_eos { Vec::new() } else { config.eos_token_ids.clone() };
    if args.check_tensors {
        check_tensors(&split, args.json)?;
    }
    let wanted = (prompt.len() + args.predict).max(64);
    let (placement, promise) = super::load::promised(&split, &args.placement, wanted, BATCH)?;
    if let Some(promise) = promise.as_ref().filter(|_| !args.json) {
        eprintln!("{promise}");
    }
    let mut loaded = load(split, &placement, wanted, BATCH, args.json)?;
    let engine = loaded.decoder();
    let warnings = warnings(engine)?;
    if !args.json {
        warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    }
    let settings = GenerateSettings {
        n_predict: args.predict,
        sampler: SamplerSettings {
            temperature: args.temp,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repeat_penalty: args.repeat_penalty,
            seed: args.seed,
            ..SamplerSettings::default()
        },
        stop,
        audit_every: args.audit_every,
    };
    let mut stream = tokenizer.decode_stream();
    let mut answer = String::new();
    let eos = engine.split().manifest().config.eos_token_ids.clone();
    let mut on_token = |token: u32| {
        if !eos.contains(&token)
            && let Some(piece) = stream.push(token)
        {
            if !args.json {
                print!("{piece}");
                let _ = std::io::stdout().flush();
            }
            answer.push_str(&piece);
        }
        true
    };
    let report = generate(engine, &prompt, &settings, &mut on_token)?;
    if let Some(rest) = stream.finish() {
        if !args.json {
            print!("{rest}");
        }
        answer.push_str(&rest);
    }
    if args.json {
        return output::json(&Output {
            command: std::env::args().skip(1).collect(),
            model: engine.split().manifest().source.model.clone(),
            planted: engine.split().planted()?.is_some(),
            text: &answer,
            warnings,
            report: &report,
            plan: engine.plan_json(),
            promise,
        });
    }
    println!("\n");
    println!("{}", account(&report));
    if let Some(audit) = &report.audit {
        println!("{}", audited(audit));
    }
    Ok(())
}

fn prompt(args: &Run) -> anyhow::Result<String> {
    match (&args.prompt, &args.file) {
        (Some(prompt), _) => Ok(prompt.clone()),
        (None, Some(path)) => std::fs::read_to_string(path).with_context(|| format!("{}", path.display())),
        (None, None) => Err(Usage("run needs -p or -f".to_owned()).into()),
    }
}

fn chat(args: &Run, split: &Split, tokenizer: &Tokenizer, text: &str) -> anyhow::Result<String> {
    let template = split
        .plain_file("chat_template.jinja")?
        .ok_or_else(|| Usage("this model has no chat template; leave --chat out".to_owned()))?;
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(ChatMessage::new("system", system));
    }
    messages.push(ChatMessage::new("user", text));
    let config = &split.manifest().config;
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
    let (bos, eos) = (name(config.bos_token_id), name(config.eos_token_ids.first().copied()));
    Ok(ChatTemplate::new(&template, &bos, &eos)?.render(&messages, true)?)
}

fn check_tensors(split: &Split, quiet: bool) -> anyhow::Result<()> {
    let progress = Progress::new("check", quiet);
    let on_part = |done: usize, total: usize| progress.set(done as u64, total as u64, format!("part {done}/{total}"));
    let checked = split.check_weights(&on_part);
    progress.finish();
    Ok(checked?)
}

/// What a user must know before believing the figures.
fn warnings(engine: &dyn Decoder) -> anyhow::Result<Vec<String>> {
    let mut out: Vec<String> = engine.flaws().iter().take(FLAWS_SAID_MAX).map(ToString::to_string).collect();
    if engine.flaws().len() > FLAWS_SAID_MAX {
        out.push(format!("{} more such tensors", engine.flaws().len() - FLAWS_SAID_MAX));
    }
    out.extend(engine.warnings());
    if let Some(planted) = engine.split().planted()? {
        out.push(format!(
            "{} has random weights with planted activations: it measures speed and says nothing",
            planted.model
        ));
    }
    let trained = engine.split().manifest().config.max_context;
    if engine.context() > trained {
        out.push(format!("-c is above the {trained} tokens that the model was trained for"));
    }
    Ok(out)
}

/// The line that every run ends with.
pub fn account(r: &RunReport) -> String {
    let b = &r.bytes_per_token;
    let hits = r.cache_hit_rate.map_or(String::new(), |h| format!(", cache hits {:.0} %", 100.0 * h));
    // By thresholds it differs from text to text.
    let computed = match r.computed_share {
        share if share > 0.0 && share < 1.0 => format!("{:.1} % of the neurons; ", 100.0 * share),
        _ => String::new(),
    };
    format!(
        "{} tokens at {:.1} tok/s (prompt {} at {:.0} tok/s); per token: {}{hits}; \
         {computed}{:.0} % of the {} limit; peak memory {}",
        r.tokens.len(),
        r.decode_tok_s,
        r.prompt_tokens,
        r.prompt_tok_s,
        tiers(b),
        100.0 * r.limit_share,
        r.limit,
        format_bytes(r.peak_rss_bytes)
    )
}

/// What audits found, in a line.
fn audited(a: &AuditReport) -> String {
    let figures = (a.recall, a.energy_recall, a.energy_recall_of_oracle, a.output_error);
    let (Some(recall), Some(energy), Some(of_oracle), Some(error)) = figures else {
        return "audit of 0 tokens: none was decoded after the first, which the prompt gives".to_owned();
    };
    format!(
        "audit of {} token{}: recall {recall:.2}, energy {energy:.2} ({of_oracle:.2} of the oracle's), \
         output error {error:.2}; {:.1} s, in no figure above",
        a.tokens,
        if a.tokens == 1 { "" } else { "s" },
        a.seconds
    )
}

/// Bytes by tier; VRAM only where there is a GPU.
pub fn tiers(b: &TierBytes) -> String {
    let vram = if b.device > 0 { format!("VRAM {}, ", format_bytes(b.device)) } else { String::new() };
    format!("{vram}RAM {}, cache {}, disk {}", format_bytes(b.host), format_bytes(b.cache), format_bytes(b.disk))
}

/// Threads for measurements outside an engine.
pub fn pool(threads: Threads) -> anyhow::Result<Pool> {
    let n = threads.checked()?;
    Pool::new(n).map_err(|e| thermocline_runtime::Error::from(e).into())
}

/// Starts the thread pool of the batched matrix products in calibration and evaluation.
pub fn limit_threads(threads: Threads) -> anyhow::Result<()> {
    let n = threads.checked()?;
    match rayon::ThreadPoolBuilder::new().num_threads(n).build_global() {
        Err(e) if e.source().is_some() => {
            Err(anyhow::Error::new(e).context(format!("cannot start {n} threads; use fewer (-t)")))
        }
        // Without a cause, the pool is there already: of the size asked for first.
        _ => Ok(()),
    }
}
