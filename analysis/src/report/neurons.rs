//! Statistics of neurons, from a profile or from what a split keeps of it.

use crate::Result;
use thermocline_calibrate::coactivation::BitMatrix;
use thermocline_calibrate::{ActiveSet, OVERLAP_LAGS, Profile, TOP_SHARES};
use thermocline_datasets::ModelConfig;
use thermocline_split::{Packing, Shares, Split};

/// Hottest neurons in the co-activation map: more would be finer than its pixels.
const HEAT_NEURONS: usize = 64;

/// Shares of all neurons whose division is shown.
const DIVIDED: [f64; 3] = [0.1, 0.3, 0.5];

/// How the neurons of a model fire.
#[derive(Debug, Clone)]
pub struct Neurons {
    /// `profile` or `split`.
    pub kind: &'static str,
    /// Name of the folder.
    pub name: String,
    /// What it is of: (what, value).
    pub facts: Vec<(&'static str, String)>,
    /// What counts as active.
    pub active_means: String,
    /// Layer by layer.
    pub layers: Vec<LayerFigures>,
    /// How some shares of all neurons are divided between the layers; empty where that was not measured.
    pub divided: Vec<Divided>,
    /// Which layer [`Neurons::lift`] is of.
    pub heat_layer: usize,
    /// What counts as active there: the smallest set that was sampled says most.
    pub lift_means: String,
    /// `log2 P(i and j) / (P(i) P(j))` of the layer's hottest neurons, hottest first, `[n, n]`; `None` on the diagonal.
    pub lift: Vec<Option<f64>>,
}

/// A share of all neurons, divided between the layers.
#[derive(Debug, Clone)]
pub struct Divided {
    /// The share.
    pub active: f64,
    /// Each layer's share of its own neurons.
    pub layers: Vec<f64>,
}

/// One layer.
#[derive(Debug, Clone)]
pub struct LayerFigures {
    /// Activation rates, highest first, `[intermediate_size]`.
    pub rates: Vec<f64>,
    /// Share of a token's active set that was also active in one of the last 1, 4, 16 tokens.
    pub overlap: [Option<f64>; OVERLAP_LAGS.len()],
}

impl LayerFigures {
    fn new(mut rates: Vec<f64>, overlap: [Option<f64>; OVERLAP_LAGS.len()]) -> Self {
        rates.sort_by(|a, b| b.total_cmp(a));
        LayerFigures { rates, overlap }
    }

    /// Mean activation rate.
    pub fn mean_rate(&self) -> f64 {
        self.rates.iter().sum::<f64>() / self.rates.len().max(1) as f64
    }

    /// Share of all activations that the hottest `share` of the neurons make up.
    pub fn coverage(&self, share: f64) -> f64 {
        let n = (share * self.rates.len() as f64).round() as usize;
        let total: f64 = self.rates.iter().sum();
        if total > 0.0 { self.rates.iter().take(n).sum::<f64>() / total } else { share }
    }

    /// The overlap that these rates alone would give, if tokens had nothing to do with each other.
    pub fn overlap_by_chance(&self, lag: usize) -> f64 {
        let again = |r: &f64| r * (1.0 - (1.0 - r.clamp(0.0, 1.0)).powi(lag as i32));
        let total: f64 = self.rates.iter().sum();
        if total > 0.0 { self.rates.iter().map(again).sum::<f64>() / total } else { 0.0 }
    }
}

impl Neurons {
    /// Those of a profile.
    pub(crate) fn of_profile(profile: &Profile) -> Result<Self> {
        let (meta, config) = (profile.meta(), profile.config());
        let set = active_set(config, meta.settings.active_share);
        let heat_layer = config.n_layers / 2;
        let (mut layers, mut lift) = (Vec::new(), Vec::new());
        for l in 0..config.n_layers {
            let statistics = profile.layer(l)?;
            let rates = statistics.activation_rate(set);
            if l == heat_layer && set == ActiveSet::Nonzero {
                lift = lifts(&rates, &statistics.active);
            } else if l == heat_layer {
                lift = lifts(&statistics.activation_rate(ActiveSet::Top(0)), &statistics.active_top10);
            }
            layers.push(LayerFigures::new(rates, statistics.overlap(set)));
        }
        // Older profiles do not say.
        let name = if meta.model_name.is_empty() { "?" } else { &meta.model_name };
        let mut facts = vec![("model", name.to_owned())];
        facts.extend(shape(config));
        facts.extend([
            ("model digest", meta.model_digest.clone()),
            ("corpus digest", meta.corpus_digest.clone()),
            ("calibrated on", format!("{} tokens in windows of {}", meta.n_tokens, meta.settings.window_len)),
            ("calibration time", format!("{:.0} s, {:.0} GFLOP/s", meta.seconds, meta.flops / meta.seconds / 1e9)),
        ]);
        Ok(Neurons {
            kind: "profile",
            name: file_name(profile.dir()),
            facts,
            active_means: active_means(config, meta.settings.active_share),
            layers,
            divided: Vec::new(),
            heat_layer,
            lift_means: if set == ActiveSet::Nonzero { "not zero" } else { "top 10 %" }.to_owned(),
            lift,
        })
    }

