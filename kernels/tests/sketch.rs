//! Rows of sketches come back as they were written, and every variant of their kernels agrees with `unsketch`.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use proptest::prelude::*;
use thermocline_kernels::{
    Isa, Kernels, SKETCH_UNIT, SketchBits, SketchMatrix, sketch_row, sketch_scales, trellis_next, trellis_subset,
    unsketch,
};

const BITS: [SketchBits; 2] = [SketchBits::Two, SketchBits::Three];
const COLUMNS: [usize; 6] = [64, 128, 192, 576, 896, 1024];

fn written(bits: SketchBits, codes: &[u8], scales: &[f32]) -> Vec<u8> {
    // What was there before must not matter.
    let mut row = vec![0xa5; bits.row_bytes(codes.len())];
    sketch_row(bits, codes, scales, &mut row);
    row
}

fn values(bits: SketchBits, columns: usize, row: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; columns];
    unsketch(bits, row, &mut out);
    out
}

/// The levels of a row's codes, by a walk along the trellis.
fn levels(bits: SketchBits, codes: &[u8]) -> Vec<f32> {
    let mut state = 0;
    let mut level = |code: &u8| {
        let (branch, point) = (usize::from(code & 1), usize::from(code >> 1));
        let level = bits.levels()[4 * point + trellis_subset(state, branch)];
        state = trellis_next(state, branch);
        f32::from(level)
    };
    codes.iter().map(&mut level).collect()
}

fn read_back(scales: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; scales.len()];
    sketch_scales(scales, &mut out);
    out
}

/// Any row: codes, and scales over some orders of magnitude, some of them zero.
fn row(bits: SketchBits, columns: usize) -> impl Strategy<Value = (Vec<u8>, Vec<f32>)> {
    let code = 0..1u8 << bits.bits();
    let scale = prop_oneof![1 => Just(0.0f32), 4 => 0.0f32..1.0, 2 => (-40i32..40).prop_map(|e| 2.0f32.powi(e))];
    (prop::collection::vec(code, columns), prop::collection::vec(scale, columns / SKETCH_UNIT))
}

fn shape() -> impl Strategy<Value = (SketchBits, usize)> {
    (prop::sample::select(&BITS[..]), prop::sample::select(&COLUMNS[..]))
}

/// Some rows one behind the other, an input, some of the rows and factors.
#[derive(Debug, Clone)]
struct Case {
    bits: SketchBits,
    columns: usize,
    bytes: Vec<u8>,
    x: Vec<f32>,
    picked: Vec<(u32, f32)>,
}

fn case() -> impl Strategy<Value = Case> {
    (shape(), 1usize..24).prop_flat_map(|((bits, columns), n_rows)| {
        let rows = prop::collection::vec(row(bits, columns), n_rows).prop_map(move |rows| {
            rows.iter().flat_map(|(codes, scales)| written(bits, codes, scales)).collect::<Vec<u8>>()
        });
        let value = prop_oneof![6 => -2.0f32..2.0, 1 => Just(0.0f32), 1 => (-120i32..40).prop_map(|e| -2.0f32.powi(e))];
        let x = prop::collection::vec(value, columns);
        let picked = prop::collection::vec((0..n_rows as u32, -3.0f32..3.0), 0..40);
        (rows, x, picked).prop_map(move |(bytes, x, picked)| Case { bits, columns, bytes, x, picked })
    })
}

#[test]
fn bytes_are_those_of_the_format() {
    assert_eq!([SketchBits::Two.row_bytes(64), SketchBits::Three.row_bytes(64)], [16 + 1 + 2, 16 + 8 + 1 + 2]);
    assert_eq!([SketchBits::Two.row_bytes(896), SketchBits::Three.row_bytes(896)], [14 * 17 + 2, 14 * 25 + 2]);
    // Column 16 r + m of the second unit with r = 2, m = 5, and thus bit 22: all of its bits.
    let mut codes = vec![0u8; 128];
    codes[64 + 37] = 7;
    let row = written(SketchBits::Three, &codes, &[255.0, 51.2]);
    let mut want = vec![0u8; 52];
    want[16 + 2] = 1 << 6;
    want[24 + 2] = 1 << 6;
    want[32 + 8 + 2] = 1 << 6;
    want[48..].copy_from_slice(&[255, 51, 0x80, 0x3f]);
    assert_eq!(row, want);
    let got = values(SketchBits::Three, 128, &row);
    assert_eq!(got[0], 255.0 * -255.0);
    // Subset 2 of the highest points, then what the branch bit does to the columns behind.
    assert_eq!(
        got[64 + 37..64 + 45],
        [185.0, -139.0, -185.0, -255.0, -185.0, -255.0, -139.0, -255.0].map(|level| 51.0 * level)
    );
}

