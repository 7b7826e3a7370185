//! `base + scale * B A`, in one order of operations, so that every implementation gets the same bits.

/// Adds an adapter's product to one row of the base: for every column `j`, in f32 with separate, correctly rounded
/// multiplications and additions,
///
/// ```text
/// acc = 0; for k in 0..rank { acc = acc + b[k] * a[k][j] }
/// final = bf16(base[j] + scale * acc)      // round to nearest, ties to even
/// ```
///
/// A result that is not a number is the base's own bits if those are no number, else `0x7fc0`: payloads and signs of
/// computed NaNs differ from machine to machine. `b` is `[rank]`, `a` is `[rank, columns]` row-major, `base` and the
/// result are bf16 bits.
///
/// # Panics
/// If `a` is not as many rows as `b` has values, each as long as `base`.
pub fn fold_row(base: &mut [u16], a: &[f32], b: &[f32], scale: f32, acc: &mut Vec<f32>) {
    assert_eq!(a.len(), b.len() * base.len(), "one row of A for each value of B");
    acc.clear();
    acc.resize(base.len(), 0.0);
    for (b, a) in b.iter().zip(a.chunks_exact(base.len().max(1))) {
        acc.iter_mut().zip(a).for_each(|(acc, a)| *acc += *b * *a);
    }
    for (bits, acc) in base.iter_mut().zip(acc) {
        *bits = round(*bits, f32::from_bits(u32::from(*bits) << 16) + scale * *acc);
    }
}

/// `sum` as bf16, or what stands for no number.
fn round(base: u16, sum: f32) -> u16 {
    if sum.is_nan() {
        return if base & 0x7fff > 0x7f80 { base } else { 0x7fc0 };
    }
    let bits = sum.to_bits();
    // Half of the last place less one, and one more if the last kept bit is odd. No finite f32 overflows 32 bits here;
    // the largest ones round to infinity, as they must.
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_fold_is_the_naive_sum(
            rank in 1usize..5,
            base in prop::collection::vec(any::<u16>(), 1..20),
            seed in prop::collection::vec(-4.0f32..4.0, 100),
            scale in prop::sample::select(vec![0.0, 1.0, -0.5, 2.0, 1e30]),
        ) {
            let n = base.len();
            let (b, a) = (&seed[..rank], &seed[5..5 + rank * n]);
            let mut got = base.clone();
            fold_row(&mut got, a, b, scale, &mut Vec::new());
            for j in 0..n {
                let mut acc = 0.0f32;
                for k in 0..rank {
                    let product = b[k] * a[k * n + j];
                    acc += product;
                }
                let sum = bf16::from_bits(base[j]).to_f32() + scale * acc;
                let want = if !sum.is_nan() {
                    bf16::from_f32(sum).to_bits()
                } else if bf16::from_bits(base[j]).is_nan() {
                    base[j]
                } else {
                    0x7fc0
                };
                prop_assert_eq!(got[j], want, "{:04x} + {} * {}", base[j], scale, acc);
            }
        }
    }

    #[test]
    fn the_largest_sums_round_to_infinity_and_ties_to_even() {
        let folded = |base: u16, product: f32| {
            let mut row = [base];
            fold_row(&mut row, &[product], &[1.0], 1.0, &mut Vec::new());
            row[0]
        };
        assert_eq!(folded(0x7f7f, f32::from_bits(0x7b00_0000)), 0x7f80, "half a place above the largest");
        assert_eq!((folded(0x3f80, 0.003_906_25), folded(0x3f81, 0.003_906_25)), (0x3f80, 0x3f82));
        assert_eq!((folded(0x7f80, f32::NEG_INFINITY), folded(0xff81, 1.0), folded(0x8000, 0.0)), (0x7fc0, 0xff81, 0));
    }
}
