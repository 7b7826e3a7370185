//! One token's feed-forward layer, neuron by neuron, from bundles wherever they lie.
//!
//! Neurons are summed within blocks of fixed boundaries, ascending, and blocks are added in order: the result is the
//! same to the last bit for any number of threads and for any division of the neurons between memory and disk.

#[cfg(feature = "cuda")]
use crate::row_choice::HostList;
use crate::row_choice::{RowChoice, RowsOfNeuron};
use std::ops::Range;
use std::sync::PoisonError;
#[cfg(feature = "cuda")]
use std::sync::atomic::AtomicU32;
use std::sync::atomic::{AtomicU64, Ordering};
use thermocline_datasets::Activation;
use thermocline_kernels::{
    BundleLayout, CERTIFIED_ROWS, Certificate, Encoding, Kernels, LayerLayout, PREFETCH_BYTES, Pool, PreparedInput,
    QuantisedInput, SketchMatrix, prefetch,
};
use thermocline_split::{ALL_ROWS, DOWN_ROW, GATE_ROW, UP_ROW};

/// Blocks per layer, about: enough for the threads of a desktop, few enough that adding them up costs nothing.
const BLOCKS: usize = 24;

/// Neurons whose weights one task computes.
const WEIGHED: usize = 32;

/// Gates that are computed together before any other row of these neurons is touched.
const GATES: usize = 4;

/// Neurons that go through one step (certificate, first row, second row) before any of them goes through the next: what a
/// step shows to be needed is on its way while the others go through it.
const JUDGED: usize = 4 * CERTIFIED_ROWS;

/// Neurons not certified whose first rows are asked for before they are multiplied.
const OPEN_AHEAD: usize = 8;

/// The running sums of one layer for one token.
#[derive(Debug)]
pub(crate) struct FfnSums {
    /// Leave a neuron when its gate shows that it is zero, and its down row unread when h is zero.
    pub(crate) skip_zeros: bool,
    activation: Activation,
    block_neurons: usize,
    hidden_size: usize,
    input: PreparedInput,
    /// `[n_blocks, hidden_size]`.
    partials: Vec<f32>,
}

/// Neurons that can be computed now, ascending.
#[derive(Clone, Copy)]
pub(crate) enum Span<'a> {
    /// All neurons from `first` on whose bundles `bytes` holds.
    Contiguous { first: usize, bytes: &'a [u8] },
    /// All neurons of the layer, with a proof for most of those whose gates are not positive.
    Certified { bytes: &'a [u8], certificate: &'a Certificate, input: &'a QuantisedInput },
    /// Single neurons and their bundles.
    Listed(&'a [(u32, &'a [u8])]),
    /// Single rows of them.
    Rows(&'a [(u32, &'a [u8])], RowChoice<'a>),
}

impl FfnSums {
    pub(crate) fn new(hidden_size: usize, activation: Activation, n_neurons: usize) -> Self {
        let block_neurons = n_neurons.div_ceil(BLOCKS).next_multiple_of(32);
        let partials = vec![0.0; n_neurons.div_ceil(block_neurons) * hidden_size];
        let input = PreparedInput::default();
        Self { skip_zeros: true, activation, block_neurons, hidden_size, input, partials }
    }

    /// Memory that the sums and their input take.
    pub(crate) fn bytes(&self) -> u64 {
        4 * self.partials.len() as u64 + PreparedInput::bytes(self.hidden_size)
    }

    /// Starts a new layer, whose bundles are laid out so and whose input is `x`.
    pub(crate) fn start(&mut self, kernels: &Kernels, layout: &LayerLayout, x: &[f32]) {
        kernels.prepare(input_encoding(layout), x, &mut self.input);
        self.partials.fill(0.0);
    }

