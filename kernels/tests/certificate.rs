//! What is certified is negative in every exact kernel, whatever the rows and inputs look like.
#![allow(missing_docs, clippy::unwrap_used)]

use proptest::prelude::*;
use thermocline_kernels::{
    CERTIFIED_ROWS, Certificate, Encoding, Isa, Kernels, PreparedInput, QuantisedInput, RowRef, ScaleFit, pack, unpack,
};

const ROWS: usize = 40;

fn kernels() -> impl Iterator<Item = Kernels> {
    Isa::ALL.into_iter().filter_map(Kernels::new)
}

fn new(encoding: Encoding, columns: usize, packed: &[Vec<u8>]) -> Option<Certificate> {
    let row = |r: usize, out: &mut [f32]| {
        unpack(encoding, RowRef::from_matrix_row(encoding, columns, &packed[r]), out);
    };
    Certificate::new(packed.len(), columns, row).unwrap()
}

/// Checks every row under every instruction set; returns how many are certified and how many are negative.
fn check(encoding: Encoding, packed: &[Vec<u8>], x: &[f32]) -> (u32, u32) {
    let (certificate, mut input) = (new(encoding, x.len(), packed), QuantisedInput::default());
    let Some(certificate) = certificate.filter(|_| input.set(x)) else { return (0, 0) };
    let (mut certified, mut negative) = (0, 0);
    let mut words = Vec::new();
    for kernels in kernels() {
        let mut prepared = PreparedInput::default();
        kernels.prepare(encoding, x, &mut prepared);
        let dots = |row: &Vec<u8>| {
            let row = RowRef::from_matrix_row(encoding, x.len(), row);
            [kernels.dots(encoding, [row], x)[0], kernels.prepared_dots(encoding, [row], &prepared)[0]]
        };
        let exact: Vec<[f32; 2]> = packed.iter().map(dots).collect();
        (certified, negative) = (0, exact.iter().filter(|e| e[0] < 0.0).count() as u32);
        let blocks = packed.len().div_ceil(CERTIFIED_ROWS);
        let judged: Vec<u32> = (0..blocks).map(|b| certificate.negative(&kernels, b, &input)).collect();
        for (b, &word) in judged.iter().enumerate() {
            certified += word.count_ones();
            for lane in (0..CERTIFIED_ROWS).filter(|lane| word >> lane & 1 == 1) {
                let exact = exact[b * CERTIFIED_ROWS + lane];
                assert!(exact.iter().all(|e| *e < 0.0), "{encoding}, {:?}: {exact:?} was certified", kernels.isa());
            }
        }
        assert!(exact.as_flattened().iter().all(|e| e.is_finite()), "what is accepted does not overflow");
        words.push(judged);
    }
    assert!(words.iter().all(|w| *w == words[0]), "integers do not depend on the instruction set");
    (certified, negative)
}

fn packed(encoding: Encoding, rows: &[Vec<f32>]) -> Option<Vec<Vec<u8>>> {
    rows.iter()
        .map(|row| {
            let mut out = vec![0; encoding.row_stride(row.len())];
            pack(encoding, row, ScaleFit::LeastSquares, &mut out).ok().map(|()| out)
        })
        .collect()
}

/// Numbers of about the same size; of any size; with cancellation to come; and what is no ordinary number.
fn value() -> impl Strategy<Value = f32> + Clone {
    prop_oneof![
        8 => -2.0f32..2.0,
        4 => (-1.0f32..1.0, -40i32..40).prop_map(|(v, e)| v * (e as f32).exp2()),
        1 => any::<u32>().prop_map(f32::from_bits),
        1 => prop_oneof![Just(0.0f32), Just(-0.0), Just(1e-40), Just(-1e-44), Just(3e38), Just(f32::NAN), Just(f32::NEG_INFINITY)],
    ]
}

fn tame() -> impl Strategy<Value = f32> + Clone {
    prop_oneof![8 => -2.0f32..2.0, 2 => (-1.0f32..1.0, -38i32..38).prop_map(|(v, e)| v * (e as f32).exp2())]
}

fn case(
    value: impl Strategy<Value = f32> + Clone + 'static,
) -> impl Strategy<Value = (Encoding, Vec<Vec<f32>>, Vec<f32>)> {
    (0usize..3, 1usize..9, 0usize..32).prop_flat_map(move |(e, groups, extra)| {
        let encoding = Encoding::PLAIN[e];
        let n = groups * 32 + if encoding == Encoding::Bf16 { extra } else { 0 };
        let values = proptest::collection::vec(value.clone(), n);
        (Just(encoding), proptest::collection::vec(values.clone(), ROWS), values)
    })
}

