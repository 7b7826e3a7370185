//! Every variant of every row kernel against the plain loops, on random rows.
#![allow(missing_docs, clippy::unwrap_used)]

use proptest::prelude::*;
use thermocline_kernels::{
    BundleLayout, Encoding, Isa, Kernels, Pool, PreparedInput, RowRef, ScaleFit, gemv, matmul, matmul_nn, pack,
    reference, unpack,
};

fn encoded(encoding: Encoding, row: &[f32]) -> Vec<u8> {
    let mut out = vec![0; encoding.row_stride(row.len())];
    pack(encoding, row, ScaleFit::LeastSquares, &mut out).unwrap();
    out
}

/// Both sides add n products of the same f32 values in another order: the difference is at most n half-ulps of the
/// sum of the absolute products.
fn tolerance(encoding: Encoding, row: RowRef<'_>, x: &[f32]) -> f32 {
    let mut w = vec![0.0; x.len()];
    unpack(encoding, row, &mut w);
    let size: f32 = w.iter().zip(x).map(|(a, b)| (a * b).abs()).sum();
    size * x.len() as f32 * f32::EPSILON + 1e-30
}

fn columns(encoding: Encoding) -> impl Strategy<Value = usize> {
    (1usize..20, 0usize..32)
        .prop_map(move |(g, extra)| if encoding == Encoding::Bf16 { g * 32 + extra } else { g * 32 })
}

fn case() -> impl Strategy<Value = (Encoding, Vec<Vec<f32>>, Vec<f32>)> {
    (0usize..3).prop_flat_map(|e| {
        let encoding = Encoding::PLAIN[e];
        columns(encoding).prop_flat_map(move |n| {
            let values = || proptest::collection::vec(-2.0f32..2.0, n);
            (Just(encoding), proptest::collection::vec(values(), 4), values())
        })
    })
}

proptest! {
    #[test]
    fn rows_are_flawed_where_their_values_are((encoding, rows, _) in case(), at in any::<prop::sample::Index>(), half in any::<u16>(), blank in any::<bool>()) {
        let n = rows[0].len();
        let mut bytes = encoded(encoding, &rows[0]);
        let first = if encoding == Encoding::Bf16 { 0 } else { encoding.code_bytes(n) };
        if blank {
            bytes[first..].fill(0);
        }
        // Half of the time all exponent bits are set, or next to none would be.
        let half = if half % 2 == 0 { half | 0x7f80 } else { half };
        let n_halves = if encoding == Encoding::Bf16 { n } else { encoding.scale_bytes(n) / 2 };
        bytes[first + 2 * at.index(n_halves)..][..2].copy_from_slice(&half.to_le_bytes());
        let row = RowRef::from_matrix_row(encoding, n, &bytes);
        let mut values = vec![0.0; n];
        unpack(encoding, row, &mut values);
        prop_assert_eq!(encoding.first_not_finite(row), values.iter().position(|v| !v.is_finite()));
        let scaled = |v: &f32| *v != 0.0;
        prop_assert!(!encoding.is_zero(row) || !values.iter().any(scaled));
        prop_assert!(encoding != Encoding::Bf16 || encoding.is_zero(row) != values.iter().any(scaled));
    }

    #[test]
    fn dots_and_axpy_agree_with_the_plain_loops((encoding, rows, x) in case(), a in -3.0f32..3.0) {
        let packed: Vec<_> = rows.iter().map(|r| encoded(encoding, r)).collect();
        let rows: Vec<_> = packed.iter().map(|p| RowRef::from_matrix_row(encoding, x.len(), p)).collect();
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let four = kernels.dots(encoding, [rows[0], rows[1], rows[2], rows[3]], &x);
            for (n, &got) in four.iter().enumerate() {
                let want = reference::dot(encoding, rows[n], &x);
                prop_assert!((got - want).abs() <= tolerance(encoding, rows[n], &x), "{:?} {got} {want}", kernels.isa());
                let [one] = kernels.dots(encoding, [rows[n]], &x);
                prop_assert_eq!(one.to_bits(), got.to_bits(), "a row's result must not depend on its neighbours");
            }
            let (mut together, mut apart) = (x.clone(), x.clone());
            let factors = [a, -0.5, 0.25, 1.5];
            let ahead = [&packed[0][..], &[], &packed[1][..5]];
            kernels.axpys(encoding, [rows[0], rows[1], rows[2], rows[3]], factors, &mut together, &ahead);
            rows.iter().zip(factors).for_each(|(row, a)| kernels.axpy(encoding, *row, a, &mut apart));
            for (t, a) in together.iter().zip(&apart) {
                prop_assert_eq!(t.to_bits(), a.to_bits(), "rows added together and one by one must agree to the bit");
            }
            let (mut got, mut want) = (x.clone(), x.clone());
            kernels.axpy(encoding, rows[0], a, &mut got);
            reference::axpy(encoding, rows[0], a, &mut want);
            for (g, w) in got.iter().zip(&want) {
                prop_assert!((g - w).abs() <= 1e-6 * (1.0 + w.abs() + 20.0 * a.abs()), "{:?} {g} {w}", kernels.isa());
            }
        }
    }

    #[test]
    fn quantisation_error_is_below_half_a_step_of_the_largest_weight(row in proptest::collection::vec(-5.0f32..5.0, 64)) {
        for (encoding, levels) in [(Encoding::Q8, 127.0), (Encoding::Q4, 7.0)] {
            let packed = encoded(encoding, &row);
            let mut back = vec![0.0; row.len()];
            unpack(encoding, RowRef::from_matrix_row(encoding, row.len(), &packed), &mut back);
            for (a, b) in row.chunks(32).zip(back.chunks(32)) {
                let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let error: f32 = a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum();
                let absmax: f32 = a.iter().map(|x| {
                    let s = largest / levels;
                    (x - (x / s).round() * s).powi(2)
                }).sum();
                // Least squares may not lose to plain absmax by more than the rounding of the scale to f16.
                prop_assert!(error <= absmax * 1.02 + largest * largest * 1e-5, "{encoding} {error} {absmax}");
            }
        }
    }

    #[test]
    fn bf16_keeps_bf16_bits(bits in proptest::collection::vec(any::<u16>(), 33)) {
        let row: Vec<f32> = bits.iter().map(|&b| f32::from_bits(u32::from(b) << 16)).collect();
        prop_assume!(row.iter().all(|v| !v.is_nan()));
        let packed = encoded(Encoding::Bf16, &row);
        for (b, c) in bits.iter().zip(packed.chunks_exact(2)) {
            prop_assert_eq!(*b, u16::from_le_bytes([c[0], c[1]]));
        }
    }
}

