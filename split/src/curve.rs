//! What sparse mode costs at each share of the neurons, measured; and the least share that keeps a promise.

use crate::Error;
use crate::error::{Result, corrupt};
use crate::tensor_file::{Format, TensorFile};
use serde::{Serialize, Serializer};
use std::fmt;
use xxhash_rust::xxh3::xxh3_128;

/// Of the tensors that hold a curve.
const PREFIX: &str = "curve.";
/// Tokens and digest of the text, side by side.
const MEASURED: &str = "curve.measured";
const MEASURED_BYTES: usize = 8 + 16;
/// A chosen share is a whole number of these steps from 0 to 1, so that it can be read and typed.
const STEPS: f64 = 1e4;

/// How much the perplexity of a text rises over the dense model's where sparse mode computes a share of all neurons, divided
/// between the layers as [`crate::Shares`] says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// Shares of all neurons, rising, above 0 and below 1.
    active: Vec<f32>,
    /// Relative increases there, above -1: 0.05 is 5 %.
    ppl_increase: Vec<f32>,
    /// Upper ends of their 95 % intervals.
    ppl_increase_high: Vec<f32>,
    /// Tokens whose probability was taken.
    tokens: u64,
    /// XXH3-128 of the text.
    #[serde(serialize_with = "hexadecimal")]
    text_digest: u128,
}

/// A share that a curve promises to be enough.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Promise {
    /// The share of all neurons; with sketches, of those that are not always computed.
    pub active: f32,
    /// With sketches: the curve is of a model that always computes this share of each layer's neurons.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub always: Option<f32>,
    /// What the perplexity may rise by, relative to the dense model's.
    pub max_ppl_increase: f64,
    /// Tokens that the curve was measured on.
    pub tokens: u64,
    /// XXH3-128 of the text that they are of.
    #[serde(serialize_with = "hexadecimal")]
    pub text_digest: u128,
}

fn hexadecimal<S: Serializer>(digest: &u128, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{digest:032x}"))
}

impl Curve {
    /// Increases of the perplexity at the shares `active`, measured on `tokens` tokens of the text with that XXH3-128.
    ///
    /// # Errors
    /// [`Error::Settings`] if lengths disagree, shares do not rise from above 0 to below 1, a number is not finite, an
    /// increase is above the upper end of its interval, or there are no tokens.
    pub fn new(
        active: Vec<f32>,
        ppl_increase: Vec<f32>,
        ppl_increase_high: Vec<f32>,
        tokens: u64,
        text_digest: u128,
    ) -> Result<Self> {
        let refused = |what: &str| Err(Error::Settings { what: what.to_owned() });
        let inside = active.first().is_some_and(|s| *s > 0.0) && active.last().is_some_and(|s| *s < 1.0);
        if !(inside && active.windows(2).all(|w| w[0] < w[1])) {
            return refused("curve.active must rise, from above 0 to below 1");
        }
        if ppl_increase.len() != active.len() || ppl_increase_high.len() != active.len() {
            return refused("curve.ppl_increase and curve.ppl_increase_high must be as long as curve.active");
        }
        let is_sound = |(low, high): (&f32, &f32)| *low > -1.0 && low <= high && high.is_finite();
        if !ppl_increase.iter().zip(&ppl_increase_high).all(is_sound) {
            return refused("curve.ppl_increase must be above -1, and finite upper ends not below it");
        }
        if tokens == 0 {
            return refused("curve.measured has no tokens");
        }
        Ok(Self { active, ppl_increase, ppl_increase_high, tokens, text_digest })
    }

    /// The XXH3-128 of a text, by which a curve names it.
    pub fn digest(text: &str) -> u128 {
        xxh3_128(text.as_bytes())
    }

    /// (share, relative increase of the perplexity, upper end of its 95 % interval), by rising share.
    pub fn points(&self) -> impl DoubleEndedIterator<Item = (f32, f32, f32)> {
        let increases = self.ppl_increase.iter().zip(&self.ppl_increase_high);
        self.active.iter().zip(increases).map(|(share, (increase, high))| (*share, *increase, *high))
    }

    /// Tokens whose probability was taken.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The least measured share, or one between, at which the perplexity rises by no more than `max_ppl_increase` (at least
    /// 0). Upper ends of the intervals count, since it is a promise; a share is never thought worse than a smaller one;
    /// between measured shares, and from the last to 1, where nothing is lost, lines are straight. Rounded up to a
    /// ten-thousandth.
    pub fn promise(&self, max_ppl_increase: f64) -> Promise {
        let (mut right, mut loss) = (1.0f32, 0.0f64);
        for (share, _, high) in self.points().rev() {
            let left_loss = f64::from(high).max(loss);
            if left_loss > max_ppl_increase {
                let part = (max_ppl_increase - loss) / (left_loss - loss);
                right = rounded_up(f64::from(right) - part * f64::from(right - share)).min(right);
                break;
            }
            (right, loss) = (share, left_loss);
        }
        Promise { active: right, always: None, max_ppl_increase, tokens: self.tokens, text_digest: self.text_digest }
    }

