//! How the neurons that a token computes are best divided between the layers: what each layer's share costs, measured, and
//! the division that costs least.

use crate::curve::{Curve, bytes_of};
use crate::error::{Result, corrupt};
use crate::tensor_file::{Format, TensorFile, TensorFileEntry, Writer};
use crate::{Error, Manifest, Split};
use std::path::Path;
use thermocline_datasets::ModelConfig;

/// Two names, so that a new file can grow beside the one in use.
const FILES: [&str; 2] = ["shares.safetensors", "shares.1.safetensors"];

/// What it costs to compute a share of one layer's neurons and all of the others': those that its predictor scores highest,
/// with the mean of what the rest would have given in their place.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCost {
    /// KL divergence from the dense model at each of the shares, in nats a token.
    pub loss: Vec<f32>,
    /// Mean of `sum h_i d_i` over the neurons that are left out, `[n_shares, hidden_size]`.
    pub left_out: Vec<f32>,
}

/// The costs of all layers, and what a division by them costs, if that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Shares {
    grid: Vec<f32>,
    layers: Vec<LayerCost>,
    hidden_size: usize,
    curve: Option<Curve>,
}

/// A part of a layer's neurons, and what each costs to leave out.
struct Segment {
    layer: usize,
    length: f32,
    /// Loss that it spares, for each unit of share.
    gain: f32,
}

impl Shares {
    /// Costs of `layers` at the shares `grid`, which rise from above 0 to below 1.
    ///
    /// # Errors
    /// [`Error::Settings`] if lengths disagree or a number is not finite.
    pub fn new(grid: Vec<f32>, layers: Vec<LayerCost>, hidden_size: usize) -> Result<Self> {
        let rising = grid.windows(2).all(|w| w[0] < w[1]);
        let inside = grid.first().is_some_and(|s| *s > 0.0) && grid.last().is_some_and(|s| *s < 1.0);
        let fits = |l: &LayerCost| {
            l.loss.len() == grid.len()
                && l.left_out.len() == grid.len() * hidden_size
                && l.loss.iter().all(|v| v.is_finite() && *v >= 0.0)
                && l.left_out.iter().all(|v| v.is_finite())
        };
        if !(rising && inside && layers.iter().all(fits)) {
            return Err(Error::Settings { what: "costs of shares must be finite, for rising shares".to_owned() });
        }
        Ok(Self { grid, layers, hidden_size, curve: None })
    }

    /// The same with what sparse mode costs when it divides neurons by them.
    #[must_use]
    pub fn with_curve(self, curve: Curve) -> Self {
        Self { curve: Some(curve), ..self }
    }

    /// What sparse mode costs when it divides neurons by them, if that was measured.
    pub fn curve(&self) -> Option<&Curve> {
        self.curve.as_ref()
    }

    /// The shares at which costs were measured.
    pub fn grid(&self) -> &[f32] {
        &self.grid
    }

    /// Layer by layer.
    pub fn layers(&self) -> &[LayerCost] {
        &self.layers
    }

    /// Each layer's share, `[n_layers]`, so that their mean is `mean` (above 0, at most 1) and the sum of the losses is
    /// least. Between measured shares losses are taken to be convex and piecewise linear; below the least of them all
    /// layers shrink alike.
    pub fn allocate(&self, mean: f32) -> Vec<f32> {
        let least = self.grid[0];
        if mean <= least {
            return vec![mean; self.layers.len()];
        }
        let mut shares = vec![least; self.layers.len()];
        let mut left = (mean.min(1.0) - least) * self.layers.len() as f32;
        let mut segments: Vec<Segment> = (0..self.layers.len()).flat_map(|l| self.segments(l)).collect();
        // Stable: of equals the lower layer first, and of one layer the hotter neurons.
        segments.sort_by(|a, b| b.gain.total_cmp(&a.gain));
        for segment in segments {
            let taken = segment.length.min(left);
            shares[segment.layer] += taken;
            left -= taken;
        }
        shares
    }

