//! Sketches where VRAM has no room for all of them: those of some layers lie in pinned memory. Of some of these the host's threads
//! choose and compute all neurons (`host_layer`), the others the copy engine brings to the device while the layers before them are
//! computed.
//!
//! A token reads all of a sketch, whatever it chooses: nothing has to be predicted, and whole layers cross the link in order. Two places
//! on the device take turns, and each is filled again as soon as it was read. Layers whose sketches stay on the device lie between those
//! whose sketches do not, evenly, and so do the host's between those that are copied: the link is never without work, and the next copy
//! is on its way while the threads compute.

use super::buffers::Arena;
use super::load::{DeviceChooser, Layer, Loader, Model};
use super::plan::{ALIGN, GpuPlan, aligned};
use crate::Result;
use crate::chooser::{SketchedLayer, sketch_behind};
use std::sync::Arc;
use thermocline_kernels::cuda::launch::DeviceSketch;
use thermocline_kernels::cuda::{CudaError, Device, Mark, Memory, Queue, View};
use thermocline_kernels::{AlignedBuf, SketchMatrix, sketch_planes};
use thermocline_split::{SketchForm, Split};

/// Places on the device for sketches that are copied.
const N_PLACES: usize = 2;

/// Parts of a layer's sketch: gate, up and down rows, the numbers of each neuron, the columns' channels.
const N_PARTS: usize = 5;

/// Device bytes of the sketch of `n` neurons of one layer, at most.
pub(super) fn layer_sketch_bytes(split: &Split, n: usize) -> u64 {
    bytes_in_form(split, split.sketch_form(), n)
}

/// The same of a sketch of this form.
pub(super) fn bytes_in_form(split: &Split, form: SketchForm, n: usize) -> u64 {
    let of_layer = form.bytes(n, split.manifest().config.hidden_size) as u64;
    if n == 0 { 0 } else { aligned(of_layer + N_PARTS as u64 * ALIGN) }
}

/// Bytes of what a sketch of `n` neurons has besides rows, for the host's threads.
pub(super) fn numbers_bytes(n: usize, hidden: usize) -> u64 {
    (16 * n + 4 * hidden) as u64
}

/// Device bytes of `n_layers` such sketches of which `n_streamed` lie in pinned memory.
pub(super) fn sketches_bytes(of_layer: u64, n_layers: usize, n_streamed: usize) -> u64 {
    (n_layers - n_streamed + n_streamed.min(N_PLACES)) as u64 * of_layer
}

/// How many of `n_layers` sketches are to be in pinned memory so that the others and the places fit into `room`, as few as can be; `None`
/// if it is too small for the places.
pub(super) fn least_streamed(of_layer: u64, n_layers: usize, room: u64) -> Option<usize> {
    (0..=n_layers).find(|&n_streamed| sketches_bytes(of_layer, n_layers, n_streamed) <= room)
}

/// The place of layer `l` of `n_layers` among `n` of them, if it is one of these: evenly spread, the first one as late as can be.
fn nth_of(l: usize, n_layers: usize, n: usize) -> Option<usize> {
    let before = l * n / n_layers;
    ((l + 1) * n / n_layers > before).then_some(before)
}

/// A sketch in pinned memory, taken apart as a device wants it.
#[derive(Debug)]
pub(super) struct PinnedSketch {
    memory: Memory,
    /// Bytes of all parts; there may be room behind them.
    bytes: usize,
    /// Bytes of gate, up and down rows, the first parts.
    row_bytes: [usize; 3],
    /// Where each of the places on the device gets it.
    to: Vec<View>,
    /// Its numbers, without rows.
    pub numbers: SketchedLayer,
}

impl PinnedSketch {
    /// Bytes that cross the link, if it is copied.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Brings it to one of the places.
    pub(super) fn copy(&self, device: &Device, queue: Queue, place: usize) -> Result<(), CudaError> {
        device.copy(queue, &self.to[place], &self.memory.slice(0, self.bytes))
    }

    /// Gate (0), up (1) or down (2) rows of all its neurons.
    pub(super) fn matrix(&self, part: usize) -> SketchMatrix<'_> {
        let at = offsets(self.row_bytes)[part];
        let bytes = &self.memory.host_bytes()[at..at + self.row_bytes[part]];
        SketchMatrix::of_planes(self.numbers.form().bits()[part], self.numbers.hidden_size(), bytes)
    }
}

