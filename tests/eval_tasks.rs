//! `eval --task`: what it prints, what it refuses, and that the report shows it.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use support::{fails, json as json_of, llama, model, ok, run, split, text};

const LAMBADA: &str =
    "{\"text\": \"the lake was calm and the water was still\"}\n{\"text\": \"she went down to the sea\"}\n";
const CLOZE: &str = concat!(
    "{\"context\": \"the lake was\", \"choices\": [\" calm\", \" a stone\", \" of\"], \"answer\": 0}\n",
    "{\"context\": \"she went down to\", \"choices\": [\" the sea\", \" was\"], \"answer\": 1, \"kind\": \"word\"}\n",
    "{\"context\": \"and\", \"choices\": [\" then\", \" so it went on\"], \"answer\": 0}\n"
);

fn tiny_split() -> PathBuf {
    split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"])
}

fn write(dir: &Path, name: &str, content: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    text(&path).to_owned()
}

#[test]
fn tasks_give_a_row_for_each_mask_and_share() {
    let (dir, folder) = (tiny_split(), tempfile::tempdir().unwrap());
    let lambada = format!("lambada={}", write(folder.path(), "lambada.jsonl", LAMBADA));
    let cloze = format!("cloze={}", write(folder.path(), "cloze=1.jsonl", CLOZE));
    let given = ["eval", "-m", text(&dir), "--task", &lambada, "--task", &cloze, "-t", "2"];
    let masks = ["--mask", "dense,predicted,teal", "--active", "0.5,0.3"];
    let all = json_of(&[&given[..], &masks, &["--json"]].concat());
    let tasks = all["tasks"].as_array().unwrap();
    let what = |t: &Value| {
        (t["task"].as_str().unwrap().to_owned(), t["file"].as_str().unwrap().to_owned(), t["examples"].as_u64())
    };
    let expected = [("lambada", "lambada.jsonl", 2), ("cloze", "cloze=1.jsonl", 3)];
    let expected = expected.map(|(task, file, n)| (task.to_owned(), file.to_owned(), Some(n)));
    assert_eq!(tasks.iter().map(what).collect::<Vec<_>>(), expected);
    for task in tasks {
        let rows: Vec<_> = task["results"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| (r["mask"].as_str().unwrap(), r["active"].as_f64()))
            .collect();
        let expected = [
            ("dense", None),
            ("predicted", Some(0.5)),
            ("predicted", Some(0.3)),
            ("teal", Some(0.5)),
            ("teal", Some(0.3)),
        ];
        assert_eq!(rows, expected);
        let dense = &task["results"][0];
        assert_eq!(dense["accuracy"]["difference"], 0.0);
        assert!(task["results"][1]["answer_loss"] != dense["answer_loss"]);
    }
    assert_eq!(all["positions"], "all");
    assert!(all["masked_positions"].as_str().unwrap().starts_with("every position"));

    let decoded = [&given[..], &masks, &["--positions", "decoded", "--limit", "1"]].concat();
    let decoded_json = json_of(&[&decoded[..], &["--json"]].concat());
    assert_eq!((&decoded_json["positions"], &decoded_json["tasks"][1]["examples"]), (&json!("decoded"), &json!(1)));
    let table = ok(&decoded).stdout;
    let lines = |mask: &str| table.lines().filter(|line| line.trim_start().starts_with(mask)).count();
    assert_eq!(["dense ", "predicted ", "teal "].map(lines), [2, 4, 4], "{table}");
    assert!(table.contains("behind the context"), "{table}");

    // The report has a row for each of them, and reads records of a later version.
    let mut later = all.clone();
    (later["something"], later["tasks"][0]["more"]) = (json!({"new": 1}), json!([1]));
    later["tasks"][0]["results"][0]["accuracy"]["else"] = json!("x");
    let record = write(folder.path(), "tasks.json", &later.to_string());
    let page = write(folder.path(), "page.html", "");
    ok(&["report", &record, "-o", &page]);
    let html = fs::read_to_string(&page).unwrap();
    assert_eq!(html.matches("cloze, cloze=1.jsonl, 3 examples").count(), 5);
    assert_eq!(html.matches("lambada, lambada.jsonl, 2 examples").count(), 5);
    // A record with a field of another type is refused by its name.
    later["tasks"][1]["results"][2]["accuracy"]["lost"] = json!("two");
    let bad = write(folder.path(), "bad.json", &later.to_string());
    let message = fails(1, &["report", &bad, "-o", &page]);
    assert!(message.contains("bad.json: tasks[1].results[2].accuracy.lost"), "{message}");
}

/// What is said of files and flags that make no sense.
#[test]
fn tasks_that_cannot_be_asked() {
    let (made, folder) = (model(&llama()), tempfile::tempdir().unwrap());
    let long = format!("{{\"text\": \"a b\"}}\n{{\"text\": \"{}end\"}}\n", "abc ".repeat(400));
    let files = [
        ("missing-field", "{\"text\": \"a b\"}\n{\"txt\": \"a b\"}\n"),
        ("empty", ""),
        ("empty-text", "{\"text\": \"\"}"),
        ("one-word", "{\"text\": \"word\"}"),
        ("no-json", "text"),
        ("binary", "{\"text\": \"\u{1}\u{fffd}\"}"),
        ("too-long", long.as_str()),
    ];
    let of_cloze = [
        ("answer", "{\"context\": \"a\", \"choices\": [\" b\", \" c\"], \"answer\": 2}"),
        ("no-tokens", "{\"context\": \"a\", \"choices\": [\" b\", \"\"], \"answer\": 0}"),
        ("one-choice", "{\"context\": \"a\", \"choices\": [\" b\"], \"answer\": 0}"),
        ("lambada", "{\"text\": \"a b\"}"),
    ];
    let mut cases: Vec<Vec<String>> = Vec::new();
    for (kind, name, content) in
        files.map(|(n, c)| ("lambada", n, c)).into_iter().chain(of_cloze.map(|(n, c)| ("cloze", n, c)))
    {
        let path = write(folder.path(), &format!("{name}.jsonl"), content);
        cases.push(vec!["--task".to_owned(), format!("{kind}={path}")]);
    }
    let sound = format!("lambada={}", write(folder.path(), "sound.jsonl", LAMBADA));
    let flags: &[&[&str]] = &[
        &["--task", "lambada=TEMP/none.jsonl"],
        &["--task", "winogrande=TEMP/sound.jsonl"],
        &["--task", "lambada"],
        &["--task", &sound, "--limit", "0"],
        &["--task", &sound, "--text", "TEXT"],
        &["--task", &sound, "--mask", "predicted"],
        &["--task", &sound, "--mask", "oracle", "--active", "2"],
        &["--text", "TEXT", "--positions", "decoded"],
        &["--text", "TEXT", "--limit", "3"],
        &[],
    ];
    let temp = text(folder.path());
    cases.extend(flags.iter().map(|f| f.iter().map(|a| a.replace("TEMP", temp)).collect()));
    let mut all = String::new();
    for case in &cases {
        let mut args = vec!["eval", "-m", text(&made)];
        args.extend(case.iter().map(String::as_str));
        let ran = run(&args);
        assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
        all += &format!("$ thermocline {}\nexit {}\n{}\n\n", args.join(" "), ran.code.unwrap(), ran.stderr.trim_end());
    }
    insta::assert_snapshot!("tasks-errors", all.replace(temp, "TEMP").replace(text(&made), "MODEL"));
}
