//! Perplexity of the dense forward, to compare with another engine's:
//! `cargo run --release --example perplexity -- MODEL TEXT N_WINDOWS`.
//! Non-overlapping windows of 1024 tokens; mean cross-entropy of tokens 2..1024 of each.

#[path = "support/text.rs"]
mod text;

use std::path::Path;
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_datasets::open_checkpoint;

const WINDOW_LEN: usize = 1024;
const POSITIONS: usize = 128;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, n_windows] = arguments.as_slice() else {
        return Err("usage: perplexity MODEL TEXT N_WINDOWS".into());
    };
    let (checkpoint, n_windows) = (open_checkpoint(Path::new(model))?, n_windows.parse::<usize>()?);
    let all = text::tokens(checkpoint.as_ref(), Path::new(text))?;
    let tokens = all.get(..n_windows * WINDOW_LEN).ok_or("the text is too short")?;
    let hidden_size = checkpoint.config().hidden_size;
    let mut x = Embedding::load(checkpoint.as_ref())?.rows(tokens)?;
    for index in 0..checkpoint.config().n_layers {
        let layer = DenseLayer::load(checkpoint.as_ref(), index)?;
        for window in x.chunks_mut(WINDOW_LEN * hidden_size) {
            let mut next = layer.attention(window, 1, WINDOW_LEN)?;
            let neurons = layer.neurons(&layer.ffn_input(&next)?)?;
            layer.ffn_output(&mut next, neurons.h)?;
            window.copy_from_slice(&next);
        }
    }
    let head = Head::load(checkpoint.as_ref())?;
    let (mut sum, mut count) = (0.0f64, 0usize);
    for (batch, rows) in x.chunks(POSITIONS * hidden_size).enumerate() {
        let logits = head.logits(rows)?;
        for (row, logits) in logits.chunks(head.vocab_size()).enumerate() {
            let position = batch * POSITIONS + row;
            if (position + 1).is_multiple_of(WINDOW_LEN) {
                continue;
            }
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
            sum += total.ln() - f64::from(logits[tokens[position + 1] as usize] - max);
            count += 1;
        }
    }
    println!("perplexity {:.4} over {count} tokens", (sum / count as f64).exp());
    Ok(())
}
