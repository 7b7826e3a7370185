//! What each plane of the weights buys: the same text through the model at several precisions.

use super::likelihood::{TokenScores, add};
use super::quality::Tally;
use super::{Evaluation, Mask, Windows};
use crate::{Error, PlanesStudy, Result};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;
use thermocline_calibrate::dense::{DenseLayer, Embedding, Head};
use thermocline_datasets::{Checkpoint, ModelConfig, TensorInfo};
use thermocline_split::{Precision, Split, SplitCheckpoint};

/// Bytes of one model's logits that are held at once.
const LOGIT_BYTES: usize = 32 << 20;

/// Which planes are used of which weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Planes {
    /// Of all weights.
    All(Precision),
    /// These planes of this share of each layer's neurons, those with the most energy in the profile; the base of all
    /// other weights.
    Important(Precision, f64),
}

impl Planes {
    /// Bits a feed-forward weight that are read, of planes that take what `study` says.
    pub fn bits_per_weight(&self, study: &PlanesStudy) -> f64 {
        let bits = |precision| {
            let taken = study.planes.iter().enumerate().filter(|(i, plane)| match plane.plane.as_str() {
                "coarse" => precision >= Precision::Plus,
                "final" => precision == Precision::Exact,
                _ => *i == 0,
            });
            taken.map(|(_, plane)| plane.bits_per_weight).sum::<f64>()
        };
        match *self {
            Planes::All(precision) => bits(precision),
            Planes::Important(precision, share) => (1.0 - share) * bits(Precision::Base) + share * bits(precision),
        }
    }
}

impl fmt::Display for Planes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Planes::All(precision) => precision.fmt(f),
            Planes::Important(precision, share) => write!(f, "{precision}@{share}"),
        }
    }
}

impl FromStr for Planes {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let Some((precision, share)) = s.split_once('@') else { return s.parse().map(Planes::All) };
        match share.parse() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(Planes::Important(precision.parse()?, share)),
            _ => Err(format!("{s:?}: the share after @ is 0 to 1")),
        }
    }
}

