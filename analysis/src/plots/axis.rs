/// A scale with its label.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// Quantity and unit.
    pub label: String,
    /// Logarithmic; values at or below zero are left out.
    pub log: bool,
    /// Ends of the scale, instead of those of the data.
    pub range: Option<(f64, f64)>,
}

impl Axis {
    /// A linear scale that fits the data.
    pub fn new(label: impl Into<String>) -> Self {
        Axis { label: label.into(), log: false, range: None }
    }

    /// Makes it logarithmic.
    #[must_use]
    pub fn log(mut self) -> Self {
        self.log = true;
        self
    }

    /// Fixes its ends.
    #[must_use]
    pub fn from_to(mut self, from: f64, to: f64) -> Self {
        self.range = Some((from, to));
        self
    }

    /// The place of a value on an even scale; `None` if it has none.
    pub(crate) fn place(&self, value: f64) -> Option<f64> {
        if self.log {
            return (value > 0.0 && value.is_finite()).then(|| value.log10());
        }
        value.is_finite().then_some(value)
    }

    /// Ends on the even scale, with room around the data.
    pub(crate) fn ends(&self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        let given = self.range.and_then(|(from, to)| Some((self.place(from)?, self.place(to)?)));
        if let Some(given) = given {
            return given;
        }
        let places = values.filter_map(|v| self.place(v));
        let (low, high) = places.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return (0.0, 1.0);
        }
        let room = if high > low { 0.06 * (high - low) } else { 0.5 * high.abs().max(1e-3) };
        // A scale that nearly reaches zero should show it.
        let from = if !self.log && low >= 0.0 && low < 0.4 * high { 0.0 } else { low - room };
        (from, high + room)
    }

    /// Values at which the scale is labelled, with their places, between two ends on the even scale.
    pub(crate) fn ticks(&self, ends: (f64, f64), n: usize) -> Vec<(f64, String)> {
        if self.log {
            let ticks = log_ticks(ends);
            // A narrow range has too few round values: an even scale's ticks are better there.
            if ticks.len() >= 3 {
                return thin(ticks, n).into_iter().map(|v| (v.log10(), number(v, v))).collect();
            }
            let (from, to) = (10f64.powf(ends.0), 10f64.powf(ends.1));
            let step = round_step((to - from) / n as f64);
            return even_ticks((from, to), step).into_iter().map(|v| (v.log10(), number(v, step))).collect();
        }
        let step = round_step((ends.1 - ends.0) / n as f64);
        even_ticks(ends, step).into_iter().map(|v| (v, number(v, step))).collect()
    }
}

/// 1, 2 or 5 times a power of ten, not below `step`.
fn round_step(step: f64) -> f64 {
    if !(step > 0.0 && step.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(step.log10().floor());
    let rest = step / power;
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| rest <= f * 1.000_001).unwrap_or(10.0);
    factor * power
}

fn even_ticks((from, to): (f64, f64), step: f64) -> Vec<f64> {
    let first = (from / step - 1e-9).ceil();
    let count = ((to / step + 1e-9).floor() - first).clamp(-1.0, 100.0) as i64 + 1;
    (0..count).map(|i| (first + i as f64) * step).collect()
}

fn log_ticks((from, to): (f64, f64)) -> Vec<f64> {
    let (low, high) = (from.floor().max(-300.0) as i32, to.ceil().min(300.0) as i32);
    let all = (low..=high).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e)));
    all.filter(|v| (from - 1e-9..=to + 1e-9).contains(&v.log10())).collect()
}

/// Whole powers only if there are too many.
fn thin(ticks: Vec<f64>, n: usize) -> Vec<f64> {
    if ticks.len() <= 2 * n {
        return ticks;
    }
    ticks.into_iter().filter(|v| (v.log10() - v.log10().round()).abs() < 1e-6).collect()
}

/// A value with as many digits as its step needs.
fn number(value: f64, step: f64) -> String {
    let digits = (-step.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.digits$}");
    if text.trim_start_matches('-').trim_matches(['0', '.']).is_empty() { "0".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis, ends: (f64, f64)) -> Vec<String> {
        axis.ticks(ends, 5).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round() {
        let even = Axis::new("");
        assert_eq!(labels(&even, (0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&even, (-3.0, 29.0)), ["0", "10", "20"]);
        assert_eq!(labels(&Axis::new("").log(), (0.0, 2.0)), ["1", "2", "5", "10", "20", "50", "100"]);
        assert_eq!(labels(&Axis::new("").log(), (1.46, 1.55)), ["30", "32", "34"]);
    }

    #[test]
    fn hostile_values_do_not_matter() {
        let axis = Axis::new("");
        let ends = axis.ends([f64::NAN, f64::INFINITY, 3.0].into_iter());
        assert!(ends.0 < 3.0 && ends.1 > 3.0);
        assert_eq!(axis.ends(std::iter::empty()), (0.0, 1.0));
        assert!(axis.ticks((0.0, f64::MAX), 5).len() <= 101);
        assert!(Axis::new("").log().ticks((-400.0, 400.0), 5).len() <= 700);
    }
}
