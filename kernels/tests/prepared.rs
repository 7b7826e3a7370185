//! Rows times prepared inputs, against sums in f64 and the bound that `PreparedInput` states.
#![allow(missing_docs, clippy::unwrap_used)]

use proptest::prelude::*;
use thermocline_kernels::{BundleLayout, Encoding, GROUP, Isa, Kernels, PreparedInput, RowRef, unpack};

fn kernels() -> impl Iterator<Item = Kernels> {
    Isa::ALL.into_iter().filter_map(Kernels::new)
}

fn prepare(kernels: &Kernels, x: &[f32]) -> PreparedInput {
    let mut input = PreparedInput::default();
    // What an input before left behind must not matter.
    kernels.prepare(Encoding::Q4, &[f32::NAN; 40 * GROUP], &mut input);
    kernels.prepare(Encoding::Q4, x, &mut input);
    assert_eq!(input.values().len(), x.len());
    input
}

/// Rows of any codes, with scales of ordinary size, tiny or huge.
fn rows(groups: usize) -> impl Strategy<Value = Vec<Vec<u8>>> {
    let scale = prop_oneof![4 => 0x2000u16..0x3000, 1 => 0u16..0x7c00].prop_map(|s| s.to_le_bytes());
    let row = (proptest::collection::vec(any::<u8>(), groups * GROUP / 2), proptest::collection::vec(scale, groups));
    let row = row.prop_map(move |(codes, scales)| {
        let mut bytes = [codes, scales.concat()].concat();
        bytes.resize(Encoding::Q4.row_stride(groups * GROUP), 0xff);
        bytes
    });
    proptest::collection::vec(row, 4)
}

/// Inputs of one size; with outliers; of any size; nearly or wholly zero; as large as numbers are.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -2.0f32..2.0,
        1 => -2e4f32..2e4,
        1 => (-1.0f32..1.0, -126i32..127).prop_map(|(v, e)| v * (e as f32).exp2()),
        1 => proptest::sample::select(&[0.0f32, -0.0, 1e-40, -1e-45, 3.4e38, f32::MIN, f32::MAX][..]),
    ]
}

/// Values of a kind for each group.
fn input(groups: usize) -> impl Strategy<Value = Vec<f32>> {
    let many = |value: BoxedStrategy<f32>| proptest::collection::vec(value, GROUP);
    let size = -126i32..127;
    let group = prop_oneof![
        3 => many((-1.0f32..1.0).boxed()),
        2 => many(value().boxed()),
        2 => (size, many((-1.0f32..1.0).boxed())).prop_map(|(e, v)| v.iter().map(|v| v * (e as f32).exp2()).collect()),
        1 => many((-(1i32 << 22)..1 << 22).prop_map(|bits| f32::from_bits(bits.unsigned_abs())).boxed()),
        1 => Just(vec![0.0; GROUP]),
    ];
    proptest::collection::vec(group, groups).prop_map(|groups| groups.concat())
}

fn case() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<f32>)> {
    (1usize..38).prop_flat_map(|groups| (rows(groups), input(groups)))
}

/// The dot product, the sum of the absolute products, and what the bound takes for the rounding of the input, in f64.
fn exact(row: RowRef<'_>, x: &[f32]) -> [f64; 3] {
    let mut w = vec![0.0; x.len()];
    unpack(Encoding::Q4, row, &mut w);
    let mut sums = [0.0; 3];
    for (w, x) in w.chunks(GROUP).zip(x.chunks(GROUP)) {
        let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let step = (1.004 * 2f64.powi(-23) * f64::from(largest)).max(2f64.powi(-101));
        for (w, x) in w.iter().zip(x) {
            let (w, x) = (f64::from(*w), f64::from(*x));
            sums[0] += w * x;
            sums[1] += (w * x).abs();
            sums[2] += w.abs() * step;
        }
    }
    sums
}

proptest! {
    #[test]
    fn products_keep_their_bound((rows, x) in case()) {
        let rows: Vec<_> = rows.iter().map(|r| RowRef::from_matrix_row(Encoding::Q4, x.len(), r)).collect();
        for kernels in kernels() {
            let input = prepare(&kernels, &x);
            let four = kernels.prepared_dots(Encoding::Q4, [rows[0], rows[1], rows[2], rows[3]], &input);
            let [a, b] = kernels.prepared_dots(Encoding::Q4, [rows[0], rows[1]], &input);
            prop_assert_eq!([a, b].map(f32::to_bits), [four[0], four[1]].map(f32::to_bits));
            for (row, got) in rows.iter().zip(four) {
                let [one] = kernels.prepared_dots(Encoding::Q4, [*row], &input);
                prop_assert_eq!(one.to_bits(), got.to_bits(), "a row's result must not depend on its neighbours");
                let [want, size, left_out] = exact(*row, &x);
                // The loops over f32 have a rounding for each group or column, and what underflows; in a group they are
                // 256 times the largest magnitude before its scale comes in.
                let fixed = kernels.isa() == Isa::Avx512 && is_fixed();
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                if size + left_out > f64::from(f32::MAX) / 2.0 || (!fixed && largest > f32::MAX / 512.0) {
                    continue;
                }
                let roundings = if fixed { (x.len() / GROUP) as f64 / 4.0 + 6.0 } else { x.len() as f64 + 8.0 };
                let bound = (if fixed { left_out } else { 1e-36 }) + roundings * 2f64.powi(-24) * (size + left_out);
                let error = (f64::from(got) - want).abs();
                prop_assert!(error <= bound * 1.001, "{:?}: {got} for {want}, {error} > {bound}", kernels.isa());
            }
        }
    }

    /// Elsewhere a number that is none could vanish.
    #[test]
    fn what_is_no_number_stays_none((rows, mut x) in case(), at in any::<prop::sample::Index>(), bad in 0usize..3) {
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][bad];
        let place = at.index(x.len());
        x[place] = bad;
        let rows: Vec<_> = rows.iter().map(|r| RowRef::from_matrix_row(Encoding::Q4, x.len(), r)).collect();
        for kernels in kernels() {
            let input = prepare(&kernels, &x);
            let plain = kernels.dots(Encoding::Q4, [rows[0], rows[1]], &x);
            let prepared = kernels.prepared_dots(Encoding::Q4, [rows[0], rows[1]], &input);
            prop_assert!(prepared.iter().all(|p| !p.is_finite()), "{prepared:?}");
            prop_assert_eq!(plain.map(f32::to_bits), prepared.map(f32::to_bits));
        }
    }
}

