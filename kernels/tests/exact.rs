//! Exact encodings: every pattern of bits comes back, from every variant of the decoders.
#![allow(missing_docs, clippy::unwrap_used)]

use proptest::prelude::*;
use thermocline_kernels::exact::{PackedRow, bf16x, decode, residual, value16};
use thermocline_kernels::{BundleLayout, Encoding, Isa, Kernels, RowRef, ScaleFit, pack, unpack};

const EXACT: [Encoding; 3] = [Encoding::Bf16x, Encoding::Q4Exact, Encoding::Q8Exact];

fn packed(encoding: Encoding, bits: &[u16]) -> PackedRow {
    match encoding {
        Encoding::Bf16x => bf16x::pack(bits),
        _ => residual::pack(encoding, bits, ScaleFit::Weighted(None)),
    }
}

/// The row in the layout of a matrix, with nothing behind its stream.
fn matrix_row(encoding: Encoding, columns: usize, row: &PackedRow) -> Vec<u8> {
    let mut bytes = row.base.clone();
    bytes.extend(&row.coarse);
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    bytes.extend(&row.head);
    assert_eq!(bytes.len(), encoding.row_stride(columns));
    bytes.extend(&row.stream);
    bytes
}

fn assert_round_trip(encoding: Encoding, bits: &[u16]) {
    let row = packed(encoding, bits);
    let bytes = matrix_row(encoding, bits.len(), &row);
    let row = RowRef::from_matrix_row(encoding, bits.len(), &bytes);
    assert_eq!(encoding.stream_bytes(row.head), row.stream.len());
    let mut out = vec![0x5555; bits.len()];
    decode(encoding, row, &mut out);
    let wrong = out.iter().zip(bits).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{encoding}: {:?} {:?}", wrong.map(|i| bits[i]), wrong.map(|i| out[i]));
    for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
        out.fill(0x5555);
        kernels.decode(encoding, row, &mut out);
        let wrong = out.iter().zip(bits).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{encoding} {:?}: {:?}", kernels.isa(), wrong.map(|i| (bits[i], out[i])));
    }
}

/// Rows as models have them, and as only enemies do.
fn rows() -> impl Strategy<Value = Vec<u16>> {
    let columns = prop_oneof![1usize..6, Just(16), Just(32), Just(36), Just(66)].prop_map(|groups| groups * 32);
    columns.prop_flat_map(|n| {
        let plain = (any::<u64>(), -30i32..20).prop_map(move |(seed, exponent)| normal(seed, n, exponent));
        let any_bits = proptest::collection::vec(any::<u16>(), n);
        let few = proptest::collection::vec(prop::sample::select(SPECIAL.to_vec()), n);
        // Sound rows with a few weights of any kind among them.
        let mixed = (any::<u64>(), proptest::collection::vec((any::<prop::sample::Index>(), any::<u16>()), 0..20));
        let mixed = mixed.prop_map(move |(seed, others)| {
            let mut bits = normal(seed, n, -5);
            others.iter().for_each(|(at, b)| bits[at.index(n)] = *b);
            bits
        });
        // On the grid of a 4-bit checkpoint: weights lie between two codes.
        let grid = (any::<u64>(), 1u16..2000).prop_map(move |(seed, scale)| {
            let mut state = seed;
            (0..n)
                .map(|_| (random(&mut state) * 16.0).round() * f32::from(scale) / 4096.0)
                .map(|v| (v.to_bits() >> 16) as u16)
                .collect()
        });
        prop_oneof![plain, any_bits, few, mixed, grid]
    })
}

/// Zeros, subnormals, infinities, NaN of both kinds, the largest and smallest numbers, ones.
const SPECIAL: [u16; 16] = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x007f, 0x0080, 0x7f80, 0xff80, 0x7f81, 0xff81, 0x7fff, 0xffff, 0x7f7f, 0xff7f,
    0x3f80, 0xbf80,
];

