//! Audits of sparse mode: what they say is true, and nothing else changes.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use support::budgets::planes;
use support::{
    bits, budget_range_of, copy, demo, engine_at, engine_of, fails, json, llama, medium, needed_bytes, ok, prompt,
    qwen_relu, request, split, text,
};
use thermocline_calibrate::dense::{DenseLayer, Embedding};
use thermocline_runtime::{Account, AuditReport, Engine, Error, Logits, Mode, layer_active};
use thermocline_split::{Split, SplitCheckpoint};

/// Tokens of a prompt, and tokens decoded behind it.
const PROMPT: usize = 13;
const DECODED: usize = 14;

/// Logits of single tokens behind a prompt, audited every so many tokens.
fn decode(engine: &mut Engine, every: usize) -> Vec<u32> {
    engine.start_audit(every).unwrap();
    engine.clear();
    let tokens = prompt(PROMPT + DECODED);
    let mut logits = engine.forward(&tokens[..PROMPT], Logits::Last).unwrap();
    for token in &tokens[PROMPT..] {
        logits.extend(engine.forward(&[*token], Logits::Last).unwrap());
    }
    bits(&logits)
}

/// What was found, without the time that it took.
fn found(engine: &Engine) -> AuditReport {
    AuditReport { seconds: 0.0, ..engine.audit().unwrap() }
}

/// All weights in memory, a budget in the middle, and the least one.
fn budgets(dir: &Path, given: &str, mode: Mode) -> [Option<u64>; 3] {
    let (least, all) = budget_range_of(&Split::open_at(dir, planes(given)).unwrap(), mode);
    [None, Some((least + all) / 2), Some(least)]
}

/// A split that was made to divide neurons between its layers, and knows what stands for those that are left out.
#[cfg(feature = "analysis")]
fn with_shares() -> PathBuf {
    support::once("llama.audited-shares", |path| {
        support::copy_dir(&split(&llama(), "q4", &["--chunk-neurons", "8"]), path);
        ok(&[
            "eval",
            "-m",
            text(path),
            "--text",
            text(support::corpus()),
            "--fit-shares",
            "--ctx",
            "64",
            "--windows",
            "2",
            "-t",
            "2",
        ]);
    })
}

/// Splits, planes of them, and a share of neurons: plain ones, one with shares, a compressed one, layers of several
/// encodings, planes in several files.
fn cases() -> Vec<(PathBuf, &'static str, f32)> {
    let mixed = demo::split("q4,hot@0.6=q8+exact,hot@0.2=bf16x,3=q4+exact", &["--resident-encoding", "q8"]);
    vec![
        (split(&llama(), "bf16", &["--chunk-neurons", "8"]), "base", 0.3),
        (split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]), "base", 0.1),
        #[cfg(feature = "analysis")]
        (with_shares(), "base", 0.3),
        (split(&qwen_relu(), "bf16", &["--chunk-neurons", "24", "--zstd-level", "3"]), "base", 0.2),
        (demo::split("bf16", &[]), "base", 0.02),
        (demo::split("q4", &[]), "base", 0.02),
        (mixed.clone(), "base", 0.05),
        (mixed, "exact@0.4", 0.02),
        (demo::split("q4+exact", &[]), "exact", 0.02),
    ]
}

fn counters(a: Account) -> [u64; 10] {
    let b = a.bytes;
    [
        b.device,
        b.cache,
        b.host,
        b.disk,
        a.cache_hits,
        a.cache_misses,
        a.neurons_computed,
        a.neurons_total,
        a.foreseen,
        a.foreseen_used,
    ]
}

#[test]
fn audits_change_no_bit_and_no_figure_and_say_the_same_under_every_budget() {
    let mut n_streamed = 0;
    for (dir, given, active) in cases() {
        let mode = Mode::Sparse { active };
        let mut reports = Vec::new();
        for budget in budgets(&dir, given, mode) {
            for n_threads in [1, 2] {
                let name = format!("{} at {given}, {budget:?}, {n_threads} threads", dir.display());
                let engine = || engine_at(&dir, planes(given), request(mode, budget, n_threads)).unwrap();
                let (mut plain, mut audited) = (engine(), engine());
                let expected = decode(&mut plain, 0);
                assert!(plain.audit().is_none() && plain.audit_time().is_zero());
                assert!(decode(&mut audited, 3) == expected, "{name}");
                assert_eq!(counters(audited.account()), counters(plain.account()), "{name}");
                n_streamed += u32::from(audited.account().bytes.disk > 0);
                assert!(!audited.audit_time().is_zero());
                // Again, with what reading ahead and the cache then hold.
                let (again, first) = (decode(&mut audited, 1) == decode(&mut plain, 0), found(&audited).tokens);
                assert!(again && first == DECODED as u64, "{name}");
                assert_eq!(counters(audited.account()), counters(plain.account()), "{name}");
                decode(&mut audited, 3);
                reports.push(found(&audited));
            }
        }
        let first = &reports[0];
        assert_eq!((first.every, first.tokens), (3, DECODED.div_ceil(3) as u64));
        assert!(reports.iter().all(|r| r == first), "{} at {given}: {reports:?}", dir.display());
    }
    // Small models take less than the buffers that the least budget has for them.
    assert!(n_streamed > 12, "only {n_streamed} engines read from disk");
}

