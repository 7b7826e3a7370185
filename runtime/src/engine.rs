//! The token engine: tokens in, logits out.

use crate::account::Account;
use crate::attention::{Rope, attend_batch, attend_one};
use crate::audit::{Audit, AuditReport, InMemoryAndOnDisk, check_audit};
use crate::cache::NeuronCache;
use crate::chooser::{Chooser, Judgement, check_max_error, chosen_active, has_sketches};
use crate::divide::slot_bytes;
use crate::fetch::{DirectFile, Fetcher};
use crate::ffn::FfnSums;
use crate::kv::KvCache;
use crate::layer_active::LayerActive;
use crate::layer_ffn::{Foreseen, LayerFfn};
use crate::matrix::{Compute, Matrix};
use crate::plan::{Mode, Plan, decoded_bytes, n_parts, sketched_neurons};
use crate::prefill::FfnBatch;
use crate::row_choice::LeftToSketch;
use crate::stream::{Stream, Streams};
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Duration;
use thermocline_datasets::ModelConfig;
use thermocline_kernels::{Kernels, Pool, QuantisedInput, ops};
use thermocline_split::{Flaw, Split};

/// Norms and biases of one layer.
#[derive(Debug)]
struct LayerVectors {
    input_norm: Vec<f32>,
    ffn_norm: Vec<f32>,
    /// q, k, v, if the family has them.
    biases: Option<[Vec<f32>; 3]>,
}

/// A loaded model with one sequence's state.
pub struct Engine {
    split: Arc<Split>,
    config: ModelConfig,
    plan: Plan,
    compute: Compute,
    vectors: Vec<LayerVectors>,
    final_norm: Vec<f32>,
    embedding: Matrix,
    /// `None` if the embedding is the head.
    lm_head: Option<Matrix>,
    /// q, k, v, o of each layer.
    attention: Vec<[Matrix; 4]>,
    ffn: Vec<LayerFfn>,
    /// In sparse mode.
    choosers: Vec<Chooser>,
    /// What sketches may lose of a layer's output, as a share; `None`: whatever the share of the neurons leaves.
    max_error: Option<f32>,
    /// In sparse mode: what is computed of each layer.
    layers_active: Vec<LayerActive>,
    cache: NeuronCache,
    /// `None` if everything is in memory.
    streams: Option<Streams>,
    kv: KvCache,
    rope: Rope,
    sums: FfnSums,
    quantised: QuantisedInput,
    batch: FfnBatch,
    /// The neurons that the last layer computed for the last decoded token, ascending.
    active: Vec<u32>,
    account: Account,
    /// In sparse mode, if asked for.
    audit: Option<Audit>,
    flaws: Vec<Flaw>,
}

/// Which positions' logits a forward pass returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// The last token's, `[vocab]`.
    Last,
    /// Every token's, `[n_tokens, vocab]`.
    All,
}

