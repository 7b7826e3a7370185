//! The budget tests on real models, in the folder that `THERMOCLINE_TEST_MODELS` names (`smollm2/model.gguf`,
//! `qwen05/model.gguf`; `datasets/fetch-models.sh` gets them).
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use support::{calibrating, json, ok, splitting, text};

/// The program's own pages, a real tokenizer (about 50 MB for 150,000 tokens) and its JSON text while it is read.
const SLACK_BYTES: u64 = 96 << 20;

fn real(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("THERMOCLINE_TEST_MODELS").map(|d| Path::new(&d).join(name).join("model.gguf"));
    let found = path.filter(|p| p.exists());
    if found.is_none() {
        eprintln!("SKIPPED: {name}/model.gguf is not in THERMOCLINE_TEST_MODELS; nothing was tested");
    }
    found
}

fn run(dir: &Path, prompt: &str, n: &str, budget: &str, more: &[&str]) -> Value {
    let given = ["run", "-m", text(dir), "-p", prompt, "-n", n, "-c", "320", "--temp", "0", "--ignore-eos"];
    json(&[&given, more, &["--ram-budget", budget, "--json"]].concat())
}

fn through(name: &str) {
    let Some(model) = real(name) else { return };
    let folder = tempfile::TempDir::new().unwrap();
    let (profile, dir) = (folder.path().join("profile"), folder.path().join("split"));
    ok(&calibrating(&model, "512", "256", &profile));
    ok(&splitting(&model, &profile, &["--encoding", "q4"], &dir));
    let proof = json(&["verify", text(&dir), "-m", text(&model), "--json"]);
    assert_eq!(proof["violations"], serde_json::json!([]));
    for (i, prompt) in
        ["The lake is deepest", "fn main() {", "Water is densest at four degrees, so"].into_iter().enumerate()
    {
        let whole = run(&dir, prompt, "256", "auto", &[]);
        let dense = whole["plan"]["dense_bytes"].as_u64().unwrap();
        let share = [2, 4, 2][i];
        let budget = format!("{}B", dense / share);
        let half = run(&dir, prompt, "256", &budget, &[]);
        assert_eq!(half["tokens"].as_array().unwrap().len(), 256);
        assert_eq!(half["tokens"], whole["tokens"], "{name}: {prompt} in 1/{share}");
        let (peak, disk) =
            (half["peak_rss_bytes"].as_u64().unwrap(), half["bytes_per_token"]["disk"].as_u64().unwrap());
        assert!(peak <= dense / share + SLACK_BYTES && disk > 0, "{name}: peak {peak} of {budget}, {disk} from disk");
        if i == 0 {
            let sparse = ["--mode", "sparse", "--active", "0.5"];
            let (a, b) = (run(&dir, prompt, "32", "auto", &sparse), run(&dir, prompt, "32", &budget, &sparse));
            assert_eq!(a["tokens"], b["tokens"], "{name}: sparse in 1/{share}");
        }
    }
    eprintln!("TESTED: {name}, split, verified, and run in half and a quarter of its size");
}

#[test]
fn smollm2_runs_in_half_and_a_quarter_of_its_size() {
    through("smollm2");
}

#[test]
fn qwen05_runs_in_half_and_a_quarter_of_its_size() {
    through("qwen05");
}