    /// Those that a split keeps.
    pub(crate) fn of_split(split: &Split) -> Result<Self> {
        let (m, file) = (split.manifest(), split.statistics());
        let heat_layer = m.config.n_layers / 2;
        let bytes = file.read("trace.token")?;
        let tokens: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let (mut layers, mut lift) = (Vec::new(), Vec::new());
        for l in 0..m.config.n_layers {
            let rates = file.read_f32(&format!("layers.{l}.activation_rate"))?;
            let rates: Vec<f64> = rates.into_iter().map(f64::from).collect();
            let trace = file.read(&format!("layers.{l}.trace"))?;
            let trace = BitMatrix::new(tokens.len(), m.config.intermediate_size, trace)?;
            if l == heat_layer {
                lift = lifts(&rates, &trace);
            }
            layers.push(LayerFigures::new(rates, trace_overlap(&tokens, &trace)));
        }
        let (source, packing) = (&m.source, &m.packing);
        let mut facts = vec![("made from", format!("{} ({} neurons)", source.model, source.ffn_dtype))];
        facts.extend(shape(&m.config));
        let format_bytes = thermocline_runtime::budget::format_bytes;
        facts.extend([
            ("encoding", encodings(packing)),
            ("weights", format_bytes(split.dense_bytes())),
            ("order", format!("{}, {} neurons in a chunk", packing.order, packing.chunk_neurons)),
            ("predictor", format!("rank {}, {}", packing.predictor_rank, format_bytes(m.predictors.file_bytes))),
            ("split digest", m.checksum.clone()),
            ("model digest", source.model_digest.clone()),
            ("corpus digest", source.corpus_digest.clone()),
            ("calibrated on", format!("{} tokens; overlaps from a trace of {}", source.n_tokens, tokens.len())),
        ]);
        Ok(Neurons {
            kind: "split",
            name: file_name(split.dir()),
            facts,
            active_means: active_means(&m.config, packing.active_share),
            layers,
            divided: split.shares()?.map_or(Vec::new(), |shares| DIVIDED.map(|active| divided(&shares, active)).into()),
            heat_layer,
            lift_means: match active_set(&m.config, packing.active_share) {
                ActiveSet::Nonzero => "not zero".to_owned(),
                ActiveSet::Top(_) => format!("top {:.0} %", 100.0 * packing.active_share),
            },
            lift,
        })
    }

