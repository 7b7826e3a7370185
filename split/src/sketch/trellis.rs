//! The search for the codes of a sketch's row: of all paths through the trellis the one that loses least.
//!
//! Papers: Viterbi (1967); Marcellin and Fischer, Trellis coded quantization (1990); each path has its own feedback as in Duel-Hallen
//! and Heegard, Delayed decision-feedback sequence estimation (1989).

// Several arrays advance together; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use thermocline_kernels::{SketchBits, TRELLIS_STATES, trellis_next, trellis_subset};

/// Columns that are searched together.
pub(super) const WINDOW: usize = 64;
/// Of these, the ones that are decided before the search goes on: paths that end together have as a rule been one for five
/// times the six columns that a state remembers.
pub(super) const DECIDED: usize = 32;
/// Points of a subset, at most.
const MOST_POINTS: usize = 4;

/// Levels by subsets.
#[derive(Debug, Clone)]
pub(super) struct Subsets {
    levels: [[f32; MOST_POINTS]; 4],
    /// Halfway from one level of a subset to the next; infinite behind the last.
    borders: [[f32; MOST_POINTS - 1]; 4],
    n_points: usize,
}

impl Subsets {
    pub(super) fn new(bits: SketchBits) -> Self {
        let of = |subset: usize, point: usize| bits.levels().get(4 * point + subset).map(|level| f32::from(*level));
        let mut out = Self {
            levels: [[0.0; MOST_POINTS]; 4],
            borders: [[f32::INFINITY; MOST_POINTS - 1]; 4],
            n_points: bits.levels().len() / 4,
        };
        for subset in 0..4 {
            for point in 0..MOST_POINTS {
                out.levels[subset][point] = of(subset, point).unwrap_or_default();
                if let (Some(low), Some(high)) = (of(subset, point), of(subset, point + 1)) {
                    out.borders[subset][point] = (low + high) / 2.0;
                }
            }
        }
        out
    }

    /// The point of a subset that is nearest to `value`, and its level.
    #[inline]
    fn nearest(&self, subset: usize, value: f32) -> (usize, f32) {
        let point = self.borders[subset].iter().map(|border| usize::from(value > *border)).sum::<usize>();
        (point, self.levels[subset][point])
    }

    /// The level of a column's code behind `state`, and the next state.
    #[inline]
    pub(super) fn level(&self, state: usize, code: u8) -> (f32, usize) {
        let branch = usize::from(code & 1);
        let level = self.levels[trellis_subset(state, branch)][usize::from(code >> 1)];
        (level, trellis_next(state, branch))
    }
}

/// How a path came to a state: the code of the column, and whether it came from the upper half of the states.
type Step = u8;
const FROM_UPPER: u8 = 0x80;

fn before(state: usize, step: Step) -> usize {
    state / 2 + if step & FROM_UPPER > 0 { TRELLIS_STATES / 2 } else { 0 }
}

/// The codes of the best path that ends in any state.
fn walk_back(costs: &[f32; TRELLIS_STATES], steps: &[[Step; TRELLIS_STATES]], codes: &mut [u8]) {
    let mut state = (0..TRELLIS_STATES).min_by(|a, b| costs[*a].total_cmp(&costs[*b])).unwrap_or_default();
    for (steps, code) in steps.iter().zip(codes).rev() {
        let step = steps[state];
        *code = step & !FROM_UPPER;
        state = before(state, step);
    }
}

/// Codes of a row's weights of the least squared error, `scales` for each of them.
pub(super) fn search(subsets: &Subsets, weights: &[f32], scales: impl Fn(usize) -> f32, codes: &mut [u8]) {
    let mut costs = [f32::INFINITY; TRELLIS_STATES];
    costs[0] = 0.0;
    let mut steps = vec![[0; TRELLIS_STATES]; weights.len()];
    for (column, (weight, steps)) in weights.iter().zip(&mut steps).enumerate() {
        let scale = scales(column);
        let value = if scale > 0.0 { weight / scale } else { 0.0 };
        let of_subset: [_; 4] = std::array::from_fn(|subset| {
            let (point, level) = subsets.nearest(subset, value);
            (point as u8, (weight - level * scale).powi(2))
        });
        let previous = costs;
        for state in 0..TRELLIS_STATES {
            let branch = state % 2;
            let [lower, upper] = [0, TRELLIS_STATES / 2].map(|half| {
                let from = state / 2 + half;
                let (point, error) = of_subset[trellis_subset(from, branch)];
                (previous[from] + error, point << 1 | branch as u8)
            });
            (costs[state], steps[state]) = if upper.0 < lower.0 { (upper.0, upper.1 | FROM_UPPER) } else { lower };
        }
    }
    walk_back(&costs, &steps, codes);
}