/// The means of a layer over audited tokens: recall, energy recall, of the oracle's, output error.
type Figures = [f64; 4];

/// The same figures from candle's dense forward on the decoded weights, in plain loops.
fn expected(dir: &Path, given: &str, share: f32, every: usize) -> Vec<Figures> {
    let checkpoint = SplitCheckpoint::new(Split::open_at(dir, planes(given)).unwrap());
    let active = layer_active(checkpoint.split(), share).unwrap();
    let tokens = prompt(PROMPT + DECODED);
    let mut x = Embedding::load(&checkpoint).unwrap().rows(&tokens).unwrap();
    let mut out = Vec::new();
    for (index, active) in active.iter().enumerate() {
        let layer = DenseLayer::load(&checkpoint, index).unwrap();
        let (low_rank, norms) = checkpoint.split().predictor(index).unwrap();
        x = layer.attention(&x, 1, tokens.len()).unwrap();
        let input = layer.ffn_input(&x).unwrap();
        let mut h = layer.neurons(&input).unwrap().h;
        let scores = low_rank.scores(&input, layer.activation(), &norms).unwrap();
        let (ffn, hidden) = (layer.intermediate_size(), layer.hidden_size());
        let down = layer.down_norms().unwrap();
        let mut all = vec![0.0; x.len()];
        layer.ffn_output(&mut all, h.clone()).unwrap();
        let mut sums = [0.0; 4];
        let mut energies = Vec::new();
        for t in PROMPT..tokens.len() {
            let weight: Vec<f64> = (0..ffn).map(|i| f64::from(h[t * ffn + i].abs()) * f64::from(down[i])).collect();
            let kept = highest(active.n_active, |i| f64::from(scores[t * ffn + i]), ffn);
            let best: Vec<usize> =
                highest(kept.len(), |i| weight[i], ffn).into_iter().filter(|&i| weight[i] > 0.0).collect();
            let energy = |set: &[usize]| set.iter().map(|&i| weight[i] * weight[i]).sum::<f64>();
            let whole = weight.iter().map(|w| w * w).sum::<f64>();
            let n_found = best.iter().filter(|i| kept.contains(i)).count();
            let one_of = |part: f64, all: f64| if all > 0.0 { part / all } else { 1.0 };
            energies.push((n_found, best.len(), one_of(energy(&kept), whole), one_of(energy(&kept), energy(&best))));
            (0..ffn).filter(|i| !kept.contains(i)).for_each(|i| h[t * ffn + i] = 0.0);
        }
        let mut some = vec![0.0; x.len()];
        layer.ffn_output(&mut some, h).unwrap();
        let audited: Vec<usize> = (0..DECODED).step_by(every).collect();
        let (mut n_found, mut n_wanted) = (0, 0);
        for t in 0..tokens.len() {
            let row = t * hidden..(t + 1) * hidden;
            if t >= PROMPT {
                some[row.clone()].iter_mut().zip(&active.left_out).for_each(|(y, mean)| *y += mean);
            }
            if t >= PROMPT && audited.contains(&(t - PROMPT)) {
                let (all, some) = (&all[row.clone()], &some[row.clone()]);
                let norm = all.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                let apart = all.iter().zip(some).map(|(a, s)| f64::from(a - s).powi(2)).sum::<f64>().sqrt();
                let (found, wanted, energy, of_oracle) = energies[t - PROMPT];
                (n_found, n_wanted) = (n_found + found, n_wanted + wanted);
                let n = audited.len() as f64;
                sums[1] += energy / n;
                sums[2] += of_oracle / n;
                sums[3] += apart / norm / n;
            }
        }
        x.iter_mut().zip(&some).for_each(|(x, y)| *x += y);
        sums[0] = n_found as f64 / n_wanted as f64;
        out.push(sums);
    }
    out
}

/// The `k` highest of `n`, the lower number first where two are alike.
fn highest(k: usize, of: impl Fn(usize) -> f64, n: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    all.sort_by(|&a, &b| of(b).total_cmp(&of(a)).then(a.cmp(&b)));
    all.truncate(k);
    all
}