    /// Tensors for [`crate::tensor_file::Writer`], in order.
    pub(crate) fn tensors(&self) -> [(String, Format, usize, usize); 4] {
        let n = self.active.len();
        let of = |name: &str, format, columns| (name.to_owned(), format, 1, columns);
        [
            of("curve.active", Format::F32, n),
            of("curve.ppl_increase", Format::F32, n),
            of("curve.ppl_increase_high", Format::F32, n),
            of(MEASURED, Format::U8, MEASURED_BYTES),
        ]
    }

    /// Their contents.
    pub(crate) fn contents(&self) -> [Vec<u8>; 4] {
        let [active, low, high] =
            [&self.active, &self.ppl_increase, &self.ppl_increase_high].map(|values| bytes_of(values));
        [active, low, high, self.measured()]
    }

    /// Tokens and digest of the text, side by side.
    pub(crate) fn measured(&self) -> Vec<u8> {
        [&self.tokens.to_le_bytes()[..], &self.text_digest.to_le_bytes()].concat()
    }

    /// Whether another one was measured at the same shares, on the same tokens.
    pub(crate) fn is_measured_as(&self, other: &Self) -> bool {
        let of = |c: &Self| (c.tokens, c.text_digest);
        self.active == other.active && of(self) == of(other)
    }

    /// Whether a tensor is a curve's.
    pub(crate) fn has(name: &str) -> bool {
        name.starts_with(PREFIX)
    }

    /// The curve in `file`, if it has one.
    pub(crate) fn read(file: &TensorFile) -> Result<Option<Self>> {
        if !file.tensors().iter().any(|t| Self::has(&t.name)) {
            return Ok(None);
        }
        let [active, low, high] =
            ["active", "ppl_increase", "ppl_increase_high"].map(|part| file.read_f32(&format!("{PREFIX}{part}")));
        let (tokens, digest) = measured_of(file, MEASURED)?;
        let curve = Self::new(active?, low?, high?, tokens, digest);
        curve.map(Some).map_err(|e| corrupt(file.path(), "curve", e.to_string()))
    }
}

/// Floats as they are stored.
pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Tokens and digest of a text, from the tensor of that name.
pub(crate) fn measured_of(file: &TensorFile, name: &str) -> Result<(u64, u128)> {
    let measured = file.read(name)?;
    let parts = measured.split_first_chunk::<8>().and_then(|(tokens, digest)| {
        let digest: [u8; 16] = digest.try_into().ok()?;
        Some((u64::from_le_bytes(*tokens), u128::from_le_bytes(digest)))
    });
    parts.ok_or_else(|| corrupt(file.path(), name, format!("{} bytes, not {MEASURED_BYTES}", measured.len())))
}

