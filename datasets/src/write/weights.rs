use super::TinyModel;
use crate::architectures::{self, Role};
use half::bf16;

/// A tensor of a tiny model: canonical name, `[rows, columns]` or `[n]`, and row-major values exact in bf16.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyTensor {
    /// Canonical name.
    pub name: String,
    /// Canonical shape.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// SplitMix64: tiny, seedable, and the same on every machine, which is all that is asked of it.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), with 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// About normal, mean 0, variance 1: the sum of twelve uniforms less six, so no transcendental function whose
    /// last bit depends on the platform is involved.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// Every tensor of the model, in the order of its name list; equal arguments give equal weights.
pub fn tiny_tensors(model: &TinyModel, seed: u64) -> Vec<TinyTensor> {
    architectures::tensors(&model.config())
        .into_iter()
        .enumerate()
        .map(|(index, spec)| {
            // Each tensor has its own stream, so that one model's layers do not change with another's vocabulary.
            let mut random = Random(seed ^ (index as u64 + 1).wrapping_mul(0xD134_2543_DE82_EF95));
            let values = values(&mut random, spec.role, &spec.shape);
            TinyTensor { name: spec.name, shape: spec.shape, values }
        })
        .collect()
}

fn values(random: &mut Random, role: Role, shape: &[usize]) -> Vec<f32> {
    let columns = shape.last().copied().unwrap_or(1).max(1);
    let fan = 1.0 / (columns as f32).sqrt();
    let n: usize = shape.iter().product();
    let mut lean = 0.0;
    (0..n)
        .map(|i| {
            let noise = random.normal();
            if i % columns == 0 && role == Role::Gate {
                lean = 4.0 * random.uniform() - 0.5;
            }
            let value = match role {
                Role::Norm => 1.0 + 0.1 * noise,
                Role::QueryBias | Role::KeyBias | Role::ValueBias => 0.1 * noise,
                Role::Embedding => 2.0 * fan * (noise + 1.0),
                Role::Head => 2.0 * fan * noise,
                Role::Gate => fan * noise - lean / columns as f32,
                _ => fan * noise,
            };
            bf16::from_f32(value).to_f32()
        })
        .collect()
}
