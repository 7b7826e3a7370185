//! The neurons of one layer, from three sources: the hot prefix in memory, the cache, the disk.

use crate::Result;
use crate::account::Account;
use crate::cache::NeuronCache;
use crate::chooser::SketchedLayer;
use crate::fetch::{DirectFile, Fetcher, LayerIndex, Run, Staged, Ticket};
use crate::ffn::{FfnSums, Span};
use crate::matrix::{Compute, Disk};
use crate::prefill::FfnBatch;
use crate::residual::with_residuals;
use crate::row_choice::RowChoice;
use crate::stream::Stream;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use thermocline_kernels::{AlignedBuf, Certificate, Kernels, LayerLayout, QuantisedInput};
use thermocline_split::{Flaw, LayerFile, Split};

/// Chunks that lie closer than this are read together: the bytes between cost less than another read.
const GAP_BYTES: u64 = 16 << 10;
/// Buffers that reading ahead by prediction leaves to reads that are certain.
const LOOKAHEAD_RESERVE: usize = 4;

/// One layer's neurons.
#[derive(Debug)]
pub(crate) struct LayerFfn {
    index: Arc<LayerIndex>,
    /// The planes' files, the base's first.
    files: Vec<Arc<DirectFile>>,
    hot: AlignedBuf,
    /// Where in `hot` bundles lie: without the room behind their streams, or residuals.
    hot_layout: LayerLayout,
    /// Of all gates, if the plan has it and the gates' magnitudes allow it.
    certificate: Option<Certificate>,
    n_hot: usize,
    has_residuals: bool,
    /// Of a bundle's bytes, how much is read: there is room behind streams.
    used_share: f64,
    n_neurons: usize,
    run_bytes: usize,
    decoded_bytes: usize,
}

/// Chunks that were asked for one layer early.
#[derive(Debug, Default)]
pub(crate) struct Foreseen {
    runs: Vec<(Range<usize>, Ticket)>,
}

impl Foreseen {
    /// Gives up on all of it.
    pub(crate) fn discard(&mut self, fetcher: &Fetcher) {
        for (_, ticket) in self.runs.drain(..) {
            fetcher.discard(ticket);
        }
    }
}

impl LayerFfn {
    /// Reads the hot prefix; `certified` asks for a certificate of the gates, which must then all be hot. With `residuals_from` all are,
    /// those from that one on as what their sketches leave of them.
    pub(crate) fn load(
        split: &Arc<Split>,
        layer: usize,
        (n_hot, residuals_from): (usize, Option<usize>),
        certified: bool,
        run_bytes: usize,
        decoded_bytes: usize,
    ) -> Result<Self> {
        let index = Arc::new(LayerIndex { split: Arc::clone(split), layer });
        let file = index.file();
        let n_neurons = file.order().len();
        let (hot, layout) = match residuals_from {
            Some(first) => read_with_residuals(split, layer, first)?,
            None => read_hot(file, n_hot)?,
        };
        let kernels = Kernels::detect();
        let gate = |n: usize, out: &mut [f32]| {
            let (of, bundle) = (layout.of(n), layout.bundle(&hot, 0, n));
            kernels.unpack(of.encoding(), of.row(bundle, 0), out);
        };
        let certificate = if certified { Certificate::new(n_neurons, layout.hidden_size(), gate)? } else { None };
        let files = file.paths().map(|path| Ok(Arc::new(DirectFile::open(path)?))).collect::<Result<_>>()?;
        let padded = file.bundles().offset(n_hot).max(1);
        let has_room = n_hot > 0 && residuals_from.is_none();
        let used_share = if has_room { layout.offset(n_hot) as f64 / padded as f64 } else { 1.0 };
        Ok(Self {
            files,
            hot,
            hot_layout: layout,
            certificate,
            n_hot,
            has_residuals: residuals_from.is_some(),
            used_share,
            n_neurons,
            run_bytes,
            decoded_bytes,
            index,
        })
    }

