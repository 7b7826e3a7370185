//! Prompts: whole layers stream through the copy engine, a piece ahead, into products on the tensor cores.
//!
//! A prompt touches nearly every neuron, so that nothing is predicted: each piece of a layer's weights is decoded once
//! to bfloat16 pairs (16 bits of precision, `kernels::cuda::gemm`) and multiplied with all tokens of the batch.

use super::load::{Layer, Model};
use super::plan::{GpuPlan, heads};
use super::sections::Section;
use super::sketches::PinnedSketch;
use crate::Result;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::Encoding;
use thermocline_kernels::cuda::launch::{
    Added, DeviceMatrix, Norm, RopeTables, add_bias_rows, attend_rows, embed_rows, gate_rows, gemv, norm_rows,
    unpack_bundles, unpack_rows,
};
use thermocline_kernels::cuda::{Device, Gemm, Queue, Split, View, gemm};

/// One batch of a prompt in progress.
pub(super) struct Batch<'a> {
    pub device: &'a Device,
    pub config: &'a ModelConfig,
    pub plan: &'a GpuPlan,
    pub model: &'a Model,
    /// Tokens of the batch.
    pub n: usize,
    /// Tokens before it.
    pub past: usize,
}

/// Cold neurons `first .. first + n` (counted from the first cold one) of a section of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Piece {
    layer: usize,
    section: usize,
    first: usize,
    n: usize,
}

