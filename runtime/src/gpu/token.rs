//! One token, from its number to its logits, as one CUDA graph: what it is and where it stands is read from mapped
//! memory, so that the same graph serves every token.

use super::load::{Layer, Model};
use super::plan::{GpuPlan, heads};
use crate::Result;
use crate::plan::Mode;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::cuda::launch::{
    Added, Bundles, Choose, LayerInput, Norm, RopeTables, Selection, attend, choose, embed, ffn, finish, gemv,
    predict_inner, predict_scores,
};
use thermocline_kernels::cuda::{CudaError, Device, Graph, Queue};

/// Records a token. `with_host`: the host's threads compute the share of the misses that the step says.
pub(super) fn record(
    device: &Device,
    config: &ModelConfig,
    plan: &GpuPlan,
    model: &Model,
    with_host: bool,
) -> Result<Graph> {
    Ok(device.capture(|| {
        let (s, mapped) = (&model.scratch, &model.mapped);
        embed(device, &model.embedding, &mapped.step.view(), &s.step, &s.x)?;
        for (l, layer) in model.layers.iter().enumerate() {
            attention(device, config, plan, model, layer)?;
            feed_forward(device, config, plan, model, (l, layer), with_host)?;
        }
        let norm = Norm { weight: &model.final_norm, eps: config.rms_norm_eps, out: None };
        gemv(device, &model.head, &s.x, Some(norm), Added::default(), &s.logits)?;
        device.copy(Queue::Compute, &mapped.logits.slice(0, s.logits.len()), &s.logits)?;
        device.copy(Queue::Compute, &mapped.totals.slice(0, s.work.totals.len()), &s.work.totals)
    })?)
}

fn attention(
    device: &Device,
    config: &ModelConfig,
    plan: &GpuPlan,
    model: &Model,
    layer: &Layer,
) -> Result<(), CudaError> {
    let s = &model.scratch;
    let norm = Norm { weight: &layer.input_norm, eps: config.rms_norm_eps, out: None };
    let bias = Added { bias: layer.qkv_bias.as_ref(), residual: None };
    gemv(device, &layer.qkv, &s.x, Some(norm), bias, &s.qkv)?;
    let heads = heads(config, plan.request.base.context);
    let rope = RopeTables { cos: &model.rope[0], sin: &model.rope[1] };
    let cache = [&layer.keys, &layer.values];
    let shares = [&s.attention_partial, &s.attention_arrived];
    attend(device, heads, plan.n_splits, &s.qkv, &s.step, cache, rope, shares, &s.attention)?;
    let residual = Added { bias: None, residual: Some(&s.x) };
    gemv(device, &layer.o, &s.attention, None, residual, &s.x)
}

fn feed_forward(
    device: &Device,
    config: &ModelConfig,
    plan: &GpuPlan,
    model: &Model,
    (l, layer): (usize, &Layer),
    with_host: bool,
) -> Result<(), CudaError> {
    let s = &model.scratch;
    let place = (l, config.n_layers);
    let mut host = None;
    let work = match (&layer.predictor, &layer.every) {
        (Some(predictor), _) => {
            predict_inner(device, &predictor.input, &s.x, &layer.ffn_norm, &s.inner)?;
            let shared = (with_host && layer.n_hot < config.intermediate_size).then(|| model.mapped.work());
            let host_x = model.mapped.x.slice(0, 4 * config.hidden_size);
            let input = LayerInput {
                hidden: config.hidden_size,
                x: &s.x,
                norm_weight: &layer.ffn_norm,
                eps: config.rms_norm_eps,
                inner: &s.inner,
                normed: &s.normed,
                host_x: shared.is_some().then_some(&host_x),
            };
            predict_scores(device, &predictor.factors, input, &predictor.neurons, model.activation, &s.scores)?;
            choose(
                device,
                &Choose {
                    scores: &s.scores,
                    ffn: config.intermediate_size,
                    n_hot: layer.n_hot,
                    selection: selection(plan.request.base.mode, config),
                    cache: &layer.cache,
                    step: &s.step,
                    layer: l,
                    n_layers: config.n_layers,
                    host: shared.as_ref(),
                    out: &s.work,
                },
            )?;
            host = shared.is_some().then(|| model.mapped.result());
            &s.work
        }
        (None, Some(every)) => {
            // No rows: only the normalised input is wanted.
            let norm = Norm { weight: &layer.ffn_norm, eps: config.rms_norm_eps, out: Some(&s.normed) };
            let none = thermocline_kernels::cuda::launch::DeviceMatrix { rows: 0, ..layer.qkv.clone() };
            gemv(device, &none, &s.x, Some(norm), Added::default(), &s.qkv)?;
            every
        }
        (None, None) => unreachable!("a layer has a predictor or a list of all neurons"),
    };
    let ahead = Some(model.layers.get(l + 1).map_or(&model.head.data, |next| &next.qkv.data));
    let bundles = Bundles { hot: &layer.hot, cold: &layer.cold.view(), cache: &layer.slots, ahead };
    ffn(device, model.layout, model.activation, work, bundles, &s.normed, model.n_blocks, &s.partial)?;
    let hidden = config.hidden_size;
    finish(device, &s.partial, model.n_blocks, hidden, &work.counts, host.as_ref(), &s.step, place, &s.x)
}

fn selection(mode: Mode, config: &ModelConfig) -> Selection {
    match mode {
        Mode::Exact => Selection::Every,
        Mode::Sparse { active } => Selection::Top(crate::predictor::n_active(active, config.intermediate_size)),
    }
}