/// Two engines that share no code between weights and figures. The runtime keeps keys and values in half precision: states
/// differ by a few parts in a thousand, and neurons whose scores nearly tie change places, one or two of a token's set; they
/// are the set's last, and weigh little.
#[test]
fn figures_agree_with_an_independent_dense_forward() {
    let mut widest = [[1.0f64, 0.0]; 4];
    for (dir, given, active) in cases() {
        let mode = Mode::Sparse { active };
        let want = expected(&dir, given, active, 3);
        for (i, budget) in budgets(&dir, given, mode).into_iter().enumerate() {
            let mut engine = engine_at(&dir, planes(given), request(mode, budget, 1 + i % 2)).unwrap();
            decode(&mut engine, 3);
            let report = found(&engine);
            assert_eq!(report.layers.len(), want.len());
            let mut means = [0.0; 4];
            for (layer, want) in report.layers.iter().zip(&want) {
                let q = &layer.quality;
                let got = [q.recall, q.energy_recall, q.energy_recall_of_oracle, layer.output_error];
                for (which, (got, want)) in got.into_iter().zip(want).enumerate() {
                    let limit = [0.02, 0.005, 0.005, 0.01][which];
                    let name = format!("{} at {given}, {budget:?}, figure {which}", dir.display());
                    assert!((got - want).abs() < limit, "{name} of layer {}: {got}, expected {want}", q.layer);
                    means[which] += got / report.layers.len() as f64;
                    widest[which] = [widest[which][0].min(got), widest[which][1].max(got)];
                }
                assert_eq!(layer.lost_energy, 1.0 - q.energy_recall);
            }
            let told = [report.recall, report.energy_recall, report.energy_recall_of_oracle, report.output_error];
            for (told, mean) in told.into_iter().zip(means) {
                assert!((told.unwrap() - mean).abs() < 1e-12);
            }
        }
    }
    // Figures that are all alike would agree whatever they are.
    assert!(widest.iter().all(|[least, most]| most - least > 0.1), "{widest:?}");
}

#[test]
fn a_choice_of_all_neurons_is_perfect() {
    for (dir, given, _) in cases() {
        let mode = Mode::Sparse { active: 1.0 };
        let (least, _) = budget_range_of(&Split::open_at(&dir, planes(given)).unwrap(), mode);
        for budget in [None, Some(least)] {
            let mut engine = engine_at(&dir, planes(given), request(mode, budget, 2)).unwrap();
            decode(&mut engine, 2);
            let a = found(&engine);
            let figures = [a.recall, a.energy_recall, a.energy_recall_of_oracle, a.lost_energy, a.output_error];
            assert_eq!(figures, [1.0, 1.0, 1.0, 0.0, 0.0].map(Some), "{} with {budget:?}", dir.display());
        }
    }
}

/// A chunk that no audited token's choice needs is damaged while the model runs: only the audit reads it.
#[test]
fn an_audit_that_fails_leaves_the_sequence_alone() {
    let (_guard, dir) = copy(&split(&medium(), "q4", &["--chunk-neurons", "4", "--order", "random"]));
    let mode = Mode::Sparse { active: 0.02 };
    let (least, _) = budget_range_of(&Split::open(&dir).unwrap(), mode);
    let tokens = prompt(PROMPT + 3);
    let begun = |every: usize| {
        let mut engine = engine_of(Split::open(&dir).unwrap(), request(mode, Some(least), 2)).unwrap();
        engine.forward(&tokens[..PROMPT], Logits::Last).unwrap();
        engine.start_audit(every).unwrap();
        engine
    };
    let decode = |engine: &mut Engine| -> Result<(), Error> {
        tokens[PROMPT..].iter().try_for_each(|t| engine.forward(&[*t], Logits::Last).map(drop))
    };
    let last = |engine: &mut Engine| bits(&engine.forward(&[5], Logits::Last).unwrap());
    let mut plain = begun(0);
    decode(&mut plain).unwrap();
    let expected = last(&mut plain);
    let path = dir.join("layers/001.thm");
    let good = fs::read(&path).unwrap();
    let mut audits_failed = 0;
    for part in 1..8 {
        let (mut plain, mut audited) = (begun(0), begun(2));
        let mut bad = good.clone();
        bad[good.len() * part / 8] ^= 16;
        fs::write(&path, &bad).unwrap();
        let (without, with) = (decode(&mut plain), decode(&mut audited));
        fs::write(&path, &good).unwrap();
        // Chunks that the choice needs, and hot ones, are no audit's alone.
        if without.is_err() || with.is_ok() {
            continue;
        }
        let message = with.unwrap_err().to_string();
        assert!(message.contains("001.thm"), "{message}");
        assert_eq!((audited.len(), found(&audited).tokens), (PROMPT, 0), "the first token fails, and counts nowhere");
        decode(&mut audited).unwrap();
        assert!(last(&mut audited) == expected);
        assert_eq!(found(&audited).tokens, 2);
        audits_failed += 1;
    }
    assert!(audits_failed > 0, "every damaged chunk was needed, or hot");
}

