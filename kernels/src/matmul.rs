use gemm::{Parallelism, gemm};

/// `out = x w^T`, or `out += x w^T` if `add`: `x` is `[m, k]`, `w` is `[n, k]`, `out` is `[m, n]`, all row-major f32.
/// One thread: callers parallelise over pieces, so that the result does not depend on the number of threads.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn matmul(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32], add: bool) {
    strided(m, n, k, x, (k, 1), w, (1, k), out, add);
}

/// `out = x w`, or `out += x w` if `add`: `x` is `[m, k]`, `w` is `[k, n]`, `out` is `[m, n]`, all row-major f32.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn matmul_nn(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32], add: bool) {
    strided(m, n, k, x, (k, 1), w, (n, 1), out, add);
}

/// Strides are (row, column) of `x` as `[m, k]` and of `w` as `[k, n]`.
#[allow(clippy::too_many_arguments)]
fn strided(
    m: usize,
    n: usize,
    k: usize,
    x: &[f32],
    x_strides: (usize, usize),
    w: &[f32],
    w_strides: (usize, usize),
    out: &mut [f32],
    add: bool,
) {
    assert!(x.len() >= m * k && w.len() >= n * k && out.len() >= m * n, "a slice is shorter than its shape");
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: every element that the strides reach lies inside the slices, whose lengths were checked above; `out` is
    // borrowed mutably and so does not overlap the inputs.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            x.as_ptr(),
            x_strides.1 as isize,
            x_strides.0 as isize,
            w.as_ptr(),
            w_strides.1 as isize,
            w_strides.0 as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