    /// Whether reads bypass the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.files.iter().all(|file| file.is_direct())
    }

    /// Where the bundles lie that are read from disk, all of them put together; those in memory, if some are residuals, of which
    /// none is read from disk.
    pub(crate) fn layout(&self) -> &LayerLayout {
        if self.has_residuals { &self.hot_layout } else { self.index.file().bundles() }
    }

    /// The first flaw among the hot bundles.
    pub(crate) fn flaw(&self) -> Option<Flaw> {
        self.index.file().flaw_in(&self.hot_layout, 0, self.hot_bytes())
    }

    /// What is read of so many bytes of bundles.
    fn used(&self, bytes: u64) -> u64 {
        (bytes as f64 * self.used_share).round() as u64
    }

    /// The hot bundles.
    pub(crate) fn hot_bytes(&self) -> &[u8] {
        &self.hot[..if self.n_hot == 0 { 0 } else { self.hot_layout.offset(self.n_hot) }]
    }

    /// All cold chunks, in runs that fit a buffer.
    pub(crate) fn cold_runs(&self) -> Vec<Run> {
        let n_chunks = self.index.file().n_chunks();
        let mut runs = Vec::new();
        let mut start = self.n_hot.div_ceil(self.index.file().chunk_neurons());
        while start < n_chunks {
            let end = self.fit(start, n_chunks);
            runs.push(self.index.run(&self.files, start..end));
            start = end;
        }
        runs
    }

    /// The end of the longest run from chunk `start` that fits a buffer.
    fn fit(&self, start: usize, limit: usize) -> usize {
        let (mut stored, mut end) = (0, start);
        while end < limit {
            stored += self.index.file().stored_bytes(end..end + 1) as usize;
            let decoded = self.index.bundle_bytes(start..end + 1);
            if end > start && (stored > self.run_bytes || (self.decoded_bytes > 0 && decoded > self.decoded_bytes)) {
                break;
            }
            end += 1;
        }
        end
    }

    /// The sums of `FFN(x)` for one token, every neuron.
    pub(crate) fn exact(
        &self,
        compute: &mut Compute,
        mut disk: Option<&mut Disk<'_>>,
        account: &mut Account,
        sums: &mut FfnSums,
        input: &mut QuantisedInput,
        x: &[f32],
    ) -> Result<()> {
        account.neurons_computed += self.n_neurons as u64;
        account.neurons_total += self.n_neurons as u64;
        sums.start(&compute.kernels, self.layout(), x);
        let bytes = self.hot_bytes();
        let hot = match &self.certificate {
            Some(certificate) if sums.skip_zeros && input.set(x) => Span::Certified { bytes, certificate, input },
            _ => Span::Contiguous { first: 0, bytes },
        };
        let hot = sums.add(&compute.kernels, &mut compute.pool, &self.hot_layout, hot);
        account.bytes.host += self.used(hot);
        let mut first = self.n_hot;
        while first < self.n_neurons {
            let Some(disk) = disk.as_mut() else { unreachable!("cold neurons without a stream") };
            let staged = self.take(disk, account)?;
            let span = Span::Contiguous { first, bytes: staged.bytes() };
            sums.add(&compute.kernels, &mut compute.pool, self.layout(), span);
            first += self.layout().n_in(first, staged.bytes().len());
            disk.fetcher.release(staged);
        }
        Ok(())
    }

    /// `y += FFN(x)` for a batch of tokens, every neuron; the `sketch` of those whose rows are residuals.
    pub(crate) fn batch(
        &self,
        compute: &mut Compute,
        mut disk: Option<&mut Disk<'_>>,
        account: &mut Account,
        batch: &mut FfnBatch,
        sketch: Option<&SketchedLayer>,
        (x, y): (&[f32], &mut [f32]),
    ) -> Result<()> {
        account.bytes.host += self.hot_bytes().len() as u64;
        batch.add(compute, &self.hot_layout, sketch, x, self.hot_bytes(), y);
        let mut first = self.n_hot;
        while first < self.n_neurons {
            let Some(disk) = disk.as_mut() else { unreachable!("cold neurons without a stream") };
            let staged = self.take(disk, account)?;
            batch.add(compute, self.layout(), None, x, staged.bytes(), y);
            first += self.layout().n_in(first, staged.bytes().len());
            disk.fetcher.release(staged);
        }
        Ok(())
    }

    /// Shows `see` every neuron's bundle, in order and in pieces: where the bundles of a piece lie, its first neuron, its bytes.
    /// What is cold is read for this alone, whatever the cache holds, through the free buffers of `fetcher`, and counts in no
    /// account.
    pub(crate) fn for_all(
        &self,
        fetcher: Option<&Fetcher>,
        see: &mut dyn FnMut(&LayerLayout, usize, &[u8]),
    ) -> Result<()> {
        see(&self.hot_layout, 0, self.hot_bytes());
        let Some(fetcher) = fetcher.filter(|_| self.n_hot < self.n_neurons) else { return Ok(()) };
        let mut stream = Stream::once(self.cold_runs());
        let mut first = self.n_hot;
        while first < self.n_neurons {
            let staged = match stream.take(fetcher) {
                Ok(staged) => staged,
                Err(e) => {
                    stream.rewind(fetcher);
                    return Err(e);
                }
            };
            see(self.layout(), first, staged.bytes());
            first += self.layout().n_in(first, staged.bytes().len());
            fetcher.release(staged);
        }
        Ok(())
    }

    fn take(&self, disk: &mut Disk<'_>, account: &mut Account) -> Result<Staged> {
        let begin = Instant::now();
        let staged = disk.stream.take(disk.fetcher)?;
        account.disk_wait += begin.elapsed();
        account.bytes.disk += staged.bytes().len() as u64;
        Ok(staged)
    }

    /// Cold chunks that hold at least one of `active` (ascending) and none of whose needed neurons could be skipped.
    fn missing_chunks(&self, layer: usize, active: &[u32], cache: &NeuronCache) -> Vec<usize> {
        let chunk_neurons = self.index.file().chunk_neurons();
        let mut chunks = Vec::new();
        for &n in active {
            let n = n as usize;
            let chunk = n / chunk_neurons;
            if n >= self.n_hot && chunks.last() != Some(&chunk) && !cache.contains(layer, n) {
                chunks.push(chunk);
            }
        }
        chunks
    }

    /// Joins near chunks to runs that fit a buffer and do not reach across a run that is `taken`.
    fn runs_of(&self, chunks: &[usize], taken: &[(Range<usize>, Ticket)]) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &c in chunks {
            if let Some(last) = runs.last_mut() {
                let gap = self.index.file().stored_bytes(last.end..c);
                let apart = taken.iter().any(|(t, _)| (last.end..c).contains(&t.start));
                if !apart && gap <= GAP_BYTES && self.fit(last.start, c + 1) == c + 1 {
                    last.end = c + 1;
                    continue;
                }
            }
            runs.push(c..c + 1);
        }
        runs
    }

    /// Starts reading what `active`, a guess made one layer early, will need, as far as buffers are free.
    pub(crate) fn foresee(
        &self,
        fetcher: &Fetcher,
        cache: &NeuronCache,
        account: &mut Account,
        active: &[u32],
    ) -> Foreseen {
        let mut foreseen = Foreseen::default();
        for run in self.runs_of(&self.missing_chunks(self.index.layer, active, cache), &[]) {
            if fetcher.n_free() <= LOOKAHEAD_RESERVE {
                break;
            }
            let Some(ticket) = fetcher.try_submit(&self.index.run(&self.files, run.clone())) else { break };
            account.foreseen += run.len() as u64;
            foreseen.runs.push((run, ticket));
        }
        foreseen
    }

    /// The sums of `FFN(x)` for one token, only the neurons in `active` (ascending), and of these only the rows that are chosen, if
    /// rows are.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn sparse(
        &self,
        compute: &mut Compute,
        fetcher: Option<&Fetcher>,
        account: &mut Account,
        sums: &mut FfnSums,
        cache: &mut NeuronCache,
        mut foreseen: Foreseen,
        active: &[u32],
        choice: Option<RowChoice<'_>>,
        x: &[f32],
    ) -> Result<()> {
        let layer = self.index.layer;
        sums.start(&compute.kernels, self.layout(), x);
        let n_rows = |&n: &u32| choice.map_or(3, |rows| u64::from(rows.of(n as usize).rows.count_ones()));
        account.neurons_computed += active.iter().map(n_rows).sum::<u64>() / 3;
        account.neurons_total += self.n_neurons as u64;
        let missing = self.missing_chunks(layer, active, cache);
        let Some(fetcher) = fetcher.filter(|_| !missing.is_empty() || !foreseen.runs.is_empty()) else {
            self.add_span(compute, account, sums, cache, None, active, choice);
            return Ok(());
        };
        // What was foreseen and is needed comes first in line; the rest is asked for now, in order.
        let covered = |c: usize, runs: &[(Range<usize>, Ticket)]| runs.iter().any(|(r, _)| r.contains(&c));
        let (useful, useless): (Vec<_>, Vec<_>) =
            foreseen.runs.drain(..).partition(|(r, _)| missing.iter().any(|c| r.contains(c)));
        let late: Vec<usize> = missing.iter().copied().filter(|&c| !covered(c, &useful)).collect();
        account.foreseen_used += (missing.len() - late.len()) as u64;
        let mut runs: Vec<(Range<usize>, Option<Ticket>)> =
            self.runs_of(&late, &useful).into_iter().map(|r| (r, None)).collect();
        runs.extend(useful.into_iter().map(|(r, t)| (r, Some(t))));
        runs.sort_by_key(|(r, _)| r.start);

        let chunk_neurons = self.index.file().chunk_neurons();
        let (mut rest, mut submitted) = (active, 0);
        for r in 0..runs.len() {
            // Keep as many reads under way as there are buffers, in the order in which they are used.
            submitted = submitted.max(r);
            while submitted < runs.len() {
                let (range, ticket) = &mut runs[submitted];
                if ticket.is_none() {
                    *ticket = fetcher.try_submit(&self.index.run(&self.files, range.clone()));
                    if ticket.is_none() {
                        break;
                    }
                }
                submitted += 1;
            }
            let (range, ticket) = runs[r].clone();
            let begin = Instant::now();
            let ticket = match ticket {
                Some(ticket) => ticket,
                None => loop {
                    if let Some(ticket) = fetcher.try_submit(&self.index.run(&self.files, range.clone())) {
                        break ticket;
                    }
                    std::thread::yield_now();
                },
            };
            let staged = match fetcher.wait(ticket) {
                Ok(staged) => staged,
                Err(e) => {
                    runs[r + 1..].iter().filter_map(|(_, t)| *t).for_each(|t| fetcher.discard(t));
                    useless.into_iter().for_each(|(_, t)| fetcher.discard(t));
                    return Err(e);
                }
            };
            account.disk_wait += begin.elapsed();
            account.bytes.disk += staged.bytes().len() as u64;
            // Everything before the next run's first neuron can be computed now.
            let frontier = runs.get(r + 1).map_or(self.n_neurons, |(next, _)| next.start * chunk_neurons);
            let (now, later) = rest.split_at(rest.partition_point(|&n| (n as usize) < frontier));
            rest = later;
            let first = range.start * chunk_neurons;
            self.add_span(compute, account, sums, cache, Some((first, staged.bytes())), now, choice);
            fetcher.release(staged);
        }
        if !rest.is_empty() {
            self.add_span(compute, account, sums, cache, None, rest, choice);
        }
        // Every buffer comes back, whatever happened to one of the reads.
        let mut result = Ok(());
        for (_, ticket) in useless {
            match fetcher.wait(ticket) {
                Ok(staged) => {
                    account.bytes.disk += staged.bytes().len() as u64;
                    fetcher.release(staged);
                }
                Err(e) => result = Err(e),
            }
        }
        result
    }

    /// Computes neurons that are hot, cached, or in `staged` (first neuron, bundles); caches those from the disk.
    #[allow(clippy::too_many_arguments)]
    fn add_span(
        &self,
        compute: &mut Compute,
        account: &mut Account,
        sums: &mut FfnSums,
        cache: &mut NeuronCache,
        staged: Option<(usize, &[u8])>,
        active: &[u32],
        choice: Option<RowChoice<'_>>,
    ) {
        let (layer, layout) = (self.index.layer, self.layout());
        let mut from_disk = Vec::new();
        let mut list: Vec<(u32, &[u8])> = Vec::with_capacity(active.len());
        let (mut hits, mut cached_bytes, mut hot_bytes) = (0, 0, 0);
        for &n in active {
            let at = n as usize;
            let n_rows = choice.map_or(3, |rows| rows.of(at).rows.count_ones());
            let bytes = layout.of(at).bundle_bytes() as u64 * u64::from(n_rows) / 3;
            let bundle = if at < self.n_hot {
                hot_bytes += bytes;
                self.hot_layout.bundle(&self.hot, 0, at)
            } else if let Some(bundle) = cache.get(layer, at) {
                hits += 1;
                cached_bytes += bytes;
                bundle
            } else {
                from_disk.push(n);
                let (first, staged) = staged.unwrap_or((0, &[]));
                layout.bundle(staged, first, at)
            };
            list.push((n, bundle));
        }
        let span = choice.map_or(Span::Listed(&list), |rows| Span::Rows(&list, rows));
        sums.add(&compute.kernels, &mut compute.pool, layout, span);
        account.cache_hits += hits;
        account.bytes.cache += self.used(cached_bytes);
        account.bytes.host += self.used(hot_bytes);
        account.cache_misses += from_disk.len() as u64;
        active.iter().filter(|&&n| n as usize >= self.n_hot).for_each(|&n| cache.touch(layer, n as usize));
        if let Some((first, staged)) = staged {
            for n in from_disk {
                cache.insert(layer, n as usize, layout.bundle(staged, first, n as usize));
            }
        }
    }
}

