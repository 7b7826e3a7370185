use crate::{
    Random, Rows, U, additions, assert_near, device, dot, pinned, poisoned, read, upload, whole_input, whole_row, wide,
};
use proptest::prelude::*;
use thermocline_kernels::Encoding;
use thermocline_kernels::cuda::launch::{Added, DeviceMatrix, Norm, embed, gemv};

pub(crate) fn on_device(rows: &Rows) -> DeviceMatrix {
    let data = upload(&rows.bytes).view();
    let (encoding, columns, stride) = (rows.encoding, rows.columns, rows.stride);
    DeviceMatrix { encoding, rows: rows.weights.len() / columns, columns, stride, data }
}

/// An encoding and a number of columns that it accepts.
pub(crate) fn shape(groups: impl Strategy<Value = usize>) -> impl Strategy<Value = (Encoding, usize)> {
    shape_of(&Encoding::ALL, groups)
}

/// The same for the plain encodings.
pub(crate) fn plain_shape(groups: impl Strategy<Value = usize>) -> impl Strategy<Value = (Encoding, usize)> {
    shape_of(&Encoding::PLAIN, groups)
}

fn shape_of(
    encodings: &'static [Encoding],
    groups: impl Strategy<Value = usize>,
) -> impl Strategy<Value = (Encoding, usize)> {
    (prop::sample::select(encodings), groups, 0usize..32)
        .prop_map(|(encoding, groups, less)| (encoding, groups * 32 - if encoding.accepts(1) { less } else { 0 }))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn gemv_is_exact_where_sums_are((encoding, columns) in shape(1usize..300), rows in 1usize..70, seed: u64) {
        let random = &mut Random::new(seed);
        // As many weights in all as plain encodings take in the same time.
        let rows = if Encoding::PLAIN.contains(&encoding) { rows } else { rows.div_ceil(8) };
        let w = Rows::packed(encoding, columns, (0..rows).map(|_| whole_row(encoding, columns, random)));
        let x = whole_input(columns, random);
        let out = poisoned(4 * rows);
        gemv(device(), &on_device(&w), &upload(&x).view(), None, Added::default(), &out.view()).unwrap();
        let want: Vec<f32> = (0..rows).map(|r| dot(w.weights(r), &wide(&x)) as f32).collect();
        prop_assert_eq!(read::<f32>(&out), want);
    }

    #[test]
    fn embed_decodes_a_row_and_copies_the_step((encoding, columns) in shape(1usize..40), seed: u64, token in 0usize..5) {
        let table = Rows::random(encoding, 5, columns, &mut Random::new(seed));
        let host_step = pinned(&[token as u32, 7, 9, 11, 13]);
        let (step, x) = (poisoned(20), poisoned(4 * columns));
        embed(device(), &on_device(&table), &host_step.view(), &step.view(), &x.view()).unwrap();
        prop_assert_eq!(&read::<u32>(&step)[..5], &[token as u32, 7, 9, 11, 13]);
        prop_assert_eq!(read::<f32>(&x), table.weights(token));
    }

    #[test]
    fn gemv_agrees_with_the_plain_loop(
        (encoding, columns) in shape(prop_oneof![1usize..20, Just(18), Just(28), Just(256), Just(300)]),
        rows in prop_oneof![1usize..80, Just(700)],
        (normed, biased, added) in any::<(bool, bool, bool)>(),
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let rows = if columns > 2000 { rows.min(80) } else { rows };
        let rows = if Encoding::PLAIN.contains(&encoding) { rows } else { rows.div_ceil(8) };
        let w = Rows::random(encoding, rows, columns, random);
        let (x, weight, bias) = (random.values(columns), random.values(columns), random.values(rows));
        let residual = random.values(rows);
        let eps = 1e-5f32;
        let norm_weight = upload(&weight);
        let (x_memory, bias_memory) = (upload(&x), upload(&bias));
        let normed_out = poisoned(4 * columns);
        // The output is the residual itself where there is one.
        let out = if added { upload(&residual) } else { poisoned(4 * rows) };
        let (normed_view, weight_view, bias_view, out_view) =
            (normed_out.view(), norm_weight.view(), bias_memory.view(), out.view());
        let norm = normed.then_some(Norm { weight: &weight_view, eps, out: Some(&normed_view) });
        let addition = Added { bias: biased.then_some(&bias_view), residual: added.then_some(&out_view) };
        gemv(device(), &on_device(&w), &x_memory.view(), norm, addition, &out_view).unwrap();

        let x = wide(&x);
        // Relative error of a normalised input: half that of its mean square, and a few roundings.
        let input_error = if normed { (columns as f64 / 1024.0 + 24.0) * U } else { 0.0 };
        let input: Vec<f64> = if normed {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / columns as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            x.iter().zip(&weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
        } else {
            x
        };
        if normed {
            for (got, want) in read::<f32>(&normed_out).iter().zip(&input) {
                assert_near(*got, *want, input_error * want.abs(), "normalised input");
            }
        }
        for (r, got) in read::<f32>(&out).iter().enumerate() {
            let (product, size) = w.dot(r, &input);
            let more = f64::from(if biased { bias[r] } else { 0.0 }) + f64::from(if added { residual[r] } else { 0.0 });
            let tolerance = (additions(columns) * U + input_error) * size + 4.0 * U * (more.abs() + 2.0);
            assert_near(*got, product + more, tolerance, &format!("{encoding} row {r} of {rows} x {columns}"));
        }
    }

    /// In fixed point what is small beside its group's largest input loses bits, by a stated bound and no more.
    #[test]
    fn gemv_bears_outliers_and_what_is_no_number(
        q4: bool, groups in 1usize..12, rows in 1usize..40, seed: u64, exponent in -130i32..112, bad: bool,
    ) {
        let random = &mut Random::new(seed);
        let (encoding, columns) = (if q4 { Encoding::Q4 } else { Encoding::Q8 }, 32 * groups);
        let w = Rows::random(encoding, rows, columns, random);
        let mut x: Vec<f32> = random.values(columns).iter().map(|v| v * 2f32.powi(exponent)).collect();
        for _ in 0..groups {
            // Sums stay finite, however often it is the same column.
            let x = &mut x[random.below(columns)];
            *x = (*x * 3e4).clamp(-1e36, 1e36);
        }
        let place = random.below(columns);
        if bad {
            x[place] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)];
        }
        let out = poisoned(4 * rows);
        gemv(device(), &on_device(&w), &upload(&x).view(), None, Added::default(), &out.view()).unwrap();
        let input = wide(&x);
        for (r, got) in read::<f32>(&out).into_iter().enumerate() {
            if bad {
                prop_assert!(!got.is_finite(), "row {} is {}", r, got);
                continue;
            }
            let (product, size) = w.dot(r, &input);
            // Half a unit of the group's fixed point for each column; below 2^-97 units do not shrink any more.
            let lost: f64 = input.chunks(32).zip(w.weights(r).chunks(32)).map(|(x, w)| {
                let most = x.iter().fold(0f64, |m, v| m.max(v.abs()));
                w.iter().map(|w| f64::from(w.abs())).sum::<f64>() * (most * 2f64.powi(-29)).max(2f64.powi(-126))
            }).sum();
            let tolerance = additions(columns) * U * size + lost + f64::from(f32::MIN_POSITIVE);
            assert_near(got, product, tolerance, &format!("{encoding} row {r} of {rows} x {columns}"));
        }
    }
}
