//! Weights that no sound model has: values that are not finite, tensors of nothing but zeros.

use crate::error::Result;
use crate::{Error, Format, LayerFile, Split, TensorEntry};
use thermocline_kernels::{BundleLayout, Encoding, LayerLayout};

/// The three tensors of a bundle, in its order of rows.
const PROJECTIONS: [&str; 3] = ["gate", "up", "down"];

/// One of them, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// The canonical tensor name.
    pub tensor: String,
    /// The layer and the checkpoint's number of the neuron, if it is a feed-forward weight.
    pub neuron: Option<(usize, u32)>,
    /// What it is.
    pub kind: FlawKind,
}

/// What can be wrong with a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlawKind {
    /// NaN or infinite, or in a group whose scale is: indices into the canonical tensor. Of a group, the first column.
    NotFinite {
        /// The row.
        row: usize,
        /// The column.
        column: usize,
    },
    /// Every weight of the tensor is zero (in quantised tensors: every scale).
    AllZero,
}

impl std::fmt::Display for Flaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.tensor)?;
        if let Some((layer, neuron)) = self.neuron {
            write!(f, "layer {layer}, neuron {neuron}: ")?;
        }
        match self.kind {
            FlawKind::NotFinite { row, column } => write!(f, "the weight at [{row}, {column}] is not finite"),
            FlawKind::AllZero => f.write_str("every weight is zero"),
        }
    }
}

impl LayerFile {
    /// The first flaw among `bundles`, the neurons of the layer from `first` on in split order. Only if they are all of
    /// the layer's can a tensor be called all zero.
    pub fn flaw(&self, first: usize, bundles: &[u8]) -> Option<Flaw> {
        self.flaw_in(self.bundles(), first, bundles)
    }

    /// The same where bundles lie in memory as `all` says.
    pub fn flaw_in(&self, all: &LayerLayout, first: usize, bundles: &[u8]) -> Option<Flaw> {
        let layer = self.layer();
        let tensor = |which: usize| format!("model.layers.{layer}.mlp.{}_proj.weight", PROJECTIONS[which]);
        let n = all.n_in(first, bundles.len());
        let mut zero = [n == self.order().len(); 3];
        for (place, &id) in self.order().iter().enumerate().skip(first).take(n) {
            let (layout, bundle) = (all.of(place), all.bundle(bundles, first, place));
            for (which, zero) in zero.iter_mut().enumerate() {
                let row = layout.row(bundle, which);
                if let Some(at) = layout.encoding().first_not_finite(row) {
                    // The column of the down matrix is stored as a row.
                    let (row, column) = if which == 2 { (at, id as usize) } else { (id as usize, at) };
                    let kind = FlawKind::NotFinite { row, column };
                    return Some(Flaw { tensor: tensor(which), neuron: Some((layer, id)), kind });
                }
                // A residual of zeros is a sketch without an error.
                *zero = *zero && layout.encoding() != Encoding::R4 && layout.encoding().is_zero(row);
            }
        }
        let which = zero.iter().position(|z| *z)?;
        Some(Flaw { tensor: tensor(which), neuron: None, kind: FlawKind::AllZero })
    }
}

impl TensorEntry {
    /// The first flaw among `bytes`, an f32 tensor's first rows. A bias may be all zero.
    pub fn flaw(&self, bytes: &[u8]) -> Option<Flaw> {
        let value = |b: &[u8]| b.try_into().map_or(0.0, f32::from_le_bytes);
        let at = bytes.chunks_exact(4).position(|b| !value(b).is_finite())?;
        let kind = FlawKind::NotFinite { row: at / self.columns, column: at % self.columns };
        Some(Flaw { tensor: self.name.clone(), neuron: None, kind })
    }

    /// The first flaw among `bytes`, the first rows of an encoded matrix of this name in `layout`. Only a whole matrix
    /// is called all zero.
    pub fn matrix_flaw(&self, layout: &BundleLayout, bytes: &[u8]) -> Option<Flaw> {
        let flaw = |kind| Some(Flaw { tensor: self.name.clone(), neuron: None, kind });
        let encoding = layout.encoding();
        let mut zero = bytes.len() == self.rows * layout.bundle_bytes();
        for (row, bytes) in bytes.chunks_exact(layout.bundle_bytes()).enumerate() {
            let encoded = layout.row(bytes, 0);
            if let Some(column) = encoding.first_not_finite(encoded) {
                return flaw(FlawKind::NotFinite { row, column });
            }
            zero = zero && encoding.is_zero(encoded);
        }
        if zero { flaw(FlawKind::AllZero) } else { None }
    }
}

impl Split {
    /// Reads every weight and checks it: checksums first, then values. Memory: one layer's bundles, or one tensor.
    /// `progress(done, total)` counts layers and files.
    ///
    /// # Errors
    /// [`Error::Unsound`] for the first weight that is not finite or tensor that is all zero; and if a file cannot be
    /// read or is damaged.
    pub fn check_weights(&self, progress: &dyn Fn(usize, usize)) -> Result<()> {
        let total = self.layers().len() + 2;
        let sound = |path: &std::path::Path, flaw: Option<Flaw>| match flaw {
            Some(flaw) => Err(Error::Unsound { path: path.to_owned(), flaw }),
            None => Ok(()),
        };
        for (l, layer) in self.layers().iter().enumerate() {
            progress(l, total);
            let mut bundles = vec![0; layer.bundles().bytes(0..layer.order().len())];
            layer.read_chunks(0..layer.n_chunks(), &mut bundles)?;
            sound(layer.path(), layer.flaw(0, &bundles))?;
        }
        for (i, file) in [self.resident(), self.predictors()].into_iter().enumerate() {
            progress(self.layers().len() + i, total);
            for tensor in file.tensors() {
                let flaw = match tensor.format.encoding() {
                    None if tensor.format == Format::F32 => tensor.flaw(&file.read(&tensor.name)?),
                    None => file.read(&tensor.name).map(|_| None)?,
                    Some(encoding) if i > 0 => {
                        let layout = BundleLayout::matrix_row(encoding, tensor.columns, 0);
                        let bytes = file.read(&tensor.name)?;
                        layout.and_then(|layout| tensor.matrix_flaw(&layout, &bytes))
                    }
                    Some(_) => {
                        let matrix = self.matrix(&tensor.name)?;
                        let mut bytes = vec![0; matrix.bytes() as usize];
                        matrix.read_start(&mut bytes)?;
                        tensor.matrix_flaw(matrix.layout(), &bytes)
                    }
                };
                sound(file.path(), flaw)?;
            }
        }
        progress(total, total);
        Ok(())
    }
}
