//! Fills one layer's sums, a window at a time.
//!
//! Work is split over tokens where a token's threshold is sought and over neurons where counts are added, so there is
//! one set of accumulators whatever the number of threads, and every sum has one order.

use super::{
    fixed::{add_fixed, add_fixed_moment, triangle_len},
    histogram::{HISTOGRAM_BINS, bin},
    inputs::Input,
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
        let ffn = config.intermediate_size;
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
        let is_kept = |input: Input| input != Input::Mixture || settings.attention_moments;
        let input_squares = Input::ALL.map(|input| vec![0; if is_kept(input) { input.width(config) } else { 0 }]);
        let mut input_moments: [Vec<i64>; Input::ALL.len()] = Default::default();
        settings.moments().for_each(|input| input_moments[input as usize] = vec![0; triangle_len(input.width(config))]);
        Ok(Accumulator {
            layer,
            sparse: config.activation.is_sparse(),
            active_index: settings.active_index()?,
            plan,
            blocks: (0..ffn).step_by(BLOCK).map(block).collect(),
            sums: LayerSums { input_squares, input_moments, down_norm, ..LayerSums::default() },
        })
    }

    /// What projections read in a window, `[window_len, input.width]`.
    pub(crate) fn add_input(&mut self, window: usize, input: Input, x: &[f32]) -> Result<()> {
        let squares = &mut self.sums.input_squares[input as usize];
        if squares.is_empty() {
            return Ok(());
        }
        let (width, ok) = (squares.len(), add_squares(squares, x));
        self.check(ok, window, input.name())?;
        let moment = &mut self.sums.input_moments[input as usize];
        if moment.is_empty() {
            return Ok(());
        }
        let x = tensor(x.to_vec(), &[x.len() / width, width])?;
        let ok = with_values(&x.t()?.matmul(&x)?, |product| add_moment(moment, product, width))?;
        self.check(ok, window, "second moment of an input")
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

/// Adds the upper triangle of `product [width, width]`.
fn add_moment(totals: &mut [i64], product: &[f32], width: usize) -> bool {
    let mut rows = Vec::with_capacity(width);
    let mut rest = totals;
    for i in 0..width {
        let (row, tail) = rest.split_at_mut(width - i);
        rows.push(row);
        rest = tail;
    }
    rows.into_par_iter().enumerate().with_min_len(16).all(|(i, totals)| {
        let row = &product[i * width + i..(i + 1) * width];
        totals.iter_mut().zip(row).all(|(total, &v)| add_fixed_moment(total, v))
    })
}