impl Engine {
    /// Loads what `plan` keeps in memory. `progress(done, total)` counts layers.
    ///
    /// # Errors
    /// If a file cannot be read or is damaged, or the system refuses the memory or the threads ([`Error::OutOfMemory`],
    /// [`Error::Threads`], [`Error::Readers`]).
    pub fn load(split: Split, plan: Plan, progress: &dyn Fn(usize, usize)) -> Result<Self> {
        let split = Arc::new(split);
        let config = split.manifest().config.clone();
        let run_bytes = plan.staging.run_bytes;
        let decoded = decoded_bytes(&split, run_bytes);
        let resident = split.resident();
        let matrices = split.matrices()?;
        let mut resident_files = vec![Arc::new(DirectFile::open(resident.path())?)];
        if let Some((file, _)) = matrices.iter().find_map(|m| m.planes().get(1)) {
            resident_files.push(Arc::new(DirectFile::open(file.path())?));
        }
        let matrix = |name: &str, shape: (usize, usize)| -> Result<Matrix> {
            let missing = || misfit(&split, name, "the tensor is missing".to_owned());
            let placed = matrices.iter().zip(&plan.pinned_rows).find(|(m, _)| m.entry().name == name);
            let (matrix, &rows) = placed.ok_or_else(missing)?;
            let entry = matrix.entry();
            if (entry.rows, entry.columns) != shape {
                return Err(misfit(&split, name, format!("[{}, {}], expected {shape:?}", entry.rows, entry.columns)));
            }
            Matrix::load(&split, matrix, rows, run_bytes)
        };
        let vector = |name: &str, n: usize| -> Result<Vec<f32>> {
            let v = split.vector(name)?;
            if v.len() == n { Ok(v) } else { Err(misfit(&split, name, format!("{} values, expected {n}", v.len()))) }
        };
        let (hidden, q_width) = (config.hidden_size, config.n_heads * config.head_dim);
        let kv_width = config.n_kv_heads * config.head_dim;
        let mut vectors = Vec::with_capacity(config.n_layers);
        let mut attention = Vec::with_capacity(config.n_layers);
        let mut ffn = Vec::with_capacity(config.n_layers);
        let mut choosers = Vec::new();
        let layers_active = match plan.request.mode {
            Mode::Exact => Vec::new(),
            Mode::Sparse { active } => chosen_active(&split, active, plan.always_neurons)?,
        };
        for l in 0..config.n_layers {
            progress(l, config.n_layers);
            let name = |rest: &str| format!("model.layers.{l}.{rest}");
            let biases = if config.qkv_bias {
                Some([
                    vector(&name("self_attn.q_proj.bias"), q_width)?,
                    vector(&name("self_attn.k_proj.bias"), kv_width)?,
                    vector(&name("self_attn.v_proj.bias"), kv_width)?,
                ])
            } else {
                None
            };
            vectors.push(LayerVectors {
                input_norm: vector(&name("input_layernorm.weight"), hidden)?,
                ffn_norm: vector(&name("post_attention_layernorm.weight"), hidden)?,
                biases,
            });
            attention.push([
                matrix(&name("self_attn.q_proj.weight"), (q_width, hidden))?,
                matrix(&name("self_attn.k_proj.weight"), (kv_width, hidden))?,
                matrix(&name("self_attn.v_proj.weight"), (kv_width, hidden))?,
                matrix(&name("self_attn.o_proj.weight"), (hidden, q_width))?,
            ]);
            let certified = plan.certificate_bytes > 0;
            let residuals_from = plan.residuals.then_some(plan.always_neurons);
            let neurons = (plan.hot_neurons[l], residuals_from);
            ffn.push(LayerFfn::load(&split, l, neurons, certified, run_bytes, decoded)?);
            if let Some(active) = layers_active.get(l) {
                let on_disk = plan.hot_neurons[l] < config.intermediate_size;
                choosers.push(Chooser::load(&split, l, plan.always_neurons, active, on_disk)?);
            }
        }
        let vocab = (config.vocab_size, hidden);
        let embedding = matrix("model.embed_tokens.weight", vocab)?;
        let lm_head = if config.tie_word_embeddings { None } else { Some(matrix("lm_head.weight", vocab)?) };
        let final_norm = vector("model.norm.weight", hidden)?;
        progress(config.n_layers, config.n_layers);

        let loaded = attention.iter().flatten().chain([&embedding]).chain(&lm_head);
        let flaws = loaded.map(Matrix::flaw).chain(ffn.iter().map(LayerFfn::flaw));
        let flaws = flaws.flatten().collect();

        let (mut dense, mut sparse) = (Vec::new(), Vec::new());
        for (matrices, neurons) in attention.iter().zip(&ffn) {
            for m in matrices {
                dense.extend(m.runs(&resident_files));
                sparse.extend(m.runs(&resident_files));
            }
            dense.extend(neurons.cold_runs());
        }
        let head = lm_head.as_ref().unwrap_or(&embedding);
        dense.extend(head.runs(&resident_files));
        sparse.extend(head.runs(&resident_files));
        let staging = plan.staging;
        let streams = if plan.streams() {
            let fetcher = Fetcher::new(staging.n_readers, staging.n_buffers, run_bytes, n_parts(&split), decoded)?;
            Some(Streams::new(fetcher, Stream::new(dense, 0), Stream::new(sparse, staging.n_buffers / 2)))
        } else {
            None
        };
        let (bundle, n) = (slot_bytes(&split, &plan.hot_neurons), config.intermediate_size);
        Ok(Self {
            compute: Compute { kernels: Kernels::detect(), pool: Pool::new(plan.request.n_threads)? },
            vectors,
            final_norm,
            embedding,
            lm_head,
            attention,
            ffn,
            choosers,
            max_error: None,
            layers_active,
            cache: NeuronCache::new(plan.cache_slots, bundle, config.n_layers, n)?,
            streams,
            kv: KvCache::new(&config, plan.request.context),
            rope: Rope::new(&config, plan.request.context),
            sums: FfnSums::new(hidden, config.activation, n),
            quantised: QuantisedInput::default(),
            batch: FfnBatch::new(hidden, config.activation, n),
            active: Vec::new(),
            account: Account::default(),
            audit: None,
            flaws,
            plan,
            config,
            split,
        })
    }

