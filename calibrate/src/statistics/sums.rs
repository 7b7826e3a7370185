//! One layer's statistics as integers: the form that is stored, and that shards are merged in.

use super::{
    fixed::triangle_len,
    histogram::HISTOGRAM_BINS,
    inputs::Input,
    overlap::{N_SETS, Overlap},
};
use crate::settings::{OVERLAP_LAGS, Settings, TOP_SHARES};
use thermocline_datasets::ModelConfig;

/// Element types of the statistics file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    U8,
    U32,
    F32,
    U64,
    I64,
}

impl Dtype {
    pub(crate) fn n_bytes(self) -> usize {
        match self {
            Dtype::U8 => 1,
            Dtype::U32 | Dtype::F32 => 4,
            Dtype::U64 | Dtype::I64 => 8,
        }
    }
}

/// One tensor of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Section {
    pub(crate) fn n_bytes(&self) -> usize {
        self.shape.iter().fold(self.dtype.n_bytes(), |n, length| n.saturating_mul(*length))
    }
}

/// The tensors of a layer in the order of its file: wide elements first, so that all of them are aligned.
/// Fixed-point sums are `[n, 2]` u64: low half, high half of a two's complement i128.
pub(crate) fn sections(config: &ModelConfig, settings: &Settings, n_samples: usize) -> Vec<Section> {
    let ffn = config.intermediate_size;
    let section = |name, dtype, shape: &[usize]| Section { name, dtype, shape: shape.to_vec() };
    // Version 1 has no sections, not even empty ones, of what came with the second moments of attention's inputs.
    let inputs = |is_old: fn(&Input) -> bool| {
        Input::ALL.into_iter().filter(move |input| is_old(input) || settings.attention_moments)
    };
    let squares = |input: Input| section(input.squares(), Dtype::U64, &[input.width(config), 2]);
    let moment = |input: Input| {
        let is_kept = settings.moments().any(|kept| kept == input);
        section(input.moment(), Dtype::I64, &[if is_kept { triangle_len(input.width(config)) } else { 0 }])
    };
    let mut out = vec![section("abs_sum", Dtype::U64, &[ffn, 2]), section("square_sum", Dtype::U64, &[ffn, 2])];
    out.extend(inputs(|input| *input != Input::Mixture).map(squares));
    out.push(section("overlap", Dtype::U64, &[N_SETS, OVERLAP_LAGS.len(), 2]));
    out.extend(inputs(|input| *input == Input::Ffn).map(moment));
    out.extend([
        section("nonzero", Dtype::U32, &[ffn]),
        section("top", Dtype::U32, &[TOP_SHARES.len(), ffn]),
        section("histogram", Dtype::U32, &[ffn, HISTOGRAM_BINS]),
        section("down_norm", Dtype::F32, &[ffn]),
        section("active", Dtype::U8, &[n_samples, ffn.div_ceil(8)]),
        section("active_top10", Dtype::U8, &[n_samples, ffn.div_ceil(8)]),
    ]);
    out
}

/// The values of [`sections`], in its order.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct LayerSums {
    pub(crate) abs: Vec<i128>,
    pub(crate) square: Vec<i128>,
    /// Of the inputs' squares, in the order of [`Input::ALL`]; empty where they are not kept.
    pub(crate) input_squares: [Vec<i128>; Input::ALL.len()],
    pub(crate) overlap: Overlap,
    /// Of the products of the inputs' channels, upper triangles, likewise.
    pub(crate) input_moments: [Vec<i64>; Input::ALL.len()],
    pub(crate) nonzero: Vec<u32>,
    pub(crate) top: Vec<u32>,
    pub(crate) histogram: Vec<u32>,
    pub(crate) down_norm: Vec<f32>,
    pub(crate) active: Vec<u8>,
    pub(crate) active_top10: Vec<u8>,
}

