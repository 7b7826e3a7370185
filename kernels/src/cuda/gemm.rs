//! Products of prompt batches on the tensor cores, nearly as exact as f32.

use super::device::Device;
use super::error::Result;
use super::memory::View;

/// A matrix as the sum of two of bfloat16, row-major: `hi` is the value rounded, `lo` what that leaves out, rounded.
/// Together they carry 16 bits of each value.
#[derive(Debug, Clone)]
pub struct Split {
    /// The rounded values.
    pub hi: View,
    /// What rounding left out; `None` if that is zero everywhere.
    pub lo: Option<View>,
}

/// `c[m, n] (+)= a[m, k] b`, all row-major; b is `[n, k]` if `b_is_transposed`, else `[k, n]`.
#[derive(Debug)]
pub struct Gemm<'a> {
    /// Rows of a and c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// `[m, k]`.
    pub a: &'a Split,
    /// `[n, k]` or `[k, n]`.
    pub b: &'a Split,
    /// Which of the two.
    pub b_is_transposed: bool,
    /// f32 `[m, n]`, the first columns of rows of `c_stride`.
    pub c: &'a View,
    /// From one row of c to the next, at least n.
    pub c_stride: usize,
    /// Whether the product is added to c or replaces it.
    pub add: bool,
}

/// Computes a product by up to three of bfloat16 with f32 sums: hi hi + lo hi + hi lo. What is left out, lo lo, is
/// smaller than rounding to 16 bits (the scheme of arXiv 1904.06376).
///
/// # Errors
/// If cuBLASLt is not there or fails.
///
/// # Panics
/// If a matrix is smaller than its shape says.
pub fn gemm(device: &Device, task: &Gemm<'_>) -> Result<()> {
    let (m, n, k) = (task.m, task.n, task.k);
    let check = |split: &Split, values: usize| {
        assert!(split.hi.len() >= 2 * values && split.lo.as_ref().is_none_or(|lo| lo.len() >= 2 * values), "operand");
    };
    check(task.a, m * k);
    check(task.b, n * k);
    if m == 0 || n == 0 {
        return Ok(());
    }
    assert!(task.c_stride >= n && task.c.len() >= 4 * ((m - 1) * task.c_stride + n), "result");
    device.keep([&task.a.hi, &task.b.hi, task.c].into_iter().chain(&task.a.lo).chain(&task.b.lo));
    let mut add = task.add;
    let pairs = [
        (Some(&task.a.hi), Some(&task.b.hi)),
        (task.a.lo.as_ref(), Some(&task.b.hi)),
        (Some(&task.a.hi), task.b.lo.as_ref()),
    ];
    for (a, b) in pairs {
        let (Some(a), Some(b)) = (a, b) else { continue };
        device.backend().gemm(
            [m, n, k, task.c_stride],
            a.address(),
            b.address(),
            task.b_is_transposed,
            task.c.address(),
            add,
        )?;
        add = true;
    }
    Ok(())
}
