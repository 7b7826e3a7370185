//! What planes of weights take: bits, against what they could take at best, and the time that decoding costs.

use crate::Result;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use thermocline_kernels::exact::residual;
use thermocline_kernels::{BundleLayout, Encoding, Kernels, LayoutSection};
use thermocline_split::{LayerFile, Split};

/// Layers that are looked at: every layer would say the same.
const LAYERS: usize = 4;
/// How long each decoding is measured.
const MEASURED: Duration = Duration::from_millis(300);
/// zstd's level; higher ones win next to nothing on such data.
const ZSTD_LEVEL: i32 = 3;

/// One plane of a split's feed-forward weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlaneStudy {
    /// `q4`, `coarse`, `final`, ...
    pub plane: String,
    /// As stored, lengths and all.
    pub bits_per_weight: f64,
    /// Entropy of its symbols, each for itself: of codes of 4 or 8 bits; of a final plane the logarithm of the number
    /// of bfloat16 that the planes before leave; of bf16 and bf16x sign and mantissa (8 bits) and the exponents' entropy.
    pub entropy_bits: f64,
    /// After zstd.
    pub zstd_bits: f64,
}

/// The planes of a split, together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanesStudy {
    /// That of most of the first layer's neurons; those in others are not looked at.
    pub encoding: String,
    /// Base first.
    pub planes: Vec<PlaneStudy>,
    /// All planes, of the bits of bf16.
    pub share_of_bf16: f64,
    /// What [`PlaneStudy::entropy_bits`] is for bf16.
    pub bf16_entropy_bits: f64,
    /// Gigabytes of bf16 that one thread decodes in a second, from memory; `None` where nothing is decoded.
    pub decode_gb_s: Option<f64>,
    /// The same of a plain copy.
    pub copy_gb_s: f64,
    /// Seconds of one thread to decode all feed-forward weights once: what a dense token costs besides products.
    pub decode_seconds_per_token: Option<f64>,
}

/// Looks at the neurons of some layers of a split that was opened with all its planes.
///
/// # Errors
/// If the split cannot be read.
pub fn study_planes(split: &Split) -> Result<PlanesStudy> {
    let n = split.layers().len();
    let mut counts = Counts::default();
    let layers = || split.layers().iter().step_by(n.div_ceil(LAYERS).max(1));
    let first = split.layers()[0].bundles().largest().bundles().encoding();
    for layer in layers() {
        for section in layer.bundles().sections().iter().filter(|s| s.bundles().encoding() == first) {
            counts.add(section.bundles(), &bundles_of(layer, section)?);
        }
    }
    let (decode_gb_s, copy_gb_s) = speed(split)?;
    let planes = counts.planes(first);
    let total = (3 * split.manifest().config.hidden_size * split.manifest().config.intermediate_size * n) as f64;
    Ok(PlanesStudy {
        encoding: first.name().to_owned(),
        share_of_bf16: planes.iter().map(|p| p.bits_per_weight).sum::<f64>() / 16.0,
        planes,
        bf16_entropy_bits: 8.0 + entropy(&counts.exponents),
        decode_gb_s,
        copy_gb_s,
        decode_seconds_per_token: decode_gb_s.map(|speed| 2.0 * total / 1e9 / speed),
    })
}

/// What was seen of all rows.
struct Counts {
    weights: f64,
    /// Stored and zstd-compressed bytes of base, coarse and final planes.
    bytes: [f64; 3],
    compressed: [f64; 3],
    codes: Vec<u64>,
    coarse: Vec<u64>,
    exponents: Vec<u64>,
    /// Sum of the logarithms of cell sizes.
    cell_bits: f64,
}

impl Default for Counts {
    fn default() -> Self {
        let counts = || vec![0; 256];
        Self {
            weights: 0.0,
            bytes: [0.0; 3],
            compressed: [0.0; 3],
            codes: counts(),
            coarse: counts(),
            exponents: counts(),
            cell_bits: 0.0,
        }
    }
}