impl LayerSums {
    /// The bytes of the layer's sections, one after the other, little-endian.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let sums = [&self.abs, &self.square].into_iter().chain(&self.input_squares);
        // A little-endian i128 is its low half followed by its high half.
        sums.flatten().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        self.overlap.as_flattened().as_flattened().iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        self.input_moments.iter().flatten().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        for counts in [&self.nonzero, &self.top, &self.histogram] {
            counts.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        }
        self.down_norm.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        out.extend_from_slice(&self.active);
        out.extend_from_slice(&self.active_top10);
        out
    }

    /// The inverse of [`LayerSums::encode`] for bytes of `sections`; `None` if there are too few.
    pub(crate) fn decode(bytes: &[u8], sections: &[Section]) -> Option<Self> {
        let mut rest = bytes;
        let mut next = sections.iter();
        let mut take = || {
            let (head, tail) = rest.split_at_checked(next.next()?.n_bytes())?;
            rest = tail;
            Some(head)
        };
        let sums = |bytes: &[u8]| numbers(bytes, i128::from_le_bytes);
        let counts = |bytes: &[u8]| numbers(bytes, u32::from_le_bytes);
        let mut out = LayerSums { abs: sums(take()?), square: sums(take()?), ..LayerSums::default() };
        let is_there = |name: &str| sections.iter().any(|section| section.name == name);
        for (input, squares) in Input::ALL.into_iter().zip(&mut out.input_squares) {
            if is_there(input.squares()) {
                *squares = sums(take()?);
            }
        }
        let overlap = numbers(take()?, u64::from_le_bytes);
        out.overlap.as_flattened_mut().as_flattened_mut().iter_mut().zip(overlap).for_each(|(to, v)| *to = v);
        for (input, moment) in Input::ALL.into_iter().zip(&mut out.input_moments) {
            if is_there(input.moment()) {
                *moment = numbers(take()?, i64::from_le_bytes);
            }
        }
        out.nonzero = counts(take()?);
        out.top = counts(take()?);
        out.histogram = counts(take()?);
        out.down_norm = numbers(take()?, f32::from_le_bytes);
        out.active = take()?.to_vec();
        out.active_top10 = take()?.to_vec();
        Some(out)
    }

    /// Adds the statistics of windows that come later in the corpus; the name of the first that does not fit.
    pub(crate) fn merge(&mut self, later: &LayerSums) -> Result<(), &'static str> {
        let same_bits = |a: &[f32], b: &[f32]| a.iter().map(|v| v.to_bits()).eq(b.iter().map(|v| v.to_bits()));
        if !same_bits(&self.down_norm, &later.down_norm) {
            return Err("down_norm differs");
        }
        add(&mut self.abs, &later.abs, i128::checked_add)?;
        add(&mut self.square, &later.square, i128::checked_add)?;
        let mut squares = self.input_squares.iter_mut().zip(&later.input_squares);
        squares.try_for_each(|(to, from)| add(to, from, i128::checked_add))?;
        let overlap = later.overlap.as_flattened().as_flattened();
        add(self.overlap.as_flattened_mut().as_flattened_mut(), overlap, u64::checked_add)?;
        let mut moments = self.input_moments.iter_mut().zip(&later.input_moments);
        moments.try_for_each(|(to, from)| add(to, from, i64::checked_add))?;
        add(&mut self.nonzero, &later.nonzero, u32::checked_add)?;
        add(&mut self.top, &later.top, u32::checked_add)?;
        add(&mut self.histogram, &later.histogram, u32::checked_add)?;
        self.active.extend_from_slice(&later.active);
        self.active_top10.extend_from_slice(&later.active_top10);
        Ok(())
    }
}

fn numbers<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| from(*chunk)).collect()
}

fn add<T: Copy>(to: &mut [T], from: &[T], sum: impl Fn(T, T) -> Option<T>) -> Result<(), &'static str> {
    if to.len() != from.len() {
        return Err("lengths differ");
    }
    for (to, &from) in to.iter_mut().zip(from) {
        *to = sum(*to, from).ok_or("a sum overflows")?;
    }
    Ok(())
}
