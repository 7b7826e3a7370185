//! Sketches where VRAM has no room for all of them: those of some layers lie in pinned memory, and the copy engine brings each to the
//! device while the layers before it are computed.
//!
//! A token reads all of a sketch, whatever it chooses: nothing has to be predicted, and whole layers cross the link in order. Two places
//! on the device take turns, so that one is filled while the other is read. Layers whose sketches stay on the device lie between those
//! whose sketches are copied, evenly, so that the link is never without work and rows of both cross beside the copies.

use super::load::{DeviceChooser, Layer, Loader, Model};
use super::plan::{ALIGN, aligned};
use crate::Result;
use crate::chooser::sketch_behind;
use thermocline_kernels::cuda::launch::DeviceSketch;
use thermocline_kernels::cuda::{CudaError, Device, Queue, View};
use thermocline_kernels::{AlignedBuf, sketch_planes};
use thermocline_split::Split;

/// Places on the device for sketches that are copied.
const N_PLACES: usize = 2;

/// Parts of a layer's sketch: gate, up and down rows, the numbers of each neuron, the columns' channels.
const N_PARTS: usize = 5;

/// Device bytes of the sketch of `n` neurons of one layer, at most.
pub(super) fn layer_sketch_bytes(split: &Split, n: usize) -> u64 {
    let of_layer = thermocline_split::sketch_bytes(n, split.manifest().config.hidden_size) as u64;
    if n == 0 { 0 } else { aligned(of_layer + N_PARTS as u64 * ALIGN) }
}

/// Device bytes of `n_layers` such sketches of which `n_streamed` are copied for each token.
pub(super) fn sketches_bytes(of_layer: u64, n_layers: usize, n_streamed: usize) -> u64 {
    (n_layers - n_streamed + n_streamed.min(N_PLACES)) as u64 * of_layer
}

/// How many of `n_layers` sketches are to be copied so that the others and the places fit into `room`, as few as can be; `None` if it is
/// too small for the places.
pub(super) fn least_streamed(of_layer: u64, n_layers: usize, room: u64) -> Option<usize> {
    (0..=n_layers).find(|&n_streamed| sketches_bytes(of_layer, n_layers, n_streamed) <= room)
}

/// The place among those whose sketches are copied of layer `l` of `n_layers`, if it is one of `n_streamed`: evenly spread, the
/// first one as late as can be.
fn nth_streamed(l: usize, n_layers: usize, n_streamed: usize) -> Option<usize> {
    let before = l * n_streamed / n_layers;
    ((l + 1) * n_streamed / n_layers > before).then_some(before)
}

/// A sketch in pinned memory.
#[derive(Debug)]
pub(super) struct StreamedSketch {
    from: View,
    to: View,
}

impl StreamedSketch {
    /// Bytes that cross the link.
    pub(super) fn bytes(&self) -> u64 {
        self.from.len() as u64
    }

    /// Brings it to the device.
    pub(super) fn copy(&self, device: &Device, queue: Queue) -> Result<(), CudaError> {
        device.copy(queue, &self.to, &self.from)
    }
}

impl Loader<'_> {
    /// Places for the sketches that are copied.
    pub(super) fn sketch_places(&self) -> Vec<View> {
        let plan = self.plan;
        let n = self.split.manifest().config.intermediate_size - plan.always_neurons;
        let of_layer = layer_sketch_bytes(self.split, n);
        (0..plan.streamed_sketches.min(N_PLACES)).map(|_| self.arena.take(of_layer as usize)).collect()
    }

    /// The sketch of layer `l`, if the split has any, where the plan says.
    pub(super) fn sketch(&self, l: usize) -> Result<Option<(DeviceSketch, Option<StreamedSketch>)>> {
        let (first, hidden) = (self.plan.always_neurons, self.plan.hidden_size);
        let Some(sketch) = sketch_behind(self.split, l, first, self.active.get(l))? else { return Ok(None) };
        let n_neurons = sketch.n_neurons();
        let [gate, up, down] = [0, 1, 2].map(|part| sketch_planes(sketch.matrix(part, hidden)));
        let values =
            [&sketch.gate_sd, &sketch.up_sd, &sketch.down_norm, &sketch.down_error].map(Vec::as_slice).concat();
        let parts: [&[u8]; N_PARTS] =
            [&gate, &up, &down, bytemuck::cast_slice(&values), bytemuck::cast_slice(&sketch.columns)];
        let nth = nth_streamed(l, self.split.layers().len(), self.plan.streamed_sketches);
        let (views, streamed) = match nth {
            None => {
                let mut views = Vec::with_capacity(N_PARTS);
                for part in parts {
                    views.push(self.arena.put(self.device, part)?);
                }
                (views, None)
            }
            Some(nth) => {
                let (views, streamed) = self.pinned_sketch(parts, &self.sketch_places[nth % N_PLACES])?;
                (views, Some(streamed))
            }
        };
        let [gate, up, down, neurons, columns]: [View; N_PARTS] =
            views.try_into().expect("a view for each part of a sketch");
        Ok(Some((DeviceSketch { gate, up, down, neurons, columns, first, n_neurons, hidden }, streamed)))
    }

    /// The parts one behind the other in pinned memory, and where they are in `place`.
    fn pinned_sketch(&self, parts: [&[u8]; N_PARTS], place: &View) -> Result<(Vec<View>, StreamedSketch)> {
        let bytes = parts.iter().map(|part| aligned(part.len() as u64)).sum::<u64>() as usize;
        let mut host = AlignedBuf::zeroed(bytes)?;
        let (mut views, mut at) = (Vec::with_capacity(N_PARTS), 0);
        for part in parts {
            host[at..at + part.len()].copy_from_slice(part);
            views.push(place.slice(at, part.len()));
            at += aligned(part.len() as u64) as usize;
        }
        let from = self.device.pin(host)?.slice(0, bytes);
        Ok((views, StreamedSketch { from, to: place.slice(0, bytes) }))
    }
}

impl Layer {
    /// Its sketch, if that lies in pinned memory.
    pub(super) fn streamed_sketch(&self) -> Option<&StreamedSketch> {
        match &self.chooser {
            Some(DeviceChooser::Sketch(_, streamed)) => streamed.as_ref(),
            _ => None,
        }
    }
}

/// Begins to copy the first sketch that layers from `first` on need, when all before is done: then, both places are free but for that
/// of the layer before.
pub(super) fn copy_next(device: &Device, model: &Model, first: usize) -> Result<(), CudaError> {
    let Some(next) = model.layers[first..].iter().find_map(Layer::streamed_sketch) else { return Ok(()) };
    device.order(Queue::Compute, Queue::Copy)?;
    next.copy(device, Queue::Copy)
}

/// Before layer `l` reads its sketch: that is there, and the next one is on its way.
pub(super) fn wait_for_sketch(device: &Device, model: &Model, l: usize) -> Result<(), CudaError> {
    if model.layers[l].streamed_sketch().is_none() {
        return Ok(());
    }
    device.order(Queue::Copy, Queue::Compute)?;
    copy_next(device, model, l + 1)
}

impl Model {
    /// Bytes of sketches that a token reads over the link.
    pub(super) fn streamed_bytes(&self) -> u64 {
        self.layers.iter().filter_map(Layer::streamed_sketch).map(StreamedSketch::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_spread_evenly_and_the_last_layer_is_one() {
        for (n_layers, n_streamed) in [(80, 41), (4, 3), (30, 30), (7, 0), (5, 1)] {
            let nth: Vec<_> = (0..n_layers).map(|l| nth_streamed(l, n_layers, n_streamed)).collect();
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
