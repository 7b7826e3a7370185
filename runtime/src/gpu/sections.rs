//! A layer's sections: neighbouring neurons whose bundles have one layout. Each is a launch of the fused kernel, with a list
//! of its own. A layer of one section takes the list that `choose` makes; of several, the lists are made from it.

use super::buffers::Scratch;
use super::load::Loader;
use super::plan::aligned;
use crate::Result;
use crate::chooser::is_sketched;
use crate::plan::Mode;
use std::ops::Range;
use thermocline_kernels::BundleLayout;
use thermocline_kernels::cuda::View;
use thermocline_kernels::cuda::launch::{WorkList, host_item, hot_item};
use thermocline_split::{LayerFile, Split};

/// Bytes of [`WorkList::counts`] and of [`WorkList::totals`].
pub(super) const COUNTS_BYTES: usize = 32;
pub(super) const TOTALS_BYTES: usize = 64;

/// One of them.
#[derive(Debug)]
pub(super) struct Section {
    pub layout: BundleLayout,
    /// In split order.
    pub neurons: Range<usize>,
    /// The bundles of its first neurons, in device memory.
    pub hot: View,
    /// Those of the others, pinned.
    pub cold: View,
    /// What a token computes. Where nothing is chosen that is all of it, listed once, unless the host's threads have a part.
    pub work: WorkList,
    /// Its row of the totals.
    pub totals: usize,
}

impl Section {
    /// Its first cold neuron.
    pub fn first_cold(&self) -> usize {
        self.neurons.start + self.hot.len() / self.layout.bundle_bytes()
    }
}

/// Sections that layers have at most on the device: with `residuals` one more than in the split, of neurons of which only these are
/// there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections<'a> {
    pub split: &'a Split,
    pub residuals: bool,
}

impl Sections<'_> {
    fn of(&self, file: &LayerFile) -> usize {
        file.bundles().sections().len() + usize::from(self.residuals)
    }

    fn totals_rows_of(&self, files: &[LayerFile]) -> usize {
        let rows = |n| if n == 1 { 1 } else { 1 + n };
        files.iter().map(|file| rows(self.of(file))).sum()
    }

    /// Rows of totals: for what `choose` counts of each layer, and for each section of layers that have several.
    pub fn totals_rows(&self) -> usize {
        self.totals_rows_of(self.split.layers())
    }

    /// The row of layer `l`; its sections' follow, if it has several.
    pub fn first_totals_row(&self, l: usize) -> usize {
        self.totals_rows_of(&self.split.layers()[..l])
    }

    /// The most sections that a layer has.
    pub fn most(&self) -> usize {
        self.split.layers().iter().map(|file| self.of(file)).max().unwrap_or(1)
    }

    /// Lists, beside the one that `choose` makes, which layers share: one for each section of the layer that has most.
    fn n_shared_lists(&self) -> usize {
        match self.most() {
            1 => 0,
            n => n,
        }
    }

    /// Device bytes of the sections' lists. Layers have lists of their own in exact mode, and with sketches, which no neuron needs that
    /// is always computed.
    pub fn lists_bytes(&self, mode: Mode) -> u64 {
        let may_be_all = mode == Mode::Exact || is_sketched(self.split, mode);
        let lists = |file: &LayerFile| {
            let own = file.bundles().sections().iter().map(|s| list_bytes(s.neurons().len())).sum::<u64>();
            // Neurons divided in two take more room at the ends of their lists alone.
            own + if self.residuals { list_bytes(1) } else { 0 }
        };
        let own: u64 = if may_be_all { self.split.layers().iter().map(lists).sum() } else { 0 };
        own + self.n_shared_lists() as u64 * list_bytes(self.split.manifest().config.intermediate_size)
    }
}

fn list_bytes(n_neurons: usize) -> u64 {
    aligned(8 * n_neurons as u64) + aligned(COUNTS_BYTES as u64)
}

impl Scratch {
    /// A list with a row of the totals.
    fn with_totals(&self, list: &WorkList, row: usize) -> WorkList {
        WorkList { totals: self.work.totals.slice(TOTALS_BYTES * row, TOTALS_BYTES), ..list.clone() }
    }
}

impl Loader<'_> {
    pub(super) fn all_sections(&self) -> Sections<'_> {
        Sections { split: self.split, residuals: self.plan.residuals }
    }

    /// The lists that layers with several sections share.
    pub(super) fn shared_lists(&self, work: &WorkList) -> Vec<WorkList> {
        let n = self.split.manifest().config.intermediate_size;
        let list =
            |_| WorkList { items: self.arena.take(8 * n), counts: self.arena.take(COUNTS_BYTES), ..work.clone() };
        (0..self.all_sections().n_shared_lists()).map(list).collect()
    }

    /// Whether the list of a layer whose first `n_hot` neurons are in device memory is made anew for each token: where something
    /// is chosen, and where the host's threads may have a part.
    pub(super) fn is_chosen(&self, n_hot: usize) -> bool {
        self.plan.has_choice(self.split) || (self.with_host && n_hot < self.split.manifest().config.intermediate_size)
    }

    /// What `choose` makes for layer `l`, and the layer's sections; `hot` holds the first `n_hot` bundles, `cold` the others.
    pub(super) fn sections(
        &self,
        l: usize,
        n_hot: usize,
        [hot, cold]: [&View; 2],
        scratch: &Scratch,
    ) -> Result<(WorkList, Vec<Section>)> {
        let layout = &self.layout(l);
        let (row, several) = (self.all_sections().first_totals_row(l), layout.sections().len() > 1);
        let chosen = scratch.with_totals(&scratch.work, row);
        let mut sections = Vec::with_capacity(layout.sections().len());
        for (i, section) in layout.sections().iter().enumerate() {
            let neurons = section.neurons();
            let border = n_hot.clamp(neurons.start, neurons.end);
            let (n_section_hot, n_cold) = (border - neurons.start, neurons.end - border);
            let totals = if several { row + 1 + i } else { row };
            let work = if !self.is_chosen(n_hot) {
                self.list_all(n_cold, n_section_hot, &chosen)?
            } else if several {
                scratch.with_totals(&scratch.sections[i], totals)
            } else {
                chosen.clone()
            };
            let (hot_at, cold_at) = (neurons.start.min(n_hot), border.max(n_hot));
            sections.push(Section {
                layout: *section.bundles(),
                hot: hot.slice(layout.offset(hot_at), layout.bytes(neurons.start..border)),
                cold: cold.slice(layout.bytes(n_hot..cold_at), layout.bytes(border..neurons.end)),
                neurons,
                work,
                totals,
            });
        }
        Ok((chosen, sections))
    }

    /// A list of all neurons of a section, those in pinned memory first: the kernel's blocks take turns, and so each has
    /// its part of the slow ones.
    fn list_all(&self, n_cold: usize, n_hot: usize, chosen: &WorkList) -> Result<WorkList> {
        let n = n_cold + n_hot;
        let items: Vec<[u32; 2]> = (0..n_cold).map(host_item).chain((0..n_hot).map(hot_item)).collect();
        let counts = [n, n_cold, 0, n_hot, 0, n, 0, 0].map(|v| v as u32);
        Ok(WorkList {
            items: self.arena.put(self.device, bytemuck::cast_slice(&items))?,
            counts: self.arena.put(self.device, bytemuck::cast_slice(&counts))?,
            ..chosen.clone()
        })
    }
}
