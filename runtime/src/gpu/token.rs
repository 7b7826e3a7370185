//! One token, from its number to its logits, as one CUDA graph: what it is and where it stands is read from mapped
//! memory, so that the same graph serves every token.

use super::load::{Layer, Model};
use super::plan::{GpuPlan, heads};
use crate::Result;
use crate::plan::Mode;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::cuda::launch::{
    Added, Ahead, Bundles, Choose, Foreseen, LayerInput, LowRankPredictor, Norm, RopeTables, Selection, attend, choose,
    embed, fetch_bundles, ffn, finish, gemv, predict_inner, predict_scores,
};
use thermocline_kernels::cuda::{CudaError, Device, Graph, Queue, View};

/// What takes part besides the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    /// The host's threads compute the share of the misses that the step says.
    pub host: bool,
    /// The link fetches for the next layer, as much as the step says.
    pub lookahead: bool,
}

/// Records a token.
pub(super) fn record(
    device: &Device,
    config: &ModelConfig,
    plan: &GpuPlan,
    model: &Model,
    parts: Parts,
) -> Result<Graph> {
    Ok(device.capture(|| {
        let (s, mapped) = (&model.scratch, &model.mapped);
        embed(device, &model.embedding, &mapped.step.view(), &s.step, &s.x)?;
        for (l, layer) in model.layers.iter().enumerate() {
            attention(device, config, plan, model, layer)?;
            feed_forward(device, config, plan, model, (l, layer), parts)?;
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
    parts: Parts,
) -> Result<(), CudaError> {
    let s = &model.scratch;
    let place = (l, config.n_layers);
    let mut host = None;
    let [fetched, next] = [l, l + 1].map(|l| parts.lookahead.then(|| foreseen(config, model, l)).flatten());
    let work = match (&layer.predictor, &layer.every) {
        (Some(predictor), _) => {
            let own = predictor.of_layer(layer, s);
            let predictors: Vec<_> = [own].into_iter().chain(next.map(|next| next.predictor)).collect();
            predict_inner(device, &predictors, &s.x)?;
            let shared = (parts.host && layer.n_hot < config.intermediate_size).then(|| model.mapped.work());
            let host_x = model.mapped.x.slice(0, 4 * config.hidden_size);
            let input = LayerInput {
                hidden: config.hidden_size,
                x: &s.x,
                eps: config.rms_norm_eps,
                normed: &s.normed,
                host_x: shared.is_some().then_some(&host_x),
            };
            predict_scores(device, &predictors, input, model.activation)?;
            let ahead = next.map(|next| Ahead {
                scores: next.predictor.scores,
                n_hot: next.layer.n_hot,
                cache: &next.layer.cache,
                foreseen: next.list,
            });
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
                    fetched: fetched.map(|own| own.list),
                    ahead,
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
    let places = fetched.map(|own| own.places);
    if places.is_some() {
        device.order(Queue::Copy, Queue::Compute)?;
    }
    let bundles = Bundles { hot: &layer.hot, cold: &layer.cold.view(), cache: &layer.slots, fetched: places, ahead };
    ffn(device, model.layout, model.activation, work, bundles, &s.normed, model.n_blocks, &s.partial)?;
    // From when this layer does not need the link any more to when the next one does.
    if let Some(next) = next {
        device.order(Queue::Compute, Queue::Copy)?;
        fetch_bundles(device, model.layout, next.list, &next.layer.cold.view(), next.places, &s.work.totals)?;
    }
    let hidden = config.hidden_size;
    finish(device, &s.partial, model.n_blocks, hidden, &work.counts, host.as_ref(), &s.step, place, &s.x)
}

/// A layer for which the link fetches while the attention before it is computed.
#[derive(Clone, Copy)]
struct NextLayer<'a> {
    layer: &'a Layer,
    /// For the input of the layer before.
    predictor: LowRankPredictor<'a>,
    list: &'a Foreseen,
    places: &'a View,
}

/// Layer `l`: if there is one, with neurons to fetch, whose predictor can be asked together with that of the layer before.
fn foreseen<'a>(config: &ModelConfig, model: &'a Model, l: usize) -> Option<NextLayer<'a>> {
    let (lookahead, before) = (model.lookahead.as_ref()?, model.layers.get(l.checked_sub(1)?)?);
    let layer = model.layers.get(l).filter(|layer| layer.n_hot < config.intermediate_size)?;
    let own = before.predictor.as_ref()?.of_layer(before, &model.scratch);
    let predictor = layer.predictor.as_ref()?.ahead(layer, lookahead);
    let shape = |p: &LowRankPredictor<'_>| [p.input, p.factors].map(|m| (m.encoding, m.rows, m.columns));
    let (list, places) = (&lookahead.foreseen[l % 2], &lookahead.places);
    (shape(&predictor) == shape(&own)).then_some(NextLayer { layer, predictor, list, places })
}

fn selection(mode: Mode, config: &ModelConfig) -> Selection {
    match mode {
        Mode::Exact => Selection::Every,
        Mode::Sparse { active } => Selection::Top(crate::predictor::n_active(active, config.intermediate_size)),
    }
}
