//! Small pieces that charts of several sections need.

use crate::plots::Ink;

/// Colour of item `i` of `n` in an ordered family.
pub(crate) fn ordered(i: usize, n: usize) -> Ink {
    Ink::Ordered(i as f64 / n.saturating_sub(1).max(1) as f64)
}

/// Whether item `i` of `n` is one of the few that a legend names.
pub(crate) fn is_named(i: usize, n: usize) -> bool {
    i == 0 || i + 1 == n || (n > 2 && i == n / 2)
}

/// A share as a percentage with sensible digits.
pub(crate) fn percent(share: f64) -> String {
    let digits = if share < 0.0995 { 1 } else { 0 };
    format!("{:.digits$} %", 100.0 * share)
}

/// Bytes as megabytes, the unit of most charts.
pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Bytes as gigabytes, for models of that size.
pub(crate) fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Bytes as gibibytes, the unit of VRAM budgets.
pub(crate) fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// Mean of what is there.
pub(crate) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    (n > 0).then(|| sum / n as f64)
}

/// `text` cut to `n` characters, for legends.
pub(crate) fn short(text: &str, n: usize) -> String {
    if text.chars().count() <= n {
        return text.to_owned();
    }
    text.chars().take(n.saturating_sub(1)).chain(['\u{2026}']).collect()
}
