//! Writes a tensor as raw little-endian f32, for `checks/compare_tensors.py`; without a name, lists the tensors.
//!
//!     cargo run --release -p thermocline-datasets --example dump_tensor -- MODEL [NAME] > tensor.f32

use std::io::Write;
use thermocline_datasets::open_checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match arguments.as_slice() {
        [model] => {
            let checkpoint = open_checkpoint(model.as_ref())?;
            writeln!(out, "{:?}", checkpoint.config())?;
            for name in checkpoint.names() {
                writeln!(out, "{name} {:?}", checkpoint.info(&name))?;
            }
        }
        [model, name] => {
            for value in open_checkpoint(model.as_ref())?.load(name)? {
                out.write_all(&value.to_le_bytes())?;
            }
        }
        _ => return Err("expected MODEL [NAME]".into()),
    }
    Ok(())
}