/// Where parts of so many bytes begin, one behind the other.
fn offsets<const N: usize>(bytes: [usize; N]) -> [usize; N] {
    let mut next = 0;
    bytes.map(|bytes| {
        let at = next;
        next += aligned(bytes as u64) as usize;
        at
    })
}

/// Places for the sketches that are copied.
pub(super) fn take_places(split: &Split, plan: &GpuPlan, arena: &Arena) -> Vec<View> {
    let of_layer = layer_sketch_bytes(split, split.manifest().config.intermediate_size - plan.always_neurons);
    (0..plan.streamed_sketches.min(N_PLACES)).map(|_| arena.take(of_layer as usize)).collect()
}

impl Loader<'_> {
    /// The sketch of layer `l`, if the split has any, where the plan says.
    pub(super) fn sketch(&self, l: usize) -> Result<Option<DeviceChooser>> {
        let (first, hidden) = (self.plan.always_neurons, self.plan.hidden_size);
        let Some(sketch) = sketch_behind(self.split, l, first, self.active.get(l))? else { return Ok(None) };
        let (n_neurons, [_, up_bits, _]) = (sketch.n_neurons(), sketch.form.bits());
        let [gate, up, down] = [0, 1, 2].map(|part| sketch_planes(sketch.matrix(part, hidden)));
        let values =
            [&sketch.gate_sd, &sketch.up_sd, &sketch.down_norm, &sketch.down_error].map(Vec::as_slice).concat();
        let parts: [&[u8]; N_PARTS] =
            [&gate, &up, &down, bytemuck::cast_slice(&values), bytemuck::cast_slice(&sketch.columns)];
        let of_views = |views: [View; N_PARTS]| {
            let [gate, up, down, neurons, columns] = views;
            DeviceSketch { gate, up, down, neurons, columns, up_bits, first, n_neurons, hidden }
        };
        if nth_of(l, self.split.layers().len(), self.plan.streamed_sketches).is_none() {
            let mut views = Vec::with_capacity(N_PARTS);
            for part in parts {
                views.push(self.arena.put(self.device, part)?);
            }
            let views: [View; N_PARTS] = views.try_into().expect("a view for each part of a sketch");
            return Ok(Some(DeviceChooser::Sketch(of_views(views))));
        }
        let (lens, at) = (parts.map(<[u8]>::len), offsets(parts.map(<[u8]>::len)));
        let bytes = aligned((at[N_PARTS - 1] + lens[N_PARTS - 1]) as u64) as usize;
        let mut host = AlignedBuf::zeroed(bytes)?;
        for (part, at) in parts.into_iter().zip(at) {
            host[at..at + part.len()].copy_from_slice(part);
        }
        let in_place = |place: &View| of_views(std::array::from_fn(|i| place.slice(at[i], lens[i])));
        let whole = !self.split.layers()[l].bundles().has_plain_rows();
        let numbers = SketchedLayer::of_numbers(sketch, first, &self.split.manifest().config, whole);
        let pinned = PinnedSketch {
            memory: self.device.pin(host)?,
            bytes,
            row_bytes: [lens[0], lens[1], lens[2]],
            to: self.sketch_places.iter().map(|place| place.slice(0, bytes)).collect(),
            numbers,
        };
        let places = self.sketch_places.iter().map(in_place).collect();
        Ok(Some(DeviceChooser::Pinned(places, Arc::new(pinned))))
    }
}

impl Layer {
    /// Its sketch, if that lies in pinned memory.
    pub(super) fn pinned_sketch(&self) -> Option<&Arc<PinnedSketch>> {
        match &self.chooser {
            Some(DeviceChooser::Pinned(_, pinned)) => Some(pinned),
            _ => None,
        }
    }

    /// The same, if the host's threads could choose and compute all of its neurons.
    pub(super) fn for_host(&self) -> Option<&Arc<PinnedSketch>> {
        self.pinned_sketch().filter(|_| self.n_hot == 0)
    }
}

impl Model {
    /// Leaves so many layers to the host, if there are as many that it could compute, evenly among these, the first one as early as can be:
    /// meanwhile the first sketches are copied.
    pub(super) fn leave_to_host(&mut self, n: usize) {
        let n_possible = self.n_for_host();
        let mut behind = n_possible;
        for layer in &mut self.layers {
            let is_possible = layer.for_host().is_some();
            behind -= usize::from(is_possible);
            layer.is_hosts = is_possible && nth_of(behind, n_possible, n.min(n_possible)).is_some();
        }
    }

    /// Layers that the host's threads could choose and compute.
    pub(super) fn n_for_host(&self) -> usize {
        self.layers.iter().filter(|layer| layer.for_host().is_some()).count()
    }