    /// Adds the neurons of `span`, whose numbers must be above those of all earlier spans of this layer, and returns
    /// the bytes of the rows that were read. Neurons with `h == 0` add nothing and their down rows are not read; where
    /// a gate that is not positive makes h zero, the up rows are not read either.
    /// `layout` says where the bundles lie; those of single neurons are laid out as it says.
    pub(crate) fn add(&mut self, kernels: &Kernels, pool: &mut Pool, layout: &LayerLayout, span: Span<'_>) -> u64 {
        let (first, end) = match span {
            Span::Contiguous { first, bytes } => (first, first + layout.n_in(first, bytes.len())),
            Span::Certified { .. } => (0, layout.n_neurons()),
            Span::Listed([]) | Span::Rows([], _) => return 0,
            Span::Listed(list) | Span::Rows(list, _) => (list[0].0 as usize, list[list.len() - 1].0 as usize + 1),
        };
        if first == end {
            return 0;
        }
        let (activation, skip_zeros, block_neurons) = (self.activation, self.skip_zeros, self.block_neurons);
        let from = layout.offset(first);
        let (first_block, end_block) = (first / block_neurons, end.div_ceil(block_neurons));
        let x = &self.input;
        let partials = &mut self.partials[first_block * self.hidden_size..end_block * self.hidden_size];
        let (thirds, certificate_bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        pool.for_each_chunk(partials, self.hidden_size, |b, sums| {
            let start = (first_block + b) * block_neurons;
            let mut block = Block::new(kernels, *layout.of(start.max(first)), activation, skip_zeros, x, sums);
            for (neurons, section) in layout.within(start.max(first)..(start + block_neurons).min(end)) {
                block.begin(section.bundles());
                match span {
                    Span::Contiguous { bytes, .. } => {
                        block.add_all(neurons.len(), |i| section.bundle(bytes, from, neurons.start + i));
                    }
                    Span::Certified { bytes, certificate, input } => {
                        let judged =
                            block.add_certified(neurons, certificate, input, |n| section.bundle(bytes, from, n));
                        certificate_bytes.fetch_add(judged, Ordering::Relaxed);
                    }
                    Span::Listed(list) => {
                        let mine = among(list, neurons);
                        block.add_all(mine.len(), |i| mine[i].1);
                    }
                    Span::Rows(list, choice) => {
                        let mine = among(list, neurons);
                        let of = |i: usize| (mine[i].1, choice.of(mine[i].0 as usize));
                        let mut of_block = Vec::new();
                        block.add_rows(mine.len(), of, |i, h| of_block.push((mine[i].0, h)));
                        choice.left.lock().unwrap_or_else(PoisonError::into_inner).append(&mut of_block);
                    }
                }
            }
            thirds.fetch_add(block.finish(), Ordering::Relaxed);
        });
        thirds.into_inner() / 3 + certificate_bytes.into_inner()
    }

    /// |h| * ||d|| of the neurons from `first` on whose bundles `bytes` holds, for the input that the layer was started with,
    /// into `out`, one for each of them. The sums stay as they are.
    pub(crate) fn weights(
        &self,
        kernels: &Kernels,
        pool: &mut Pool,
        layout: &LayerLayout,
        first: usize,
        bytes: &[u8],
        out: &mut [f32],
    ) {
        pool.for_each_chunk(out, WEIGHED, |task, out| {
            let mut down = vec![0.0; self.hidden_size];
            for (out, n) in out.iter_mut().zip(first + task * WEIGHED..) {
                let (of, bundle) = (layout.of(n), layout.bundle(bytes, first, n));
                let (g, u) = kernels.pre_activations(of, bundle, &self.input, &[]);
                kernels.unpack(of.encoding(), of.row(bundle, 2), &mut down);
                let square = down.iter().map(|&d| f64::from(d) * f64::from(d)).sum::<f64>();
                *out = self.activation.apply(g, u).abs() * square.sqrt() as f32;
            }
        });
    }

    /// Adds the down rows of a sketch of the neurons from `first` on, `[n_neurons - first, hidden_size]`, times `h` of these; returns
    /// the bytes of the rows that were read, those of neurons whose h is not 0. It comes after all spans of the layer.
    pub(crate) fn add_sketched(
        &mut self,
        kernels: &Kernels,
        pool: &mut Pool,
        down: SketchMatrix<'_>,
        first: usize,
        h: &[f32],
    ) -> u64 {
        let (block_neurons, n_rows) = (self.block_neurons, AtomicU64::new(0));
        pool.for_each_chunk(&mut self.partials, self.hidden_size, |b, sums| {
            let place = |neuron: usize| neuron.saturating_sub(first).min(h.len());
            let neurons = place(b * block_neurons)..place((b + 1) * block_neurons);
            let rows: Vec<u32> = neurons.filter(|&n| h[n] != 0.0).map(|n| n as u32).collect();
            let factors: Vec<f32> = rows.iter().map(|&n| h[n as usize]).collect();
            kernels.sketch_axpys(down, &rows, &factors, sums);
            n_rows.fetch_add(rows.len() as u64, Ordering::Relaxed);
        });
        n_rows.into_inner() * down.row_bytes() as u64
    }

    /// Adds the blocks, in order, to the residual stream `y`.
    pub(crate) fn finish(&self, y: &mut [f32]) {
        for block in self.partials.chunks_exact(self.hidden_size) {
            for (y, v) in y.iter_mut().zip(block) {
                *y += v;
            }
        }
    }
}

/// Those of `list`, ascending, that are among `neurons`.
fn among<'a, 'b>(list: &'b [(u32, &'a [u8])], neurons: Range<usize>) -> &'b [(u32, &'a [u8])] {
    let place = |n: usize| list.partition_point(|(id, _)| (*id as usize) < n);
    &list[place(neurons.start)..place(neurons.end)]
}