    /// What is where.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The split that it was loaded from.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// Weights in memory that no sound model has, at most one a tensor or layer. What is read from disk later is not
    /// looked at; [`Split::check_weights`] looks at everything.
    pub fn flaws(&self) -> &[Flaw] {
        &self.flaws
    }

    /// What it cost so far.
    pub fn account(&self) -> Account {
        self.account
    }

    /// The neurons of the last layer that the last token decoded in sparse mode computed, ascending; for comparison with
    /// another engine.
    pub fn last_active(&self) -> &[u32] {
        &self.active
    }

    /// From now on audits the first token that is decoded and every one `every` tokens after it; never if `every` is 0. What
    /// earlier audits found is forgotten. Audits change no bit of what is computed, and nothing of the account.
    ///
    /// # Errors
    /// If the plan is not for sparse mode: exact mode chooses nothing.
    pub fn start_audit(&mut self, every: usize) -> Result<()> {
        check_audit(every, self.plan.request.mode)?;
        self.audit = (every > 0).then(|| Audit::new(&self.config, every));
        Ok(())
    }

    /// From now on sparse mode computes no more neurons of a layer than leave an expected error of `error` (above 0 and below 1),
    /// the root of the squared errors' sum over that of the energies; never more than the plan's share.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are no sketches to tell errors, rows are chosen by thresholds, or the number is out of range.
    pub fn limit_error(&mut self, error: f32) -> Result<()> {
        let plan = &self.plan;
        let has_sketches = has_sketches(&self.split);
        check_max_error(error, plan.request.mode, has_sketches, plan.always_neurons, &self.layers_active)?;
        self.max_error = Some(error);
        Ok(())
    }

    /// What audits found since they were started; `None` if they were not.
    pub fn audit(&self) -> Option<AuditReport> {
        self.audit.as_ref().map(Audit::report)
    }

    /// What audits took since they were started.
    pub fn audit_time(&self) -> Duration {
        self.audit.as_ref().map_or(Duration::ZERO, Audit::time)
    }

    /// Tokens in the context.
    pub fn len(&self) -> usize {
        self.kv.len()
    }

    /// Whether the context is empty.
    pub fn is_empty(&self) -> bool {
        self.kv.len() == 0
    }

    /// Whether reads from disk bypass the page cache; if not, the budget bounds this process but not the system.
    pub fn reads_are_direct(&self) -> bool {
        self.ffn.iter().all(LayerFfn::is_direct)
    }

