//! Sums as fixed-point integers.
//!
//! Floating-point addition is not associative, so partial sums of shards would differ in their last bits from one
//! run's. Each window's sum is taken in f64 in a fixed order, rounded once to a multiple of a power of two, and added
//! as an integer: any grouping of the windows gives the same bits.

/// Per-channel sums are multiples of 2^-60. A window's sum below 2^44 becomes an integer below 2^104, so 2^23 windows
/// are certain to fit into an i128; additions are checked all the same.
const SCALE: f64 = (1u64 << 60) as f64;
const WINDOW_SUM_MAX: f64 = (1u64 << 44) as f64;

/// Entries of the second moment are i64 multiples of 2^-26, which halves the largest tensor of a profile: a total
/// of up to 2^37 fits, and a rounding error of 2^-27 per window is below that of the f32 product that made it.
const MOMENT_SCALE: f64 = (1u64 << 26) as f64;
const MOMENT_MAX: f64 = (1u64 << 36) as f64;

/// Adds a window's sum; false if it is not finite or too large.
#[must_use]
pub(crate) fn add_fixed(total: &mut i128, sum: f64) -> bool {
    // NaN fails the comparison.
    let fits = sum.abs() < WINDOW_SUM_MAX;
    match total.checked_add((sum * SCALE).round() as i128) {
        Some(next) if fits => {
            *total = next;
            true
        }
        _ => false,
    }
}

/// As [`add_fixed`], for an entry of the second moment.
#[must_use]
pub(crate) fn add_fixed_moment(total: &mut i64, sum: f32) -> bool {
    let sum = f64::from(sum);
    let fits = sum.abs() < MOMENT_MAX;
    match total.checked_add((sum * MOMENT_SCALE).round() as i64) {
        Some(next) if fits => {
            *total = next;
            true
        }
        _ => false,
    }
}

/// The value of a per-channel sum.
pub(crate) fn from_fixed(total: i128) -> f64 {
    total as f64 / SCALE
}

/// The value of an entry of the second moment.
pub(crate) fn from_fixed_moment(total: i64) -> f64 {
    total as f64 / MOMENT_SCALE
}

/// Entries on and above the diagonal of an `n` by `n` matrix; as many as there are numbers, if there are more.
pub(crate) fn triangle_len(n: usize) -> usize {
    n.saturating_mul(n.saturating_add(1)) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_grouping_gives_the_same_integer() {
        let sums: Vec<f64> = (0..1000).map(|i| (f64::from(i) * 0.7).sin().powi(3) * 1e3 + 1e-7).collect();
        let total = |values: &[f64]| {
            let mut total = 0i128;
            assert!(values.iter().all(|&v| add_fixed(&mut total, v)));
            total
        };
        let reversed: Vec<f64> = sums.iter().rev().copied().collect();
        assert_eq!(total(&sums), total(&reversed));
        assert_eq!(total(&sums), total(&sums[..300]) + total(&sums[300..]));
        assert!((from_fixed(total(&sums)) - sums.iter().sum::<f64>()).abs() < 1e-9);
    }

    #[test]
    fn refuses_what_it_cannot_hold() {
        let mut total = 5;
        assert!(!add_fixed(&mut total, f64::NAN));
        assert!(!add_fixed(&mut total, f64::INFINITY));
        assert!(!add_fixed(&mut total, 1e14));
        assert_eq!(total, 5);
        let mut moment = i64::MAX - 1;
        assert!(!add_fixed_moment(&mut moment, 1.0));
        assert!(!add_fixed_moment(&mut moment, f32::NAN));
    }
}