/// Codes of the nearest level that can be had in each column, whatever that leaves for those to come: a hundredth of the work, and
/// a half more squared error.
pub(super) fn walk(subsets: &Subsets, weights: &[f32], scales: impl Fn(usize) -> f32, codes: &mut [u8]) {
    let mut state = 0;
    for (column, (weight, code)) in weights.iter().zip(codes).enumerate() {
        let scale = scales(column);
        let value = if scale > 0.0 { weight / scale } else { 0.0 };
        let [zero, one] = [0, 1].map(|branch| {
            let (point, level) = subsets.nearest(trellis_subset(state, branch), value);
            ((value - level).abs(), (point << 1 | branch) as u8)
        });
        *code = if one.0 < zero.0 { one.1 } else { zero.1 };
        state = trellis_next(state, usize::from(*code & 1));
    }
}

/// What each path has left of the window's weights.
type Left = [[f32; WINDOW]; TRELLIS_STATES];
/// A number for each state.
type OfStates = [f32; TRELLIS_STATES];

/// The points that a column can have behind each state with one branch bit: side by side, so that all states are done at once.
struct Branch {
    /// The least level, and how much further each next one is.
    first: OfStates,
    steps: [OfStates; MOST_POINTS - 1],
    borders: [OfStates; MOST_POINTS - 1],
    n_points: usize,
}

impl Branch {
    fn new(subsets: &Subsets, branch: usize) -> Self {
        let of = |state| trellis_subset(state, branch);
        let level = |state, point: usize| subsets.levels[of(state)][point];
        Self {
            first: std::array::from_fn(|state| level(state, 0)),
            steps: std::array::from_fn(|p| std::array::from_fn(|state| level(state, p + 1) - level(state, p))),
            borders: std::array::from_fn(|p| std::array::from_fn(|state| subsets.borders[of(state)][p])),
            n_points: subsets.n_points,
        }
    }

    /// By states, for a column of which paths have so much `left`.
    #[inline]
    fn costs(&self, before: &OfStates, left: &OfStates, scale: f32, certainty: f32) -> Costs {
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let mut out = Costs { total: *before, error: self.first, point: [0.0; TRELLIS_STATES] };
        for (border, step) in self.borders.iter().zip(&self.steps).take(self.n_points - 1) {
            for i in 0..TRELLIS_STATES {
                let is_above = left[i] * inverse > border[i];
                out.error[i] += if is_above { step[i] } else { 0.0 };
                out.point[i] += if is_above { 1.0 } else { 0.0 };
            }
        }
        for i in 0..TRELLIS_STATES {
            out.error[i] = (left[i] - out.error[i] * scale) * certainty;
            out.total[i] += out.error[i] * out.error[i];
        }
        out
    }
}

/// What a column costs behind each state with one branch bit.
#[derive(Clone, Copy)]
struct Costs {
    total: OfStates,
    error: OfStates,
    point: OfStates,
}

/// The search in a window, where what a column's rounding loses is made good by the columns behind it, as far as a factor says.
pub(super) struct FeedbackSearch {
    branches: [Branch; 2],
    left: Box<[Left; 2]>,
    steps: [[Step; TRELLIS_STATES]; WINDOW],
}

impl FeedbackSearch {
    pub(super) fn new(bits: SketchBits) -> Self {
        let subsets = Subsets::new(bits);
        Self {
            branches: [0, 1].map(|branch| Branch::new(&subsets, branch)),
            left: Box::new([[[0.0; WINDOW]; TRELLIS_STATES]; 2]),
            steps: [[0; TRELLIS_STATES]; WINDOW],
        }
    }

