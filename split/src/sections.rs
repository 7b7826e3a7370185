//! The files of a layer put together: planes over their base, sections one behind the other.

use crate::content::Content;
use crate::error::{Result, corrupt};
use crate::plane_file::PlaneFile;
use crate::planes::{Plane, joined};
use crate::precision::Planes;
use std::ops::Range;
use thermocline_kernels::{BundleLayout, LayerLayout};

/// Neighbouring chunks whose bundles are made of the same planes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Section {
    /// Chunks of the layer.
    pub chunks: Range<usize>,
    /// The planes: numbers of files, the base first.
    pub files: Range<usize>,
    /// The chunk of the layer that the files begin with.
    pub first_chunk: usize,
}

/// The files of a layer, checked against each other.
#[derive(Debug)]
pub(crate) struct Sections {
    pub files: Vec<PlaneFile>,
    pub sections: Vec<Section>,
    /// The checkpoint's number of the neuron at each place.
    pub order: Vec<u32>,
    /// Of the planes put together.
    pub layout: LayerLayout,
}

impl Sections {
    /// Of one group of files, the base first, for each part of the layer. `planes` says how many neurons have the further
    /// planes; where they are not used, their files need not be there.
    ///
    /// # Errors
    /// If the files are not of one layer, or a group's planes make no encoding.
    pub(crate) fn new(groups: Vec<Vec<PlaneFile>>, planes: Planes) -> Result<Self> {
        let (mut files, mut sections, mut order) = (Vec::new(), Vec::new(), Vec::new());
        let (mut layouts, mut n_front) = (Vec::new(), 0);
        for mut group in groups {
            check_group(&group)?;
            let Some(base) = group.first_mut() else { unreachable!("a base in every group") };
            let chunk_neurons = base.chunk_neurons();
            if files.is_empty() {
                n_front = planes.n_front(base.layer_neurons(), chunk_neurons);
            }
            let place = base.place();
            check_place(files.first().unwrap_or(base), base, order.len())?;
            order.append(&mut base.take_order());
            group[1..].iter_mut().for_each(|plane| drop(plane.take_order()));
            let border = n_front.clamp(place.start, place.end);
            let chunks_of = |neurons: &Range<usize>| neurons.start / chunk_neurons..neurons.end.div_ceil(chunk_neurons);
            for (neurons, n_files) in [(place.start..border, group.len()), (border..place.end, 1)] {
                if neurons.is_empty() {
                    continue;
                }
                layouts.push((neurons.len(), layout(&group[..n_files], planes)?));
                let chunks = chunks_of(&neurons);
                let files = files.len()..files.len() + n_files;
                sections.push(Section { chunks, files, first_chunk: place.start / chunk_neurons });
            }
            files.append(&mut group);
        }
        let Some(first) = files.first() else { unreachable!("a layer has files") };
        if order.len() != first.layer_neurons() {
            let reason = format!("{} of a layer's {} neurons", order.len(), first.layer_neurons());
            return Err(corrupt(first.path(), "header", reason));
        }
        let mut seen = vec![false; order.len()];
        for &id in &order {
            // Each file has checked its own numbers.
            if std::mem::replace(&mut seen[id as usize], true) {
                return Err(corrupt(first.path(), "order", format!("neuron {id} is in two files of the layer")));
            }
        }
        let misfit = || corrupt(first.path(), "header", "sections of different models");
        let layout = LayerLayout::new(layouts).ok_or_else(misfit)?;
        Ok(Self { files, sections, order, layout })
    }
}

/// That further planes belong to the base in front of them.
fn check_group(group: &[PlaneFile]) -> Result<()> {
    let Some((base, further)) = group.split_first() else { unreachable!("a base in every group") };
    for plane in further {
        let same = plane.layer() == base.layer()
            && plane.content().hidden_size() == base.content().hidden_size()
            && plane.order() == base.order()
            && plane.place() == base.place()
            && plane.chunk_neurons() == base.chunk_neurons();
        if !same {
            return Err(corrupt(plane.path(), "header", "does not fit the layer's base"));
        }
    }
    Ok(())
}

/// That `base` continues the layer of `first` at neuron `at`.
fn check_place(first: &PlaneFile, base: &PlaneFile, at: usize) -> Result<()> {
    let same = base.layer() == first.layer()
        && base.layer_neurons() == first.layer_neurons()
        && base.chunk_neurons() == first.chunk_neurons();
    let whole = base.place().end == base.layer_neurons() || base.place().end.is_multiple_of(base.chunk_neurons());
    match same && base.place().start == at && whole {
        true => Ok(()),
        false => Err(corrupt(base.path(), "header", "does not continue the layer's other neurons")),
    }
}

/// What the bundles of these planes are together.
fn layout(group: &[PlaneFile], planes: Planes) -> Result<BundleLayout> {
    let Some((base, further)) = group.split_first() else { unreachable!("a base in every group") };
    let Content::Bundles(stored) = *base.content() else {
        return Err(corrupt(base.path(), "encoding", "a further plane where the base should be"));
    };
    let over: Vec<Plane> = further.iter().filter_map(|p| p.content().plane()).collect();
    let total = group.iter().map(|p| p.content().bundle_bytes()).sum();
    let encoding = joined(stored.encoding(), &over).filter(|_| over.len() == further.len());
    let layout = encoding.and_then(|e| BundleLayout::of_bundle_bytes(e, stored.hidden_size(), total));
    layout.ok_or_else(|| {
        let reason = format!("{} planes over {} at {planes}", further.len(), stored.encoding());
        corrupt(base.path(), "encoding", reason)
    })
}