    /// The sketches that are copied for each token, and their layers.
    fn copied(&self) -> impl Iterator<Item = (usize, &Arc<PinnedSketch>)> {
        let layers = self.layers.iter().enumerate().filter(|(_, layer)| !layer.is_hosts);
        layers.filter_map(|(l, layer)| Some((l, layer.pinned_sketch()?)))
    }

    /// Which of these layer `l` is.
    fn nth_copied(&self, l: usize) -> Option<usize> {
        self.copied().position(|(copied, _)| copied == l)
    }

    /// Where the device finds the sketch of layer `l`, if that is what it chooses by.
    pub(super) fn device_sketch(&self, l: usize) -> Option<&DeviceSketch> {
        match &self.layers[l].chooser {
            Some(DeviceChooser::Sketch(sketch)) => Some(sketch),
            Some(DeviceChooser::Pinned(places, _)) => places.get(self.nth_copied(l)? % N_PLACES),
            _ => None,
        }
    }

    /// Bytes of sketches that a token reads over the link.
    pub(super) fn copied_bytes(&self) -> u64 {
        self.copied().map(|(_, sketch)| sketch.bytes()).sum()
    }

    /// The bytes of the sketches, copied or not, of layers that the host computes.
    pub(super) fn hosts_sketch_bytes(&self) -> u64 {
        let layers = self.layers.iter().filter(|layer| layer.is_hosts);
        layers.filter_map(Layer::pinned_sketch).map(|sketch| sketch.bytes()).sum()
    }
}

/// The copies of one token, in order.
pub(super) struct Copies {
    /// The ones that are under way or done.
    begun: Vec<Mark>,
}

impl Copies {
    /// Begins as many as there are places, when all before is done.
    pub(super) fn begin(device: &Device, model: &Model) -> Result<Self, CudaError> {
        let mut copies = Self { begun: Vec::new() };
        (0..N_PLACES).try_for_each(|_| copies.next(device, model))?;
        Ok(copies)
    }

    /// Begins the next one, if there is one, when all before is done.
    fn next(&mut self, device: &Device, model: &Model) -> Result<(), CudaError> {
        let Some((_, sketch)) = model.copied().nth(self.begun.len()) else { return Ok(()) };
        device.order(Queue::Compute, Queue::Copy)?;
        sketch.copy(device, Queue::Copy, self.begun.len() % N_PLACES)?;
        self.begun.push(device.mark(Queue::Copy)?);
        Ok(())
    }

    /// Before layer `l` reads its sketch: that is there.
    pub(super) fn wait(&self, device: &Device, model: &Model, l: usize) -> Result<(), CudaError> {
        model.nth_copied(l).map_or(Ok(()), |nth| device.wait(Queue::Compute, &self.begun[nth]))
    }

    /// When layer `l` has read its sketch: its place is free.
    pub(super) fn go_on(&mut self, device: &Device, model: &Model, l: usize) -> Result<(), CudaError> {
        model.nth_copied(l).map_or(Ok(()), |_| self.next(device, model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_spread_evenly_and_the_last_layer_is_one() {
        for (n_layers, n_streamed) in [(80, 41), (4, 3), (30, 30), (7, 0), (5, 1)] {
            let nth: Vec<_> = (0..n_layers).map(|l| nth_of(l, n_layers, n_streamed)).collect();
            let found: Vec<usize> = nth.iter().flatten().copied().collect();
            assert!(found.into_iter().eq(0..n_streamed), "{n_layers} {n_streamed}: {nth:?}");
            if n_streamed > 0 {
                let longest = n_layers.div_ceil(n_streamed);
                assert!(nth.windows(longest).all(|few| few.iter().any(Option::is_some)), "{nth:?}");
                assert_eq!(nth[n_layers - 1], Some(n_streamed - 1));
            }
        }
    }

    /// Two places take the room of two sketches, so that copying one or two spares nothing.
    #[test]
    fn as_few_are_copied_as_room_asks() {
        let fits = |room| least_streamed(10, 6, room);
        assert_eq!([60, 59, 50, 49, 20, 19].map(fits), [Some(0), Some(3), Some(3), Some(4), Some(6), None]);
        assert_eq!(least_streamed(0, 6, 0), Some(0));
        for n_streamed in 0..=6 {
            let bytes = sketches_bytes(10, 6, n_streamed);
            assert!(least_streamed(10, 6, bytes).is_some_and(|n| n <= n_streamed));
        }
    }
}
