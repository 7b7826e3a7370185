//! One token, from its number to its logits, as one CUDA graph: what it is and where it stands is read from mapped
//! memory, so that the same graph serves every token.

use super::audit::Kept;
use super::buffers::Scratch;
use super::load::{DeviceChooser, Layer, Model, RowRule};
use super::plan::{GpuPlan, heads};
use super::sections::Section;
use super::sketches::Copies;
use crate::Result;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::cuda::launch::{
    Added, Ahead, Bundles, Choose, Foreseen, LayerInput, LowRankPredictor, Norm, RopeTables, RowChoice, Sketched,
    SketchedRows, add_sketched, ask_host, attend, choose, divide_work, embed, fetch_bundles, ffn, finish, gemv,
    predict_inner, predict_scores, sketch_scores,
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
    Ok(device.capture(|| launch(device, config, plan, model, parts, None))?)
}

/// Gives the device a token, kernel by kernel; what each layer makes of its input is `kept`.
pub(super) fn launch(
    device: &Device,
    config: &ModelConfig,
    plan: &GpuPlan,
    model: &Model,
    parts: Parts,
    kept: Option<&Kept>,
) -> Result<(), CudaError> {
    let (s, mapped) = (&model.scratch, &model.mapped);
    embed(device, &model.embedding, &mapped.step.view(), &s.step, &s.x)?;
    let mut copies = Copies::begin(device, model)?;
    for (l, layer) in model.layers.iter().enumerate() {
        attention(device, config, plan, model, layer)?;
        kept.map_or(Ok(()), |kept| kept.before(device, model, l))?;
        copies.wait(device, model, l)?;
        feed_forward(device, config, model, (l, layer), parts)?;
        copies.go_on(device, model, l)?;
        kept.map_or(Ok(()), |kept| kept.after(device, model, l))?;
    }
    let norm = Norm { weight: &model.final_norm, eps: config.rms_norm_eps, out: None };
    gemv(device, &model.head, &s.x, Some(norm), Added::default(), &s.logits)?;
    device.copy(Queue::Compute, &mapped.logits.slice(0, s.logits.len()), &s.logits)?;
    device.copy(Queue::Compute, &mapped.totals.slice(0, s.work.totals.len()), &s.work.totals)
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
    model: &Model,
    (l, layer): (usize, &Layer),
    parts: Parts,
) -> Result<(), CudaError> {
    let s = &model.scratch;
    let place = (l, config.n_layers);
    let [fetched, next] = [l, l + 1].map(|l| parts.lookahead.then(|| foreseen(config, model, l)).flatten());
    let shared = (parts.host && layer.n_hot < config.intermediate_size).then(|| model.mapped.work());
    let host_x = model.mapped.x.slice(0, 4 * config.hidden_size);
    if layer.is_hosts {
        return leave_to_host(device, config, model, (l, layer), &host_x);
    }
    let input = LayerInput {
        hidden: config.hidden_size,
        x: &s.x,
        eps: config.rms_norm_eps,
        normed: &s.normed,
        host_x: shared.is_some().then_some(&host_x),
    };
    match &layer.chooser {
        Some(DeviceChooser::Predictor(predictor)) => {
            let own = predictor.of_layer(layer, s);
            let predictors: Vec<_> = [own].into_iter().chain(next.map(|next| next.predictor)).collect();
            predict_inner(device, &predictors, &s.x)?;
            predict_scores(device, &predictors, input, model.activation)?;
        }
        Some(DeviceChooser::Sketch(_) | DeviceChooser::Pinned(..)) => {
            let sketch = model.device_sketch(l).expect("a sketch on the device");
            let of_row = |rule: RowRule| RowChoice { least: rule.least, whole: rule.whole, products: &s.products };
            let out = Sketched { scores: &s.scores, activations: &s.sketched, rows: layer.rows.map(of_row) };
            sketch_scores(device, sketch, input, &layer.ffn_norm, model.activation, out)?;
        }
        None => {
            normalise(device, config, model, layer, [Some(input.normed), input.host_x])?;
        }
    }
    if layer.is_chosen {
        let ahead = next.map(|next| Ahead {
            scores: next.predictor.scores,
            n_hot: next.layer.last_section().first_cold(),
            cache: &next.layer.cache,
            foreseen: next.list,
        });
        choose(
            device,
            &Choose {
                scores: &s.scores,
                ffn: config.intermediate_size,
                n_hot: layer.n_hot,
                n_always: layer.n_always,
                selection: layer.selection,
                rows: layer.rows.is_some(),
                sketched: layer.sketch().map(|_| &s.sketched),
                products: layer.rows.is_some().then_some(&s.products),
                cache: &layer.cache,
                step: &s.step,
                layer: l,
                n_layers: config.n_layers,
                host: shared.as_ref(),
                fetched: fetched.map(|own| own.list),
                ahead,
                out: &layer.work,
            },
        )?;
        if layer.sections.len() > 1 {
            let parts: Vec<_> = layer.sections.iter().map(|s| (s.neurons.clone(), &s.work)).collect();
            divide_work(device, &layer.work, layer.n_hot, config.intermediate_size, &parts)?;
        }
    }
    let host = shared.map(|_| model.mapped.result());
    let ahead = Some(model.layers.get(l + 1).map_or(&model.head.data, |next| &next.qkv.data));
    let places = fetched.map(|own| own.places);
    if places.is_some() {
        device.order(Queue::Copy, Queue::Compute)?;
    }
    // Each section leaves a row for every block; the last brings what comes next into the second-level cache.
    let row = 4 * config.hidden_size;
    let (rows, mut n_rows) = (row * model.n_blocks, layer.sections.len() * model.n_blocks);
    let sketched = s.partial.slice(row * n_rows, row * model.sketch_rows);
    let sketch = model.device_sketch(l);
    // Single rows leave it activations to add; whole neurons leave it nothing, and the link has more time.
    let (before, behind) = if layer.rows.is_some() { (None, sketch) } else { (sketch, None) };
    if let Some(sketch) = before {
        add_sketched(device, sketch, &s.sketched, model.sketch_rows, &sketched)?;
    }
    for (i, section) in layer.sections.iter().enumerate() {
        let ahead = ahead.filter(|_| i + 1 == layer.sections.len());
        let bundles = Bundles { hot: &section.hot, cold: &section.cold, cache: &layer.slots, fetched: places, ahead };
        let (work, partial) = (&section.work, s.partial.slice(i * rows, rows));
        let rows = layer.rows.filter(|rule| !rule.whole).map(|_| layer.sketched_rows(section, s));
        ffn(device, section.layout, model.activation, work, bundles, &s.normed, model.n_blocks, &partial, rows)?;
    }
    if let Some(sketch) = behind {
        add_sketched(device, sketch, &s.sketched, model.sketch_rows, &sketched)?;
    }
    n_rows += if sketch.is_some() { model.sketch_rows } else { 0 };
    // From when this layer does not need the link any more to when the next one does.
    if let Some(next) = next {
        device.order(Queue::Compute, Queue::Copy)?;
        let section = next.layer.last_section();
        fetch_bundles(device, section.layout, next.list, &section.cold, next.places, &next.layer.work.totals)?;
    }
    let (hidden, counts, left_out) = (config.hidden_size, &layer.work.counts, layer.left_out.as_ref());
    finish(device, &s.partial, n_rows, hidden, counts, left_out, host.as_ref(), &s.step, place, &s.x)
}

