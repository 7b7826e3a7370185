//! The small element-wise steps of a decoder, on f32 slices.

use half::f16;

/// RMSNorm (arXiv 1910.07467): `out_j = x_j / rms(x) * weight_j`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
    for c in chunks {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += v * v;
        }
    }
    let mean = (lanes.iter().sum::<f32>() + rest) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

/// Rotary embedding (arXiv 2104.09864, rotate-half form) of one head at one position.
/// `cos` and `sin` hold `head_dim / 2` values for that position.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// Softmax in place; the largest logit is subtracted first.
pub fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    let inverse = 1.0 / sum;
    for v in x {
        *v *= inverse;
    }
}

/// `sum_j a_j * b_j` with 16 independent sums, which the compiler turns into vectors.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (ca, cb) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ca.zip(cb) {
        for ((l, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *l += a * b;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// `y_j += a * x_j`.
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Rounds to half precision, for the key/value cache.
pub fn to_f16(x: &[f32], out: &mut [f16]) {
    use half::slice::HalfFloatSliceExt;
    out.convert_from_f32_slice(x);
}

/// Widens from half precision.
pub fn from_f16(x: &[f16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    x.convert_to_f32_slice(out);
}

/// A sum over all bytes taken as u64 words: reads memory as fast as it can be read, for bandwidth measurements.
pub fn sum_bytes(bytes: &[u8]) -> f32 {
    let (_, words, _) = bytemuck::pod_align_to::<u8, [u64; 8]>(bytes);
    let mut lanes = [0u64; 8];
    for line in words {
        for (l, w) in lanes.iter_mut().zip(line) {
            *l = l.wrapping_add(*w);
        }
    }
    lanes.iter().fold(0u64, |a, b| a.wrapping_add(*b)) as f32
}