    /// Rows of [`Neurons::lift`].
    pub fn n_lift(&self) -> usize {
        self.lift.len().isqrt()
    }
}

fn divided(shares: &Shares, active: f64) -> Divided {
    Divided { active, layers: shares.allocate(active as f32).into_iter().map(f64::from).collect() }
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// What is in which encoding.
fn encodings(packing: &Packing) -> String {
    let attention = packing.attention_encoding.as_ref().map_or(String::new(), |e| format!("attention {e}, "));
    format!("neurons {}, {attention}the rest {}", packing.ffn_encoding, packing.resident_encoding)
}

fn shape(c: &ModelConfig) -> Vec<(&'static str, String)> {
    let text = format!(
        "{:?}, {:?}, {} layers of {} neurons, hidden size {}, {} / {} heads",
        c.architecture, c.activation, c.n_layers, c.intermediate_size, c.hidden_size, c.n_heads, c.n_kv_heads
    );
    vec![("shape", text)]
}

/// What the statistics of a model count: a split says 0 for neurons that are not zero.
fn active_set(config: &ModelConfig, share: f64) -> ActiveSet {
    match TOP_SHARES.iter().position(|&s| s == share) {
        Some(top) if !config.activation.is_sparse() => ActiveSet::Top(top),
        _ => ActiveSet::Nonzero,
    }
}

fn active_means(config: &ModelConfig, share: f64) -> String {
    match active_set(config, share) {
        ActiveSet::Nonzero => "not zero".to_owned(),
        ActiveSet::Top(_) => {
            format!("among the largest {:.0} % of |h| \u{b7} ||d|| of its layer at that token", 100.0 * share)
        }
    }
}

/// `log2` of the lift over independence of the hottest neurons.
fn lifts(rates: &[f64], active: &BitMatrix) -> Vec<Option<f64>> {
    let mut hottest: Vec<usize> = (0..rates.len()).collect();
    hottest.sort_by(|&a, &b| rates[b].total_cmp(&rates[a]).then(a.cmp(&b)));
    hottest.truncate(HEAT_NEURONS);
    let n = hottest.len();
    let mut together = vec![0u32; n * n];
    for row in 0..active.n_rows() {
        let on: Vec<usize> = (0..n).filter(|&i| active.get(row, hottest[i])).collect();
        for &i in &on {
            on.iter().for_each(|&j| together[i * n + j] += 1);
        }
    }
    let n_rows = active.n_rows() as f64;
    let lift = |at: usize| {
        let (i, j) = (at / n, at % n);
        let alone = |k: usize| f64::from(together[k * n + k]);
        let expected = alone(i) * alone(j) / n_rows.max(1.0);
        // Half a count on both sides keeps rare pairs from reading as infinite.
        (i != j && expected > 0.0).then(|| ((f64::from(together[at]) + 0.5) / (expected + 0.5)).log2())
    };
    (0..n * n).map(lift).collect()
}

/// Overlap within runs of neighbouring tokens.
fn trace_overlap(tokens: &[u64], trace: &BitMatrix) -> [Option<f64>; OVERLAP_LAGS.len()] {
    OVERLAP_LAGS.map(|lag| {
        let (mut hits, mut total) = (0u64, 0u64);
        for t in lag..tokens.len() {
            if tokens[t].checked_sub(lag as u64) != Some(tokens[t - lag]) {
                continue;
            }
            for (byte, &now) in trace.row(t).iter().enumerate() {
                let past = (1..=lag).fold(0, |past, d| past | trace.row(t - d)[byte]);
                hits += u64::from((now & past).count_ones());
                total += u64::from(now.count_ones());
            }
        }
        (total > 0).then(|| hits as f64 / total as f64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_and_chance_follow_the_rates() {
        let even = LayerFigures::new(vec![0.3; 100], [None; 3]);
        assert!((even.coverage(0.3) - 0.3).abs() < 1e-9 && (even.overlap_by_chance(1) - 0.3).abs() < 1e-9);
        let steep = LayerFigures::new((0..100).map(|i| if i < 10 { 1.0 } else { 0.0 }).collect(), [None; 3]);
        assert_eq!((steep.coverage(0.1), steep.overlap_by_chance(1)), (1.0, 1.0));
        assert_eq!(LayerFigures::new(vec![0.0; 4], [None; 3]).coverage(0.5), 0.5);
    }

    #[test]
    fn lift_and_overlap_equal_the_definitions() {
        // Neurons 0 and 1 always together, at every second token; neuron 2 at the others.
        let rows: Vec<u8> = (0..8).map(|t| if t % 2 == 0 { 0b011 } else { 0b100 }).collect();
        let trace = BitMatrix::new(8, 3, rows).unwrap();
        let lift = lifts(&[0.5, 0.5, 0.5], &trace);
        assert!((lift[1].unwrap() - (4.5f64 / 2.5).log2()).abs() < 1e-9);
        assert!((lift[2].unwrap() - (0.5f64 / 2.5).log2()).abs() < 1e-9 && lift[0].is_none());
        assert_eq!(trace_overlap(&[0, 1, 2, 3, 4, 5, 6, 7], &trace), [Some(0.0), Some(1.0), None]);
        // Two runs of three: lag 4 never has enough before it.
        assert_eq!(trace_overlap(&[0, 1, 2, 9, 10, 11, 20, 30], &trace), [Some(0.0), None, None]);
    }
}