    /// The lower convex hull of a layer's losses, from the least share to 1, where nothing is lost.
    fn segments(&self, layer: usize) -> Vec<Segment> {
        let points = self.grid.iter().zip(&self.layers[layer].loss).map(|(s, l)| (*s, *l)).chain([(1.0, 0.0)]);
        let slope = |a: (f32, f32), b: (f32, f32)| (a.1 - b.1) / (b.0 - a.0);
        let mut hull: Vec<(f32, f32)> = Vec::new();
        for point in points {
            while let [.., a, b] = hull[..]
                && slope(a, b) <= slope(b, point)
            {
                hull.pop();
            }
            hull.push(point);
        }
        hull.windows(2).map(|w| Segment { layer, length: w[1].0 - w[0].0, gain: slope(w[0], w[1]) }).collect()
    }

    /// What stands for the neurons that are left out at `share` of `layer`, `[hidden_size]`: between the measured means,
    /// and nothing where all neurons are computed.
    pub fn left_out(&self, layer: usize, share: f32) -> Vec<f32> {
        let means = &self.layers[layer].left_out;
        let mean = |i: usize| means.get(i * self.hidden_size..(i + 1) * self.hidden_size);
        let above = self.grid.partition_point(|s| *s < share);
        let at = |i: usize| self.grid.get(i).copied().unwrap_or(1.0);
        let (below, weight) = match above.checked_sub(1) {
            Some(below) => (below, (share - at(below)) / (at(above) - at(below))),
            None => (0, 0.0),
        };
        let value = |i: usize, c: usize| mean(i).map_or(0.0, |mean| mean[c]);
        (0..self.hidden_size).map(|c| (1.0 - weight) * value(below, c) + weight * value(above, c)).collect()
    }

    pub(crate) fn read(file: &TensorFile, config: &ModelConfig) -> Result<Self> {
        let grid = file.read_f32("shares.grid")?;
        let layer = |l: usize| {
            let [loss, left_out] = ["loss", "left_out"].map(|part| file.read_f32(&format!("shares.{l}.{part}")));
            Ok(LayerCost { loss: loss?, left_out: left_out? })
        };
        let layers = (0..config.n_layers).map(layer).collect::<Result<_>>()?;
        let shares =
            Self::new(grid, layers, config.hidden_size).map_err(|e| corrupt(file.path(), "shares", e.to_string()))?;
        let shares = Self { curve: Curve::read(file)?, ..shares };
        // All that belong here were found: of others, or of one twice, nobody knows what they mean.
        let known = 1 + 2 * config.n_layers + shares.curve.as_ref().map_or(0, |c| c.tensors().len());
        if file.tensors().len() != known {
            let reason = format!("{} tensors where {known} are known", file.tensors().len());
            return Err(corrupt(file.path(), "tensors", reason));
        }
        Ok(shares)
    }

    fn write(&self, dir: &Path, name: &str) -> Result<TensorFileEntry> {
        let n = self.grid.len();
        let of_layer = |l: usize| {
            [
                (format!("shares.{l}.loss"), Format::F32, 1, n),
                (format!("shares.{l}.left_out"), Format::F32, n, self.hidden_size),
            ]
        };
        let tensors = std::iter::once(("shares.grid".to_owned(), Format::F32, 1, n));
        let tensors = tensors.chain((0..self.layers.len()).flat_map(of_layer));
        let tensors = tensors.chain(self.curve.iter().flat_map(Curve::tensors));
        let mut writer = Writer::create(dir, name, tensors.collect())?;
        writer.write("shares.grid", &bytes_of(&self.grid))?;
        for (l, layer) in self.layers.iter().enumerate() {
            writer.write(&format!("shares.{l}.loss"), &bytes_of(&layer.loss))?;
            writer.write(&format!("shares.{l}.left_out"), &bytes_of(&layer.left_out))?;
        }
        if let Some(curve) = &self.curve {
            for ((name, ..), contents) in curve.tensors().iter().zip(curve.contents()) {
                writer.write(name, &contents)?;
            }
        }
        writer.finish()
    }
}

impl Split {
    /// Puts `shares` into the split in `dir`, in place of those that it has. A reader finds the old or the new ones,
    /// whenever it looks; engines that are loaded keep what they have.
    ///
    /// # Errors
    /// If the split cannot be opened or written, or `shares` are another model's.
    pub fn put_shares(dir: &Path, shares: &Shares) -> Result<()> {
        let mut manifest = Manifest::read(dir)?;
        if (manifest.config.n_layers, manifest.config.hidden_size) != (shares.layers.len(), shares.hidden_size) {
            return Err(Error::Settings { what: format!("{}: the shares are another model's", dir.display()) });
        }
        let old = manifest.shares.take();
        manifest.shares = Some(shares.write(dir, other_name(FILES, old.as_ref()))?);
        manifest.replace_file(dir, old)
    }
}