/// The encoding for which a layer's input is prepared: one for codes of q4 serves all.
pub(crate) fn input_encoding(layout: &LayerLayout) -> Encoding {
    layout.encodings().find(|e| matches!(e, Encoding::Q4 | Encoding::R4)).unwrap_or(layout.of(0).encoding())
}

/// The bundles of a layer's neurons from `first` on.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
pub(crate) struct ColdBundles<'a> {
    pub layout: &'a LayerLayout,
    pub first: usize,
    pub bytes: &'a [u8],
    /// Where rows are residuals, or down rows may not be read: those of the sketch, and the neuron that its first is of.
    pub sketch: Option<(SketchMatrix<'a>, usize)>,
}

/// Adds the neurons of `list`, counted from the first of `cold`, to `sums` `[hidden]`, as [`FfnSums::add`] does
/// within a block; returns the bytes of the rows that were read. Most of them should fire: whole bundles are read ahead.
#[cfg(feature = "cuda")]
pub(crate) fn add_bundles(
    kernels: &Kernels,
    cold: ColdBundles<'_>,
    activation: Activation,
    x: &PreparedInput,
    sums: &mut [f32],
    list: HostList<'_>,
) -> u64 {
    let ColdBundles { layout, first, bytes, sketch } = cold;
    let from = layout.offset(first);
    let neuron = |i: usize| first + HostList::number(&list.entries[i]);
    let mut block = Block::new(kernels, *layout.coldest().bundles(), activation, true, x, sums);
    let (mut next, mut sketched_rows, mut activations) = (0, Vec::new(), Vec::new());
    for (neurons, section) in layout.within(first..layout.n_neurons()) {
        let is_last = neurons.end == layout.n_neurons();
        let rest = &list.entries[next..];
        let is_in = |entry: &AtomicU32| first + HostList::number(entry) < neurons.end;
        let n = if is_last { rest.len() } else { rest.partition_point(is_in) };
        block.begin(section.bundles());
        let bundle = |i: usize| section.bundle(bytes, from, neuron(next + i));
        if list.known.is_some() {
            // A device keeps neurons whose down row is not read: these are residuals.
            let left = |i: usize, h: f32| {
                let first_sketched = sketch.map_or(0, |(_, first)| first);
                sketched_rows.push((neuron(next + i) - first_sketched) as u32);
                activations.push(h);
            };
            block.add_rows(n, |i| (bundle(i), list.rows(next + i)), left);
        } else {
            block.add_whole(0..n, bundle);
        }
        next += n;
    }
    let bytes = block.finish() / 3;
    let Some((down, _)) = sketch else { return bytes };
    kernels.sketch_axpys(down, &sketched_rows, &activations, sums);
    bytes + (sketched_rows.len() * down.row_bytes()) as u64
}

