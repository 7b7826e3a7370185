//! Encodings with a stream or a coarse plane: bits against [`Kernels::decode`], sums within the bounds of the others.

use crate::ffn::{Case, activation, check_bundles, run};
use crate::matrix::on_device;
use crate::{Random, Rows, device, poisoned, read, upload, whole_input, whole_row};
use proptest::prelude::*;
use thermocline_kernels::cuda::launch::{Added, Nonlinearity, gemv, unpack_bundles, unpack_rows};
use thermocline_kernels::exact::{PackedRow, bf16x, bits16, residual};
use thermocline_kernels::{BundleLayout, Encoding, Kernels, RowRef, ScaleFit};

const EXACT: [Encoding; 3] = [Encoding::Bf16x, Encoding::Q4Exact, Encoding::Q8Exact];
const PLANAR: [Encoding; 4] = [Encoding::Bf16x, Encoding::Q4Plus, Encoding::Q4Exact, Encoding::Q8Exact];

fn packed(encoding: Encoding, bits: &[u16]) -> PackedRow {
    match encoding {
        Encoding::Bf16x => bf16x::pack(bits),
        Encoding::Q4Plus => {
            let row = residual::pack(Encoding::Q4Exact, bits, ScaleFit::Weighted(None));
            PackedRow { head: vec![], stream: vec![], ..row }
        }
        _ => residual::pack(encoding, bits, ScaleFit::Weighted(None)),
    }
}

/// Rows of a matrix, as far apart as the longest needs.
pub(crate) fn matrix(encoding: Encoding, columns: usize, rows: &[Vec<u16>]) -> Rows {
    let rows: Vec<PackedRow> = rows.iter().map(|bits| packed(encoding, bits)).collect();
    let longest = rows.iter().map(|row| row.stream.len()).max().unwrap_or(0);
    let stride = BundleLayout::matrix_row(encoding, columns, longest).unwrap().bundle_bytes();
    let mut bytes = vec![0; rows.len() * stride];
    for (out, row) in bytes.chunks_exact_mut(stride).zip(rows) {
        let mut row_bytes = row.base;
        row_bytes.extend(row.coarse);
        row_bytes.resize(row_bytes.len().next_multiple_of(16), 0);
        row_bytes.extend(row.head);
        row_bytes.extend(row.stream);
        out[..row_bytes.len()].copy_from_slice(&row_bytes);
    }
    Rows::new(encoding, columns, stride, bytes)
}

/// Bundles of three rows each, in several places but of one layout.
fn bundles<const N: usize>(
    encoding: Encoding,
    hidden: usize,
    neurons: [Vec<[Vec<u16>; 3]>; N],
) -> (BundleLayout, [Vec<u8>; N]) {
    let packed = neurons.map(|part| {
        let rows = |neuron: [Vec<u16>; 3]| neuron.map(|bits| packed(encoding, &bits));
        part.into_iter().map(rows).collect::<Vec<_>>()
    });
    let streams = |rows: &[PackedRow; 3]| rows.iter().map(|row| row.stream.len()).sum::<usize>();
    let longest = packed.iter().flatten().map(streams).max().unwrap_or(0);
    let layout = BundleLayout::with_streams(encoding, hidden, longest).unwrap();
    let bytes = packed.map(|part| part.iter().flat_map(|rows| bundle(&layout, rows)).collect());
    (layout, bytes)
}

fn bundle(layout: &BundleLayout, rows: &[PackedRow; 3]) -> Vec<u8> {
    let mut bytes = vec![0; layout.bundle_bytes()];
    let mut put = |at: &mut usize, part: &[u8]| {
        bytes[*at..*at + part.len()].copy_from_slice(part);
        *at += part.len();
    };
    let mut coarse_at = layout.base_bytes();
    rows.iter().for_each(|row| put(&mut coarse_at, &row.coarse));
    let mut at = layout.base_bytes() + layout.coarse_bytes();
    rows.iter().for_each(|row| put(&mut at, &row.head));
    rows.iter().for_each(|row| put(&mut at, &row.stream));
    rows.iter().enumerate().for_each(|(which, row)| layout.set_row(&mut bytes, which, &row.base));
    bytes
}

/// About normal: the sum of six uniform ones, times a power of two.
fn normal(random: &mut Random, n: usize, exponent: i32) -> Vec<u16> {
    let scale = 2.0f32.powi(exponent);
    (0..n).map(|_| bits16((0..6).map(|_| random.value()).sum::<f32>() * scale)).collect()
}