#[test]
fn bundle_rows_come_back_and_do_not_overlap() {
    for encoding in Encoding::PLAIN {
        let layout = BundleLayout::new(encoding, 96).unwrap();
        let mut bundle = vec![0xAA; layout.bundle_bytes()];
        let rows: Vec<Vec<u8>> = (0..3)
            .map(|r| encoded(encoding, &(0..96).map(|j| ((j * 7 + r * 13) % 29) as f32 - 14.0).collect::<Vec<_>>()))
            .collect();
        for (which, row) in rows.iter().enumerate() {
            layout.set_row(&mut bundle, which, row);
        }
        for (which, row) in rows.iter().enumerate() {
            let want = RowRef::from_matrix_row(encoding, 96, row);
            let got = layout.row(&bundle, which);
            assert_eq!((got.codes, got.scales), (want.codes, want.scales), "{encoding} row {which}");
        }
    }
    assert!(BundleLayout::new(Encoding::Q4, 100).is_none());
}

/// Residual rows are q4's, but for what is made of them.
#[test]
fn residual_rows_are_computed_with_as_those_of_q4() {
    let values =
        |seed: usize, n: usize| -> Vec<f32> { (0..n).map(|j| ((j * 37 + seed) % 61) as f32 / 30.0 - 1.0).collect() };
    for columns in [32, 96, 320] {
        let (rows, x) = ([values(3, columns), values(11, columns)], values(29, columns));
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let of = |encoding: Encoding| {
                let packed = rows.each_ref().map(|row| encoded(encoding, row));
                let refs = packed.each_ref().map(|row| RowRef::from_matrix_row(encoding, columns, row));
                let (mut input, mut unpacked, mut sum) = (PreparedInput::default(), vec![0.0; columns], x.clone());
                kernels.prepare(encoding, &x, &mut input);
                kernels.unpack(encoding, refs[0], &mut unpacked);
                kernels.axpy(encoding, refs[1], 0.7, &mut sum);
                let dots = (kernels.dots(encoding, refs, &x), kernels.prepared_dots(encoding, refs, &input));
                (packed, dots, unpacked, sum)
            };
            assert!(of(Encoding::R4) == of(Encoding::Q4), "{:?}, {columns}", kernels.isa());
        }
    }
}

