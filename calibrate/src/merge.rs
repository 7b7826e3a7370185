//! Puts shards together.

use crate::{
    Error, Result,
    profile::{Profile, ProfileMeta, sample_plan, write_profile},
    record::layer_file,
    work_dir::{WorkDir, write_atomically},
};
use std::path::{Path, PathBuf};

/// Merges the profiles of all shards of one corpus, in any order, into `out_dir`; its statistics are byte for byte
/// those of one run.
///
/// # Errors
/// [`Error::Merge`] if they are of different models, corpora or settings, overlap or leave windows out;
/// [`Error::Corrupt`] if one is damaged; [`Error::Locked`] and [`Error::OutputExists`] as for
/// [`crate::calibrate()`].
pub fn merge(profiles: &[PathBuf], out_dir: &Path) -> Result<Profile> {
    let mut shards = profiles.iter().map(|dir| Profile::open(dir)).collect::<Result<Vec<_>>>()?;
    shards.sort_by_key(|shard| shard.meta().first_window);
    let meta = merged_meta(&shards, out_dir)?;
    shards.iter().try_for_each(Profile::verify)?;
    let work = WorkDir::lock(out_dir)?;
    if out_dir.exists() {
        work.remove()?;
        return Err(Error::OutputExists { path: out_dir.to_owned() });
    }
    work.clear()?;
    for layer in 0..meta.config.n_layers {
        let mut total = None;
        for shard in &shards {
            let sums = shard.layer_sums(layer)?;
            match &mut total {
                None => total = Some(sums),
                Some(total) => total.merge(&sums).map_err(|reason| Error::Merge {
                    path: shard.dir().to_owned(),
                    reason: format!("layer {layer}: {reason}"),
                })?,
            }
        }
        write_atomically(&work.join(&layer_file(layer)), &total.unwrap_or_default().encode())?;
    }
    let sample_tokens = sample_plan(&meta).token_indices(0..meta.n_windows_total);
    write_profile(work, out_dir, meta, &sample_tokens, |work, layer| work.join(&layer_file(layer)))
}

/// The whole's description, if the sorted shards make one.
fn merged_meta(shards: &[Profile], out_dir: &Path) -> Result<ProfileMeta> {
    let Some(first) = shards.first() else {
        return Err(Error::Merge { path: out_dir.to_owned(), reason: "no profiles given".to_owned() });
    };
    let mut meta = first.meta().clone();
    let (mut next, mut seconds, mut flops, mut n_samples) = (0, 0.0, 0.0, 0);
    for shard in shards {
        let bad = |reason: String| Err(Error::Merge { path: shard.dir().to_owned(), reason });
        let other = shard.meta();
        if other.model_digest != meta.model_digest || other.config != meta.config {
            return bad(format!("model {} is not {}", other.model_digest, meta.model_digest));
        }
        if other.settings != meta.settings {
            return bad(format!("settings {:?} are not {:?}", other.settings, meta.settings));
        }
        if other.corpus_digest != meta.corpus_digest || other.n_windows_total != meta.n_windows_total {
            return bad(format!("corpus {} is not {}", other.corpus_digest, meta.corpus_digest));
        }
        if other.first_window < next {
            return bad(format!("windows from {} overlap those before {next}", other.first_window));
        }
        if other.first_window > next {
            return bad(format!("windows {next}..{} are missing", other.first_window));
        }
        next = other.first_window + other.n_windows;
        seconds += other.seconds;
        flops += other.flops;
        n_samples += other.n_samples;
    }
    if next != meta.n_windows_total {
        let reason = format!("windows {next}..{} are missing", meta.n_windows_total);
        return Err(Error::Merge { path: out_dir.to_owned(), reason });
    }
    meta.shard = None;
    meta.first_window = 0;
    meta.n_windows = next;
    meta.n_tokens = (next * meta.settings.window_len) as u64;
    (meta.seconds, meta.flops, meta.n_samples) = (seconds, flops, n_samples);
    Ok(meta)
}