impl Batch<'_> {
    /// Appends `tokens`; the logits of the last one are in `Scratch::logits` when the device has finished.
    pub(super) fn run(&self, tokens: &[u32]) -> Result<()> {
        let (device, buffers, s) = (self.device, &self.model.prefill, &self.model.scratch);
        device.write(&buffers.tokens, bytemuck::cast_slice(tokens))?;
        embed_rows(device, &self.model.embedding, &buffers.tokens, self.n, &buffers.x)?;
        let pieces = self.cold_pieces();
        if let Some(&first) = pieces.first() {
            self.fetch(first, 0)?;
        }
        let mut next = 0;
        for (l, layer) in self.model.layers.iter().enumerate() {
            self.attention(layer)?;
            self.feed_forward(l, layer, &pieces, &mut next)?;
        }
        let row = 4 * self.config.hidden_size;
        device.copy(Queue::Compute, &s.x, &buffers.x.slice((self.n - 1) * row, row))?;
        let norm = Norm { weight: &self.model.final_norm, eps: self.config.rms_norm_eps, out: None };
        gemv(device, &self.model.head, &s.x, Some(norm), Added::default(), &s.logits)?;
        Ok(())
    }

    /// Bytes that a batch reads over the link: cold neurons, and the sketches that their residuals are added to.
    pub(super) fn link_bytes(&self) -> u64 {
        let sketches = self.model.layers.iter().filter_map(|layer| self.needed_sketch(layer));
        self.model.layers.iter().map(Layer::cold_bytes).sum::<u64>() + sketches.map(PinnedSketch::bytes).sum::<u64>()
    }

    fn attention(&self, layer: &Layer) -> Result<()> {
        let (device, config, buffers) = (self.device, self.config, &self.model.prefill);
        let (n, hidden) = (self.n, config.hidden_size);
        let input = [&buffers.input[0], &buffers.input[1]];
        let norm = Norm { weight: &layer.input_norm, eps: config.rms_norm_eps, out: None };
        norm_rows(device, &buffers.x, norm, n, hidden, input)?;
        self.multiply(&layer.qkv, &buffers.qkv, false)?;
        if let Some(bias) = &layer.qkv_bias {
            add_bias_rows(device, &buffers.qkv, bias, n, layer.qkv.rows)?;
        }
        let heads = heads(config, self.plan.request.base.context);
        let rope = RopeTables { cos: &self.model.rope[0], sin: &self.model.rope[1] };
        let cache = [&layer.keys, &layer.values];
        attend_rows(device, heads, (n, self.past), &buffers.qkv, cache, rope, input)?;
        self.multiply(&layer.o, &buffers.x, true)
    }

    /// `out[n, rows] (+)= input[n, columns] w^T`, a piece of rows at a time.
    fn multiply(&self, w: &DeviceMatrix, out: &View, add: bool) -> Result<()> {
        let (device, buffers) = (self.device, &self.model.prefill);
        let [hi, lo] = &buffers.rows[0];
        let a = self.input();
        for first in (0..w.rows).step_by(self.plan.prefill_neurons) {
            let n = self.plan.prefill_neurons.min(w.rows - first);
            unpack_rows(device, w, first, n, [hi, lo])?;
            let b = pair(hi, lo, w.encoding);
            let c = out.slice(4 * first, out.len() - 4 * first);
            let (m, k) = (self.n, w.columns);
            let task = Gemm { m, n, k, a: &a, b: &b, b_is_transposed: true, c: &c, c_stride: w.rows, add };
            gemm(device, &task)?;
        }
        Ok(())
    }

    fn feed_forward(&self, l: usize, layer: &Layer, pieces: &[Piece], next: &mut usize) -> Result<()> {
        let (device, config, buffers) = (self.device, self.config, &self.model.prefill);
        let norm = Norm { weight: &layer.ffn_norm, eps: config.rms_norm_eps, out: None };
        let input = [&buffers.input[0], &buffers.input[1]];
        norm_rows(device, &buffers.x, norm, self.n, config.hidden_size, input)?;
        if let Some(sketch) = self.needed_sketch(layer) {
            sketch.copy(device, Queue::Compute, 0)?;
        }
        for section in &layer.sections {
            let bundle = section.layout.bundle_bytes();
            for (first, n) in self.parts(section.hot.len() / bundle) {
                let bundles = section.hot.slice(first * bundle, n * bundle);
                self.neurons((layer, section), &bundles, (section.neurons.start + first, n))?;
            }
        }
        while let Some(piece) = pieces.get(*next).filter(|p| p.layer == l) {
            // This piece is there; the next one's buffer was last used by the piece before this one.
            device.order(Queue::Copy, Queue::Compute)?;
            device.order(Queue::Compute, Queue::Copy)?;
            if let Some(&ahead) = pieces.get(*next + 1) {
                self.fetch(ahead, *next + 1)?;
            }
            let section = &layer.sections[piece.section];
            let stored = buffers.stored[*next % 2].slice(0, piece.n * section.layout.bundle_bytes());
            self.neurons((layer, section), &stored, (section.first_cold() + piece.first, piece.n))?;
            *next += 1;
        }
        Ok(())
    }

    /// A layer's sketch that must be copied first: residuals are added to it, nothing else of a prompt needs it.
    fn needed_sketch<'l>(&self, layer: &'l Layer) -> Option<&'l PinnedSketch> {
        layer.pinned_sketch().filter(|_| self.plan.residuals).map(AsRef::as_ref)
    }

    /// `x += FFN(input)` for the `n` neurons of `bundles`, from neuron `first` on, of one section of a layer.
    fn neurons(&self, (layer, section): (&Layer, &Section), bundles: &View, (first, n): (usize, usize)) -> Result<()> {
        let (device, buffers, model) = (self.device, &self.model.prefill, self.model);
        let (m, hidden) = (self.n, self.config.hidden_size);
        let rows = &buffers.rows;
        let encoding = section.layout.encoding();
        let is_residual = encoding == Encoding::R4;
        let sketch = layer.sketch().filter(|_| is_residual).map(|sketch| (sketch, first - layer.n_always));
        let out = std::array::from_fn(|i| [&rows[i][0], &rows[i][1]]);
        unpack_bundles(device, section.layout, bundles, n, sketch, out)?;
        let weights: [Split; 3] = std::array::from_fn(|i| pair(&rows[i][0], &rows[i][1], encoding));
        let a = self.input();
        for (b, c) in [(&weights[0], &buffers.gate), (&weights[1], &buffers.up)] {
            gemm(device, &Gemm { m, n, k: hidden, a: &a, b, b_is_transposed: true, c, c_stride: n, add: false })?;
        }
        let h = [&buffers.h[0], &buffers.h[1]];
        gate_rows(device, [&buffers.gate, &buffers.up], (m, n), model.activation, h)?;
        let a = Split { hi: h[0].clone(), lo: Some(h[1].clone()) };
        let (b, c) = (&weights[2], &buffers.x);
        gemm(device, &Gemm { m, n: hidden, k: n, a: &a, b, b_is_transposed: false, c, c_stride: hidden, add: true })?;
        Ok(())
    }

    fn input(&self) -> Split {
        let [hi, lo] = &self.model.prefill.input;
        Split { hi: hi.clone(), lo: Some(lo.clone()) }
    }

    fn cold_pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (layer, l) in self.model.layers.iter().enumerate() {
            for (section, s) in l.sections.iter().enumerate() {
                let parts = self.parts(s.cold.len() / s.layout.bundle_bytes());
                pieces.extend(parts.map(|(first, n)| Piece { layer, section, first, n }));
            }
        }
        pieces
    }

    /// `n` neurons in parts that the buffers hold: the first of each, and how many.
    fn parts(&self, n: usize) -> impl Iterator<Item = (usize, usize)> {
        let step = self.plan.prefill_neurons;
        (0..n).step_by(step).map(move |first| (first, step.min(n - first)))
    }

    fn fetch(&self, piece: Piece, nth: usize) -> Result<()> {
        let section = &self.model.layers[piece.layer].sections[piece.section];
        let bundle = section.layout.bundle_bytes();
        let from = section.cold.slice(piece.first * bundle, piece.n * bundle);
        let to = self.model.prefill.stored[nth % 2].slice(0, piece.n * bundle);
        Ok(self.device.copy(Queue::Copy, &to, &from)?)
    }
}

/// Rows that are exactly bfloat16 have nothing in their low half.
fn pair(hi: &View, lo: &View, encoding: Encoding) -> Split {
    Split { hi: hi.clone(), lo: (!encoding.is_exact()).then(|| lo.clone()) }
}
