//! A model that runs (cases 26, 34, 35 and 37): budgets that do not fit, predictors that lie, contexts that fill up, and
//! signals.

use crate::harness::{Table, bytes_of};
use crate::support::forge;
use crate::support::{
    BINARY, bits, calibrating, copy, engine, files, llama, medium, model, ok, profile, prompt, qwen_relu, request,
    split, splitting, text, thermocline,
};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use thermocline_runtime::{Logits, Mode};
use thermocline_split::Split;

fn tiny() -> std::path::PathBuf {
    split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"])
}

/// A budget too small, a context too long and a prompt too long take no memory for what they ask.
#[test]
fn what_does_not_fit_is_told_before_it_is_allocated() {
    let mut table = Table::new("does-not-fit");
    let (_guard, dir) = copy(&tiny());
    let link = table.folder().join("SPLIT");
    std::os::unix::fs::symlink(&dir, &link).unwrap();
    let m = text(&link);
    for (case, name, code, args) in [
        (26, "one-byte", 3, &["run", "-p", "a", "--ram-budget", "1B"][..]),
        (26, "plan-of-one-byte", 3, &["plan", "--ram-budget", "1B"]),
        (26, "context-beyond-the-budget", 3, &["run", "-p", "a", "-c", "1000000", "--ram-budget", "4MiB"]),
        (26, "context-beyond-any-memory", 2, &["run", "-p", "a", "-c", "99999999999"]),
        (35, "prompt-beyond-the-context", 2, &["run", "-p", "0123456789", "-c", "4"]),
    ] {
        table.ends(code, 0, case, name, &[args, &["-m", m, "-t", "1"]].concat());
    }
    table.check();
}

/// Values of `predictors.N.neurons` as no fit gives them: the scores are NaN, infinite, zero or all alike.
#[test]
fn predictors_that_lie_choose_neurons_all_the_same() {
    let mut table = Table::new("predictors");
    let whole = split(&qwen_relu(), "q8", &["--chunk-neurons", "1"]);
    let link = table.folder().join("SPLIT");
    let tokens = prompt(6);
    let answer = |dir: &Path, active: f32| {
        let mut engine = engine(dir, request(Mode::Sparse { active }, None, 2)).unwrap();
        let logits = tokens.iter().flat_map(|t| engine.forward(&[*t], Logits::Last).unwrap()).collect::<Vec<f32>>();
        (bits(&logits), engine.account().neurons_computed)
    };
    let (_, computed) = answer(&whole, 0.25);
    let dense = answer(&whole, 1.0).0;
    for (name, value) in [
        ("NaN", f32::NAN),
        ("infinite", f32::INFINITY),
        ("minus infinite", f32::NEG_INFINITY),
        ("nothing", 0.0),
        ("everything alike", 1e30),
    ] {
        let (_guard, dir) = copy(&whole);
        for layer in 0..2 {
            forge::predictor(&dir, &format!("predictors.{layer}.neurons"), |bytes| {
                bytes.chunks_exact_mut(4).for_each(|v| v.copy_from_slice(&value.to_le_bytes()));
            });
        }
        let (_, chosen) = answer(&dir, 0.25);
        assert_eq!(chosen, computed, "{name}: as many neurons as were asked for");
        assert!(answer(&dir, 1.0).0 == dense, "{name}: with every neuron it is the dense answer");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        let args = ["run", "-m", text(&link), "-p", "the lake", "-n", "4", "--mode", "sparse", "--active", "0.25"];
        table.ends(0, bytes_of(&dir), 34, &name.replace(' ', "-"), &[&args[..], &["-t", "1"]].concat());
    }
    table.check();
}

#[test]
fn a_full_context_ends_the_answer_with_its_reason() {
    let dir = tiny();
    let given = ["run", "-m", text(&dir), "-p", "0123456789", "-n", "500", "--temp", "0", "--ignore-eos", "--json"];
    for context in ["11", "24"] {
        let answer = crate::support::json(&[&given[..], &["-c", context]].concat());
        assert_eq!(answer["finish_reason"], "length", "-c {context}");
        let n: usize = context.parse().unwrap();
        assert_eq!(answer["tokens"].as_array().unwrap().len(), n - 10 + 1);
    }
}

fn signal(name: &str, child: &Child) {
    let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// How long it takes to end, which it must.
fn ends(child: &mut Child) -> Duration {
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < Duration::from_secs(20), "it does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    begin.elapsed()
}

#[test]
fn signals_end_a_run_in_mid_token_and_leave_nothing() {
    let dir = split(&medium(), "bf16", &["--chunk-neurons", "16"]);
    let before = files(&dir).len();
    for name in ["INT", "TERM"] {
        let temporary = tempfile::TempDir::new().unwrap();
        let mut child = thermocline()
            .env("TMPDIR", temporary.path())
            .current_dir(temporary.path())
            .args(["run", "-m", text(&dir), "-p", "the lake", "-n", "100000", "-c", "400", "--ignore-eos"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It has begun to answer.
        let mut first = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        signal(name, &child);
        let took = ends(&mut child);
        assert!(took < Duration::from_secs(2), "{name}: {took:?}");
        assert!(fs::read_dir(temporary.path()).unwrap().next().is_none(), "{name}: something is left");
        assert_eq!(files(&dir).len(), before);
    }
}

#[test]
fn signals_end_writers_and_their_work_is_taken_up() {
    let (made, profile, folder) = (model(&medium()), profile(&medium()), tempfile::TempDir::new().unwrap());
    let (a, b) = (folder.path().join("split"), folder.path().join("profile"));
    let splitting = splitting(&made, &profile, &["--encoding", "bf16"], &a);
    let calibrating = [&calibrating(&made, "1024", "128", &b)[..], &["--resume"]].concat();
    for (args, out, work) in [(&splitting[..], &a, "split.partial"), (&calibrating, &b, "profile.work")] {
        for name in ["INT", "TERM"] {
            let mut command = Command::new(BINARY);
            let mut child = command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let begin = Instant::now();
            while !folder.path().join(work).exists() {
                assert!(begin.elapsed() < Duration::from_secs(60), "{work} never appeared");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(50));
            signal(name, &child);
            let took = ends(&mut child);
            assert!(took < Duration::from_secs(2) && !out.exists(), "{name}: {took:?}");
        }
        ok(args);
        assert!(!folder.path().join(work).exists(), "nothing temporary is left");
    }
    assert!(files(&a) == files(&split(&medium(), "bf16", &[])));
    assert_eq!(Split::open(&a).unwrap().layers().len(), 12);
}
