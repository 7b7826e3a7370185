//! Fills one layer's sums, a window at a time.
//!
//! Work is split over tokens where a token's threshold is sought and over neurons where counts are added, so there is
//! one set of accumulators whatever the number of threads, and every sum has one order.

use super::{
    fixed::{add_fixed, add_fixed_moment, triangle_len},
    histogram::{HISTOGRAM_BINS, bin},
    overlap::count_overlap,
    samples::SamplePlan,
    selection::{score, thresholds},
    sums::LayerSums,
};
use crate::{
    Error, Result,
    dense::{Activations, tensor, with_values},
    settings::{Settings, TOP_SHARES},
};
use rayon::prelude::*;
use thermocline_datasets::ModelConfig;

/// Neurons per task: its histograms (64 KB) stay in a core's second-level cache.
const BLOCK: usize = 128;
const TOP10: usize = 0;
const TOP30: usize = 2;

type Thresholds = [f32; TOP_SHARES.len()];

/// Counts of `BLOCK` neighbouring neurons.
#[derive(Default)]
struct Block {
    first: usize,
    abs: Vec<i128>,
    square: Vec<i128>,
    nonzero: Vec<u32>,
    top: [Vec<u32>; TOP_SHARES.len()],
    histogram: Vec<u32>,
}

pub(crate) struct Accumulator<'a> {
    layer: usize,
    sparse: bool,
    active_index: usize,
    plan: &'a SamplePlan,
    second_moment: bool,
    blocks: Vec<Block>,
    sums: LayerSums,
}

impl<'a> Accumulator<'a> {
    pub(crate) fn new(
        config: &ModelConfig,
        settings: &Settings,
        plan: &'a SamplePlan,
        layer: usize,
        down_norm: Vec<f32>,
    ) -> Result<Self> {
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let block = |first: usize| {
            let n = BLOCK.min(ffn - first);
            Block {
                first,
                abs: vec![0; n],
                square: vec![0; n],
                nonzero: vec![0; n],
                top: std::array::from_fn(|_| vec![0; n]),
                histogram: vec![0; n * HISTOGRAM_BINS],
            }
        };
        let moment = if settings.second_moment { triangle_len(hidden) } else { 0 };
        Ok(Accumulator {
            layer,
            sparse: config.activation.is_sparse(),
            active_index: settings.active_index()?,
            plan,
            second_moment: settings.second_moment,
            blocks: (0..ffn).step_by(BLOCK).map(block).collect(),
            sums: LayerSums {
                ffn_input_square: vec![0; hidden],
                qkv_input_square: vec![0; hidden],
                attention_output_square: vec![0; config.n_heads * config.head_dim],
                ffn_input_second_moment: vec![0; moment],
                down_norm,
                ..LayerSums::default()
            },
        })
    }

    /// Input of the query, key and value projections, `[window_len, hidden_size]`.
    pub(crate) fn add_qkv_input(&mut self, window: usize, x: &[f32]) -> Result<()> {
        let ok = add_squares(&mut self.sums.qkv_input_square, x);
        self.check(ok, window, "attention input")
    }

    /// Input of the output projection, `[window_len, n_heads * head_dim]`.
    pub(crate) fn add_attention_output(&mut self, window: usize, x: &[f32]) -> Result<()> {
        let ok = add_squares(&mut self.sums.attention_output_square, x);
        self.check(ok, window, "attention output")
    }

    /// Input of the feed-forward half, `[window_len, hidden_size]`.
    pub(crate) fn add_ffn_input(&mut self, window: usize, x: &[f32]) -> Result<()> {
        let ok = add_squares(&mut self.sums.ffn_input_square, x);
        self.check(ok, window, "feed-forward input")?;
        if self.second_moment {
            let hidden = self.sums.ffn_input_square.len();
            let x = tensor(x.to_vec(), &[x.len() / hidden, hidden])?;
            let product = x.t()?.matmul(&x)?;
            let ok =
                with_values(&product, |product| add_moment(&mut self.sums.ffn_input_second_moment, product, hidden))?;
            self.check(ok, window, "feed-forward input's second moment")?;
        }
        Ok(())
    }

    /// The neurons' activations of a window.
    pub(crate) fn add_activations(&mut self, window: usize, activations: &Activations) -> Result<()> {
        let (h, ffn) = (activations.h.as_slice(), activations.intermediate_size);
        let norms = self.sums.down_norm.as_slice();
        let limits: Vec<Thresholds> =
            h.par_chunks(ffn).map_init(Vec::new, |scratch, h| thresholds(h, norms, scratch)).collect();
        let ok =
            self.blocks.par_iter_mut().map(|block| block.add(h, ffn, norms, &limits)).reduce(|| true, |a, b| a && b);
        self.add_overlap(h, ffn, &limits);
        self.add_samples(window, h, ffn, &limits);
        self.check(ok, window, "activations")
    }

    fn add_overlap(&mut self, h: &[f32], ffn: usize, limits: &[Thresholds]) {
        let (norms, words) = (self.sums.down_norm.as_slice(), ffn.div_ceil(64));
        let sparse = self.sparse;
        self.sums.overlap.par_iter_mut().enumerate().filter(|(set, _)| *set != 0 || sparse).for_each(
            |(set, counts)| {
                let mut rows = vec![0u64; limits.len() * words];
                for ((row, h), limits) in rows.chunks_exact_mut(words).zip(h.chunks_exact(ffn)).zip(limits) {
                    let limit = [f32::from_bits(1), limits[TOP10], limits[TOP30]][set];
                    for ((word, h), norms) in row.iter_mut().zip(h.chunks(64)).zip(norms.chunks(64)) {
                        *word = pack(h, norms, limit);
                    }
                }
                count_overlap(&rows, words, counts);
            },
        );
    }