fn random(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// About normal: the sum of six uniform ones, times a power of two.
fn normal(seed: u64, n: usize, exponent: i32) -> Vec<u16> {
    let mut state = seed;
    let scale = 2.0f32.powi(exponent);
    (0..n)
        .map(|_| (0..6).map(|_| random(&mut state)).sum::<f32>() * scale)
        .map(thermocline_kernels::exact::bits16)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_bit_comes_back(bits in rows()) {
        EXACT.into_iter().for_each(|encoding| assert_round_trip(encoding, &bits));
    }

    #[test]
    fn bf16x_takes_rows_of_any_length(bits in proptest::collection::vec(0x3c00u16..0x4000, 1..200)) {
        assert_round_trip(Encoding::Bf16x, &bits);
    }

    /// The base of an exact row is what the plain encoding has, and the coarse plane brings it to within a sixteenth.
    #[test]
    fn planes_refine_the_base(seed in any::<u64>(), groups in 1usize..40) {
        let bits = normal(seed, groups * 32, -6);
        let row = packed(Encoding::Q4Exact, &bits);
        let values: Vec<f32> = bits.iter().map(|&b| value16(b)).collect();
        let mut plain = vec![0; Encoding::Q4.row_stride(bits.len())];
        pack(Encoding::Q4, &values, ScaleFit::Weighted(None), &mut plain).unwrap();
        prop_assert!(plain == row.base);
        let (mut base, mut plus) = (vec![0.0; bits.len()], vec![0.0; bits.len()]);
        let bytes = matrix_row(Encoding::Q4Exact, bits.len(), &row);
        unpack(Encoding::Q4, RowRef::from_matrix_row(Encoding::Q4, bits.len(), &bytes), &mut base);
        unpack(Encoding::Q4Plus, RowRef::from_matrix_row(Encoding::Q4Plus, bits.len(), &bytes), &mut plus);
        let (mut clipped, scales) = (0, RowRef::from_matrix_row(Encoding::Q4, bits.len(), &bytes).scales);
        for (column, v) in values.iter().enumerate() {
            let scale = half::f16::from_le_bytes([scales[column / 32 * 2], scales[column / 32 * 2 + 1]]).to_f32().abs();
            let error = (v - base[column]).abs();
            if error >= scale * 0.5 {
                clipped += 1;
            } else {
                prop_assert!((v - plus[column]).abs() <= scale / 32.0 * 1.0001, "{v} {} {}", base[column], plus[column]);
            }
        }
        prop_assert!(clipped <= bits.len() / 50 + 2, "{clipped} of {}", bits.len());
    }

    /// Products with exact rows are those with the same rows in bf16, to the bit.
    #[test]
    fn exact_rows_multiply_like_bf16(bits in rows(), seed in any::<u64>()) {
        let mut state = seed;
        let x: Vec<f32> = bits.iter().map(|_| random(&mut state)).collect();
        let plain: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        let plain = RowRef::from_matrix_row(Encoding::Bf16, bits.len(), &plain);
        for encoding in EXACT {
            let bytes = matrix_row(encoding, bits.len(), &packed(encoding, &bits));
            let row = RowRef::from_matrix_row(encoding, bits.len(), &bytes);
            for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
                let [a, b] = kernels.dots(encoding, [row, row], &x);
                let [want] = kernels.dots(Encoding::Bf16, [plain], &x);
                prop_assert_eq!([a.to_bits(), b.to_bits()], [want.to_bits(); 2]);
                let (mut got, mut want) = (x.clone(), x.clone());
                kernels.axpys(encoding, [row; 3], [0.5, -2.0, 0.1], &mut got, &[]);
                kernels.axpys(Encoding::Bf16, [plain; 3], [0.5, -2.0, 0.1], &mut want, &[]);
                prop_assert!(got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits()));
            }
        }
    }

    /// What was never packed gives some bits, and nothing is read that is not there.
    #[test]
    fn damaged_rows_end(encoding in prop::sample::select(EXACT.to_vec()), groups in 1usize..40, seed in any::<u64>(), extra in 0usize..3000) {
        let columns = groups * 32;
        let mut state = seed;
        let bytes: Vec<u8> = (0..encoding.row_stride(columns) + extra).map(|_| (random(&mut state) * 1e6) as i32 as u8).collect();
        let row = RowRef::from_matrix_row(encoding, columns, &bytes);
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            kernels.decode(encoding, row, &mut vec![0; columns]);
        }
        let layout = BundleLayout::with_streams(encoding, columns, extra).unwrap();
        let bundle: Vec<u8> = (0..layout.bundle_bytes()).map(|_| (random(&mut state) * 1e6) as i32 as u8).collect();
        (0..3).for_each(|which| Kernels::detect().decode(encoding, layout.row(&bundle, which), &mut vec![0; columns]));
    }
}

