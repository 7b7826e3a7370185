//! The files of a layer put together: planes over their base, sections one behind the other.

use crate::Error;
use crate::content::Content;
use crate::error::{Result, corrupt};
use crate::manifest::{LayerEntry, Manifest, PlaneEntry, SectionEntry};
use crate::plane_file::PlaneFile;
use crate::planes::{Plane, further_planes, joined};
use crate::precision::Planes;
use crate::sealed::Sealed;
use std::ops::Range;
use std::path::Path;
use thermocline_kernels::{BundleLayout, Encoding, LayerLayout};

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
                n_front = planes.n_front(base.place().layer_neurons, chunk_neurons);
            }
            let place = base.place().neurons.clone();
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
        if order.len() != first.place().layer_neurons {
            let reason = format!("{} of a layer's {} neurons", order.len(), first.place().layer_neurons);
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
        let same = plane.place() == base.place()
            && plane.content().hidden_size() == base.content().hidden_size()
            && plane.order() == base.order()
            && plane.chunk_neurons() == base.chunk_neurons();
        if !same {
            return Err(corrupt(plane.path(), "header", "does not fit the layer's base"));
        }
    }
    Ok(())
}

/// That `base` continues the layer of `first` at neuron `at`.
fn check_place(first: &PlaneFile, base: &PlaneFile, at: usize) -> Result<()> {
    let (of_first, place) = (first.place(), base.place());
    let same = (place.layer, place.layer_neurons, base.chunk_neurons())
        == (of_first.layer, of_first.layer_neurons, first.chunk_neurons());
    let end = place.neurons.end;
    let whole = end == place.layer_neurons || end.is_multiple_of(base.chunk_neurons());
    match same && place.neurons.start == at && whole {
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

/// Opens the files of a section, the base first, as far as they are used.
pub(crate) fn open_group(
    dir: &Path,
    listed: &[PlaneEntry],
    encoding: Encoding,
    planes: Planes,
) -> Result<Vec<PlaneFile>> {
    let open = |entry: &PlaneEntry| {
        let path = dir.join(&entry.file);
        let plane = PlaneFile::open(&path)?;
        if plane.file_bytes() != entry.file_bytes || plane.checksum() != entry.checksum {
            return Err(corrupt(&path, "header", "does not fit the manifest: files of two splits are mixed"));
        }
        Ok(plane)
    };
    let Some((base, entries)) = listed.split_first() else {
        return Err(corrupt(&dir.join(Manifest::FILE), "hot", format!("a section in {encoding} without files")));
    };
    let further = further_planes(encoding);
    if further.len() != entries.len() {
        let reason = format!("{} planes of a layer in {encoding}", entries.len());
        return Err(corrupt(&dir.join(&base.file), "planes", reason));
    }
    let mut files = vec![open(base)?];
    if matches!(files[0].content(), Content::Bundles(layout) if layout.encoding() != encoding.base()) {
        let reason = format!("not what the manifest says, the base of {encoding}");
        return Err(corrupt(&dir.join(&base.file), "encoding", reason));
    }
    let place = files[0].place();
    if planes.n_front(place.layer_neurons, files[0].chunk_neurons()) > place.neurons.start {
        let taken = further.iter().zip(entries).filter(|(plane, _)| planes.precision().takes(**plane));
        for (_, entry) in taken {
            files.push(open(entry)?);
        }
    }
    Ok(files)
}

/// What the manifest says of a layer whose files are written: those of each section, the base first.
pub(crate) fn layer_entry(dir: &Path, sections: &[(usize, Encoding)], files: &[Vec<String>]) -> Result<LayerEntry> {
    let entry = |file: &String| {
        let written = PlaneFile::open(&dir.join(file))?;
        Ok(PlaneEntry { file: file.clone(), file_bytes: written.file_bytes(), checksum: written.checksum() })
    };
    let mut hot = Vec::with_capacity(sections.len());
    for ((neurons, encoding), files) in sections.iter().zip(files) {
        let planes = files.iter().map(entry).collect::<Result<Vec<_>>>()?;
        hot.push(SectionEntry { neurons: *neurons, encoding: encoding.name().to_owned(), planes });
    }
    let mut rest = hot.pop().into_iter().flat_map(|s| s.planes);
    match rest.next() {
        Some(PlaneEntry { file, file_bytes, checksum }) => {
            Ok(LayerEntry { file, file_bytes, checksum, planes: rest.collect(), hot })
        }
        None => Err(Error::Settings { what: "a layer without files".to_owned() }),
    }
}