/// Rows as models have them, and as only enemies do.
fn row(random: &mut Random, n: usize) -> Vec<u16> {
    match random.below(6) {
        // No cell has the weight; plain segments.
        0 => (0..n).map(|_| random.bits() as u16).collect(),
        // Zeros, subnormals, infinities, NaN of both kinds, the largest and smallest numbers.
        1 => {
            const SPECIAL: [u16; 12] =
                [0x0000, 0x8000, 0x0001, 0x8001, 0x007f, 0x7f80, 0xff80, 0x7f81, 0xffff, 0x7f7f, 0xff7f, 0x3f80];
            (0..n).map(|_| SPECIAL[random.below(SPECIAL.len())]).collect()
        }
        // A few weights of any kind among sound ones, and groups of nothing but zeros.
        2 => {
            let mut bits = normal(random, n, -5);
            bits.chunks_mut(32).filter(|_| random.below(4) == 0).for_each(|group| group.fill(0));
            (0..n / 64 + 1).for_each(|_| bits[random.below(n)] = random.bits() as u16);
            bits
        }
        // Exponents that follow no distribution: many without codes.
        3 => (0..n).map(|_| bits16(random.value() * 2f32.powi(random.below(40) as i32 - 20))).collect(),
        _ => {
            let exponent = random.below(40) as i32 - 30;
            normal(random, n, exponent)
        }
    }
}

/// Finite rows of moderate size.
fn sound_row(random: &mut Random, n: usize) -> Vec<u16> {
    let mut bits = normal(random, n, -2);
    bits.chunks_mut(32).filter(|_| random.below(16) == 0).for_each(|group| group.fill(0));
    (0..n / 200).for_each(|_| bits[random.below(n)] = bits16(random.value() * 2f32.powi(3 - random.below(30) as i32)));
    bits
}

fn hidden() -> impl Strategy<Value = usize> {
    prop_oneof![4 => (1usize..40).prop_map(|g| 32 * g), 1 => Just(576usize), 1 => Just(896), 1 => Just(2880)]
}

/// The bits that a row's bytes stand for, by the CPU.
fn decoded(encoding: Encoding, row: RowRef<'_>, columns: usize) -> Vec<u16> {
    let mut bits = vec![0; columns];
    Kernels::detect().decode(encoding, row, &mut bits);
    bits
}

fn neurons(n: usize, mut row: impl FnMut() -> Vec<u16>) -> Vec<[Vec<u16>; 3]> {
    (0..n).map(|_| [row(), row(), row()]).collect()
}