#[test]
fn every_code_comes_back_from_every_column_under_every_scale_code() {
    for bits in BITS {
        for s in 0..=255u8 {
            // The first unit's scale makes the row's 2^-3.
            let scales = [255.0 / 8.0, f32::from(s) / 8.0];
            for shift in 0..1 << bits.bits() {
                let codes: Vec<u8> = (0..128).map(|j| ((j + j / 16 + shift) % (1 << bits.bits())) as u8).collect();
                let row = written(bits, &codes, &scales);
                let want = levels(bits, &codes).into_iter().enumerate().map(|(j, level)| scales[j / 64] * level);
                assert_eq!(values(bits, 128, &row), want.collect::<Vec<f32>>(), "{bits:?}, scale code {s}");
            }
        }
    }
}

#[test]
fn scales_that_are_zero_tiny_or_huge_are_kept() {
    assert_eq!(read_back(&[0.0, -0.0, 0.0]), [0.0; 3]);
    assert_eq!(values(SketchBits::Two, 64, &written(SketchBits::Two, &[3; 64], &[0.0])), [0.0; 64]);
    assert_eq!(read_back(&[0.0, 255.0, 1.0]), [0.0, 255.0, 1.0]);
    // The least bfloat16 is 2^-133; what is less than half of it is nothing beside it.
    let least = 2.0f32.powi(-133);
    assert_eq!(read_back(&[least, 100.0 * least, 255.0 * least]), [least, 100.0 * least, 255.0 * least]);
    assert_eq!(read_back(&[least / 4.0, f32::from_bits(1), 0.0]), [0.0; 3]);
    for largest in [f32::MIN_POSITIVE, 1e-30, 1.0, 1e30, 2.0f32.powi(120)] {
        let [most, half] = read_back(&[largest, largest / 2.0])[..] else { panic!("two scales") };
        assert!((most / largest - 1.0).abs() < 1.0 / 500.0 && (half / largest - 0.5).abs() < 1.0 / 500.0, "{largest}");
        let row = written(SketchBits::Three, &[7; 64], &[largest]);
        assert!(values(SketchBits::Three, 64, &row).iter().all(|v| v.is_finite()));
    }
    // Even the largest number is no reason for a row's scale that is infinite, only for values that are.
    let row = written(SketchBits::Two, &[2; 64], &[f32::MAX]);
    assert!(values(SketchBits::Two, 64, &row).iter().all(|v| v.abs() == f32::INFINITY));
}

#[test]
fn no_rows_at_all_are_no_trouble() {
    for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
        let matrix = SketchMatrix::new(SketchBits::Two, 64, &[]);
        let mut y = [1.0; 64];
        kernels.sketch_dots(matrix, 0, &kernels.sketch_input(&[1.0; 64]), &mut []);
        kernels.sketch_axpys(matrix, &[], &[], &mut y);
        assert_eq!((matrix.n_rows(), y), (0, [1.0; 64]));
    }
}