    /// Codes of the best path from `state` on through `weights`, at most [`WINDOW`]; `factor(i)` is row i of the factor from its
    /// diagonal on, `scales` are those of each column.
    pub(super) fn search<'f>(
        &mut self,
        state: usize,
        weights: &[f32],
        factor: impl Fn(usize) -> &'f [f32],
        scales: impl Fn(usize) -> f32,
        codes: &mut [u8],
    ) {
        let n = weights.len();
        let mut costs = [f32::INFINITY; TRELLIS_STATES];
        costs[state] = 0.0;
        let [mut now, mut next] = self.left.each_mut();
        // Paths that nobody has come along cost without end, whatever they have left.
        now.iter_mut().for_each(|left| left[..n].copy_from_slice(weights));
        for column in 0..n {
            let row = &factor(column)[..n - column];
            let left: OfStates = std::array::from_fn(|state| now[state][column]);
            let of_branch = self.branches.each_ref().map(|b| b.costs(&costs, &left, scales(column), 1.0 / row[0]));
            for state in 0..TRELLIS_STATES {
                let of = &of_branch[state % 2];
                let (lower, upper) = (state / 2, (state + TRELLIS_STATES) / 2);
                let (from, mark) = if of.total[upper] < of.total[lower] { (upper, FROM_UPPER) } else { (lower, 0) };
                costs[state] = of.total[from];
                self.steps[column][state] = (of.point[from] as u8) << 1 | (state % 2) as u8 | mark;
                let error = of.error[from];
                let (old, new) = (&now[from][column..n], &mut next[state][column..n]);
                old.iter().zip(row).zip(new).for_each(|((old, f), new)| *new = old - error * f);
            }
            std::mem::swap(&mut now, &mut next);
        }
        walk_back(&costs, &self.steps[..n], codes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_datasets::Random;

    const COLUMNS: usize = 576;

    /// Squared error of codes, relative to the weights.
    fn lost(subsets: &Subsets, weights: &[f32], scale: f32, codes: &[u8]) -> f32 {
        let mut state = 0;
        let mut lost = 0.0;
        for (weight, code) in weights.iter().zip(codes) {
            let (level, next) = subsets.level(state, *code);
            lost += (weight - scale * level).powi(2);
            state = next;
        }
        lost / weights.iter().map(|w| w * w).sum::<f32>()
    }

    fn normal(n: usize) -> Vec<f32> {
        let mut random = Random::new(3);
        (0..n).map(|_| random.normal()).collect()
    }

    #[test]
    fn normal_weights_lose_less_than_the_best_levels_of_their_own_would() {
        // Four and eight levels: Max, Quantizing for minimum distortion (1960), table I.
        for (bits, expected, own) in [(SketchBits::Two, 0.082, 0.1175), (SketchBits::Three, 0.022, 0.03454)] {
            let (subsets, scale, weights) = (Subsets::new(bits), bits.normal_scale(), normal(40 * COLUMNS));
            let mut codes = vec![0; weights.len()];
            let mean = |codes: &mut [u8], quick| {
                let of_row = |(row, codes): (&[f32], &mut [u8])| {
                    if quick {
                        walk(&subsets, row, |_| scale, codes)
                    } else {
                        search(&subsets, row, |_| scale, codes)
                    }
                    lost(&subsets, row, scale, codes)
                };
                weights.chunks_exact(COLUMNS).zip(codes.chunks_exact_mut(COLUMNS)).map(of_row).sum::<f32>() / 40.0
            };
            let best = mean(&mut codes, false);
            assert!((best / expected - 1.0).abs() < 0.03, "{bits:?}: {best}");
            let quick = mean(&mut codes, true);
            assert!(quick > own && quick < 2.0 * best, "{bits:?}: {quick}");
        }
    }

    /// Without anything to make good, both searches are the same, from any state and whatever was searched before.
    #[test]
    fn a_window_without_feedback_is_a_plain_search() {
        for bits in [SketchBits::Two, SketchBits::Three] {
            let (subsets, mut window, scale) = (Subsets::new(bits), FeedbackSearch::new(bits), bits.normal_scale());
            let factor = [1.0].into_iter().chain([0.0; WINDOW - 1]).collect::<Vec<f32>>();
            for weights in normal(20 * WINDOW).chunks_exact(WINDOW) {
                let [mut plain, mut fed] = [[0; WINDOW]; 2];
                search(&subsets, weights, |_| scale, &mut plain);
                window.search(0, weights, |_| &factor, |_| scale, &mut fed);
                let [plain, fed] = [plain, fed].map(|codes| lost(&subsets, weights, scale, &codes));
                assert!((plain - fed).abs() < 1e-5 * plain, "{bits:?}: {plain} {fed}");
                // Another state leaves other codes behind it.
                window.search(TRELLIS_STATES - 1, weights, |_| &factor, |_| 0.0, &mut [0; WINDOW]);
            }
        }
    }

    /// What rounding one column leaves is taken from the next: two equal inputs see only the sum of their weights.
    #[test]
    fn feedback_makes_good_what_columns_lose() {
        let (subsets, mut window, scale) = (Subsets::new(SketchBits::Two), FeedbackSearch::new(SketchBits::Two), 0.01);
        let weights = normal(WINDOW);
        // Nearly equal inputs in pairs: certain of their difference hardly at all, of their sum well.
        let first: Vec<f32> = [10.0, -10.0].into_iter().chain([0.0; WINDOW]).collect();
        let second: Vec<f32> = [1.0].into_iter().chain([0.0; WINDOW]).collect();
        let mut codes = [0; WINDOW];
        window.search(0, &weights, |i| if i % 2 == 0 { &first } else { &second }, |_| scale, &mut codes);
        let mut state = 0;
        let kept: Vec<f32> = codes
            .iter()
            .map(|code| {
                let (level, next) = subsets.level(state, *code);
                state = next;
                level * scale
            })
            .collect();
        let rms = |lost: &dyn Fn(usize) -> f32| {
            ((0..WINDOW / 2).map(|i| lost(2 * i).powi(2)).sum::<f32>() / (WINDOW / 2) as f32).sqrt()
        };
        let of_sums = rms(&|i| weights[i] + weights[i + 1] - kept[i] - kept[i + 1]);
        let of_differences = rms(&|i| weights[i] - weights[i + 1] - kept[i] + kept[i + 1]);
        assert!(of_sums < 0.3 * of_differences, "{of_sums} {of_differences}");
    }
}
