//! From logits to a token.

use crate::{Error, Result};
use serde::Serialize;
use thermocline_kernels::ops;

/// How to choose; the defaults are llama.cpp's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SamplerSettings {
    /// 0 is greedy.
    pub temperature: f32,
    /// Only the k likeliest; 0 is all.
    pub top_k: usize,
    /// Only the likeliest that make up this probability (nucleus, arXiv 1904.09751).
    pub top_p: f32,
    /// Only those at least this times as likely as the likeliest (arXiv 2407.01082).
    pub min_p: f32,
    /// Divides (or multiplies, if negative) the logits of recent tokens (arXiv 1909.05858); 1 is off.
    pub repeat_penalty: f32,
    /// How many recent tokens that concerns.
    pub repeat_last_n: usize,
    /// Same seed, same tokens.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repeat_penalty: 1.0, repeat_last_n: 64, seed: 0 }
    }
}

impl SamplerSettings {
    /// # Errors
    /// If a number is out of its range; names the flag.
    pub fn check(&self) -> Result<()> {
        let bad = |flag, value: f32, range| Err(Error::Setting { flag, reason: format!("{value} is not {range}") });
        match *self {
            Self { temperature: t, .. } if !(t >= 0.0 && t.is_finite()) => bad("--temp", t, "0 or more"),
            Self { top_p: p, .. } if !(p > 0.0 && p <= 1.0) => bad("--top-p", p, "above 0 and at most 1"),
            Self { min_p: p, .. } if !(0.0..=1.0).contains(&p) => bad("--min-p", p, "between 0 and 1"),
            Self { repeat_penalty: r, .. } if !(r > 0.0 && r.is_finite()) => bad("--repeat-penalty", r, "above 0"),
            _ => Ok(()),
        }
    }
}

/// Draws tokens; the state is the generator and the recent tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: SamplerSettings,
    state: u64,
    recent: Vec<u32>,
}

impl Sampler {
    /// # Errors
    /// As [`SamplerSettings::check`].
    pub fn new(settings: SamplerSettings) -> Result<Self> {
        settings.check()?;
        Ok(Self { settings, state: settings.seed, recent: Vec::new() })
    }

    /// Takes note of a token of the prompt, for the repeat penalty.
    pub fn accept(&mut self, token: u32) {
        self.recent.push(token);
    }

    /// The next token.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let s = self.settings;
        if s.repeat_penalty == 1.0 {
            return self.choose(logits);
        }
        let mut logits = logits.to_vec();
        let mut penalised: Vec<u32> = self.recent[self.recent.len().saturating_sub(s.repeat_last_n)..].to_vec();
        penalised.sort_unstable();
        penalised.dedup();
        for &t in &penalised {
            if let Some(l) = logits.get_mut(t as usize) {
                *l = if *l > 0.0 { *l / s.repeat_penalty } else { *l * s.repeat_penalty };
            }
        }
        self.choose(&logits)
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        let token = if self.settings.temperature == 0.0 { greedy(logits) } else { self.draw(logits) };
        self.recent.push(token);
        token
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let s = self.settings;
        let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|&i| logits[i as usize].is_finite()).collect();
        let above = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if s.top_k > 0 && s.top_k < ids.len() {
            ids.select_nth_unstable_by(s.top_k - 1, above);
            ids.truncate(s.top_k);
        }
        ids.sort_unstable_by(above);
        if ids.is_empty() {
            return greedy(logits);
        }
        // The order of llama.cpp: top-k, top-p, min-p on the untempered distribution, then temperature.
        let mut p: Vec<f32> = ids.iter().map(|&i| logits[i as usize]).collect();
        ops::softmax(&mut p);
        let mut sum = 0.0;
        let nucleus = p.iter().position(|v| {
            sum += v;
            sum >= s.top_p
        });
        let likely = p.partition_point(|&v| v >= s.min_p * p[0]);
        let kept = nucleus.map_or(p.len(), |n| n + 1).min(likely).max(1);
        let mut p: Vec<f32> = ids[..kept].iter().map(|&i| logits[i as usize] / s.temperature).collect();
        ops::softmax(&mut p);
        let u = self.uniform();
        let mut sum = 0.0;
        let chosen = p.iter().position(|v| {
            sum += f64::from(*v);
            u < sum
        });
        ids[chosen.unwrap_or(kept - 1)]
    }

    /// Uniform in [0, 1), 53 bits, from SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The first of the largest; the first token if there is none.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    // The maximum first, which vectorises, then its place.
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&l| l == max).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(settings: SamplerSettings, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(settings).expect("settings in range");
        let mut counts = vec![0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.sample(logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        let open = SamplerSettings { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
        let logits = [1.0f32, 2.0, 0.0, f32::NEG_INFINITY];
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        for (count, logit) in counts(open, &logits).iter().zip(logits) {
            // Five standard deviations of a binomial.
            let p = logit.exp() / sum;
            let slack = 5.0 * (20_000.0 * p * (1.0 - p)).sqrt();
            assert!((*count as f32 - 20_000.0 * p).abs() <= slack, "{count} of {p}");
        }
    }

    #[test]
    fn each_filter_cuts_what_it_should() {
        let open = SamplerSettings { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
        let logits = [0.6f32.ln(), 0.25f32.ln(), 0.1f32.ln(), 0.05f32.ln()];
        let seen = |s| counts(s, &logits).iter().filter(|c| **c > 0).count();
        assert_eq!(seen(open), 4);
        assert_eq!(seen(SamplerSettings { top_k: 2, ..open }), 2);
        assert_eq!(seen(SamplerSettings { top_p: 0.9, ..open }), 3);
        assert_eq!(seen(SamplerSettings { min_p: 0.3, ..open }), 2);
        assert_eq!(seen(SamplerSettings { temperature: 0.0, ..open }), 1);
    }

    #[test]
    fn a_penalty_breaks_a_repetition_and_a_seed_repeats_a_draw() {
        let settings = SamplerSettings { temperature: 0.0, repeat_penalty: 2.0, ..Default::default() };
        let mut sampler = Sampler::new(settings).expect("settings in range");
        assert_eq!((sampler.sample(&[1.0, 0.9]), sampler.sample(&[1.0, 0.9])), (0, 1));
        let settings = SamplerSettings { seed: 7, ..Default::default() };
        assert_eq!(counts(settings, &[0.1, 0.2, 0.3]), counts(settings, &[0.1, 0.2, 0.3]));
        assert_ne!(
            counts(settings, &[0.1, 0.2, 0.3]),
            counts(SamplerSettings { seed: 8, ..settings }, &[0.1, 0.2, 0.3])
        );
    }

    #[test]
    fn settings_out_of_range_name_their_flag() {
        let d = SamplerSettings::default();
        for (flag, s) in [
            ("--temp", SamplerSettings { temperature: f32::NAN, ..d }),
            ("--top-p", SamplerSettings { top_p: 0.0, ..d }),
            ("--min-p", SamplerSettings { min_p: 1.5, ..d }),
            ("--repeat-penalty", SamplerSettings { repeat_penalty: 0.0, ..d }),
        ] {
            let message = s.check().expect_err("out of range").to_string();
            assert!(message.starts_with(flag), "{message}");
        }
    }
}
