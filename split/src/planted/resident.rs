//! Embedding, attention, norms and head of a planted model.

use super::rows::{Row, matrix};
use super::{EMBEDDING, HEAD, MATRIX};
use crate::error::Result;
use crate::tensor_file::{Format, Writer};
use std::path::Path;
use thermocline_datasets::Random;
use thermocline_datasets::architectures::{self, Role, TensorSpec};
use thermocline_datasets::planted::PlantedModel;

/// The largest codes that the scales of [`thermocline_datasets::planted::Scales`] are meant for.
const CONSTANT_CODE: i8 = 4;
const IDENTITY_CODE: i8 = 4;
const HEAD_CODE: i8 = 7;

/// The tensors that are not bundles: matrices first, as `split` orders them, what is streamed together lying together.
pub(super) fn tensors(model: &PlantedModel) -> Vec<(TensorSpec, Format)> {
    let specs = architectures::tensors(&model.config());
    let in_bundles = |role: Role| matches!(role, Role::Gate | Role::Up | Role::Down);
    let (vectors, matrices): (Vec<_>, Vec<_>) =
        specs.into_iter().filter(|spec| !in_bundles(spec.role)).partition(|spec| spec.role == Role::Norm);
    let with = |format: Format| move |spec: TensorSpec| (spec, format);
    matrices.into_iter().map(with(Format::Q4)).chain(vectors.into_iter().map(with(Format::F32))).collect()
}

fn rows_and_columns(spec: &TensorSpec) -> (usize, usize) {
    match spec.shape.as_slice() {
        [rows, columns] => (*rows, *columns),
        shape => (1, shape.iter().product()),
    }
}

/// Bytes of all of them.
pub(super) fn bytes(model: &PlantedModel) -> u64 {
    let bytes = |(spec, format): &(TensorSpec, Format)| {
        let (rows, columns) = rows_and_columns(spec);
        (rows * format.row_bytes(columns).unwrap_or(0)) as u64
    };
    tensors(model).iter().map(bytes).sum()
}

/// Writes `resident.safetensors`, one tensor in memory at a time.
pub(super) fn write(model: &PlantedModel, dir: &Path) -> Result<crate::TensorFileEntry> {
    let tensors = tensors(model);
    let announced = tensors.iter().map(|(spec, format)| {
        let (rows, columns) = rows_and_columns(spec);
        (spec.name.clone(), *format, rows, columns)
    });
    let mut writer = Writer::create(dir, "resident.safetensors", announced.collect())?;
    for (index, (spec, _)) in tensors.iter().enumerate() {
        let (rows, columns) = rows_and_columns(spec);
        let random = |row: usize| Random::at(model.seed(), &[MATRIX, index as u64, row as u64]);
        let bytes = match spec.role {
            Role::Norm => 1.0f32.to_le_bytes().repeat(columns),
            Role::Embedding => matrix(rows, columns, |token, row| embed(model, token, row)),
            Role::Head => matrix(rows, columns, |token, row| head(model, token, row)),
            Role::Output => {
                let reserved = ..model.shape().channels().free.start;
                matrix(rows, columns, |r, row| {
                    let zero = reserved.contains(&r);
                    row.randomize(&mut random(r), if zero { 0.0 } else { model.scales().output });
                })
            }
            _ => matrix(rows, columns, |r, row| row.randomize(&mut random(r), model.scales().query)),
        };
        writer.write(&spec.name, &bytes)?;
    }
    writer.finish()
}

/// A token's row of the embedding: its code, its domain's constant, its name, and noise.
pub(super) fn embed(model: &PlantedModel, token: usize, row: &mut Row<'_>) {
    let (channels, scales) = (model.shape().channels(), model.scales());
    row.randomize(&mut Random::at(model.seed(), &[EMBEDDING, token as u64]), scales.free);
    row.put(channels.pattern.start, model.pattern(token).iter().copied());
    row.scale(channels.pattern, scales.pattern);
    for (domain, group) in channels.constants.into_iter().enumerate() {
        let code = if domain == model.domain(token) { CONSTANT_CODE } else { 0 };
        row.put(group.start, [code]);
        row.scale(group, scales.constant / f32::from(CONSTANT_CODE));
    }
    row.put(channels.identity.start, model.identity(token).iter().map(|i| IDENTITY_CODE * i));
    row.scale(channels.identity, scales.identity);
}

/// A token's row of the head: the name of the token before it.
fn head(model: &PlantedModel, token: usize, row: &mut Row<'_>) {
    let (channels, scales) = (model.shape().channels(), model.scales());
    let vocab_size = model.shape().vocab_size;
    row.randomize(&mut Random::at(model.seed(), &[HEAD, token as u64]), scales.head_free);
    row.scale(0..channels.identity.start, 0.0);
    let before = (token + vocab_size - 1) % vocab_size;
    row.put(channels.identity.start, model.identity(before).iter().map(|i| HEAD_CODE * i));
    row.scale(channels.identity, scales.head);
}