/// That of two names which the file in use has not.
pub(crate) fn other_name(names: [&'static str; 2], in_use: Option<&TensorFileEntry>) -> &'static str {
    if in_use.is_some_and(|entry| entry.file == names[0]) { names[1] } else { names[0] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares() -> Shares {
        let layer = |loss: [f32; 3]| LayerCost { loss: loss.to_vec(), left_out: vec![3.0, 0.0, 2.0, 1.0, 1.0, 4.0] };
        let layers = vec![layer([9.0, 4.0, 1.0]), layer([0.9, 0.4, 0.1]), layer([0.5, 0.5, 0.1])];
        Shares::new(vec![0.1, 0.2, 0.5], layers, 2).unwrap()
    }

    #[test]
    fn a_layer_that_costs_more_gets_more_and_the_mean_is_what_was_asked() {
        let shares = shares();
        for mean in [0.05, 0.1, 0.13, 0.3, 0.6, 0.99, 1.0] {
            let each = shares.allocate(mean);
            assert!((each.iter().sum::<f32>() / 3.0 - mean).abs() < 1e-6, "{each:?} at {mean}");
            assert!(each[0] >= each[1] && each.iter().all(|s| *s <= 1.0 + 1e-6), "{each:?} at {mean}");
        }
        // The first layer's 0.1 to 0.2 spares 50 a share, its 0.2 to 0.5 10, the others' 5 and 1.
        let each = shares.allocate(0.1 + 0.4 / 3.0);
        assert!(each.iter().zip([0.5, 0.1, 0.1]).all(|(e, x)| (e - x).abs() < 1e-6), "{each:?}");
    }

    /// No division of as many neurons costs less, by the same straight lines between the points of the hull.
    #[test]
    fn no_exchange_between_two_layers_is_better() {
        let shares = shares();
        let cost = |each: &[f32]| {
            let of = |(l, s): (usize, &f32)| {
                let (mut at, mut loss) = (shares.grid[0], shares.layers[l].loss[0]);
                for segment in shares.segments(l) {
                    let part = (s - at).clamp(0.0, segment.length);
                    loss -= part * segment.gain;
                    at += segment.length;
                }
                loss
            };
            each.iter().enumerate().map(of).sum::<f32>()
        };
        for mean in [0.15, 0.3, 0.5, 0.8] {
            let best = shares.allocate(mean);
            for (from, to) in [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)] {
                let mut other = best.clone();
                let moved = 0.03f32.min(best[from] - 0.1).min(1.0 - best[to]).max(0.0);
                other[from] -= moved;
                other[to] += moved;
                assert!(cost(&best) <= cost(&other) + 1e-5, "{mean}: {best:?} {other:?}");
            }
        }
    }

    #[test]
    fn what_is_left_out_goes_from_mean_to_mean_and_ends_at_nothing() {
        let shares = shares();
        let close = |share: f32, expected: [f32; 2]| {
            let got = shares.left_out(0, share);
            assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 1e-5), "{got:?} at {share}");
        };
        close(0.05, [3.0, 0.0]);
        close(0.1, [3.0, 0.0]);
        close(0.15, [2.5, 0.5]);
        close(0.2, [2.0, 1.0]);
        close(0.75, [0.5, 2.0]);
        close(1.0, [0.0, 0.0]);
    }

    #[test]
    fn costs_that_are_none_are_refused() {
        let layer = LayerCost { loss: vec![f32::NAN], left_out: vec![0.0; 2] };
        assert!(Shares::new(vec![0.5], vec![layer.clone()], 2).is_err());
        assert!(Shares::new(vec![1.0], vec![LayerCost { loss: vec![0.0], ..layer.clone() }], 2).is_err());
        assert!(Shares::new(vec![0.5], vec![LayerCost { loss: vec![0.0], ..layer }], 3).is_err());
    }
}