#[test]
fn weighted_scales_lower_the_weighted_error() {
    let row: Vec<f32> =
        (0..64).map(|j| ((j * 37 % 61) as f32 / 30.0 - 1.0) * if j % 32 == 5 { 6.0 } else { 1.0 }).collect();
    let weights: Vec<f32> = (0..64).map(|j| if j % 32 == 5 { 1e-3 } else { 1.0 }).collect();
    let error = |fit: ScaleFit<'_>| {
        let mut packed = vec![0; Encoding::Q4.row_stride(64)];
        pack(Encoding::Q4, &row, fit, &mut packed).unwrap();
        let mut back = vec![0.0; 64];
        unpack(Encoding::Q4, RowRef::from_matrix_row(Encoding::Q4, 64, &packed), &mut back);
        row.iter().zip(&back).zip(&weights).map(|((a, b), w)| w * (a - b).powi(2)).sum::<f32>()
    };
    let [weighted, plain, absmax] =
        [ScaleFit::Weighted(Some(&weights)), ScaleFit::LeastSquares, ScaleFit::Absmax].map(error);
    assert!(weighted < 0.7 * plain, "{weighted} {plain}");
    assert!(weighted < 0.7 * absmax, "{weighted} {absmax}");
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let mut row = vec![0.5f32; 64];
    for bad in [f32::NAN, f32::INFINITY, 3e38] {
        row[40] = bad;
        for encoding in [Encoding::Q8, Encoding::Q4] {
            let error =
                pack(encoding, &row, ScaleFit::LeastSquares, &mut vec![0; encoding.row_stride(64)]).unwrap_err();
            assert!(error.to_string().contains("column 40"), "{error}");
        }
    }
}

#[test]
fn pool_runs_every_piece_once_and_sleeps_and_wakes() {
    for n in [1, 2, 5] {
        let mut pool = Pool::new(n).expect("threads");
        for round in 0..200 {
            let mut data = vec![0u32; 1000 + round];
            pool.for_each_chunk(&mut data, 7, |i, piece| piece.iter_mut().for_each(|v| *v += 1 + i as u32));
            assert!(data.iter().enumerate().all(|(j, &v)| v == 1 + (j / 7) as u32));
            if round % 50 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}

#[test]
fn a_panic_in_a_task_reaches_the_caller_and_the_pool_lives() {
    let mut pool = Pool::new(2).expect("threads");
    let mut data = vec![0u8; 64];
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        pool.for_each_chunk(&mut data, 1, |i, _| assert!(i != 40, "planted"));
    }));
    assert!(caught.is_err());
    pool.for_each_chunk(&mut data, 1, |_, piece| piece[0] = 1);
    assert!(data.iter().all(|&v| v == 1));
}

#[test]
fn gemv_and_matmul_agree_with_the_plain_loops() {
    let (m, n, k) = (3, 70, 64);
    let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
    let x: Vec<f32> = (0..m * k).map(value).collect();
    let w: Vec<f32> = (0..n * k).map(|i| value(i + 7)).collect();
    let mut out = vec![1.0; m * n];
    matmul(m, n, k, &x, &w, &mut out, true);
    let wt: Vec<f32> = (0..k * n).map(|i| w[(i % n) * k + i / n]).collect();
    let mut out_nn = vec![0.0; m * n];
    matmul_nn(m, n, k, &x, &wt, &mut out_nn, false);
    for i in 0..m {
        for j in 0..n {
            let want: f32 = (0..k).map(|c| x[i * k + c] * w[j * k + c]).sum();
            assert!((out[i * n + j] - want - 1.0).abs() < 1e-4 && (out_nn[i * n + j] - want).abs() < 1e-4);
        }
    }
    let stride = Encoding::Bf16.row_stride(k);
    let mut packed = vec![0; n * stride];
    for (row, out) in w.chunks_exact(k).zip(packed.chunks_exact_mut(stride)) {
        pack(Encoding::Bf16, row, ScaleFit::LeastSquares, out).unwrap();
    }
    let mut y = vec![0.0; n];
    let matrix = thermocline_kernels::MatrixRef::new(Encoding::Bf16, n, k, &packed);
    gemv(&Kernels::detect(), &mut Pool::new(2).expect("threads"), matrix, &x[..k], &mut y);
    for (j, &y) in y.iter().enumerate() {
        let want = reference::dot(Encoding::Bf16, matrix.row(j), &x[..k]);
        assert!((y - want).abs() < 1e-4);
    }
}
