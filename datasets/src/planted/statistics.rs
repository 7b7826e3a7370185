use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The hottest neurons whose share of the activations is planted: as many of a 70B model as 16 GiB hold.
pub const HOT_SHARE: f64 = 0.18;
/// No neuron fires more often.
const RATE_MAX: f64 = 0.95;

/// What is planted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Share of a layer's neurons that fire at a token, in the mean.
    pub active_share: f64,
    /// Share of all activations that belong to the hottest [`HOT_SHARE`] of the neurons.
    pub hot_cover: f64,
    /// Neurons that lean the same way; 1: none do.
    pub cluster_neurons: usize,
    /// Correlation of the gate rows of one cluster.
    pub cluster_correlation: f64,
    /// Correlation of the codes of neighbouring tokens: 0 leaves the reuse that frequency alone gives.
    pub reuse: f64,
    /// Share of the hottest neurons that others take the place of in the second half of the vocabulary.
    pub shift: f64,
    /// Noise of the predicted gates, in standard deviations of what a gate row reads; 0 is a perfect predictor.
    pub predictor_noise: f64,
    /// The same of what is predicted one layer early. Splits from before this could be chosen have no other predictor for
    /// that, and no other noise than the predictor's.
    #[serde(default)]
    pub foresight_noise: f64,
}

impl Statistics {
    /// The preset of that name.
    ///
    /// | case | active | hottest 18 % cover | whose |
    /// | --- | --- | --- | --- |
    /// | a | 10 % | 60 % | PowerInfer's figures (arXiv 2312.12456) for a ReGLU 70B |
    /// | b | 10 % | 45 % | a ReGLU model trained from scratch by this project |
    /// | c | 4.4 % | 44 % | a dReLU model trained from scratch by this project |
    ///
    /// # Errors
    /// If there is none.
    pub fn case(name: &str) -> Result<Self> {
        let (active_share, hot_cover) = match name {
            "a" => (0.10, 0.60),
            "b" => (0.10, 0.45),
            "c" => (0.044, 0.44),
            _ => {
                let reason = format!("no case {name:?}; there are a, b, c");
                return Err(Error::Planted { setting: "--case", reason });
            }
        };
        Ok(Self {
            active_share,
            hot_cover,
            cluster_neurons: 32,
            cluster_correlation: 0.3,
            reuse: 0.2,
            shift: 0.5,
            predictor_noise: 0.1,
            foresight_noise: 0.6,
        })
    }

    pub(super) fn check(&self) -> Result<()> {
        let in_range = |setting, value: f64, least: f64, most: f64| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::Planted { setting, reason: format!("{value} is not in {least}..={most}") })
        };
        in_range("--planted-active", self.active_share, 0.002, 0.5)?;
        in_range("--planted-hot-cover", self.hot_cover, HOT_SHARE, 0.999)?;
        in_range("--planted-clusters", self.cluster_neurons as f64, 1.0, 4096.0)?;
        in_range("--planted-cluster-correlation", self.cluster_correlation, 0.0, 0.95)?;
        in_range("--planted-reuse", self.reuse, 0.0, 0.99)?;
        in_range("--planted-shift", self.shift, 0.0, 1.0)?;
        in_range("--planted-predictor-noise", self.predictor_noise, 0.0, 10.0)?;
        in_range("--planted-foresight-noise", self.foresight_noise, 0.0, 10.0)
    }

    /// Activation rates of `n` neurons, falling: `min(0.95, a (i + 1/2)^-alpha)` with a and alpha such that the mean is
    /// the active share and the hottest cover theirs.
    ///
    /// # Errors
    /// If no such law is that uneven.
    pub fn rates(&self, n: usize) -> Result<Vec<f64>> {
        let n_hot = n_hot(n);
        let cover = |rates: &[f64]| rates[..n_hot].iter().sum::<f64>() / rates.iter().sum::<f64>();
        let (mut low, mut high) = (0.0, 8.0);
        let steepest = self.power_law(n, high);
        if cover(&steepest) < self.hot_cover {
            let reason = format!(
                "{:.0} % of the neurons cannot cover {:.0} % of the activations; at most {:.0} %",
                100.0 * HOT_SHARE,
                100.0 * self.hot_cover,
                100.0 * cover(&steepest)
            );
            return Err(Error::Planted { setting: "--planted-hot-cover", reason });
        }
        for _ in 0..40 {
            let middle = (low + high) / 2.0;
            if cover(&self.power_law(n, middle)) < self.hot_cover { low = middle } else { high = middle }
        }
        Ok(self.power_law(n, high))
    }

    fn power_law(&self, n: usize, alpha: f64) -> Vec<f64> {
        let law: Vec<f64> = (0..n).map(|i| ((i as f64 + 0.5) / n as f64).powf(-alpha)).collect();
        let rates = |a: f64| law.iter().map(move |v| (a * v).min(RATE_MAX));
        let (mut low, mut high) = (0.0, RATE_MAX);
        for _ in 0..40 {
            let middle = (low + high) / 2.0;
            if rates(middle).sum::<f64>() < self.active_share * n as f64 { low = middle } else { high = middle }
        }
        rates(high).collect()
    }
}

/// How many of `n` neurons are the hottest ones.
pub fn n_hot(n: usize) -> usize {
    ((HOT_SHARE * n as f64).round() as usize).clamp(1, n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_the_mean_and_the_cover_that_were_asked_for() {
        for case in ["a", "b", "c"] {
            let (statistics, n) = (Statistics::case(case).unwrap(), 28_672);
            let rates = statistics.rates(n).unwrap();
            let sum: f64 = rates.iter().sum();
            assert!((sum / n as f64 - statistics.active_share).abs() < 1e-6);
            assert!((rates[..n_hot(n)].iter().sum::<f64>() / sum - statistics.hot_cover).abs() < 1e-4);
            assert!(rates.is_sorted_by(|a, b| a >= b) && rates[0] <= RATE_MAX && rates[n - 1] > 0.0);
        }
        let uneven = Statistics { active_share: 0.4, hot_cover: 0.9, ..Statistics::case("a").unwrap() };
        assert!(uneven.rates(1000).unwrap_err().to_string().contains("at most"));
    }
}
