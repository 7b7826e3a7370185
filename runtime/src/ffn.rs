//! One token's feed-forward layer, neuron by neuron, from bundles wherever they lie.
//!
//! Neurons are summed within blocks of fixed boundaries, ascending, and blocks are added in order: the result is the
//! same to the last bit for any number of threads and for any division of the neurons between memory and disk.

use thermocline_datasets::Activation;
use thermocline_kernels::{BundleLayout, Kernels, PREFETCH_BYTES, Pool};

/// Blocks per layer, about: enough for the threads of a desktop, few enough that adding them up costs nothing.
const BLOCKS: usize = 24;

/// The running sums of one layer for one token.
#[derive(Debug)]
pub(crate) struct FfnSums {
    layout: BundleLayout,
    activation: Activation,
    block_neurons: usize,
    hidden_size: usize,
    /// `[n_blocks, hidden_size]`.
    partials: Vec<f32>,
}

/// Neurons that can be computed now, ascending.
#[derive(Clone, Copy)]
pub(crate) enum Span<'a> {
    /// All neurons from `first` on whose bundles `bytes` holds.
    Contiguous { first: usize, bytes: &'a [u8] },
    /// Single neurons and their bundles.
    Listed(&'a [(u32, &'a [u8])]),
}

impl FfnSums {
    pub(crate) fn new(layout: BundleLayout, activation: Activation, n_neurons: usize) -> Self {
        let block_neurons = n_neurons.div_ceil(BLOCKS).next_multiple_of(32);
        let hidden_size = layout.hidden_size();
        let partials = vec![0.0; n_neurons.div_ceil(block_neurons) * hidden_size];
        Self { layout, activation, block_neurons, hidden_size, partials }
    }

    /// Memory that the sums take.
    pub(crate) fn bytes(&self) -> u64 {
        4 * self.partials.len() as u64
    }

    /// Starts a new layer.
    pub(crate) fn clear(&mut self) {
        self.partials.fill(0.0);
    }

    /// Adds the neurons of `span`, whose numbers must be above those of all earlier spans of this layer. Neurons with
    /// `h == 0` add nothing and their down rows are not read.
    pub(crate) fn add(&mut self, kernels: &Kernels, pool: &mut Pool, x: &[f32], span: Span<'_>) {
        let (layout, activation, bundle_bytes) = (self.layout, self.activation, self.layout.bundle_bytes());
        let encoding = layout.encoding();
        let (first, end) = match span {
            Span::Contiguous { first, bytes } => (first, first + bytes.len() / bundle_bytes),
            Span::Listed([]) => return,
            Span::Listed(list) => (list[0].0 as usize, list[list.len() - 1].0 as usize + 1),
        };
        if first == end {
            return;
        }
        // Scattered bundles, and the several streams of one bundle, defeat the hardware prefetcher.
        let ahead = PREFETCH_BYTES.div_ceil(bundle_bytes);
        let block_neurons = self.block_neurons;
        let (first_block, end_block) = (first / block_neurons, end.div_ceil(block_neurons));
        let partials = &mut self.partials[first_block * self.hidden_size..end_block * self.hidden_size];
        pool.for_each_chunk(partials, self.hidden_size, |b, sums| {
            let start = (first_block + b) * block_neurons;
            // Neurons that fire wait until there are four: their down rows are then added in one pass over the sums,
            // in order, with the same roundings as one by one.
            let mut waiting: [(f32, &[u8]); 4] = [(0.0, &[]); 4];
            let mut n_waiting = 0;
            let mut one = |bundle, next: Option<&[u8]>| {
                if let Some(next) = next {
                    thermocline_kernels::prefetch(next);
                }
                let (g, u) = kernels.pre_activations(&layout, bundle, x);
                let h = activation.apply(g, u);
                if h == 0.0 {
                    return;
                }
                waiting[n_waiting] = (h, bundle);
                n_waiting += 1;
                if n_waiting == 4 {
                    let rows = waiting.map(|(_, bundle)| layout.row(bundle, 2));
                    kernels.axpys(encoding, rows, waiting.map(|(h, _)| h), sums);
                    n_waiting = 0;
                }
            };
            match span {
                Span::Contiguous { bytes, .. } => {
                    let (from, to) = (start.max(first), (start + block_neurons).min(end));
                    let mine = &bytes[(from - first) * bundle_bytes..(to - first) * bundle_bytes];
                    for (i, bundle) in mine.chunks_exact(bundle_bytes).enumerate() {
                        let next = (i + ahead) * bundle_bytes;
                        one(bundle, mine.get(next..next + bundle_bytes));
                    }
                }
                Span::Listed(list) => {
                    let from = list.partition_point(|(id, _)| (*id as usize) < start);
                    let to = list.partition_point(|(id, _)| (*id as usize) < start + block_neurons);
                    for i in from..to {
                        one(list[i].1, list.get(i + ahead).map(|next| next.1));
                    }
                }
            }
            for (h, bundle) in &waiting[..n_waiting] {
                kernels.axpy(encoding, layout.row(bundle, 2), *h, sums);
            }
        });
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
