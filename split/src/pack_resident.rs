//! Encodes what is not in bundles: embedding, attention, norms and head.

use crate::Error;
use crate::build::{Rounding, Scales, SplitOptions};
use crate::error::Result;
use crate::pack_layer::{is_rounded_with_feedback, pack_rows};
use crate::planes::{further_planes, lay_out};
use crate::sketch::Feedback;
use crate::tensor_file::{Format, TensorFileEntry, Writer};
use std::path::Path;
use thermocline_calibrate::{Input, Profile};
use thermocline_datasets::Checkpoint;
use thermocline_kernels::Encoding;
use thermocline_kernels::exact::PackedRow;

/// Rows of a matrix that are in memory as f32 at a time.
const BLOCK_ROWS: usize = 4096;

/// What [`write_resident`] wrote.
pub(crate) struct WrittenResident {
    pub resident: TensorFileEntry,
    /// What further planes its matrices have, if any has.
    pub planes: Option<TensorFileEntry>,
    /// Whether rows that were to be rounded with feedback were not, because the profile has not got what that needs.
    pub lacks_moments: bool,
}

/// The embedding, attention and head matrices in file order: what is streamed together lies together.
pub(crate) fn resident_matrices(checkpoint: &dyn Checkpoint) -> Vec<String> {
    let config = checkpoint.config();
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    for l in 0..config.n_layers {
        names
            .extend(["q_proj", "k_proj", "v_proj", "o_proj"].map(|p| format!("model.layers.{l}.self_attn.{p}.weight")));
    }
    if !config.tie_word_embeddings {
        names.push("lm_head.weight".to_owned());
    }
    names
}

fn resident_vectors(checkpoint: &dyn Checkpoint) -> Vec<String> {
    let config = checkpoint.config();
    let mut names = vec!["model.norm.weight".to_owned()];
    for l in 0..config.n_layers {
        names.extend(["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{l}.{n}.weight")));
        if config.qkv_bias {
            names.extend(["q_proj", "k_proj", "v_proj"].map(|p| format!("model.layers.{l}.self_attn.{p}.bias")));
        }
    }
    names
}

/// Rows and columns of a matrix, or 1 and the length of a vector.
pub(crate) fn shape(checkpoint: &dyn Checkpoint, name: &str) -> Result<(usize, usize)> {
    let missing =
        || thermocline_datasets::Error::MissingTensor { path: checkpoint.path().to_owned(), name: name.to_owned() };
    let info = checkpoint.info(name).ok_or_else(missing)?;
    match info.shape.as_slice() {
        [n] => Ok((1, *n)),
        [rows, columns] => Ok((*rows, *columns)),
        _ => Err(missing().into()),
    }
}

/// The layer of an attention matrix, and what the matrix is multiplied with.
fn place(matrix: &str) -> Option<(usize, Input)> {
    let layer = matrix.split('.').nth(2)?.parse().ok()?;
    let input = match matrix.split('.').nth(4)? {
        "o_proj" => Input::AttentionOutput,
        "v_proj" => Input::Mixture,
        _ => Input::Qkv,
    };
    Some((layer, input))
}

