//! Writes the token ids of every line of a file, one line each, for `checks/compare_tokenizer.py`.
//!
//!     cargo run --release -p thermocline-datasets --example tokenize -- MODEL LINES > ids.txt

use std::io::Write;
use thermocline_datasets::{Tokenizer, open_checkpoint};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, lines] = arguments.as_slice() else { return Err("expected MODEL LINES".into()) };
    let tokenizer = Tokenizer::from_json(&open_checkpoint(model.as_ref())?.tokenizer_json()?)?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for line in std::fs::read_to_string(lines)?.split('\n') {
        let ids = tokenizer.encode(line, false)?;
        writeln!(out, "{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))?;
        let decoded = tokenizer.decode(&ids)?;
        if decoded != line {
            eprintln!("not restored: {line:?} as {decoded:?}");
        }
    }
    Ok(())
}
