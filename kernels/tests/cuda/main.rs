//! The CUDA kernels against plain loops in f64. They run in the emulator; on a GPU if `THERMOCLINE_TEST_DEVICE=cuda`.
//!
//! Tolerances are bounds of the rounding errors, from the sizes of what is added: u is half of `f32::EPSILON`, and a sum
//! in which no term passes through more than n additions errs by at most about `n u` times the sum of absolute values.
#![cfg(feature = "cuda")]
#![allow(missing_docs, clippy::unwrap_used)]

mod attention;
mod choose;
mod divide;
mod emulator;
mod exact;
mod fatbin;
mod fetch;
mod ffn;
mod matrix;
mod predict;
mod prefill;
mod residual;
mod sketch;

use std::path::Path;
use std::sync::OnceLock;
use thermocline_kernels::cuda::{Device, Memory, build_emulator};
use thermocline_kernels::exact::bits16;
use thermocline_kernels::{AlignedBuf, Encoding, RowRef, ScaleFit, pack, unpack};

/// Half a unit in the last place of 1.
const U: f64 = f32::EPSILON as f64 / 2.0;

fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| match std::env::var("THERMOCLINE_TEST_DEVICE").as_deref() {
        Ok("cuda") => Device::open(0).unwrap(),
        _ => Device::emulated(&build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()).unwrap(),
    })
}

/// xorshift64*; proptest gives the seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.bits()) * n as u64) >> 32) as usize
    }

    /// Within -1 and 1.
    fn value(&mut self) -> f32 {
        (self.bits() >> 7) as f32 / (1 << 24) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

fn upload<T: bytemuck::NoUninit>(values: &[T]) -> Memory {
    device().upload(bytemuck::cast_slice(values)).unwrap()
}

/// Device memory full of NaN.
fn poisoned(bytes: usize) -> Memory {
    upload(&vec![0xffu8; bytes])
}

fn pinned<T: bytemuck::NoUninit>(values: &[T]) -> Memory {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let mut host = AlignedBuf::zeroed(bytes.len()).unwrap();
    host[..bytes.len()].copy_from_slice(bytes);
    device().pin(host).unwrap()
}

fn read<T: bytemuck::Pod>(memory: &Memory) -> Vec<T> {
    device().read_all(&memory.view()).unwrap()
}

/// Rows in an encoding, with what they decode to and what the kernels add up to get there.
struct Rows {
    encoding: Encoding,
    columns: usize,
    stride: usize,
    bytes: Vec<u8>,
    /// `[rows, columns]`.
    weights: Vec<f32>,
    /// The largest part of a weight that a kernel multiplies and adds on its own, `[rows, columns]`: q4 codes are taken
    /// from 0 to 15, and eight times the scale is subtracted at the end.
    sizes: Vec<f64>,
}

impl Rows {
    fn random(encoding: Encoding, rows: usize, columns: usize, random: &mut Random) -> Self {
        Self::packed(encoding, columns, (0..rows).map(|_| random.values(columns)))
    }

    fn packed(encoding: Encoding, columns: usize, rows: impl Iterator<Item = Vec<f32>>) -> Self {
        if !Encoding::PLAIN.contains(&encoding) {
            let bits = rows.map(|row| row.into_iter().map(bits16).collect::<Vec<u16>>());
            return exact::matrix(encoding, columns, &bits.collect::<Vec<_>>());
        }
        let stride = encoding.row_stride(columns);
        let packed = |row: Vec<f32>| {
            let mut bytes = vec![0; stride];
            pack(encoding, &row, ScaleFit::Absmax, &mut bytes).unwrap();
            bytes
        };
        Self::new(encoding, columns, stride, rows.flat_map(packed).collect())
    }

    fn new(encoding: Encoding, columns: usize, stride: usize, bytes: Vec<u8>) -> Self {
        let rows = bytes.len() / stride;
        let (mut weights, mut sizes) = (vec![0.0; rows * columns], Vec::new());
        for (out, row) in weights.chunks_exact_mut(columns).zip(bytes.chunks_exact(stride)) {
            let row = RowRef::from_matrix_row(encoding, columns, row);
            unpack(encoding, row, out);
            sizes.extend(term_sizes(encoding, row, out));
        }
        Self { encoding, columns, stride, bytes, weights, sizes }
    }

    fn weights(&self, row: usize) -> &[f32] {
        &self.weights[row * self.columns..(row + 1) * self.columns]
    }

    /// `row . x`, and the sum of the sizes of its terms.
    fn dot(&self, row: usize, x: &[f64]) -> (f64, f64) {
        let sizes = &self.sizes[row * self.columns..(row + 1) * self.columns];
        (dot(self.weights(row), x), sizes.iter().zip(x).map(|(s, x)| s * x.abs()).sum())
    }
}

/// A row of small whole numbers that every encoding stores exactly: the first of each group makes the scale 1.
fn whole_row(encoding: Encoding, columns: usize, random: &mut Random) -> Vec<f32> {
    let first = if encoding == Encoding::Q8 { -127.0 } else { -8.0 };
    (0..columns).map(|c| if c % 32 == 0 { first } else { random.below(7) as f32 - 3.0 }).collect()
}

/// Few whole numbers, none where the rows have large ones: sums of their products are exact in any order.
fn whole_input(columns: usize, random: &mut Random) -> Vec<f32> {
    let mut value =
        |c: usize| if !c.is_multiple_of(32) && random.below(24) == 0 { random.below(5) as f32 - 2.0 } else { 0.0 };
    (0..columns).map(&mut value).collect()
}

fn term_sizes<'a>(encoding: Encoding, row: RowRef<'a>, weights: &'a [f32]) -> impl Iterator<Item = f64> + 'a {
    weights.iter().enumerate().map(move |(c, w)| {
        let offset = if matches!(encoding, Encoding::Q4 | Encoding::R4) {
            let bits = [row.scales[c / 32 * 2], row.scales[c / 32 * 2 + 1]];
            16.0 * half::f16::from_le_bytes(bits).to_f64().abs()
        } else {
            0.0
        };
        f64::from(w.abs()) + offset
    })
}

fn dot(w: &[f32], x: &[f64]) -> f64 {
    w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// More additions than any term of a dot product of `columns` passes through: those of its chunk, one for each chunk of
/// its lane, those over lanes and warps, and a few steps before and after.
fn additions(columns: usize) -> f64 {
    33.0 + columns as f64 / 256.0 + 5.0 + 16.0 + 8.0
}

#[track_caller]
fn assert_near(got: f32, want: f64, tolerance: f64, what: &str) {
    assert!((f64::from(got) - want).abs() <= tolerance, "{what}: {got}, expected {want} within {tolerance:e}");
}