/// Writes the resident tensors, and what further planes their matrices have.
pub(crate) fn write_resident(
    checkpoint: &dyn Checkpoint,
    profile: &Profile,
    options: &SplitOptions,
    dir: &Path,
) -> Result<WrittenResident> {
    let (matrices, vectors) = (resident_matrices(checkpoint), resident_vectors(checkpoint));
    let (mut announced, mut announced_planes) = (Vec::new(), Vec::new());
    for name in &matrices {
        let ((rows, columns), encoding) = (shape(checkpoint, name)?, options.encoding_of(name));
        if !encoding.accepts(columns) {
            let flag = if place(name).is_some() { "--attention-encoding" } else { "--resident-encoding" };
            let what = format!("{name} has rows of {columns}, no multiple of 32; use {flag} bf16x");
            return Err(Error::Settings { what });
        }
        announced.push((name.clone(), Format::from(encoding.base()), rows, columns));
        let planes = further_planes(encoding).iter();
        announced_planes
            .extend(planes.map(|plane| (format!("{name}.{}", plane.name()), Format::of_plane(*plane), rows, columns)));
    }
    for name in &vectors {
        announced.push((name.clone(), Format::F32, 1, shape(checkpoint, name)?.1));
    }
    let mut writer = Writer::create(dir, "resident.safetensors", announced)?;
    let mut further = match announced_planes.is_empty() {
        true => None,
        false => Some(Writer::create(dir, "resident-planes.safetensors", announced_planes)?),
    };
    let mut inputs = Inputs { profile, options, feedback: None, lacks_moments: false };
    for name in &matrices {
        let encoding = options.encoding_of(name);
        let packed = pack_matrix(checkpoint, name, encoding, &mut inputs)?;
        let mut packed = packed.iter();
        if let Some(base) = packed.next() {
            writer.write(name, base)?;
        }
        for (plane, bytes) in further_planes(encoding).iter().zip(packed) {
            if let Some(further) = &mut further {
                further.write(&format!("{name}.{}", plane.name()), bytes)?;
            }
        }
    }
    for name in &vectors {
        let bytes: Vec<u8> = checkpoint.load(name)?.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(name, &bytes)?;
    }
    let (lacks_moments, planes) = (inputs.lacks_moments, further.map(Writer::finish).transpose()?);
    Ok(WrittenResident { resident: writer.finish()?, planes, lacks_moments })
}

/// What the profile knows of the inputs of attention's matrices.
struct Inputs<'a> {
    profile: &'a Profile,
    options: &'a SplitOptions,
    /// That of the last matrix: query and key rows share one.
    feedback: Option<((usize, Input), Feedback)>,
    lacks_moments: bool,
}

impl Inputs<'_> {
    /// Mean squares of the channels that a matrix is multiplied with, if its scales are fitted to them.
    fn mean_squares(&self, matrix: &str) -> Result<Option<Vec<f32>>> {
        let Some((layer, input)) = place(matrix).filter(|_| self.options.scales == Scales::Moments) else {
            return Ok(None);
        };
        let statistics = self.profile.layer(layer)?;
        let squares = match input {
            Input::Ffn => statistics.ffn_input_mean_square,
            Input::Qkv => statistics.qkv_input_mean_square,
            Input::AttentionOutput => statistics.attention_output_mean_square,
            Input::Mixture if statistics.mixture_mean_square.is_empty() => statistics.qkv_input_mean_square,
            Input::Mixture => statistics.mixture_mean_square,
        };
        Ok(Some(squares.into_iter().map(|v| v as f32).collect()))
    }

    /// What rounds a matrix' rows in this encoding, if not each weight for itself.
    fn feedback(&mut self, matrix: &str, encoding: Encoding) -> Result<Option<&Feedback>> {
        let is_asked = self.options.rounding == Rounding::Feedback && is_rounded_with_feedback(encoding);
        let Some(place) = place(matrix).filter(|_| is_asked) else { return Ok(None) };
        if self.feedback.as_ref().is_none_or(|(of, _)| *of != place) {
            let Some(moment) = self.profile.second_moment(place.0, place.1)? else {
                self.lacks_moments = true;
                return Ok(None);
            };
            self.feedback = Some((place, Feedback::new(&moment)?));
        }
        Ok(self.feedback.as_ref().map(|(_, feedback)| feedback))
    }
}

/// Encodes a checkpoint's matrix, read block by block: its planes, the base first.
fn pack_matrix(
    checkpoint: &dyn Checkpoint,
    name: &str,
    encoding: Encoding,
    inputs: &mut Inputs<'_>,
) -> Result<Vec<Vec<u8>>> {
    let (rows, columns) = shape(checkpoint, name)?;
    let mean_squares = inputs.mean_squares(name)?;
    let fit = inputs.options.scales.fit(mean_squares.as_deref());
    let feedback = inputs.feedback(name, encoding)?;
    let mut packed: Vec<PackedRow> = Vec::with_capacity(rows);
    for first in (0..rows).step_by(BLOCK_ROWS) {
        let block = checkpoint.load_rows(name, first..(first + BLOCK_ROWS).min(rows))?;
        let done = pack_rows(encoding, &block, columns, fit, feedback);
        packed.extend(done.map_err(|(row, source)| Error::Pack {
            tensor: name.to_owned(),
            row: first + row,
            source,
        })?);
    }
    Ok(lay_out(encoding, columns, 1, &packed))
}