/// `share`, or a little more.
fn rounded_up(share: f64) -> f32 {
    let rounded = ((share * STEPS).ceil() / STEPS) as f32;
    if f64::from(rounded) < share { rounded.next_up() } else { rounded }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = (1e8 * self.max_ppl_increase).round() / 1e6;
        let measured = format!("{} tokens (text {:032x})", self.tokens, self.text_digest);
        let behind = match self.always {
            Some(always) if always > 0.0 => {
                format!(" with {} % or more of the neurons always computed", (1e6 * f64::from(always)).round() / 1e4)
            }
            _ => String::new(),
        };
        if self.active >= 1.0 {
            return write!(
                f,
                "--active 1{behind}: no smaller share keeps at most +{percent} % perplexity on {measured}"
            );
        }
        let end = "the upper end of the 95 % interval";
        write!(f, "--active {}{behind} for at most +{percent} % perplexity: {end} on {measured}", self.active)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn curve(points: &[(f32, f32)]) -> Curve {
        let (active, high): (Vec<f32>, Vec<f32>) = points.iter().copied().unzip();
        Curve::new(active, high.iter().map(|h| h - 0.01).collect(), high, 100, 7).unwrap()
    }

    /// What a share is thought to cost, from its definition: every point raised to the largest one on its right, (1, 0) the
    /// last, and straight lines between them.
    fn cost(points: &[(f32, f32)], share: f32) -> f64 {
        let mut all: Vec<(f64, f64)> = points.iter().map(|p| (f64::from(p.0), f64::from(p.1))).collect();
        all.push((1.0, 0.0));
        for i in (0..all.len() - 1).rev() {
            all[i].1 = all[i].1.max(all[i + 1].1);
        }
        let share = f64::from(share);
        let i = all.iter().position(|p| p.0 >= share).unwrap();
        if all[i].0 == share || i == 0 {
            return all[i].1;
        }
        let (a, b) = (all[i - 1], all[i]);
        a.1 + (b.1 - a.1) * (share - a.0) / (b.0 - a.0)
    }

    #[test]
    fn the_least_share_between_points_is_taken() {
        let curve = curve(&[(0.25, 0.8), (0.5, 0.2), (0.75, 0.1)]);
        for (target, active) in
            [(0.0, 1.0), (0.05, 0.875), (0.1, 0.75), (0.15, 0.625), (0.2, 0.5), (0.5, 0.375), (0.8, 0.25), (9.0, 0.25)]
        {
            assert!((curve.promise(target).active - active).abs() < 1.1e-4, "{target}: {:?}", curve.promise(target));
        }
    }

    #[test]
    fn a_dip_is_not_believed_and_a_gain_needs_no_neurons() {
        // 0.5 looks better than 0.75, and is thought to be as good.
        let dip = curve(&[(0.25, 0.8), (0.5, -0.05), (0.75, 0.125)]);
        assert_eq!(dip.promise(0.125).active, 0.5);
        assert!((dip.promise(0.0625).active - 0.875).abs() < 1.1e-4);
        let gain = curve(&[(0.25, 0.3), (0.5, -0.1), (0.75, -0.2)]);
        assert_eq!(gain.promise(0.0).active, 0.5);
    }

    #[test]
    fn a_promise_is_said_in_full() {
        let curve = curve(&[(0.25, 0.8), (0.5, 0.25)]);
        let said = curve.promise(0.25).to_string();
        assert!(said.contains("--active 0.5 for at most +25 %") && said.contains("100 tokens"), "{said}");
        let said = curve.promise(0.0).to_string();
        assert!(said.contains("--active 1: no smaller share") && said.contains("+0 %"), "{said}");
    }

    #[test]
    fn curves_that_are_none_are_refused() {
        let new = |active: &[f32], low: &[f32], high: &[f32], tokens| {
            Curve::new(active.to_vec(), low.to_vec(), high.to_vec(), tokens, 0)
        };
        assert!(new(&[0.3, 0.6], &[0.2, -0.1], &[0.3, 0.0], 5).is_ok());
        for (active, low, high, tokens) in [
            (&[][..], &[][..], &[][..], 5),
            (&[0.0, 0.6], &[0.2, 0.1], &[0.3, 0.1], 5),
            (&[0.3, 1.0], &[0.2, 0.1], &[0.3, 0.1], 5),
            (&[0.6, 0.3], &[0.2, 0.1], &[0.3, 0.1], 5),
            (&[0.3, 0.3], &[0.2, 0.1], &[0.3, 0.1], 5),
            (&[f32::NAN, 0.6], &[0.2, 0.1], &[0.3, 0.1], 5),
            (&[0.3, f32::NAN], &[0.2, 0.1], &[0.3, 0.1], 5),
            (&[0.3, 0.6], &[0.2], &[0.3, 0.1], 5),
            (&[0.3, 0.6], &[0.2, 0.1], &[0.3, 0.1, 0.0], 5),
            (&[0.3, 0.6], &[f32::NAN, 0.1], &[0.3, 0.1], 5),
            (&[0.3, 0.6], &[0.2, 0.1], &[f32::NAN, 0.1], 5),
            (&[0.3, 0.6], &[0.2, 0.1], &[f32::INFINITY, 0.1], 5),
            (&[0.3, 0.6], &[0.2, -1.0], &[0.3, 0.1], 5),
            (&[0.3, 0.6], &[0.4, 0.1], &[0.3, 0.1], 5),
            (&[0.3, 0.6], &[0.2, 0.1], &[0.3, 0.1], 0),
        ] {
            assert!(new(active, low, high, tokens).is_err(), "{active:?} {low:?} {high:?} {tokens}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The promise is kept, no share a step below would keep it, and who allows more gets no larger share.
        #[test]
        fn shares_keep_promises(
            gaps in proptest::collection::vec(0.01f32..1.0, 2..9),
            highs in proptest::collection::vec(-0.3f32..3.0, 8),
            targets in proptest::collection::vec(0.0f64..3.5, 2..6),
        ) {
            let sum: f32 = gaps.iter().sum::<f32>() * 1.001;
            let shares = gaps[..gaps.len() - 1].iter().scan(0.0, |at, gap| { *at += gap / sum; Some(*at) });
            let points: Vec<(f32, f32)> = shares.zip(highs).collect();
            let curve = curve(&points);
            let mut targets = targets;
            targets.extend([0.0, f64::from(points[0].1).max(0.0)]);
            targets.sort_by(f64::total_cmp);
            let mut before = 1.0f32;
            for target in targets {
                let active = curve.promise(target).active;
                prop_assert!(active <= before && active >= points[0].0 && active <= 1.0);
                prop_assert!(cost(&points, active) <= target + 1e-9, "{} at {active} for {target}", cost(&points, active));
                let less = active - 1.1e-4;
                if less >= points[0].0 {
                    prop_assert!(cost(&points, less) > target - 1e-9, "{active} for {target}: {less} would do");
                }
                before = active;
            }
        }
    }
}
