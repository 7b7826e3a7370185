//! Rotary position embedding, rotate-half form.
//!
//! Paper: arXiv 2104.09864, section 3.4.2; channel `i` is paired with `i + head_dim / 2` as the Hugging Face
//! checkpoints expect, not with its neighbour as in the paper.

/// Cosines and sines of every position of a window, `[window_len, head_dim / 2]` each.
pub(crate) struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rope {
    pub(crate) fn new(window_len: usize, head_dim: usize, theta: f32) -> Self {
        let half = head_dim / 2;
        let angles = (0..window_len * half).map(|i| {
            let (position, channel) = (i / half, i % half);
            // In f64: at position 100,000 an f32 angle is already wrong in the third digit.
            position as f64 * f64::from(theta).powf(-2.0 * channel as f64 / head_dim as f64)
        });
        let (cos, sin) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        Rope { cos, sin, half }
    }

    /// Writes `head [head_dim]`, plus `bias` if there is one, rotated to `position`, times `scale`.
    pub(crate) fn rotate(&self, head: &[f32], bias: Option<&[f32]>, position: usize, scale: f32, out: &mut [f32]) {
        let span = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[span.clone()], &self.sin[span]);
        let (low, high) = head.split_at(self.half);
        let (out_low, out_high) = out.split_at_mut(self.half);
        for i in 0..self.half {
            let (b_low, b_high) = bias.map_or((0.0, 0.0), |b| (b[i], b[i + self.half]));
            let (a, b) = ((low[i] + b_low) * scale, (high[i] + b_high) * scale);
            out_low[i] = a * cos[i] - b * sin[i];
            out_high[i] = b * cos[i] + a * sin[i];
        }
    }
}
