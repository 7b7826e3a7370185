//! The dense decoder, layer by layer, in f32 on the CPU.
//!
//! This is the reference that the rest of the project is measured against, so it shares nothing with the runtime's
//! kernels: matrix products are candle's, everything between them is plain loops.
//! A caller walks one layer at a time and may change the neurons' activations between
//! [`DenseLayer::neurons`] and [`DenseLayer::ffn_output`]:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
//! let checkpoint = thermocline_datasets::open_checkpoint("model.gguf".as_ref())?;
//! let (n_windows, window_len) = (1, 4);
//! let mut x = Embedding::load(checkpoint.as_ref())?.rows(&[1, 2, 3, 4])?; // [n_tokens, hidden_size]
//! for index in 0..checkpoint.config().n_layers {
//!     let layer = DenseLayer::load(checkpoint.as_ref(), index)?;
//!     x = layer.attention(&x, n_windows, window_len)?;
//!     let mut neurons = layer.neurons(&layer.ffn_input(&x)?)?;
//!     neurons.h.iter_mut().for_each(|h| if h.abs() < 1e-3 { *h = 0.0 });
//!     layer.ffn_output(&mut x, neurons.h)?; // adds to the residual stream
//! }
//! let logits = Head::load(checkpoint.as_ref())?.logits(&x)?; // [n_tokens, vocab_size]
//! # Ok(()) }
//! ```

mod attention;
mod embedding;
mod exponential;
mod gated;
mod head;
mod layer;
mod linear;
mod norm;
mod rope;
mod sequence;

pub use attention::AttentionInputs;
pub use embedding::Embedding;
pub(crate) use embedding::WHOLE_TABLE_BYTES_MAX;
pub use gated::GatedNeurons;
pub use head::Head;
pub use layer::{Activations, DenseLayer, Projection};
pub use linear::products;
pub(crate) use linear::{tensor, with_values};
pub use sequence::Sequence;