    /// Weights in memory read by all threads, in bytes a second: this machine's RAM speed for these weights (the
    /// last-level cache's, where they fit in it). Nothing is allocated for it: the budget holds while measuring.
    pub fn measure_ram_speed(&mut self) -> f64 {
        const PIECE: usize = 64 << 10;
        let matrices = self.attention.iter().flatten().chain([&self.embedding]).chain(&self.lm_head);
        let held = self.ffn.iter().map(LayerFfn::hot_bytes).chain(matrices.map(Matrix::pinned_bytes));
        let pieces: Vec<&[u8]> = held.flat_map(|bytes| bytes.chunks(PIECE)).collect();
        let total: usize = pieces.iter().map(|p| p.len()).sum();
        let mut sums = vec![0.0f32; pieces.len()];
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let begin = std::time::Instant::now();
            self.compute.pool.for_each_chunk(&mut sums, 4, |i, sums| {
                for (sum, piece) in sums.iter_mut().zip(&pieces[i * 4..]) {
                    *sum = ops::sum_bytes(piece);
                }
            });
            best = best.min(begin.elapsed().as_secs_f64());
        }
        total as f64 / best
    }

    /// The split's own files, read with this engine's readers and buffers, in bytes a second; `None` if everything is
    /// in memory.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn measure_disk_speed(&mut self) -> Result<Option<f64>> {
        let Some(streams) = &mut self.streams else { return Ok(None) };
        streams.rewind();
        let files = self.split.layers().iter().flat_map(thermocline_split::LayerFile::paths);
        crate::hardware::read_speed(files, &self.plan.staging, &streams.fetcher).map(Some)
    }

    /// Single chunks of the split's own files, scattered, read with this engine's readers and buffers, a second; `None` if
    /// everything is in memory.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn measure_disk_reads(&mut self) -> Result<Option<f64>> {
        let Some(streams) = &mut self.streams else { return Ok(None) };
        streams.rewind();
        crate::hardware::read_rate(&self.split, &streams.fetcher).map(Some)
    }

    /// Whether decoding leaves out neurons that are exactly zero (the default) or computes them too, for comparison.
    /// The logits are the same.
    pub fn skip_zeros(&mut self, skip: bool) {
        self.sums.skip_zeros = skip;
    }

    /// Forgets the sequence.
    pub fn clear(&mut self) {
        self.kv.clear();
    }

    /// Appends a prompt, in batches, and returns its last token's logits. Prompts are computed densely in either mode:
    /// they touch nearly every neuron, and a mask here would change every later token.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn prefill(&mut self, prompt: &[u32]) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        for batch in prompt.chunks(self.plan.request.batch.max(1)) {
            logits = self.checked_pass(batch, Logits::Last, false)?;
        }
        Ok(logits)
    }

    /// Appends `tokens` to the sequence and returns logits. One token is decoded, in the plan's mode; several are
    /// computed densely, as a prompt is.
    ///
    /// # Errors
    /// If the context is full, a token is not in the vocabulary, or the disk fails; the sequence is then as before.
    pub fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let is_sparse = tokens.len() == 1 && self.plan.request.mode != Mode::Exact;
        self.checked_pass(tokens, logits, is_sparse)
    }

    fn checked_pass(&mut self, tokens: &[u32], logits: Logits, is_sparse: bool) -> Result<Vec<f32>> {
        if tokens.len() > self.kv.capacity() - self.kv.len() {
            let prompt_tokens = self.kv.len() + tokens.len();
            return Err(Error::PromptTooLong { prompt_tokens, context: self.kv.capacity() });
        }
        let result = self.pass(tokens, logits, is_sparse);
        if result.is_err() {
            if let Some(streams) = &mut self.streams {
                streams.rewind();
            }
            self.batch.reset();
        }
        result
    }

    fn pass(&mut self, tokens: &[u32], logits: Logits, is_sparse: bool) -> Result<Vec<f32>> {
        let (n, hidden, past) = (tokens.len(), self.config.hidden_size, self.kv.len());
        if let Some(streams) = &mut self.streams {
            streams.begin_pass(is_sparse);
        }
        let mut x = vec![0.0; n * hidden];
        for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            self.embed(token, x)?;
        }
        let is_audited = is_sparse && self.audit.as_ref().is_some_and(Audit::is_due);
        let mut foreseen = Foreseen::default();
        let n_sketched = sketched_neurons(&self.split, &self.plan.request);
        let judgement = || Judgement::new(self.config.intermediate_size - self.plan.always_neurons, n_sketched);
        let (mut judged, mut judged_ahead) = (judgement(), judgement());
        let left = LeftToSketch::default();
        let mut active = std::mem::take(&mut self.active);
        let mut normed = vec![0.0; n * hidden];
        for l in 0..self.config.n_layers {
            if let Err(e) = self.attend(l, n, past, &mut x, &mut normed) {
                if let Some(streams) = &self.streams {
                    foreseen.discard(&streams.fetcher);
                }
                return Err(e);
            }
            self.norm(&x, &self.vectors[l].ffn_norm, &mut normed);
            let mut disk = self.streams.as_mut().map(Streams::current);
            let (compute, account) = (&mut self.compute, &mut self.account);
            if n > 1 {
                let sketch = self.choosers.get(l).and_then(Chooser::sketch);
                let io = (normed.as_slice(), x.as_mut_slice());
                self.ffn[l].batch(compute, disk.as_mut(), account, &mut self.batch, sketch, io)?;
                continue;
            }
            if !is_sparse {
                let (sums, quantised) = (&mut self.sums, &mut self.quantised);
                self.ffn[l].exact(compute, disk.as_mut(), account, sums, quantised, &normed)?;
            } else {
                let (chooser, of_layer) = (&self.choosers[l], &self.layers_active[l]);
                chooser.judge((&compute.kernels, &mut compute.pool), false, &normed, of_layer, &mut judged);
                account.bytes.host += chooser.bytes();
                chooser.choose(&judged, of_layer, self.max_error, &mut active);
                let fetcher = disk.map(|disk| disk.fetcher);
                let current = std::mem::take(&mut foreseen);
                if let (Some(fetcher), Some(next)) = (fetcher, self.choosers.get(l + 1)) {
                    // The residual stream changes little from layer to layer: the next layer's predictor, fed with
                    // this layer's input, tells most of what it will ask for while there is time to read it.
                    let mut ahead = vec![0.0; hidden];
                    ops::rms_norm(&x, &self.vectors[l + 1].ffn_norm, self.config.rms_norm_eps, &mut ahead);
                    let of_next = &self.layers_active[l + 1];
                    let mut guess = Vec::with_capacity(of_next.n_active);
                    next.judge((&compute.kernels, &mut compute.pool), true, &ahead, of_next, &mut judged_ahead);
                    account.bytes.host += next.bytes();
                    next.choose(&judged_ahead, of_next, self.max_error, &mut guess);
                    foreseen = self.ffn[l + 1].foresee(fetcher, &self.cache, account, &guess);
                }
                let (sums, cache) = (&mut self.sums, &mut self.cache);
                let rows = chooser.rows(&judged, of_layer, &left);
                let done = self.ffn[l].sparse(compute, fetcher, account, sums, cache, current, &active, rows, &normed);
                if let Err(e) = done {
                    if let Some(fetcher) = fetcher {
                        foreseen.discard(fetcher);
                    }
                    return Err(e);
                }
                let (kernels, pool) = (&compute.kernels, &mut compute.pool);
                account.bytes.host += chooser.stand_in(kernels, pool, &mut self.sums, &mut judged, &active, &left);
            }
            self.sums.finish(&mut x);
            if is_sparse {
                let left_out = &self.layers_active[l].left_out;
                x.iter_mut().zip(left_out).for_each(|(x, mean)| *x += mean);
                if let Some(audit) = self.audit.as_mut().filter(|_| is_audited) {
                    let sums = &self.sums;
                    audit.keep(l, &normed, &active, |output| {
                        sums.finish(output);
                        output.iter_mut().zip(left_out).for_each(|(y, mean)| *y += mean);
                    });
                }
            }
        }
        self.active = active;
        let out = self.head(&x, logits)?;
        if let Some(audit) = self.audit.as_mut().filter(|_| is_sparse) {
            if is_audited {
                let fetcher = self.streams.as_ref().map(|streams| &streams.fetcher);
                let neurons = InMemoryAndOnDisk { layers: &self.ffn, choosers: &self.choosers, fetcher };
                audit.run(&neurons, &mut self.compute, &mut self.sums)?;
            }
            audit.count();
        }
        self.kv.advance(n);
        Ok(out)
    }

    fn embed(&mut self, token: u32, out: &mut [f32]) -> Result<()> {
        let row = token as usize;
        if row >= self.config.vocab_size {
            return Err(crate::decoder::unknown_token(token, self.config.vocab_size));
        }
        let row_bytes = self.embedding.row_bytes() as u64;
        if self.embedding.pinned_row(&self.compute.kernels, row, out) {
            self.account.bytes.host += row_bytes;
            return Ok(());
        }
        self.account.bytes.disk += row_bytes;
        let bytes = self.split.matrix("model.embed_tokens.weight")?.read_rows(row, 1)?;
        self.embedding.unpack(&self.compute.kernels, &bytes, out);
        Ok(())
    }

    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            ops::rms_norm(x, weight, self.config.rms_norm_eps, out);
        }
    }

    /// `x += attention(norm(x))`.
    fn attend(&mut self, l: usize, n: usize, past: usize, x: &mut [f32], normed: &mut [f32]) -> Result<()> {
        self.norm(x, &self.vectors[l].input_norm, normed);
        let c = &self.config;
        let (q_width, kv_width) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let mut disk = self.streams.as_mut().map(Streams::current);
        let mut qkv = vec![0.0; n * (q_width + 2 * kv_width)];
        let [wq, wk, wv, wo] = &self.attention[l];
        let (compute, account) = (&mut self.compute, &mut self.account);
        let together = n == 1 && Matrix::apply_together([wq, wk, wv], compute, account, normed, &mut qkv);
        let (q, kv) = qkv.split_at_mut(n * q_width);
        let (k, v) = kv.split_at_mut(n * kv_width);
        for (i, (matrix, out)) in [(wq, &mut *q), (wk, &mut *k), (wv, &mut *v)].into_iter().enumerate() {
            if !together {
                matrix.apply(compute, disk.as_mut(), account, n, normed, out)?;
            }
            if let Some(biases) = &self.vectors[l].biases {
                for row in out.chunks_exact_mut(biases[i].len()) {
                    ops::axpy(1.0, &biases[i], row);
                }
            }
        }
        for t in 0..n {
            self.rope.turn(&mut q[t * q_width..(t + 1) * q_width], past + t);
            let key = &mut k[t * kv_width..(t + 1) * kv_width];
            self.rope.turn(key, past + t);
            self.kv.write(l, false, past + t, key);
            self.kv.write(l, true, past + t, &v[t * kv_width..(t + 1) * kv_width]);
        }
        let mut mixed = vec![0.0; n * q_width];
        let pool = &mut self.compute.pool;
        if n == 1 {
            attend_one(c, pool, &self.kv, l, past + 1, q, &mut mixed);
        } else {
            attend_batch(c, pool, &self.kv, l, past, n, q, &mut mixed);
        }
        wo.apply(&mut self.compute, disk.as_mut(), &mut self.account, n, &mixed, normed)?;
        ops::axpy(1.0, normed, x);
        Ok(())
    }

    fn head(&mut self, x: &[f32], logits: Logits) -> Result<Vec<f32>> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let x = if logits == Logits::Last { &x[x.len() - hidden..] } else { x };
        let mut normed = vec![0.0; x.len()];
        self.norm(x, &self.final_norm, &mut normed);
        let n = x.len() / hidden;
        let mut out = vec![0.0; n * vocab];
        let mut disk = self.streams.as_mut().map(Streams::current);
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        head.apply(&mut self.compute, disk.as_mut(), &mut self.account, n, &normed, &mut out)?;
        Ok(out)
    }
}

fn misfit(split: &Split, name: &str, reason: String) -> Error {
    let path = split.resident().path().to_owned();
    thermocline_split::Error::Corrupt { path, field: name.to_owned(), reason }.into()
}
