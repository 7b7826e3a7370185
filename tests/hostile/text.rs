//! Tokenizers and chat templates of a split, whose checksums fit: programs and settings from strangers (case 41, and
//! what fuzzing found).

use crate::harness::Table;
use crate::support::{copy_dir, forge, llama, split};
use serde_json::{Value, json};
use std::fs;

/// What a template may take: it may build 16 times the mebibyte that it may write, and joins it in pieces.
const TEMPLATE_BYTES: u64 = 64 << 20;

#[test]
fn tokenizers_that_make_no_sense() {
    let mut table = Table::new("tokenizers");
    let dir = table.folder().join("SPLIT");
    copy_dir(&split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]), &dir);
    let good: Value = serde_json::from_slice(&fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.to_string()
    };
    for (name, bad) in [
        ("no-object", "7".to_owned()),
        ("no-model", with(&|t| drop(t.as_object_mut().unwrap().remove("model")))),
        ("deep", with(&|t| *t = (0..100).fold(json!(0), |inner, _| json!([inner])))),
        ("merge-of-tokens-that-are-not-there", with(&|t| t["model"]["merges"] = json!([["no", "such"]]))),
        ("decoder-of-an-unknown-type", with(&|t| t["decoder"] = json!({"type": "Never"}))),
        // The `tokenizers` crate panics on these two.
        ("decoder-that-is-no-json", good.to_string().replacen("\"decoder\":{", "\"decoder\":{7,", 1)),
        (
            "characters-of-nothing",
            with(&|t| t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": 7})),
        ),
    ] {
        forge::plain_file(&dir, "tokenizer.json", &bad);
        let args = ["run", "-m", dir.to_str().unwrap(), "-p", "the lake", "-n", "2", "-t", "1"];
        table.ends(4, 0, 13, name, &args);
    }
    table.check();
}

#[test]
fn chat_templates_that_never_end() {
    let mut table = Table::new("templates");
    let dir = table.folder().join("SPLIT");
    copy_dir(&split(&llama(), "q4", &["--chunk-neurons", "16", "--order", "random"]), &dir);
    for (name, template) in [
        ("endless", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_owned()),
        ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned()),
        (
            "doubling",
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
                .to_owned(),
        ),
        ("product", "{{ 'ab' * 999999999 }}".to_owned()),
        ("no-template", "{% for %}".to_owned()),
        ("raised", "{{ raise_exception('no') }}".to_owned()),
        ("too-long", "x".repeat(300_000)),
    ] {
        forge::plain_file(&dir, "chat_template.jinja", &template);
        let args = ["run", "-m", dir.to_str().unwrap(), "-p", "the lake", "-n", "2", "-t", "1", "--chat"];
        table.ends(4, TEMPLATE_BYTES, 41, name, &args);
    }
    table.check();
}