fn given<'a>(dir: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let run = ["run", "-m", text(dir), "-p", "the cold engine", "--temp", "0", "--ignore-eos", "-t", "2"];
    [&run, more].concat()
}

#[test]
fn run_tells_what_audits_found_and_everything_else_stays_as_it_was() {
    let dir = split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]);
    let sparse = ["--mode", "sparse", "--active", "0.2"];
    let least = format!("{}B", needed_bytes(&given(&dir, &[&sparse[..], &["-n", "12"]].concat())));
    for budget in ["auto", &least] {
        let answer = |more: &[&str]| {
            json(&[&given(&dir, &sparse)[..], &["-n", "12", "--json", "--ram-budget", budget], more].concat())
        };
        let (plain, audited) = (answer(&[]), answer(&["--audit-every", "4"]));
        assert!(plain.get("audit").is_none() && answer(&["--audit-every", "0"]).get("audit").is_none());
        let same = ["tokens", "text", "bytes_per_token", "computed_share", "cache_hit_rate", "foreseen_used", "plan"];
        for field in same.into_iter().chain(["timeline", "prompt_tokens", "mode"]) {
            assert_eq!(audited[field], plain[field], "{field} with {budget}");
        }
        let audit = &audited["audit"];
        // Twelve tokens: the prompt gives the first, eleven are decoded, of which the first, fifth and ninth are audited.
        assert_eq!((&audit["tokens"], &audit["every"]), (&3.into(), &4.into()));
        let number = |v: &serde_json::Value, name: &str| v[name].as_f64().unwrap_or_else(|| panic!("{name}: {v}"));
        assert!(number(audit, "seconds") > 0.0);
        let layers = audit["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 2);
        for name in ["recall", "precision", "energy_recall", "energy_recall_of_oracle", "lost_energy", "output_error"] {
            let mean = layers.iter().map(|l| number(l, name)).sum::<f64>() / 2.0;
            assert!((mean - number(audit, name)).abs() < 1e-12 && mean > 0.0, "{name}");
        }
        assert!((number(audit, "energy_recall") + number(audit, "lost_energy") - 1.0).abs() < 1e-12);
    }
    let said = ok(&given(&dir, &[&sparse[..], &["-n", "12", "--audit-every", "4"]].concat())).stdout;
    let line = said.lines().last().unwrap();
    assert!(line.starts_with("audit of 3 tokens: recall 0.") && line.contains(", output error 0."), "{line}");
    let said = ok(&given(&dir, &[&sparse[..], &["-n", "1", "--audit-every", "4"]].concat())).stdout;
    assert!(said.lines().last().unwrap().starts_with("audit of 0 tokens"), "{said}");
    let none = json(&given(&dir, &[&sparse[..], &["-n", "1", "--audit-every", "4", "--json"]].concat()));
    assert!(none["audit"]["tokens"] == 0 && none["audit"]["recall"].is_null(), "{none}");
}

#[test]
fn exact_mode_has_nothing_to_audit() {
    let dir = split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]);
    for more in [&["--audit-every", "8"][..], &["--audit-every", "8", "--mode", "exact", "--json"]] {
        let message = fails(2, &given(&dir, more));
        assert!(message.contains("--audit-every") && message.contains("--mode sparse"), "{message}");
    }
    fails(2, &given(&dir, &["--audit-every=-1", "--mode", "sparse"]));
    let mut engine = engine_at(&dir, planes("base"), request(Mode::Exact, None, 1)).unwrap();
    assert!(matches!(engine.start_audit(1), Err(Error::Setting { flag: "--audit-every", .. })));
    assert!(engine.start_audit(0).is_ok() && engine.audit().is_none());
}

/// With a GPU (the emulated one) as without.
#[cfg(feature = "cuda")]
#[test]
fn run_on_a_gpu_tells_what_audits_found() {
    let emulator = thermocline_kernels::cuda::build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let dir = split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]);
    let run = |budget: &str, more: &[&str]| -> String {
        let mut command = support::thermocline();
        command.env("THERMOCLINE_CUDA_EMULATOR", &emulator).env("THERMOCLINE_VRAM_BUDGET", budget);
        let sparse = ["--mode", "sparse", "-n", "6"];
        let ran: support::Ran = command.args(given(&dir, &[&sparse[..], more].concat())).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        ran.stdout
    };
    for budget in ["0", "1GiB"] {
        let (plain, audited) = (run(budget, &[]), run(budget, &["--audit-every", "2"]));
        let line = audited.lines().last().unwrap();
        // The prompt gives the first token, five are decoded, of which the first, third and fifth are audited.
        assert!(line.starts_with("audit of 3 tokens: recall 0.") && line.contains(", output error 0."), "{line}");
        assert_eq!(plain.lines().next(), audited.lines().next(), "{budget}");
    }
}