/// `case` without its layout.
fn check(
    encoding: Encoding,
    hidden: usize,
    counts: [usize; 3],
    (activation, n_blocks): (Nonlinearity, usize),
    seed: u64,
) {
    let random = &mut Random::new(seed);
    let layout = BundleLayout::with_streams(encoding, hidden, 0).unwrap();
    let case = Case { layout, activation, n_blocks, counts, whole: false };
    let (layout, made) = bundles(encoding, hidden, case.n_bundles().map(|n| neurons(n, || sound_row(random, hidden))));
    let x = random.values(hidden);
    check_bundles(&Case { layout, ..case }, made.each_ref().map(|part| &part[..]), &x, random);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_bit_of_a_matrix_comes_back(e in 0usize..3, columns in hidden(), less in 0usize..32, rows in 1usize..9, seed: u64) {
        let (encoding, random) = (EXACT[e], &mut Random::new(seed));
        let columns = if encoding.accepts(1) { columns - less } else { columns };
        let bits: Vec<Vec<u16>> = (0..rows).map(|_| row(random, columns)).collect();
        let w = matrix(encoding, columns, &bits);
        let (hi, lo) = (poisoned(2 * rows * columns), poisoned(2 * rows * columns));
        unpack_rows(device(), &on_device(&w), 0, rows, [&hi.view(), &lo.view()]).unwrap();
        let got = read::<u16>(&hi);
        for (r, bits) in bits.iter().enumerate() {
            let row = RowRef::from_matrix_row(encoding, columns, &w.bytes[r * w.stride..(r + 1) * w.stride]);
            let want = decoded(encoding, row, columns);
            prop_assert!(want == *bits);
            let wrong = (0..columns).find(|&c| got[r * columns + c] != want[c]);
            prop_assert!(wrong.is_none(), "{} row {}: {:?}", encoding, r, wrong.map(|c| (c, want[c], got[r * columns + c])));
        }
        prop_assert!(read::<u16>(&lo).iter().all(|l| *l == 0));
    }

    #[test]
    fn every_bit_of_bundles_comes_back(e in 0usize..3, hidden in hidden(), n in 1usize..4, seed: u64) {
        let (encoding, random) = (EXACT[e], &mut Random::new(seed));
        let rows = neurons(n, || row(random, hidden));
        let (layout, [bytes]) = bundles(encoding, hidden, [rows.clone()]);
        let halves: [[_; 2]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| poisoned(2 * n * hidden)));
        let views = halves.each_ref().map(|pair| pair.each_ref().map(|half| half.view()));
        let refs = views.each_ref().map(|pair| pair.each_ref());
        unpack_bundles(device(), layout, &upload(&bytes).view(), n, None, refs).unwrap();
        for (which, [hi, lo]) in halves.iter().enumerate() {
            let want: Vec<u16> = rows.iter().flat_map(|neuron| neuron[which].clone()).collect();
            prop_assert!(read::<u16>(hi) == want, "{}, row {}", encoding, which);
            prop_assert!(read::<u16>(lo).iter().all(|l| *l == 0));
        }
    }

    /// What was never packed gives some bits, and nothing is read that is not there: what lies behind a bundle makes no
    /// difference.
    #[test]
    fn damaged_bundles_end(e in 0usize..4, groups in 1usize..40, extra in 0usize..3000, seed: u64) {
        let (encoding, hidden) = (PLANAR[e], 32 * groups);
        let layout = BundleLayout::with_streams(encoding, hidden, extra).unwrap();
        let random = &mut Random::new(seed);
        let mut bytes: Vec<u8> = (0..3 * layout.bundle_bytes()).map(|_| random.bits() as u8).collect();
        let case = Case { layout, activation: Nonlinearity::Relu, n_blocks: 2, counts: [1, 1, 1], whole: false };
        let x = random.values(hidden);
        run(&case, case.n_bundles().map(|n| &bytes[..n * layout.bundle_bytes()]), &x, random);
        let mut unpacked = || {
            let halves: [[_; 2]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| poisoned(2 * hidden)));
            let views = halves.each_ref().map(|pair| pair.each_ref().map(|half| half.view()));
            let refs = views.each_ref().map(|pair| pair.each_ref());
            unpack_bundles(device(), layout, &upload(&bytes).view(), 1, None, refs).unwrap();
            bytes[layout.bundle_bytes()..].iter_mut().for_each(|b| *b = !*b);
            halves.each_ref().map(|pair| pair.each_ref().map(read::<u16>))
        };
        prop_assert!(unpacked() == unpacked());
    }

    #[test]
    fn ffn_adds_up_planar_neurons(
        e in 0usize..4, hidden in hidden(), activation in activation(), n_blocks in 1usize..6,
        counts in [0usize..8, 0usize..5, 0usize..10], seed: u64,
    ) {
        let counts = if hidden > 1000 { counts.map(|n| n.div_ceil(2)) } else { counts };
        check(PLANAR[e], hidden, counts, (activation, n_blocks), seed);
    }

    #[test]
    fn ffn_of_planar_neurons_is_exact_where_sums_are(
        e in 0usize..3, groups in 1usize..16, drelu: bool, n_blocks in 1usize..6,
        counts in [0usize..8, 0usize..5, 0usize..10], seed: u64,
    ) {
        let (encoding, hidden, random) = (EXACT[e], 32 * groups, &mut Random::new(seed));
        let activation = if drelu { Nonlinearity::Drelu } else { Nonlinearity::Relu };
        let layout = BundleLayout::with_streams(encoding, hidden, 0).unwrap();
        let case = Case { layout, activation, n_blocks, counts, whole: true };
        let x = whole_input(hidden, random);
        let (layout, made) = bundles(encoding, hidden, case.n_bundles().map(|n| {
            neurons(n, || whole_row(encoding, hidden, random).into_iter().map(bits16).collect())
        }));
        check_bundles(&Case { layout, ..case }, made.each_ref().map(|part| &part[..]), &x, random);
    }
}

/// One bundle in shared memory instead of two, and none.
#[test]
fn ffn_takes_the_widest_planar_rows() {
    for encoding in PLANAR {
        for (hidden, counts) in [(4096, [3, 1, 2]), (8192, [2, 1, 1]), (10_240, [1, 0, 1]), (20_480, [1, 0, 1])] {
            check(encoding, hidden, counts, (Nonlinearity::Silu, 1), hidden as u64);
        }
    }
}

/// The same, as rows of a matrix.
#[test]
fn gemv_takes_the_widest_planar_rows() {
    for encoding in PLANAR {
        for columns in [8192, 10_240, 20_480] {
            let random = &mut Random::new(columns as u64);
            let w = matrix(encoding, columns, &[sound_row(random, columns), sound_row(random, columns)]);
            let (x, out) = (random.values(columns), poisoned(8));
            gemv(device(), &on_device(&w), &upload(&x).view(), None, Added::default(), &out.view()).unwrap();
            for (r, got) in read::<f32>(&out).into_iter().enumerate() {
                let (want, size) = w.dot(r, &crate::wide(&x));
                let tolerance = size * crate::additions(columns) * crate::U;
                crate::assert_near(got, want, tolerance, &format!("{encoding}, {columns} columns, row {r}"));
            }
        }
    }
}