/// Whether AVX-512 kernels take inputs in fixed point on this CPU.
fn is_fixed() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Every code times every digit at its limits: the largest sums that there are, and magnitudes around the one from
/// which on a step doubles.
#[test]
fn the_largest_codes_do_not_overflow() {
    for mantissa in [0, 1, 0x7e_fdff, 0x7e_fe00, 0x7e_fe01, 0x7f_8000, 0x7f_ffff] {
        for exponent in [0, 1, 48, 49, 50, 127, 253] {
            for (code, sign) in [(0x00, 1.0), (0x00, -1.0), (0xff, 1.0), (0xff, -1.0), (0x88, 1.0)] {
                let x = [f32::from_bits(exponent << 23 | mantissa) * sign; 5 * GROUP];
                let mut bytes = vec![code; Encoding::Q4.row_stride(x.len())];
                bytes[5 * GROUP / 2..].fill(0);
                // 2^-10 as f16.
                bytes[5 * GROUP / 2..].chunks_exact_mut(2).for_each(|s| s.copy_from_slice(&0x1400u16.to_le_bytes()));
                let row = RowRef::from_matrix_row(Encoding::Q4, x.len(), &bytes);
                let [want, size, left_out] = exact(row, &x);
                // Elsewhere a group's largest sums overflow before its scale comes in.
                for kernels in kernels().filter(|k| exponent < 253 || (k.isa() == Isa::Avx512 && is_fixed())) {
                    let [got] = kernels.prepared_dots(Encoding::Q4, [row], &prepare(&kernels, &x));
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= left_out + 170.0 * 2f64.powi(-24) * size, "{got} for {want}");
                    assert!(code != 0x88 || got == 0.0, "codes of zero");
                }
            }
        }
    }
}

/// Numbers of at most 23 bits are taken as they are.
#[test]
fn whole_numbers_are_exact() {
    let x: Vec<f32> = (0..7 * GROUP).map(|j| ((j * 7919) % 2001) as f32 - 1000.0).collect();
    let mut bytes: Vec<u8> = (0..7 * GROUP / 2).map(|j| (j * 89 % 251) as u8).collect();
    // 1 as f16.
    bytes.extend(0x3c00u16.to_le_bytes().repeat(7));
    let row = RowRef::from_matrix_row(Encoding::Q4, x.len(), &bytes);
    let want = exact(row, &x)[0];
    for kernels in kernels() {
        let [got] = kernels.prepared_dots(Encoding::Q4, [row], &prepare(&kernels, &x));
        assert_eq!(f64::from(got), want, "{:?}", kernels.isa());
    }
}

/// Memory that is asked for changes nothing, wherever it lies; other encodings are multiplied in f32.
#[test]
fn pre_activations_are_the_dots_of_two_rows() {
    let x: Vec<f32> = (0..9 * GROUP).map(|j| ((j * 31) % 101) as f32 / 50.0 - 1.0).collect();
    for encoding in Encoding::PLAIN {
        let layout = BundleLayout::new(encoding, x.len()).unwrap();
        let bundle: Vec<u8> = (0..layout.bundle_bytes()).map(|j| (j * 37 % 60) as u8).collect();
        let rows = [layout.row(&bundle, 0), layout.row(&bundle, 1)];
        for kernels in kernels() {
            let mut input = PreparedInput::default();
            kernels.prepare(encoding, &x, &mut input);
            let want = kernels.prepared_dots(encoding, rows, &input).map(f32::to_bits);
            let aheads: [&[&[u8]]; 4] = [&[], &[&[]], &[&bundle[..1]], &[&bundle, &[], &bundle[7..]]];
            for ahead in aheads {
                let (g, u) = kernels.pre_activations(&layout, &bundle, &input, ahead);
                assert_eq!([g, u].map(f32::to_bits), want);
            }
            if encoding != Encoding::Q4 {
                assert_eq!(kernels.dots(encoding, rows, &x).map(f32::to_bits), want);
            }
        }
    }
}
