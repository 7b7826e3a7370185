//! A run: layer by layer over the corpus.

use crate::{
    Error, Result, Settings, Shard,
    dense::{DenseLayer, Embedding},
    disk::{Space, disk_bytes, is_full},
    error::AtPath,
    hidden::{HiddenReader, HiddenWriter, bytes_digest},
    profile::{Profile, ProfileMeta, write_profile},
    record::{Identity, Record, hidden_file, layer_file},
    settings::flops_per_token,
    statistics::{Accumulator, Input, SamplePlan},
    work_dir::{WorkDir, write_atomically},
};
use std::{fs, ops::Range, path::Path, time::Instant};
use thermocline_datasets::Checkpoint;

/// How to run, as opposed to what to measure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Go on from an interrupted run's checkpoints; without it they are removed.
    pub resume: bool,
    /// Only this part of the corpus.
    pub shard: Option<Shard>,
}

/// What a run reports while it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Something the user should know: a fallback, a resumption.
    Notice(String),
    /// Work done so far.
    Progress {
        /// The layer in work.
        layer: usize,
        /// Layers of the model.
        n_layers: usize,
        /// Tokens that went through this layer.
        tokens_done: u64,
        /// Tokens that every layer has to do.
        tokens_total: u64,
    },
}

/// Runs the dense model over `tokens`, cut into windows of `settings.window_len` (the rest that does not fill a window
/// is left out), and writes a profile directory.
///
/// Memory is bounded by [`crate::memory_bound_bytes`]; hidden states of all tokens lie twice in `<out_dir>.work`
/// (`8 * n_tokens * hidden_size` bytes) while the run lasts. Each window goes through the same matrix products whatever
/// shard it is in, and sums are integers, so interrupted and resumed runs, and merged shards, give the same bytes as
/// one run with the same number of threads on the same kind of CPU.
///
/// # Errors
/// [`Error::Locked`] if another process writes to `out_dir`, [`Error::OutputExists`] if it is there already,
/// [`Error::ResumeMismatch`] if the interrupted run was of another model, corpus, shard or settings;
/// [`Error::DiskFull`], before any work is done, if there is no room for it; and whatever
/// reading the checkpoint or writing files can fail with. After any error the run can be resumed.
pub fn calibrate(
    checkpoint: &dyn Checkpoint,
    tokens: &[u32],
    settings: &Settings,
    options: &RunOptions,
    out_dir: &Path,
    progress: &mut dyn FnMut(Event),
) -> Result<Profile> {
    settings.check()?;
    let n_windows = tokens.len() / settings.window_len;
    let windows = options.shard.unwrap_or(Shard { index: 0, count: 1 }).windows(n_windows)?;
    let tokens = &tokens[..n_windows * settings.window_len];
    if u32::try_from(tokens.len()).is_err() {
        let reason = format!("{} tokens; counts are 32 bits wide", tokens.len());
        return Err(Error::Setting { name: "tokens", reason });
    }
    let identity = Identity {
        model_digest: checkpoint.digest()?,
        corpus_digest: bytes_digest(bytemuck::cast_slice(tokens)),
        settings: settings.clone(),
        shard: options.shard,
    };
    let work = WorkDir::lock(out_dir)?;
    if out_dir.exists() {
        return finished(work, out_dir, &identity, options.resume);
    }
    let plan = SamplePlan::new(settings, n_windows);
    let n_tokens = (windows.len() * settings.window_len) as u64;
    let needed = disk_bytes(checkpoint.config(), settings, n_tokens, plan.token_indices(windows.clone()).len());
    let (folder, space) = (work.path().to_owned(), Space::of(work.path()));
    check_space(&folder, space, needed)?;
    let run = Run { checkpoint, tokens, windows, n_windows, identity, work };
    run.go(options.resume, out_dir, progress).map_err(|error| match error {
        Error::Io { source, .. } if is_full(&source) => {
            Error::DiskFull { path: folder.clone(), needed, available: Space::of(&folder).available_bytes }
        }
        other => other,
    })
}

/// Refuses to start what the disk cannot hold.
fn check_space(path: &Path, space: Space, needed: u64) -> Result<()> {
    if space.holds(needed) {
        return Ok(());
    }
    Err(Error::DiskFull { path: path.to_owned(), needed, available: space.available_bytes })
}

/// A run that was killed between its last two steps, or that is already done.
fn finished(work: WorkDir, out_dir: &Path, now: &Identity, resume: bool) -> Result<Profile> {
    work.remove()?;
    if !resume {
        return Err(Error::OutputExists { path: out_dir.to_owned() });
    }
    let profile = Profile::open(out_dir)?;
    profile.meta().identity().check(now, out_dir)?;
    Ok(profile)
}

struct Run<'a> {
    checkpoint: &'a dyn Checkpoint,
    tokens: &'a [u32],
    windows: Range<usize>,
    n_windows: usize,
    identity: Identity,
    work: WorkDir,
}