/// Gives the layer's normalised input to all of `out`.
fn normalise(
    device: &Device,
    config: &ModelConfig,
    model: &Model,
    layer: &Layer,
    out: [Option<&View>; 2],
) -> Result<(), CudaError> {
    let s = &model.scratch;
    // A product of no rows.
    let none = thermocline_kernels::cuda::launch::DeviceMatrix { rows: 0, ..layer.qkv.clone() };
    out.into_iter().flatten().try_for_each(|out| {
        let norm = Norm { weight: &layer.ffn_norm, eps: config.rms_norm_eps, out: Some(out) };
        gemv(device, &none, &s.x, Some(norm), Added::default(), &s.qkv)
    })
}

/// A layer that the host's threads choose and compute by themselves.
fn leave_to_host(
    device: &Device,
    config: &ModelConfig,
    model: &Model,
    (l, layer): (usize, &Layer),
    host_x: &View,
) -> Result<(), CudaError> {
    let (s, place, counts) = (&model.scratch, (l, config.n_layers), &layer.work.counts);
    normalise(device, config, model, layer, [Some(&s.normed), Some(host_x)])?;
    ask_host(device, &model.mapped.work(), counts, &s.step, place)?;
    let (hidden, host) = (config.hidden_size, model.mapped.result());
    finish(device, &s.partial, 0, hidden, counts, layer.left_out.as_ref(), Some(&host), &s.step, place, &s.x)
}

impl Layer {
    /// Where the fused kernel finds what stands for rows that it does not read: neurons have the numbers of those behind the first
    /// ones, bundles those of the section.
    pub(super) fn sketched_rows<'a>(&self, section: &Section, s: &'a Scratch) -> SketchedRows<'a> {
        let behind = |neuron: usize| neuron as i32 - self.n_always as i32;
        SketchedRows {
            products: &s.products,
            sketched: &s.sketched,
            hot_offset: behind(section.neurons.start),
            cold_offset: behind(section.first_cold()),
        }
    }
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
    let own = before.predictor()?.of_layer(before, &model.scratch);
    let predictor = layer.predictor()?.ahead(layer, lookahead);
    let shape = |p: &LowRankPredictor<'_>| [p.input, p.factors].map(|m| (m.encoding, m.rows, m.columns));
    let (list, places) = (&lookahead.foreseen[l % 2], &lookahead.places);
    (shape(&predictor) == shape(&own)).then_some(NextLayer { layer, predictor, list, places })
}