/// Runs a text through the split at `dir` once for each of `choices`, and compares with all planes of all weights: the
/// ratios of perplexity and the KL divergences of the results are against that. Memory and progress as
/// [`super::evaluate`].
///
/// # Errors
/// If the split cannot be read, or the outputs are not finite.
pub fn evaluate_planes(
    dir: &Path,
    windows: &Windows<'_>,
    choices: &[Planes],
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<Evaluation>> {
    let reference: Box<dyn Checkpoint> = open(dir, Planes::All(Precision::Exact))?;
    let models = choices.iter().map(|&planes| open(dir, planes)).collect::<Result<Vec<_>>>()?;
    let config = reference.config().clone();
    let all = || std::iter::once(&reference).chain(&models);
    let hidden = config.hidden_size;
    let mut streams =
        all().map(|m| Ok(Embedding::load(m.as_ref())?.rows(windows.tokens())?)).collect::<Result<Vec<_>>>()?;
    let total = config.n_layers * streams.len();
    for index in 0..config.n_layers {
        for (i, (model, x)) in all().zip(&mut streams).enumerate() {
            progress(index * (1 + models.len()) + i, total);
            let layer = DenseLayer::load(model.as_ref(), index)?;
            for window in x.chunks_exact_mut(windows.ctx() * hidden) {
                let mut next = layer.attention(window, 1, windows.ctx())?;
                let input = layer.ffn_input(&next)?;
                let neurons = layer.neurons(&input)?;
                layer.ffn_output(&mut next, neurons.h)?;
                window.copy_from_slice(&next);
            }
        }
    }
    progress(total, total);
    let heads = all().map(|m| Ok(Head::load(m.as_ref())?)).collect::<Result<Vec<_>>>()?;
    let positions = (LOGIT_BYTES / 4 / config.vocab_size.max(1)).clamp(1, 256);
    let mut scores = vec![TokenScores::default(); streams.len()];
    for start in (0..windows.tokens().len()).step_by(positions) {
        let end = (start + positions).min(windows.tokens().len());
        let targets: Vec<Option<u32>> = (start..end).map(|p| windows.next(p)).collect();
        let range = start * hidden..end * hidden;
        let logits = heads.iter().zip(&streams).map(|(head, x)| Ok(head.logits(&x[range.clone()])?));
        let logits = logits.collect::<Result<Vec<_>>>()?;
        for (scores, of_model) in scores.iter_mut().zip(&logits) {
            add(scores, &logits[0], of_model, config.vocab_size, &targets);
        }
    }
    let dense = scores[0].losses.clone();
    let tally = vec![Tally::whole(windows.tokens().len(), config.intermediate_size); config.n_layers];
    let results = choices.iter().zip(scores.into_iter().skip(1)).map(|(planes, scores)| {
        let mut result = Evaluation::new(Mask::Dense, windows, scores, Some(&dense), &tally)?;
        result.planes = Some(planes.to_string());
        Ok(result)
    });
    results.collect()
}

fn open(dir: &Path, planes: Planes) -> Result<Box<dyn Checkpoint>> {
    let at = |precision| Ok::<_, Error>(SplitCheckpoint::new(Split::open_at(dir, precision)?));
    Ok(match planes {
        Planes::All(precision) => Box::new(at(precision)?),
        Planes::Important(precision, share) => Box::new(Important::new(at(Precision::Base)?, at(precision)?, share)?),
    })
}

/// A split whose important neurons have further planes.
struct Important {
    base: SplitCheckpoint,
    further: SplitCheckpoint,
    /// Of each layer, by the checkpoint's numbers.
    is_important: Vec<Vec<bool>>,
}

impl Important {
    fn new(base: SplitCheckpoint, further: SplitCheckpoint, share: f64) -> Result<Self> {
        let split = base.split();
        let mut is_important = Vec::with_capacity(split.layers().len());
        for (l, layer) in split.layers().iter().enumerate() {
            let energy = split.statistics().read_f32(&format!("layers.{l}.energy"))?;
            let mut places: Vec<usize> = (0..layer.order().len()).collect();
            places.sort_by(|&a, &b| energy[b].total_cmp(&energy[a]).then(a.cmp(&b)));
            let mut of_layer = vec![false; places.len()];
            let n = (share * places.len() as f64).round() as usize;
            places.iter().take(n).for_each(|&p| of_layer[layer.order()[p] as usize] = true);
            is_important.push(of_layer);
        }
        Ok(Self { base, further, is_important })
    }

    /// The layer of a feed-forward tensor, and whether its neurons are its columns.
    fn neurons(name: &str) -> Option<(usize, bool)> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        rest.starts_with("mlp.").then_some((layer.parse().ok()?, rest.starts_with("mlp.down_proj")))
    }
}

impl Checkpoint for Important {
    fn config(&self) -> &ModelConfig {
        self.base.config()
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.base.info(name)
    }

    fn load_rows(&self, name: &str, rows: Range<usize>) -> thermocline_datasets::Result<Vec<f32>> {
        let mut out = self.base.load_rows(name, rows.clone())?;
        let Some((layer, in_columns)) = Self::neurons(name) else { return Ok(out) };
        let (further, columns) = (self.further.load_rows(name, rows.clone())?, out.len() / rows.len().max(1));
        let is_important = &self.is_important[layer];
        for (row, (out, further)) in rows.zip(out.chunks_exact_mut(columns).zip(further.chunks_exact(columns))) {
            for (column, (o, e)) in out.iter_mut().zip(further).enumerate() {
                if is_important[if in_columns { column } else { row }] {
                    *o = *e;
                }
            }
        }
        Ok(out)
    }

    fn digest(&self) -> thermocline_datasets::Result<String> {
        self.base.digest()
    }

    fn tokenizer_json(&self) -> thermocline_datasets::Result<String> {
        self.base.tokenizer_json()
    }

    fn chat_template(&self) -> Option<String> {
        self.base.chat_template()
    }
}