impl Counts {
    fn add(&mut self, layout: &BundleLayout, bundles: &[u8]) {
        let (encoding, hidden) = (layout.encoding(), layout.hidden_size());
        let kernels = Kernels::detect();
        let (mut planes, mut values) = ([const { Vec::new() }; 3], vec![0.0f32; hidden]);
        let (base, coarse) = (layout.base_bytes(), layout.coarse_bytes());
        for bundle in bundles.chunks_exact(layout.bundle_bytes()) {
            let used = if encoding.has_stream() { layout.used_bytes(bundle).min(bundle.len()) } else { bundle.len() };
            let ends = if encoding == encoding.base() { [used; 3] } else { [base, base + coarse, used] };
            let mut from = 0;
            for (plane, to) in planes.iter_mut().zip(ends) {
                plane.extend_from_slice(&bundle[from..to.max(from)]);
                from = to.max(from);
            }
            for which in 0..3 {
                let row = layout.row(bundle, which);
                kernels.unpack(encoding, row, &mut values);
                values.iter().for_each(|v| self.exponents[(v.to_bits() >> 23 & 0xff) as usize] += 1);
                let nibbles = |counts: &mut [u64], bytes: &[u8]| {
                    bytes.iter().for_each(|b| {
                        counts[usize::from(b & 15)] += 1;
                        counts[usize::from(b >> 4)] += 1;
                    });
                };
                match encoding.base() {
                    Encoding::Q4 => nibbles(&mut self.codes, row.codes),
                    Encoding::Q8 => row.codes.iter().for_each(|&c| self.codes[usize::from(c)] += 1),
                    _ => {}
                }
                nibbles(&mut self.coarse, row.coarse);
                if encoding.has_stream() && encoding != Encoding::Bf16x {
                    self.cell_bits += residual::cell_bits(encoding, row);
                }
            }
            self.weights += 3.0 * hidden as f64;
        }
        for (i, plane) in planes.iter().enumerate() {
            self.bytes[i] += plane.len() as f64;
            let frame = zstd::bulk::compress(plane, ZSTD_LEVEL).map_or(plane.len(), |f| f.len());
            self.compressed[i] += frame.min(plane.len()) as f64;
        }
    }

    fn planes(&self, encoding: Encoding) -> Vec<PlaneStudy> {
        let scales = encoding.scale_bytes(32) as f64 / 4.0;
        let base = match encoding.base() {
            Encoding::Bf16 | Encoding::Bf16x => 8.0 + entropy(&self.exponents),
            _ => entropy(&self.codes) + scales,
        };
        let entropies = [base, entropy(&self.coarse), self.cell_bits / self.weights];
        let names = [encoding.base().name(), "coarse", "final"];
        let stored = names.into_iter().zip(entropies).zip(self.bytes.iter().zip(&self.compressed));
        let plane = |((name, entropy_bits), (bytes, compressed)): ((&str, f64), (&f64, &f64))| PlaneStudy {
            plane: name.to_owned(),
            bits_per_weight: 8.0 * bytes / self.weights,
            entropy_bits,
            zstd_bits: 8.0 * compressed / self.weights,
        };
        stored.map(plane).filter(|p| p.bits_per_weight > 0.0).collect()
    }
}

/// Of symbols that were counted, in bits.
fn entropy(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let shares = counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / total);
    shares.map(|p| -p * p.log2()).sum()
}

/// The bundles of one of a layer's sections.
fn bundles_of(layer: &LayerFile, section: &LayoutSection) -> Result<Vec<u8>> {
    let (neurons, each) = (section.neurons(), layer.chunk_neurons());
    let mut bundles = vec![0; layer.bundles().bytes(neurons.clone())];
    layer.read_chunks(neurons.start / each..neurons.end.div_ceil(each), &mut bundles)?;
    Ok(bundles)
}

/// Gigabytes of bf16 a second by one thread: decoded from the first layer, and copied.
fn speed(split: &Split) -> Result<(Option<f64>, f64)> {
    let section = split.layers()[0].bundles().largest();
    let (layout, kernels) = (*section.bundles(), Kernels::detect());
    let bundles = bundles_of(&split.layers()[0], section)?;
    let mut bits = vec![0u16; layout.hidden_size()];
    let bf16_bytes = (section.neurons().len() * 3 * 2 * layout.hidden_size()) as f64;
    let best = |pass: &mut dyn FnMut()| {
        let (mut best, begin) = (f64::INFINITY, Instant::now());
        while begin.elapsed() < MEASURED {
            let start = Instant::now();
            pass();
            best = best.min(start.elapsed().as_secs_f64());
        }
        bf16_bytes / 1e9 / best
    };
    let from = vec![0x3f80u16; bf16_bytes as usize / 2];
    let mut to = from.clone();
    let copy = best(&mut || std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from)));
    let decode = layout.encoding().has_stream().then(|| {
        best(&mut || {
            for bundle in bundles.chunks_exact(layout.bundle_bytes()) {
                (0..3).for_each(|which| kernels.decode(layout.encoding(), layout.row(bundle, which), &mut bits));
            }
            std::hint::black_box(&bits);
        })
    });
    Ok((decode, copy))
}