/// One block of one span, on one thread.
struct Block<'s, 'a> {
    kernels: &'s Kernels,
    layout: BundleLayout,
    activation: Activation,
    skip_zeros: bool,
    x: &'s PreparedInput,
    sums: &'s mut [f32],
    /// Neurons that fire wait until there are four: their down rows are then added in one pass over the sums, in order,
    /// with the same roundings as one by one.
    waiting: [(f32, &'a [u8]); 4],
    n_waiting: usize,
    /// Of the section under way.
    rows_read: u64,
    /// Three times the bytes of the rows read of the sections before.
    thirds: u64,
}

impl<'s, 'a> Block<'s, 'a> {
    fn new(
        kernels: &'s Kernels,
        layout: BundleLayout,
        activation: Activation,
        skip_zeros: bool,
        x: &'s PreparedInput,
        sums: &'s mut [f32],
    ) -> Self {
        let waiting = [(0.0, &[][..]); 4];
        Self { kernels, layout, activation, skip_zeros, x, sums, waiting, n_waiting: 0, rows_read: 0, thirds: 0 }
    }

    /// Goes on to neurons of another layout.
    fn begin(&mut self, layout: &BundleLayout) {
        self.flush();
        self.layout = *layout;
    }

    /// Adds those that still wait.
    fn flush(&mut self) {
        for (h, bundle) in &self.waiting[..self.n_waiting] {
            self.kernels.axpy(self.layout.encoding(), self.layout.row(bundle, 2), *h, self.sums);
        }
        self.n_waiting = 0;
        self.thirds += std::mem::take(&mut self.rows_read) * self.layout.bundle_bytes() as u64;
    }

    /// Adds `n` neurons, ascending.
    fn add_all(&mut self, n: usize, bundle: impl Fn(usize) -> &'a [u8]) {
        let (layout, encoding) = (self.layout, self.layout.encoding());
        // Scattered bundles, and the several streams of one bundle, defeat the hardware prefetcher.
        let ahead = PREFETCH_BYTES.div_ceil(layout.bundle_bytes());
        let mut first = 0;
        if self.skip_zeros && self.activation.is_sparse() {
            while first + GATES <= n {
                for i in (first + ahead..first + ahead + GATES).take_while(|i| *i < n) {
                    prefetch(layout.row(bundle(i), 0).codes);
                }
                let bundles: [_; GATES] = std::array::from_fn(|i| bundle(first + i));
                let gates = self.kernels.prepared_dots(encoding, bundles.map(|bundle| layout.row(bundle, 0)), self.x);
                for (bundle, g) in bundles.into_iter().zip(gates) {
                    // A gate that is not a number comes through.
                    if g <= 0.0 {
                        self.rows_read += 1;
                        continue;
                    }
                    let [u] = self.kernels.prepared_dots(encoding, [layout.row(bundle, 1)], self.x);
                    self.add(g, u, bundle);
                }
                first += GATES;
            }
        }
        self.add_whole(first..n, bundle);
    }

    /// Adds neurons of which most should fire. What comes next is asked for all the time, and by the loops that wait
    /// for memory least: a half of a bundle while two rows are multiplied, two while four down rows are added; more
    /// where these leave less than the next bundle, because neurons do not fire.
    fn add_whole(&mut self, neurons: Range<usize>, bundle: impl Fn(usize) -> &'a [u8]) {
        let size = self.layout.bundle_bytes();
        if size < PREFETCH_BYTES {
            return self.add_short(neurons, bundle);
        }
        let mut next = Upcoming { at: (neurons.start + 1) * size, end: neurons.end * size, size, bundle: &bundle };
        for i in neurons {
            let ahead = next.up_to((next.at + size / 2).max((i + 2) * size));
            let (g, u) = self.kernels.pre_activations(&self.layout, bundle(i), self.x, &ahead);
            if self.wait(g, u, bundle(i)) {
                let ahead = next.up_to(next.at + 2 * size);
                self.add_waiting(&ahead);
            }
        }
    }

    /// The same for short bundles, whose loops are over too soon to divide anything among their steps.
    fn add_short(&mut self, neurons: Range<usize>, bundle: impl Fn(usize) -> &'a [u8]) {
        let ahead = PREFETCH_BYTES.div_ceil(self.layout.bundle_bytes());
        for i in neurons.clone() {
            if i + ahead < neurons.end {
                prefetch(bundle(i + ahead));
            }
            let (g, u) = self.kernels.pre_activations(&self.layout, bundle(i), self.x, &[]);
            self.add(g, u, bundle(i));
        }
    }

    /// Adds `n` neurons, ascending, of which those rows are read that `of` says; shows `left` the activations of those whose down
    /// row is not. Where rows are residuals, products are added to what the sketch has, and its down rows to all neurons'.
    fn add_rows(&mut self, n: usize, of: impl Fn(usize) -> (&'a [u8], RowsOfNeuron), mut left: impl FnMut(usize, f32)) {
        let (layout, encoding) = (self.layout, self.layout.encoding());
        let is_residual = encoding == Encoding::R4;
        let ahead = PREFETCH_BYTES.div_ceil(layout.bundle_bytes());
        let ask = |i: usize| {
            let (bundle, neuron) = of(i);
            if neuron.rows == ALL_ROWS {
                return prefetch(bundle);
            }
            let rows = [GATE_ROW, UP_ROW, DOWN_ROW].into_iter().enumerate().filter(|(_, row)| neuron.has(*row));
            rows.for_each(|(which, _)| prefetch(layout.row(bundle, which).codes));
        };
        (0..ahead.min(n)).for_each(&ask);
        for i in 0..n {
            if i + ahead < n {
                ask(i + ahead);
            }
            let (bundle, neuron) = of(i);
            let dot = |which: usize| self.kernels.prepared_dots(encoding, [layout.row(bundle, which)], self.x)[0];
            let whole = |known: f32, product: f32| if is_residual { known + product } else { product };
            let [gate, up] = neuron.products;
            let (g, u) = match (neuron.has(GATE_ROW), neuron.has(UP_ROW)) {
                (true, true) => {
                    let (g, u) = self.kernels.pre_activations(&layout, bundle, self.x, &[]);
                    (whole(gate, g), whole(up, u))
                }
                (true, false) => (whole(gate, dot(0)), up),
                (false, true) => (gate, whole(up, dot(1))),
                (false, false) => (gate, up),
            };
            self.rows_read += u64::from((neuron.rows & (GATE_ROW | UP_ROW)).count_ones());
            let h = self.activation.apply(g, u);
            if is_residual || !neuron.has(DOWN_ROW) {
                left(i, h);
            }
            if neuron.has(DOWN_ROW) && h != 0.0 && self.queue(h, bundle) {
                self.add_waiting(&[]);
            }
        }
    }

    /// Adds the neurons of `range`, which begins with a block of the certificate, and returns the bytes of it that were
    /// read. Neurons with certified gates are zero; of the others most fire, as far as the gate goes.
    fn add_certified(
        &mut self,
        range: Range<usize>,
        certificate: &Certificate,
        input: &QuantisedInput,
        bundle: impl Fn(usize) -> &'a [u8],
    ) -> u64 {
        // Where both factors are cut at zero, the up row decides as well as the gate, and a gate that is not certified
        // is more often positive. Skipping the gate is safe: where there is a certificate, every gate is a finite number.
        let first_row = usize::from(self.activation == Activation::Drelu);
        let layout = self.layout;
        let ask = |n: usize, row: usize| prefetch(layout.row(bundle(n), row).codes);
        let (mut open, mut passed) = ([0; JUDGED], [(0, 0.0); JUDGED]);
        let mut judged = 0;
        for start in range.clone().step_by(JUDGED) {
            let end = range.end.min(start + JUDGED);
            let mut n_open = 0;
            for first in (start..end).step_by(CERTIFIED_ROWS) {
                let mut bits = !certificate.negative(self.kernels, first / CERTIFIED_ROWS, input);
                if end - first < CERTIFIED_ROWS {
                    bits &= (1 << (end - first)) - 1;
                }
                while bits != 0 {
                    open[n_open] = first + bits.trailing_zeros() as usize;
                    if n_open < OPEN_AHEAD {
                        ask(open[n_open], first_row);
                    }
                    bits &= bits - 1;
                    n_open += 1;
                }
                judged += certificate.block_bytes() as u64;
            }
            let mut n_passed = 0;
            for i in (0..n_open).step_by(GATES) {
                open[..n_open].iter().skip(i + OPEN_AHEAD).take(GATES).for_each(|&n| ask(n, first_row));
                let group = &open[i..n_open.min(i + GATES)];
                for (&n, value) in group.iter().zip(self.dots(group, first_row, &bundle)) {
                    // What is not a number comes through.
                    if value <= 0.0 {
                        self.rows_read += 1;
                        continue;
                    }
                    ask(n, 1 - first_row);
                    ask(n, 2);
                    passed[n_passed] = (n, value);
                    n_passed += 1;
                }
            }
            for group in passed[..n_passed].chunks(GATES) {
                let numbers: [_; GATES] = std::array::from_fn(|i| group.get(i).map_or(group[0].0, |p| p.0));
                let seconds = self.dots(&numbers[..group.len()], 1 - first_row, &bundle);
                for (&(n, first), second) in group.iter().zip(seconds) {
                    let (g, u) = if first_row == 0 { (first, second) } else { (second, first) };
                    self.add(g, u, bundle(n));
                }
            }
        }
        judged
    }

    /// Row `row` of up to [`GATES`] neurons times the input.
    fn dots(&self, neurons: &[usize], row: usize, bundle: impl Fn(usize) -> &'a [u8]) -> [f32; GATES] {
        let (layout, encoding) = (self.layout, self.layout.encoding());
        if let Ok(all) = <[usize; GATES]>::try_from(neurons) {
            return self.kernels.prepared_dots(encoding, all.map(|n| layout.row(bundle(n), row)), self.x);
        }
        let mut values = [0.0; GATES];
        for (value, &n) in values.iter_mut().zip(neurons) {
            [*value] = self.kernels.prepared_dots(encoding, [layout.row(bundle(n), row)], self.x);
        }
        values
    }

    fn add(&mut self, g: f32, u: f32, bundle: &'a [u8]) {
        if self.wait(g, u, bundle) {
            self.add_waiting(&[]);
        }
    }

    /// Lets a neuron wait if it fires; whether four do.
    fn wait(&mut self, g: f32, u: f32, bundle: &'a [u8]) -> bool {
        let h = self.activation.apply(g, u);
        self.rows_read += 2;
        if self.skip_zeros && h == 0.0 {
            return false;
        }
        self.queue(h, bundle)
    }

    /// Lets a neuron wait whose down row is added; whether four do.
    fn queue(&mut self, h: f32, bundle: &'a [u8]) -> bool {
        self.rows_read += 1;
        self.waiting[self.n_waiting] = (h, bundle);
        self.n_waiting += 1;
        self.n_waiting == self.waiting.len()
    }

    /// Adds the down rows of the four that wait.
    fn add_waiting(&mut self, ahead: &[&[u8]]) {
        let rows = self.waiting.map(|(_, bundle)| self.layout.row(bundle, 2));
        self.kernels.axpys(self.layout.encoding(), rows, self.waiting.map(|(h, _)| h), self.sums, ahead);
        self.n_waiting = 0;
    }

    /// Adds those that still wait; returns the rows that were read, each as the bytes of its bundle: three times their own.
    fn finish(mut self) -> u64 {
        self.flush();
        self.thirds
    }
}

/// The bytes of bundles not yet asked for, counted as if each bundle followed the one before.
struct Upcoming<'f, F> {
    at: usize,
    end: usize,
    /// Of a bundle.
    size: usize,
    bundle: &'f F,
}

impl<'a, F: Fn(usize) -> &'a [u8]> Upcoming<'_, F> {
    /// The bytes before `to`, of at most four bundles, which are then behind.
    fn up_to(&mut self, to: usize) -> [&'a [u8]; 4] {
        let to = to.min(self.end);
        std::array::from_fn(|_| {
            if self.at >= to {
                return &[][..];
            }
            let (i, from) = (self.at / self.size, self.at % self.size);
            // A bundle may lie there without the room behind its streams.
            let bundle = (self.bundle)(i);
            let end = from + to - self.at;
            self.at = if end < bundle.len() { to } else { (i + 1) * self.size };
            bundle.get(from..end.min(bundle.len())).unwrap_or_default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thermocline_kernels::{Encoding, ScaleFit, pack, unpack};

    const HIDDEN: usize = 64;
    const NEURONS: usize = 100;

    fn random(state: &mut u32) -> f32 {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*state >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Bundles, with `NaN` in every weight of the down rows of neurons that `x` does not fire if `spoilt`.
    fn bundles(layout: &BundleLayout, x: &[f32], spoilt: bool) -> (Vec<u8>, usize) {
        let encoding = layout.encoding();
        let (mut state, mut silent) = (7, 0);
        let mut all = vec![0u8; NEURONS * layout.bundle_bytes()];
        for bundle in all.chunks_exact_mut(layout.bundle_bytes()) {
            for which in 0..3 {
                let row: Vec<f32> = (0..HIDDEN).map(|_| random(&mut state)).collect();
                let mut packed = vec![0; encoding.row_stride(HIDDEN)];
                assert_eq!(pack(encoding, &row, ScaleFit::LeastSquares, &mut packed), Ok(()));
                layout.set_row(bundle, which, &packed);
            }
            let mut gate = vec![0.0; HIDDEN];
            unpack(encoding, layout.row(bundle, 0), &mut gate);
            if gate.iter().zip(x).map(|(g, x)| g * x).sum::<f32>() < -0.01 {
                silent += 1;
                if spoilt {
                    // All bits set: NaN as a bfloat16, and as a scale.
                    let row = vec![0xff; encoding.row_stride(HIDDEN)];
                    layout.set_row(bundle, 2, &row);
                    let mut down = vec![0.0; HIDDEN];
                    unpack(encoding, layout.row(bundle, 2), &mut down);
                    assert!(down.iter().all(|d| d.is_nan()));
                }
            }
        }
        (all, silent)
    }

    fn uniform(layout: BundleLayout) -> LayerLayout {
        LayerLayout::new([(NEURONS, layout)]).expect("neurons")
    }

    fn output(layout: &BundleLayout, x: &[f32], all: &[u8], listed: bool) -> Vec<f32> {
        let pool = &mut Pool::new(2).expect("threads");
        let mut sums = FfnSums::new(HIDDEN, Activation::Relu, NEURONS);
        sums.start(&Kernels::detect(), &uniform(*layout), x);
        if listed {
            let list: Vec<(u32, &[u8])> = (0..).zip(all.chunks_exact(layout.bundle_bytes())).collect();
            sums.add(&Kernels::detect(), pool, &uniform(*layout), Span::Listed(&list));
        } else {
            sums.add(&Kernels::detect(), pool, &uniform(*layout), Span::Contiguous { first: 0, bytes: all });
        }
        let mut y = vec![0.0; HIDDEN];
        sums.finish(&mut y);
        y
    }

    /// Neurons in several layouts, as one would compute them: one by one, in blocks, each with the kernels of its encoding.
    #[test]
    fn sections_are_summed_as_their_neurons_one_by_one() {
        let mut state = 5;
        let x: Vec<f32> = (0..HIDDEN).map(|_| random(&mut state)).collect();
        let (kernels, pool) = (Kernels::detect(), &mut Pool::new(2).expect("threads"));
        let plain = |encoding| BundleLayout::new(encoding, HIDDEN).expect("whole groups");
        let [q4, q8, bf16, plus] = [Encoding::Q4, Encoding::Q8, Encoding::Bf16, Encoding::Q4Plus].map(plain);
        for sections in [vec![(40, plus), (60, q4)], vec![(1, bf16), (32, q8), (67, q4)], vec![(50, q4), (50, bf16)]] {
            let layout = LayerLayout::new(sections.clone()).expect("neurons");
            let mut all = Vec::new();
            for (n, of) in &sections {
                // Any coarse codes are some weights'.
                let base = if of.encoding() == Encoding::Q4Plus { &q4 } else { of };
                for bundle in bundles(base, &x, false).0.chunks_exact(base.bundle_bytes()).take(*n) {
                    all.extend_from_slice(bundle);
                    (bundle.len()..of.bundle_bytes()).for_each(|_| all.push((random(&mut state) * 128.0) as i8 as u8));
                }
            }
            for activation in [Activation::Silu, Activation::Relu] {
                let mut expected = vec![0.0; HIDDEN];
                for block in (0..NEURONS).collect::<Vec<_>>().chunks(32) {
                    let mut sums = vec![0.0; HIDDEN];
                    for &n in block {
                        let (of, bundle) = (layout.of(n), layout.bundle(&all, 0, n));
                        let mut input = PreparedInput::default();
                        kernels.prepare(of.encoding(), &x, &mut input);
                        let rows = [of.row(bundle, 0), of.row(bundle, 1)];
                        let [g, u] = kernels.prepared_dots(of.encoding(), rows, &input);
                        let h = activation.apply(g, u);
                        if h != 0.0 {
                            kernels.axpy(of.encoding(), of.row(bundle, 2), h, &mut sums);
                        }
                    }
                    expected.iter_mut().zip(&sums).for_each(|(e, s)| *e += s);
                }
                let listed: Vec<(u32, &[u8])> = (0..NEURONS).map(|n| (n as u32, layout.bundle(&all, 0, n))).collect();
                let (front, rest) = all.split_at(layout.offset(37));
                let spans = [
                    vec![Span::Contiguous { first: 0, bytes: &all }],
                    vec![Span::Contiguous { first: 0, bytes: front }, Span::Contiguous { first: 37, bytes: rest }],
                    vec![Span::Listed(&listed)],
                    vec![Span::Listed(&listed[..45]), Span::Listed(&listed[45..])],
                ];
                for spans in spans {
                    let mut sums = FfnSums::new(HIDDEN, activation, NEURONS);
                    sums.start(&kernels, &layout, &x);
                    let read: u64 = spans.into_iter().map(|span| sums.add(&kernels, pool, &layout, span)).sum();
                    assert!(activation.is_sparse() || read.abs_diff(all.len() as u64) <= 2, "{read} of {}", all.len());
                    let mut y = vec![0.0; HIDDEN];
                    sums.finish(&mut y);
                    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert!(bits(&y) == bits(&expected), "{sections:?}, {activation:?}");
                }
            }
        }
    }

    /// The last neurons are no whole block of the certificate, and one that fires has an up row of no numbers.
    #[test]
    fn certified_layers_have_the_bits_of_dense_ones() {
        let mut state = 11;
        let x: Vec<f32> = (0..HIDDEN).map(|_| random(&mut state)).collect();
        let pool = &mut Pool::new(2).expect("threads");
        for encoding in Encoding::PLAIN {
            let layout = BundleLayout::new(encoding, HIDDEN).expect("whole groups");
            let (mut all, _) = bundles(&layout, &x, false);
            let kernels = Kernels::detect();
            let mut prepared = PreparedInput::default();
            kernels.prepare(encoding, &x, &mut prepared);
            let fires = |b: &[u8]| kernels.prepared_dots(encoding, [layout.row(b, 0)], &prepared)[0] > 0.0;
            let spoilt = all.chunks_exact_mut(layout.bundle_bytes()).find(|b| fires(b)).expect("one that fires");
            let (codes, scales) = layout.row_mut(spoilt, 1);
            if encoding == Encoding::Bf16 { codes } else { scales }.fill(0xff);
            let certificate = Certificate::new(NEURONS, HIDDEN, |n, out| {
                unpack(encoding, layout.row(&all[n * layout.bundle_bytes()..], 0), out);
            });
            let certificate = certificate.expect("memory").expect("finite gates");
            let mut input = QuantisedInput::default();
            assert!(input.set(&x));
            for activation in [Activation::Relu, Activation::Drelu] {
                let mut outputs = Vec::new();
                for span in [
                    Span::Contiguous { first: 0, bytes: &all },
                    Span::Certified { bytes: &all, certificate: &certificate, input: &input },
                ] {
                    let mut sums = FfnSums::new(HIDDEN, activation, NEURONS);
                    sums.skip_zeros = matches!(span, Span::Certified { .. });
                    sums.start(&kernels, &uniform(layout), &x);
                    let read = sums.add(&kernels, pool, &uniform(layout), span);
                    // Elsewhere 8-bit codes are as long as the gates that they spare.
                    let less = encoding == Encoding::Bf16 && sums.skip_zeros;
                    assert!(!less || read < all.len() as u64 * 9 / 10, "{read}");
                    let mut y = vec![0.0; HIDDEN];
                    sums.finish(&mut y);
                    outputs.push(y.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
                }
                assert!(outputs[0] == outputs[1], "{encoding}, {activation:?}");
            }
        }
    }

    #[test]
    fn the_down_row_of_a_silent_neuron_is_not_read() {
        let mut state = 3;
        let x: Vec<f32> = (0..HIDDEN).map(|_| random(&mut state)).collect();
        for encoding in Encoding::PLAIN {
            let layout = BundleLayout::new(encoding, HIDDEN).expect("whole groups");
            let ((whole, silent), (spoilt, _)) = (bundles(&layout, &x, false), bundles(&layout, &x, true));
            assert!(silent > NEURONS / 4 && silent < NEURONS, "{silent} of {NEURONS} are silent");
            for listed in [false, true] {
                let (a, b) = (output(&layout, &x, &whole, listed), output(&layout, &x, &spoilt, listed));
                assert!(a.iter().any(|v| v.abs() > 0.1), "the others do add something");
                assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{encoding}: {a:?} {b:?}");
            }
        }
    }
}