/// An input in fixed point has no place for what is not finite: such a one is multiplied as it is.
#[test]
fn an_infinity_or_a_nan_comes_out() {
    for bits in BITS {
        let bytes = written(bits, &vec![1; 640], &[1.0; 10]).repeat(5);
        let matrix = SketchMatrix::new(bits, 640, &bytes);
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            for (value, place) in [(f32::INFINITY, 3), (f32::NEG_INFINITY, 639), (f32::NAN, 320)] {
                let mut x = vec![0.25; 640];
                x[place] = value;
                let mut out = [0.0; 5];
                kernels.sketch_dots(matrix, 0, &kernels.sketch_input(&x), &mut out);
                assert!(out.iter().all(|v| !v.is_finite()), "{:?} {value} {out:?}", kernels.isa());
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let two = SketchBits::Two;
    let bytes = vec![0u8; 3 * two.row_bytes(64)];
    let matrix = SketchMatrix::new(two, 64, &bytes);
    let refused = |f: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    assert!(refused(&|| _ = two.row_bytes(0)) && refused(&|| _ = two.row_bytes(96)));
    assert!(refused(&|| _ = SketchMatrix::new(two, 64, &bytes[1..])));
    assert!(refused(&|| _ = matrix.row(3)) && !refused(&|| _ = matrix.row(2)));
    assert!(refused(&|| unsketch(two, &bytes, &mut [0.0; 64])) && refused(&|| unsketch(two, &[0; 8], &mut [])));
    let row = |codes: &[u8], scales: &[f32], n: usize| sketch_row(two, codes, scales, &mut vec![0; n]);
    assert!(!refused(&|| row(&[3; 64], &[1.0], 19)));
    assert!(refused(&|| row(&[4; 64], &[1.0], 19)) && refused(&|| row(&[3; 63], &[1.0], 19)));
    assert!(refused(&|| row(&[3; 64], &[1.0; 2], 19)) && refused(&|| row(&[3; 64], &[1.0], 20)));
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        assert!(refused(&|| row(&[3; 64], &[bad], 19)) && refused(&|| sketch_scales(&[bad], &mut [0.0])));
    }
    assert!(refused(&|| sketch_scales(&[1.0], &mut [0.0; 2])));
    for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
        let dots =
            |first, x, n| kernels.sketch_dots(matrix, first, &kernels.sketch_input(&vec![0.0; x]), &mut vec![0.0; n]);
        assert!(!refused(&|| dots(0, 64, 3)) && !refused(&|| dots(3, 64, 0)));
        assert!(refused(&|| dots(0, 63, 1)) && refused(&|| dots(0, 128, 1)));
        assert!(refused(&|| dots(0, 64, 4)) && refused(&|| dots(usize::MAX, 64, 2)) && refused(&|| dots(4, 64, 0)));
        let axpys = |rows: &[u32], a: usize, y| kernels.sketch_axpys(matrix, rows, &vec![0.0; a], &mut vec![0.0; y]);
        assert!(!refused(&|| axpys(&[2, 0], 2, 64)));
        assert!(refused(&|| axpys(&[0, 3], 2, 64)) && refused(&|| axpys(&[u32::MAX], 1, 64)));
        assert!(refused(&|| axpys(&[0], 2, 64)) && refused(&|| axpys(&[0], 1, 65)) && refused(&|| axpys(&[0], 1, 0)));
    }
}