/// The first `n` bundles of a layer, one behind the other without the room behind their streams, and where they lie; as all
/// bundles of the layer if `n` is 0.
fn read_hot(file: &LayerFile, n: usize) -> Result<(AlignedBuf, LayerLayout)> {
    let (layout, chunks) = (file.bundles(), 0..n.div_ceil(file.chunk_neurons()));
    let mut hot = AlignedBuf::zeroed(file.trimmed_bytes(chunks.clone()))?;
    if layout.within(0..n).all(|(_, section)| !section.bundles().encoding().has_stream()) {
        file.read_chunks(chunks, &mut hot[..layout.offset(n)])?;
        return Ok((hot, layout.clone()));
    }
    // A chunk at a time: there must be no second copy of the layer.
    let (mut read, mut lengths, mut at) = (Vec::new(), Vec::with_capacity(n), 0);
    for c in chunks {
        let neurons = file.neurons(c..c + 1);
        read.resize(layout.bytes(neurons.clone()), 0);
        file.read_chunks(c..c + 1, &mut read)?;
        for neuron in neurons.clone() {
            let bundle = layout.bundle(&read, neurons.start, neuron);
            let length = layout.of(neuron).trimmed_bytes(bundle);
            hot[at..at + length].copy_from_slice(&bundle[..length]);
            lengths.push(length);
            at += length;
        }
    }
    let trimmed = layout.trimmed(&lengths).unwrap_or_else(|| layout.clone());
    Ok((hot, trimmed))
}

/// A layer's first `n_always` bundles, and what sketches leave of the others; where they lie.
fn read_with_residuals(split: &Split, layer: usize, n_always: usize) -> Result<(AlignedBuf, LayerLayout)> {
    let file = &split.layers()[layer];
    let layout = with_residuals(file, n_always);
    let (always, end) = (layout.offset(n_always), layout.offset(layout.n_neurons()));
    let mut hot = AlignedBuf::zeroed(end)?;
    // Whole chunks, of which the last may have neurons that are not always computed.
    let chunks = 0..n_always.div_ceil(file.chunk_neurons());
    let mut whole = vec![0; file.bundles().bytes(file.neurons(chunks.clone()))];
    file.read_chunks(chunks, &mut whole)?;
    hot[..always].copy_from_slice(&whole[..always]);
    split.read_residuals(layer, n_always, &mut hot[always..end])?;
    Ok((hot, layout))
}
