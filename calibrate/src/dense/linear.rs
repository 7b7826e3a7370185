//! Products with a weight matrix, and access to a tensor's values without a copy.

use crate::{Error, Result, error::check_len};
use candle_core::{CpuStorage, Device, Storage, Tensor};
use thermocline_datasets::Checkpoint;

/// A weight `[n_out, n_in]` with an optional bias `[n_out]`.
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Vec<f32>>,
    n_out: usize,
    n_in: usize,
}

impl Linear {
    /// Loads `<name>.weight`, and `<name>.bias` if `with_bias`.
    pub(crate) fn load(ckpt: &dyn Checkpoint, name: &str, shape: [usize; 2], with_bias: bool) -> Result<Self> {
        let [n_out, n_in] = shape;
        let weight = load_checked(ckpt, &format!("{name}.weight"), n_out * n_in)?;
        let bias = with_bias.then(|| load_checked(ckpt, &format!("{name}.bias"), n_out)).transpose()?;
        Ok(Linear { weight: tensor(weight, &[n_out, n_in])?, bias, n_out, n_in })
    }

    /// The weight's values, row-major `[n_out, n_in]`.
    pub(crate) fn with_weight<T>(&self, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
        with_values(&self.weight, read)
    }

    /// Lengths of the weight's columns, `[n_in]`.
    pub(crate) fn column_norms(&self) -> Result<Vec<f32>> {
        self.with_weight(|weight| {
            let mut squares = vec![0.0f64; self.n_in];
            for row in weight.chunks_exact(self.n_in) {
                squares.iter_mut().zip(row).for_each(|(sum, &w)| *sum += f64::from(w) * f64::from(w));
            }
            squares.into_iter().map(|sum| sum.sqrt() as f32).collect()
        })
    }

    /// `x [n, n_in]` to `[n, n_out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.weight.t()?)?)
    }

    /// The bias, `[n_out]`.
    pub(crate) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    pub(crate) fn n_in(&self) -> usize {
        self.n_in
    }

    pub(crate) fn n_out(&self) -> usize {
        self.n_out
    }
}

/// A whole tensor as f32, if it has the expected number of values.
pub(crate) fn load_checked(ckpt: &dyn Checkpoint, name: &str, expected: usize) -> Result<Vec<f32>> {
    let values = ckpt.load(name)?;
    check_len(name, values.len(), expected)?;
    Ok(values)
}

/// Moves values into a tensor.
pub(crate) fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Lends a contiguous tensor's values: candle's own accessors copy them.
pub(crate) fn with_values<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::Tensor(candle_core::Error::Msg("tensor is not contiguous".into())));
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(read(&values[start..end])),
        _ => Err(Error::Tensor(candle_core::Error::Msg("tensor is not f32 on the CPU".into()))),
    }
}

/// Products of `input [n, n_in]` with `rows [n_out, n_in]`, row-major: `[n, n_out]`.
///
/// # Errors
/// If one of them is not a whole number of rows.
pub fn products(input: &[f32], rows: &[f32], n_in: usize) -> Result<Vec<f32>> {
    let (n, n_out) = (input.len() / n_in.max(1), rows.len() / n_in.max(1));
    check_len("products' input", input.len(), n * n_in)?;
    check_len("products' rows", rows.len(), n_out * n_in)?;
    let rows = tensor(rows.to_vec(), &[n_out, n_in])?;
    with_values(&tensor(input.to_vec(), &[n, n_in])?.matmul(&rows.t()?)?, <[f32]>::to_vec)
}