proptest! {
    #[test]
    fn only_negative_rows_are_certified((encoding, rows, x) in case(tame())) {
        if let Some(packed) = packed(encoding, &rows) {
            check(encoding, &packed, &x);
        }
    }

    #[test]
    fn wild_rows_are_not_certified_by_mistake((encoding, mut rows, x) in case(value()), at in any::<prop::sample::Index>()) {
        // Most rows have something wild, and then there is no certificate; with one such row it is seen too.
        if let Some(packed) = packed(encoding, &rows) {
            check(encoding, &packed, &x);
        }
        let wild = at.index(rows.len());
        for (r, row) in rows.iter_mut().enumerate().filter(|(r, _)| *r != wild) {
            row.iter_mut().enumerate().for_each(|(j, v)| *v = ((r * 7 + j * 13) % 29) as f32 - 14.0);
        }
        if let Some(packed) = packed(encoding, &rows) {
            check(encoding, &packed, &x);
        }
    }

    /// Codes and scales of any bits at all.
    #[test]
    fn any_bytes_are_safe(e in 0usize..3, bytes in proptest::collection::vec(any::<u8>(), 2 * 64 + 16), x in proptest::collection::vec(tame(), 64)) {
        let encoding = Encoding::PLAIN[e];
        check(encoding, &[bytes[..encoding.row_stride(64)].to_vec()], &x);
    }

    /// Rows nearly orthogonal to the input: sums whose sign is all rounding, where only a sound bound is right.
    #[test]
    fn cancelling_rows_are_judged_soundly((encoding, mut rows, x) in case(-2.0f32..2.0), tilt in -1e-3f32..1e-3) {
        let size: f32 = x.iter().map(|v| v * v).sum();
        for row in &mut rows {
            let along = row.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>() / size + tilt;
            row.iter_mut().zip(&x).for_each(|(w, x)| *w -= along * x);
        }
        check(encoding, &packed(encoding, &rows).unwrap(), &x);
    }
}

#[test]
fn most_rows_that_are_clearly_negative_are_certified() {
    let mut state = 5u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    for encoding in Encoding::PLAIN {
        let x: Vec<f32> = (0..256).map(|_| random()).collect();
        let rows: Vec<Vec<f32>> = (0..512).map(|_| (0..256).map(|_| random()).collect()).collect();
        let (certified, negative) = check(encoding, &packed(encoding, &rows).unwrap(), &x);
        assert!(certified * 10 > negative * 8, "{encoding}: {certified} of {negative}");
    }
}

#[test]
fn what_could_overflow_is_refused() {
    let mut input = QuantisedInput::default();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e12, -3e38] {
        for place in [0, 63] {
            let mut row = vec![-1.0; 64];
            row[place] = bad;
            assert!(!input.set(&row), "{bad}");
            let refused = Certificate::new(3, 64, |r, out| {
                out.fill(-1.0);
                out[place] = if r == 1 { bad } else { 1.0 };
            });
            assert!(refused.unwrap().is_none(), "{bad}");
        }
    }
    assert!(!input.set(&[0.0; 64]) && !input.set(&[1e-20; 64]));
    assert!(input.set(&[1.0; 64]));
    let nothing = Certificate::new(1, 64, |_, out| out.fill(-1e-20)).unwrap().unwrap();
    assert!(kernels().all(|k| nothing.negative(&k, 0, &input) == 0), "a row too small to have codes");
    let one = Certificate::new(1, 64, |_, out| out.fill(-1.0)).unwrap().unwrap();
    assert!(kernels().all(|k| one.negative(&k, 0, &input) == 1), "rows that are not there are not certified");
}

#[test]
fn the_longest_rows_do_not_overflow() {
    for columns in [1 << 15, (1 << 15) + 1] {
        let mut input = QuantisedInput::default();
        let accepted = input.set(&vec![1.0; columns]);
        let certificate = Certificate::new(2, columns, |r, out| out.fill([1.0, -1.0][r])).unwrap();
        assert_eq!((accepted, certificate.is_some()), (columns == 1 << 15, columns == 1 << 15));
        if let Some(certificate) = certificate {
            assert!(kernels().all(|k| certificate.negative(&k, 0, &input) == 0b10));
        }
    }
}