proptest! {
    #[test]
    fn rows_come_back_with_the_scales_that_were_promised((bits, (codes, scales)) in shape().prop_flat_map(|(b, c)| (Just(b), row(b, c)))) {
        let columns = codes.len();
        let kept = read_back(&scales);
        let largest = scales.iter().fold(0.0f32, |m, s| m.max(*s));
        for (kept, wish) in kept.iter().zip(&scales) {
            // Half a step of a row's scale, which is at most 1/255 of the largest, and 2^-7 of that for its rounding up.
            prop_assert!((kept - wish).abs() <= largest / 255.0 * 0.5 * (1.0 + 1.0 / 128.0) * 1.0001, "{kept} {wish} {largest}");
        }
        let got = values(bits, columns, &written(bits, &codes, &scales));
        let levels = levels(bits, &codes);
        for (j, got) in got.iter().enumerate() {
            prop_assert_eq!(*got, kept[j / 64] * levels[j]);
        }
    }

    /// Values are exact in f32 (8 + 8 + 8 bits). A product of a row's n passes through at most n + 3 roundings: its own, one for
    /// each addition, one where its unit is scaled; each is at most 2^-24 of the sum of absolute products (of what it has become
    /// by then: hence n + 8, for n below 2^12). Sums that f64 rounds are far below that, and nothing underflows to matter
    /// beside 10^-30.
    #[test]
    fn dots_agree_with_the_values(case in case()) {
        let Case { bits, columns, bytes, x, .. } = &case;
        let matrix = SketchMatrix::new(*bits, *columns, bytes);
        let n_rows = matrix.n_rows();
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let (input, mut all) = (kernels.sketch_input(x), vec![f32::NAN; n_rows]);
            kernels.sketch_dots(matrix, 0, &input, &mut all);
            for (i, got) in all.iter().enumerate() {
                let products = || values(*bits, *columns, matrix.row(i)).into_iter().zip(x).map(|(w, x)| f64::from(w) * f64::from(*x));
                let (want, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                // What an input in fixed point loses, where there is one.
                let largest = |unit: &[f32]| f64::from(unit.iter().fold(0.0f32, |m, x| m.max(x.abs())));
                let row = values(*bits, *columns, matrix.row(i));
                let units = row.chunks(SKETCH_UNIT).zip(x.chunks(SKETCH_UNIT));
                let of_unit = |(w, x): (&[f32], &[f32])| w.iter().map(|w| f64::from(w.abs())).sum::<f64>() * largest(x);
                let lost = 1.004 * 2.0f64.powi(-23) * units.map(of_unit).sum::<f64>();
                let bound = (columns + 8) as f64 * 2.0f64.powi(-24) * size + lost + 1e-30;
                prop_assert!((f64::from(*got) - want).abs() <= bound, "{:?} row {i}: {got} {want}", kernels.isa());
                let mut one = [f32::NAN];
                kernels.sketch_dots(matrix, i, &input, &mut one);
                prop_assert_eq!(one[0].to_bits(), got.to_bits(), "a row's result must not depend on its neighbours");
            }
        }
    }

    /// After m rows, an element has m roundings of its sum and one of each factor (a times the scale; portable loops round the
    /// product as well): each at most 2^-24 of what the absolute values come to, hence m + 4 for the lot.
    #[test]
    fn axpys_agree_with_the_values_and_with_rows_one_by_one(case in case()) {
        let Case { bits, columns, bytes, x, picked } = &case;
        let matrix = SketchMatrix::new(*bits, *columns, bytes);
        let (rows, a): (Vec<u32>, Vec<f32>) = picked.iter().copied().unzip();
        let (mut want, mut size) = (x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>(), vec![0.0f64; *columns]);
        size.iter_mut().zip(x).for_each(|(s, x)| *s = f64::from(x.abs()));
        for (row, a) in picked {
            for (j, w) in values(*bits, *columns, matrix.row(*row as usize)).into_iter().enumerate() {
                let product = f64::from(w) * f64::from(*a);
                want[j] += product;
                size[j] += product.abs();
            }
        }
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let (mut together, mut apart) = (x.clone(), x.clone());
            kernels.sketch_axpys(matrix, &rows, &a, &mut together);
            rows.iter().zip(&a).for_each(|(row, a)| kernels.sketch_axpys(matrix, &[*row], &[*a], &mut apart));
            for j in 0..*columns {
                prop_assert_eq!(together[j].to_bits(), apart[j].to_bits(), "{:?} column {}", kernels.isa(), j);
                let bound = (rows.len() + 4) as f64 * 2.0f64.powi(-24) * size[j] + 1e-30;
                prop_assert!((f64::from(together[j]) - want[j]).abs() <= bound, "{:?} {} {}", kernels.isa(), together[j], want[j]);
            }
        }
    }

    /// What was taken apart for a device has the same rows.
    #[cfg(feature = "cuda")]
    #[test]
    fn planes_have_the_rows_that_they_were_made_of(case in case()) {
        let Case { bits, columns, bytes, x, picked } = &case;
        let planes = thermocline_kernels::sketch_planes(SketchMatrix::new(*bits, *columns, bytes));
        let matrices = [SketchMatrix::new(*bits, *columns, bytes), SketchMatrix::of_planes(*bits, *columns, &planes)];
        prop_assert_eq!(matrices[0].n_rows(), matrices[1].n_rows());
        let (rows, a): (Vec<u32>, Vec<f32>) = picked.iter().copied().unzip();
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let [apart, whole] = matrices.map(|matrix| {
                let mut dots = vec![f32::NAN; matrix.n_rows()];
                kernels.sketch_dots(matrix, 0, &kernels.sketch_input(x), &mut dots);
                let mut sums = x.clone();
                kernels.sketch_axpys(matrix, &rows, &a, &mut sums);
                dots.into_iter().chain(sums).map(f32::to_bits).collect::<Vec<u32>>()
            });
            prop_assert_eq!(apart, whole, "{:?}", kernels.isa());
        }
    }

    /// Results depend on what the bytes are, not on where they lie.
    #[test]
    fn alignment_does_not_matter(case in case(), offset in 1usize..64) {
        let Case { bits, columns, bytes, x, picked } = &case;
        let moved = [vec![0xffu8; offset], bytes.clone()].concat();
        // One float further: a vector's alignment is 16 of them.
        let x_moved = [&[f32::NAN], &x[..]].concat();
        let (rows, a): (Vec<u32>, Vec<f32>) = picked.iter().copied().unzip();
        let matrices = [&bytes[..], &moved[offset..]].map(|b| SketchMatrix::new(*bits, *columns, b));
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let [here, there] = [(matrices[0], &x[..]), (matrices[1], &x_moved[1..])].map(|(matrix, x)| {
                // The sums begin where the input does, or one float further.
                let (mut dots, mut y) = (vec![0.0; matrix.n_rows()], x_moved.clone());
                let from = usize::from(x.as_ptr() != case.x.as_ptr());
                let y = &mut y[from..][..*columns];
                y.copy_from_slice(x);
                kernels.sketch_dots(matrix, 0, &kernels.sketch_input(x), &mut dots);
                kernels.sketch_axpys(matrix, &rows, &a, y);
                dots.iter().chain(&*y).copied().map(f32::to_bits).collect::<Vec<u32>>()
            });
            prop_assert_eq!(here, there);
        }
    }
}
