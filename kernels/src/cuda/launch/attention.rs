//! Attention of one position.

use super::{THREADS, address, floats, u32_of};
use crate::cuda::backend::Launch;
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;

/// Ranges that [`attend`] can divide the positions into.
pub const MAX_SPLITS: usize = 128;

/// The shape of attention.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions that the cache holds.
    pub capacity: usize,
}

impl Heads {
    fn qkv(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Values of the keys, or the values, of one layer.
    pub fn cache_values(&self) -> usize {
        self.n_kv_heads * self.capacity * self.head_dim
    }

    /// Numbers of the partial results over `n_splits` ranges of positions.
    pub fn partial_values(&self, n_splits: usize) -> usize {
        self.n_heads * n_splits * (self.head_dim + 2)
    }

    /// Heads that a block of [`attend`] takes at a time, and the `head_dim` that its kernel is made for.
    fn attend_shape(&self) -> (usize, usize) {
        let made_for = self.head_dim.next_power_of_two().clamp(64, 256);
        let (least, most) = match self.head_dim {
            64 | 128 => (1, 16),
            256 => (1, 8),
            _ => (4, 8),
        };
        ((self.n_heads / self.n_kv_heads).next_power_of_two().clamp(least, most), made_for)
    }

    /// Counters of [`attend`]: one for each group of heads, or for each part of it that a block takes at a time.
    pub fn counters(&self) -> usize {
        self.n_kv_heads * (self.n_heads / self.n_kv_heads).div_ceil(self.attend_shape().0)
    }

    pub(super) fn check(&self, qkv: &View, n: usize, keys: &View, values: &View) {
        floats(qkv, n * self.qkv());
        assert!(keys.len() >= 2 * self.cache_values() && values.len() >= 2 * self.cache_values(), "key/value cache");
    }
}

/// Cosines and sines `[capacity, head_dim / 2]`.
#[derive(Debug, Clone, Copy)]
pub struct RopeTables<'a> {
    /// Cosines.
    pub cos: &'a View,
    /// Sines.
    pub sin: &'a View,
}

/// Attention of the step's token over the cache, to which its key and value are appended (f16
/// `[n_kv_heads, capacity, head_dim]` each). `qkv` is `[q | k | v]`; `out` is `[n_heads, head_dim]`; `partial` holds
/// [`Heads::partial_values`]; `arrived`, u32 [`Heads::counters`], is zero before and after.
///
/// # Errors
/// See the module.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    device: &Device,
    heads: Heads,
    n_splits: usize,
    qkv: &View,
    step: &View,
    [keys, values]: [&View; 2],
    rope: RopeTables<'_>,
    [partial, arrived]: [&View; 2],
    out: &View,
) -> Result<()> {
    heads.check(qkv, 1, keys, values);
    floats(arrived, heads.counters());
    floats(partial, heads.partial_values(n_splits));
    floats(out, heads.n_heads * heads.head_dim);
    floats(rope.cos, heads.capacity * heads.head_dim / 2);
    floats(rope.sin, heads.capacity * heads.head_dim / 2);
    assert!((1..=MAX_SPLITS).contains(&n_splits), "splits");
    let (at_once, made_for) = heads.attend_shape();
    assert!(heads.head_dim <= made_for && heads.head_dim.is_multiple_of(2), "head_dim");
    let less = if heads.head_dim < made_for { "_less" } else { "" };
    let launch = Launch {
        kernel: format!("attend_{at_once}x{made_for}{less}"),
        grid: [heads.counters() as u32, n_splits as u32],
        block: THREADS,
        shared_bytes: 0,
        args: vec![
            address(qkv),
            address(step),
            address(keys),
            address(values),
            address(rope.cos),
            address(rope.sin),
            u32_of(heads.n_heads),
            u32_of(heads.n_kv_heads),
            u32_of(heads.head_dim),
            u32_of(heads.capacity),
            address(partial),
            address(arrived),
            address(out),
        ],
    };
    device.launch(launch, &[qkv, step, keys, values, rope.cos, rope.sin, partial, arrived, out])
}
