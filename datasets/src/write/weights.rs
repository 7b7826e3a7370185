use super::TinyModel;
use crate::Random;
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

/// Every tensor of the model, in the order of its name list; equal arguments give equal weights.
pub fn tiny_tensors(model: &TinyModel, seed: u64) -> Vec<TinyTensor> {
    architectures::tensors(&model.config())
        .into_iter()
        .enumerate()
        .map(|(index, spec)| {
            // Each tensor has its own stream, so that one model's layers do not change with another's vocabulary.
            let mut random = Random::new(seed ^ (index as u64 + 1).wrapping_mul(0xD134_2543_DE82_EF95));
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