impl Run<'_> {
    fn go(self, resume: bool, out_dir: &Path, progress: &mut dyn FnMut(Event)) -> Result<Profile> {
        let start = Instant::now();
        let config = self.checkpoint.config().clone();
        let mut record = self.start(resume, config.n_layers, progress)?;
        let (spent, plan) = (record.seconds, SamplePlan::new(&self.identity.settings, self.n_windows));
        for layer in record.n_layers_done()..config.n_layers {
            self.layer(layer, &plan, &mut record, progress)?;
            record.seconds = spent + start.elapsed().as_secs_f64();
            record.save(&self.work)?;
        }
        let (settings, window_len) = (self.identity.settings.clone(), self.identity.settings.window_len);
        let n_tokens = self.windows.len() * window_len;
        let meta = ProfileMeta {
            format_version: ProfileMeta::VERSION,
            model_name: self.checkpoint.name(),
            model_digest: self.identity.model_digest.clone(),
            corpus_digest: self.identity.corpus_digest.clone(),
            flops: flops_per_token(&config, &settings) * n_tokens as f64,
            config,
            settings,
            shard: self.identity.shard,
            first_window: self.windows.start,
            n_windows: self.windows.len(),
            n_windows_total: self.n_windows,
            n_tokens: n_tokens as u64,
            n_samples: plan.token_indices(self.windows.clone()).len(),
            seconds: record.seconds,
            statistics_digest: String::new(),
        };
        let sample_tokens = plan.token_indices(self.windows.clone());
        write_profile(self.work, out_dir, meta, &sample_tokens, |work, layer| work.join(&layer_file(layer)))
    }

    /// The record to go on from: an intact one of an interrupted run, or a fresh one with the embedded tokens.
    fn start(&self, resume: bool, n_layers: usize, progress: &mut dyn FnMut(Event)) -> Result<Record> {
        if resume {
            let (record, notices) = Record::load(&self.work, &self.identity, n_layers)?;
            let fell_back = !notices.is_empty();
            notices.into_iter().for_each(|notice| progress(Event::Notice(format!("checkpoint not used: {notice}"))));
            if let Some(record) = record {
                progress(Event::Notice(format!("resuming at layer {} of {n_layers}", record.n_layers_done())));
                return Ok(record);
            }
            if fell_back {
                progress(Event::Notice("no intact checkpoint: starting over".to_owned()));
            }
        }
        self.work.clear()?;
        let embedding = Embedding::load(self.checkpoint)?;
        let mut hidden = HiddenWriter::create(self.work.join(&hidden_file(0)))?;
        let window_len = self.identity.settings.window_len;
        for window in self.windows.clone() {
            hidden.write(&embedding.rows(&self.tokens[window * window_len..(window + 1) * window_len])?)?;
        }
        let hidden_digest = hidden.finish()?;
        let record = Record { identity: self.identity.clone(), hidden_digest, layer_digests: Vec::new(), seconds: 0.0 };
        record.save(&self.work)?;
        Ok(record)
    }

    fn layer(
        &self,
        index: usize,
        plan: &SamplePlan,
        record: &mut Record,
        progress: &mut dyn FnMut(Event),
    ) -> Result<()> {
        let (config, settings) = (self.checkpoint.config(), &self.identity.settings);
        let layer = DenseLayer::load(self.checkpoint, index)?;
        let mut statistics = Accumulator::new(config, settings, plan, index, layer.down_norms()?)?;
        let mut reader = HiddenReader::open(self.work.join(&hidden_file(index)))?;
        let mut writer = HiddenWriter::create(self.work.join(&hidden_file(index + 1)))?;
        let tokens_total = (self.windows.len() * settings.window_len) as u64;
        for (done, window) in self.windows.clone().enumerate() {
            let tokens_done = (done * settings.window_len) as u64;
            progress(Event::Progress { layer: index, n_layers: config.n_layers, tokens_done, tokens_total });
            let x = reader.read(settings.window_len * config.hidden_size)?;
            writer.write(&step(&layer, x, settings.window_len, window, &mut statistics)?)?;
        }
        reader.finish(&record.hidden_digest)?;
        let bytes = statistics.into_sums().encode();
        write_atomically(&self.work.join(&layer_file(index)), &bytes)?;
        record.layer_digests.push(bytes_digest(&bytes));
        record.hidden_digest = writer.finish()?;
        let (layer, n_layers) = (index, config.n_layers);
        progress(Event::Progress { layer, n_layers, tokens_done: tokens_total, tokens_total });
        Ok(())
    }
}

/// One window through one layer.
fn step(
    layer: &DenseLayer,
    x: Vec<f32>,
    window_len: usize,
    window: usize,
    statistics: &mut Accumulator<'_>,
) -> Result<Vec<f32>> {
    let mut observed = Ok(());
    let mut x = layer.attention_observed(&x, 1, window_len, |inputs| {
        observed = statistics
            .add_input(window, Input::Qkv, inputs.qkv)
            .and_then(|()| statistics.add_input(window, Input::Mixture, inputs.mixtures))
            .and_then(|()| statistics.add_input(window, Input::AttentionOutput, inputs.output));
    })?;
    observed?;
    let input = layer.ffn_input(&x)?;
    statistics.add_input(window, Input::Ffn, &input)?;
    let neurons = layer.neurons(&input)?;
    statistics.add_activations(window, &neurons)?;
    layer.ffn_output(&mut x, neurons.h)?;
    Ok(x)
}

/// Creates an empty folder, removing an older one of that name.
pub(crate) fn fresh_dir(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).at(path)?;
    }
    fs::create_dir_all(path).at(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_told_with_both_figures() {
        let space = Space { available_bytes: 4000, present_bytes: 96 };
        let path = Path::new("out.work");
        assert!(check_space(path, space, 4096).is_ok());
        let error = check_space(path, space, 4097).expect_err("one byte too many");
        assert!(matches!(error, Error::DiskFull { needed: 4097, available: 4000, .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("4097 bytes") && text.contains("4000 are free") && text.contains("--shard"), "{text}");
    }
}
