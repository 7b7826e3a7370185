//! `UNSAFE.md` is the list of the crate's unsafe code with the reason for each piece, made from the sources: it is compared
//! here, and `UNSAFE_LIST=write` writes it. No other crate of the workspace may have any.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};

/// How far above an unsafe block its comment may begin: long reasons, and statements that begin a few lines earlier.
const LINES_ABOVE: usize = 12;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => out.push(path),
                false => {}
            }
        }
    }
    out.sort();
    out
}

/// What a line says without its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap()
}

fn has_word(line: &str, word: &str) -> bool {
    code(line).split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

/// Name of the function, or of what is implemented, that line `at` stands in.
fn place(lines: &[&str], at: usize) -> String {
    let found = lines[..=at].iter().rev().find(|l| has_word(l, "fn") || has_word(l, "impl")).copied().unwrap_or("");
    match code(found).split_once("fn ") {
        Some((_, rest)) => rest.split(['(', '<']).next().unwrap().to_owned(),
        None => code(found).trim().trim_end_matches(['{', '}', ' ']).to_owned(),
    }
}

/// The text of the comment whose first line is `at`, from `marker` on.
fn comment(lines: &[&str], at: usize, marker: &str) -> String {
    let prefix = lines[at].trim_start().split(' ').next().unwrap();
    let own = lines[at..].iter().map(|l| l.trim_start()).take_while(|l| l.starts_with(prefix));
    let text: Vec<&str> = own.map(|l| l.trim_start_matches('/').trim()).collect();
    text.join(" ").replacen(marker, "", 1).trim().to_owned()
}

/// Kind, place and reason of what is unsafe on line `at`.
fn entry(path: &str, lines: &[&str], at: usize) -> String {
    let line = code(lines[at]);
    let (kind, marker) =
        match (line.contains("unsafe fn") || line.contains("unsafe extern"), line.contains("unsafe impl")) {
            (true, _) => ("fn", "# Safety"),
            (_, true) => ("impl", "SAFETY:"),
            _ => ("block", "SAFETY:"),
        };
    let first = at.saturating_sub(LINES_ABOVE);
    let found = (first..at).rev().find(|i| lines[*i].contains("//") && lines[*i].contains(marker));
    // Another piece in between would have taken the comment, but for a signature above its own body.
    let free = found.filter(|i| !lines[i + 1..at].iter().any(|l| has_word(l, "unsafe")));
    let reason = match (kind, free) {
        (_, Some(i)) => comment(lines, i, marker),
        ("fn", None) => "its callers' blocks say why".to_owned(),
        _ => panic!("{path}:{}: an unsafe {kind} without a `// SAFETY:` comment", at + 1),
    };
    format!("| `{}` | {kind} | {} |\n", place(lines, at), reason.replace('|', "\\|"))
}

/// The whole list.
fn list() -> String {
    let mut out = String::from(
        "# Unsafe code\n\nEvery unsafe block, impl and function of the workspace: only this crate has any. Made from the \
         comments by `UNSAFE_LIST=write cargo test -p thermocline-kernels --test unsafe_list`; the same test compares it.\n",
    );
    let mut n = 0;
    for path in sources(&root().join("src")) {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        // A type is no code.
        let is_code = |l: &str| has_word(l, "unsafe") && !l.trim_start().starts_with("type ") && !l.contains("<unsafe");
        let found: Vec<usize> = (0..lines.len()).filter(|i| is_code(lines[*i])).collect();
        if !found.is_empty() {
            out += &format!("\n## {name}\n\n| where | what | why it holds, or what it asks |\n| --- | --- | --- |\n");
            found.iter().for_each(|at| out += &entry(&name, &lines, *at));
            n += found.len();
        }
    }
    out + &format!("\n{n} in all.\n")
}

#[test]
fn every_piece_of_unsafe_code_has_its_reason_and_the_list_is_up_to_date() {
    let (path, list) = (root().join("UNSAFE.md"), list());
    if std::env::var("UNSAFE_LIST").is_ok_and(|v| v == "write") {
        fs::write(&path, &list).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap();
    let differs = written.lines().zip(list.lines()).find(|(a, b)| a != b);
    assert!(written == list, "UNSAFE.md is out of date, write it again with UNSAFE_LIST=write: {differs:?}");
}

#[test]
fn no_other_crate_has_any() {
    let workspace = root().parent().unwrap();
    for name in ["src/main.rs", "datasets/src/lib.rs", "calibrate/src/lib.rs", "split/src/lib.rs", "runtime/src/lib.rs"]
        .into_iter()
        .chain(["analysis/src/lib.rs", "fuzz/src/lib.rs"])
    {
        let text = fs::read_to_string(workspace.join(name)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{name}");
    }
}

#[test]
#[should_panic(expected = "without a `// SAFETY:` comment")]
fn a_block_without_a_reason_is_found() {
    entry("x.rs", &["fn f() {", "    // It is fine.", "    unsafe { g() }"], 2);
}