    fn add_samples(&mut self, window: usize, h: &[f32], ffn: usize, limits: &[Thresholds]) {
        for t in self.plan.positions(window) {
            let active = if self.sparse { f32::from_bits(1) } else { limits[t][self.active_index] };
            let row = &h[t * ffn..(t + 1) * ffn];
            for (limit, bits) in [(active, &mut self.sums.active), (limits[t][TOP10], &mut self.sums.active_top10)] {
                let bytes = row.chunks(8).zip(self.sums.down_norm.chunks(8));
                bits.extend(bytes.map(|(h, norms)| pack(h, norms, limit) as u8));
            }
        }
    }

    fn check(&self, ok: bool, window: usize, what: &'static str) -> Result<()> {
        if ok { Ok(()) } else { Err(Error::NotFinite { layer: self.layer, window, what }) }
    }

    /// The finished sums.
    pub(crate) fn into_sums(mut self) -> LayerSums {
        for block in std::mem::take(&mut self.blocks) {
            self.sums.abs.extend(block.abs);
            self.sums.square.extend(block.square);
            self.sums.nonzero.extend(block.nonzero);
            self.sums.histogram.extend(block.histogram);
            // Shares are the outer dimension: gather share by share below.
            self.sums.top.extend(block.top.iter().flatten());
        }
        self.sums.top = share_major(&self.sums.top, self.sums.nonzero.len());
        self.sums
    }
}

/// From `[block][share][neuron in block]` to `[share][neuron]`.
fn share_major(blocks: &[u32], ffn: usize) -> Vec<u32> {
    let mut out = vec![0; blocks.len()];
    for (share, out) in out.chunks_exact_mut(ffn).enumerate() {
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            let start = index * BLOCK * TOP_SHARES.len() + share * out.len();
            out.copy_from_slice(&blocks[start..start + out.len()]);
        }
    }
    out
}

impl Block {
    /// Adds a window; false if a sum is not finite.
    fn add(&mut self, h: &[f32], ffn: usize, norms: &[f32], limits: &[Thresholds]) -> bool {
        let n = self.abs.len();
        let norms = &norms[self.first..self.first + n];
        let (mut abs_sum, mut square_sum) = (vec![0.0f64; n], vec![0.0f64; n]);
        let [top0, top1, top2, top3] = self.top.each_mut();
        // Slices of one known length, so that the compiler drops the bounds checks and vectorises.
        let (top0, top1, top2, top3) = (&mut top0[..n], &mut top1[..n], &mut top2[..n], &mut top3[..n]);
        let nonzero = &mut self.nonzero[..n];
        for (row, limits) in h.chunks_exact(ffn).zip(limits) {
            let row = &row[self.first..self.first + n];
            for i in 0..n {
                let (magnitude, value) = (row[i].abs(), score(row[i], norms[i]));
                nonzero[i] += u32::from(magnitude > 0.0);
                top0[i] += u32::from(value >= limits[0]);
                top1[i] += u32::from(value >= limits[1]);
                top2[i] += u32::from(value >= limits[2]);
                top3[i] += u32::from(value >= limits[3]);
            }
            for i in 0..n {
                let magnitude = f64::from(row[i].abs());
                abs_sum[i] += magnitude;
                square_sum[i] += magnitude * magnitude;
            }
            for (&h, histogram) in row.iter().zip(self.histogram.as_chunks_mut::<HISTOGRAM_BINS>().0) {
                histogram[bin(h.abs())] += u32::from(h != 0.0);
            }
        }
        let abs = self.abs.iter_mut().zip(abs_sum).all(|(total, sum)| add_fixed(total, sum));
        abs && self.square.iter_mut().zip(square_sum).all(|(total, sum)| add_fixed(total, sum))
    }
}

/// Bit `i` is set if neuron `i` scores at least `limit`; at most 64 neurons.
fn pack(h: &[f32], norms: &[f32], limit: f32) -> u64 {
    h.iter().zip(norms).enumerate().fold(0, |word, (i, (&h, &norm))| word | u64::from(score(h, norm) >= limit) << i)
}

/// Adds each channel's sum of squares over the rows of `x`.
fn add_squares(totals: &mut [i128], x: &[f32]) -> bool {
    let mut sums = vec![0.0f64; totals.len()];
    for row in x.chunks_exact(totals.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
    }
    totals.iter_mut().zip(sums).all(|(total, sum)| add_fixed(total, sum))
}

/// Adds the upper triangle of `product [hidden, hidden]`.
fn add_moment(totals: &mut [i64], product: &[f32], hidden: usize) -> bool {
    let mut rows = Vec::with_capacity(hidden);
    let mut rest = totals;
    for i in 0..hidden {
        let (row, tail) = rest.split_at_mut(hidden - i);
        rows.push(row);
        rest = tail;
    }
    rows.into_par_iter().enumerate().with_min_len(16).all(|(i, totals)| {
        let row = &product[i * hidden + i..(i + 1) * hidden];
        totals.iter_mut().zip(row).all(|(total, &v)| add_fixed_moment(total, v))
    })
}