/// All 65536 patterns, in order and so that every group holds very different ones.
#[test]
fn all_patterns_come_back() {
    for encoding in EXACT {
        for step in [1u32, 257, 40503] {
            let bits: Vec<u16> = (0..=65535u32).map(|i| i.wrapping_mul(step) as u16).collect();
            bits.chunks(2048).for_each(|row| assert_round_trip(encoding, row));
        }
    }
}

/// The figures that the formats are for, on normal data: of 16 bits, with heads.
#[test]
fn normal_rows_come_near_their_entropy() {
    for (encoding, limit) in [(Encoding::Bf16x, 0.672), (Encoding::Q4Exact, 0.72), (Encoding::Q8Exact, 0.72)] {
        let bits = normal(7, 8192, -6);
        let bytes = matrix_row(encoding, bits.len(), &packed(encoding, &bits)).len();
        let share = bytes as f64 / (2 * bits.len()) as f64;
        assert!(share < limit, "{encoding}: {share}");
    }
}

/// Half a gigabyte of patterns, random and adversarial, through every exact encoding. Minutes long:
/// `cargo test --release -p thermocline-kernels --test exact -- --ignored`
#[test]
#[ignore = "minutes long"]
fn half_a_gigabyte_comes_back() {
    const BYTES: usize = 512 << 20;
    const COLUMNS: usize = 4096;
    let n_threads = std::thread::available_parallelism().map_or(1, Into::into);
    let row = |r: usize| -> Vec<u16> {
        let mut state = r as u64 + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        match r % 4 {
            // Every pattern is as likely as every other.
            0 => (0..COLUMNS).map(|_| next() as u16).collect(),
            // Sound weights, one in a hundred of any kind.
            1 => {
                let mut bits = normal(r as u64, COLUMNS, -6);
                (0..COLUMNS / 100).for_each(|_| bits[next() as usize % COLUMNS] = next() as u16);
                bits
            }
            // Special values among their neighbours.
            2 => (0..COLUMNS)
                .map(|_| SPECIAL[next() as usize % SPECIAL.len()].wrapping_add((next() % 5) as u16))
                .collect(),
            // All exponents, one after the other: no code covers a row.
            _ => (0..COLUMNS).map(|i| ((i * 128) as u16).wrapping_add((next() % 128) as u16)).collect(),
        }
    };
    let n_rows = BYTES / 2 / COLUMNS;
    std::thread::scope(|scope| {
        for t in 0..n_threads {
            scope.spawn(move || {
                let kernels = Kernels::detect();
                let mut out = vec![0; COLUMNS];
                for r in (t..n_rows).step_by(n_threads) {
                    let bits = row(r);
                    for encoding in EXACT {
                        let bytes = matrix_row(encoding, COLUMNS, &packed(encoding, &bits));
                        kernels.decode(encoding, RowRef::from_matrix_row(encoding, COLUMNS, &bytes), &mut out);
                        assert!(out == bits, "{encoding}, row {r}");
                    }
                }
            });
        }
    });
}
