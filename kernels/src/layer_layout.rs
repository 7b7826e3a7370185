use crate::{BundleLayout, Encoding};
use std::ops::Range;

/// Bundles begin at multiples of this.
const UNIT: usize = 16;

/// Neighbouring neurons of a layer whose bundles have one layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutSection {
    neurons: Range<usize>,
    /// Bytes of the sections before.
    offset: usize,
    bundles: BundleLayout,
    /// Where each bundle begins in the section, and where the last ends, in units of [`UNIT`]; `None`: all are as long as
    /// the layout says.
    places: Option<Vec<u32>>,
}

impl LayoutSection {
    /// Its neurons: places in split order.
    pub fn neurons(&self) -> Range<usize> {
        self.neurons.clone()
    }

    /// The layout of each of its bundles.
    pub fn bundles(&self) -> &BundleLayout {
        &self.bundles
    }

    /// Where among the layer's bytes the bundle of neuron `n` begins.
    #[inline]
    fn offset(&self, n: usize) -> usize {
        let i = n - self.neurons.start;
        self.offset + self.places.as_ref().map_or(i * self.bundles.bundle_bytes(), |places| places[i] as usize * UNIT)
    }

    /// The bundle of the section's neuron `n` among `bytes`, which begin with byte `from` of the layer's.
    ///
    /// # Panics
    /// If it is not among them.
    #[inline]
    pub fn bundle<'a>(&self, bytes: &'a [u8], from: usize, n: usize) -> &'a [u8] {
        &bytes[self.offset(n) - from..self.offset(n + 1) - from]
    }
}

/// Where the bundles of a layer's neurons lie, one behind the other in split order: in sections, hottest first, each with a
/// layout of its own. Most layers have one section; hot neurons in another encoding, or with further planes, are one of
/// their own. Neighbouring sections differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLayout {
    /// At least one, none of them empty.
    sections: Vec<LayoutSection>,
}

impl LayerLayout {
    /// Sections of so many neurons each, those of one layout put together; `None` if there are no neurons, or the hidden
    /// sizes differ.
    pub fn new(sections: impl IntoIterator<Item = (usize, BundleLayout)>) -> Option<Self> {
        let mut all: Vec<LayoutSection> = Vec::new();
        let mut at = 0;
        for (n, bundles) in sections.into_iter().filter(|(n, _)| *n > 0) {
            let first = all.last().map_or(0, |last| last.neurons.end);
            match all.last_mut() {
                Some(last) if last.bundles == bundles => last.neurons.end += n,
                _ => all.push(LayoutSection { neurons: first..first + n, offset: at, bundles, places: None }),
            }
            at += n * bundles.bundle_bytes();
        }
        let hidden_size = all.first()?.bundles.hidden_size();
        all.iter().all(|s| s.bundles.hidden_size() == hidden_size).then_some(Self { sections: all })
    }

    /// The sections, hottest first.
    pub fn sections(&self) -> &[LayoutSection] {
        &self.sections
    }

    /// The layout of all bundles; `None` if there are several.
    pub fn uniform(&self) -> Option<&BundleLayout> {
        match self.sections.as_slice() {
            [only] => Some(&only.bundles),
            _ => None,
        }
    }

    /// The encodings of its neurons, hottest first.
    pub fn encodings(&self) -> impl Iterator<Item = Encoding> + '_ {
        self.sections.iter().map(|s| s.bundles.encoding())
    }

    /// Whether a row of every neuron can be read without the others: there are no streams and no further planes.
    pub fn has_plain_rows(&self) -> bool {
        self.encodings().all(Encoding::is_plain)
    }

    /// The section with most bytes.
    pub fn largest(&self) -> &LayoutSection {
        let bytes = |s: &&LayoutSection| s.neurons.len() * s.bundles.bundle_bytes();
        self.sections.iter().max_by_key(bytes).unwrap_or(&self.sections[0])
    }

    /// The section of the coldest neurons.
    pub fn coldest(&self) -> &LayoutSection {
        &self.sections[self.sections.len() - 1]
    }

    /// Columns of each row.
    pub fn hidden_size(&self) -> usize {
        self.sections[0].bundles.hidden_size()
    }

    /// Neurons of the layer.
    pub fn n_neurons(&self) -> usize {
        self.sections.last().map_or(0, |s| s.neurons.end)
    }

    /// Bytes of all bundles before that of neuron `n`; of all for the number behind the last.
    ///
    /// # Panics
    /// If there is no such neuron, here and below.
    #[inline]
    pub fn offset(&self, n: usize) -> usize {
        assert!(n <= self.n_neurons(), "neuron {n} of {}", self.n_neurons());
        let section = self.sections.iter().find(|s| n <= s.neurons.end).unwrap_or(&self.sections[0]);
        section.offset(n)
    }

    /// Bytes of the bundles of `neurons`.
    pub fn bytes(&self, neurons: Range<usize>) -> usize {
        self.offset(neurons.end) - self.offset(neurons.start)
    }

    /// Bundles, from neuron `first` on, that take `bytes`, rounded down.
    pub fn n_in(&self, first: usize, bytes: usize) -> usize {
        let (mut left, mut n) = (bytes, 0);
        for (neurons, section) in self.within(first..self.n_neurons()) {
            let begin = section.offset(neurons.start);
            let whole = match &section.places {
                None => neurons.len().min(left / section.bundles.bundle_bytes()),
                Some(places) => {
                    let ends = &places[neurons.start + 1 - section.neurons.start..];
                    ends.partition_point(|&end| section.offset + end as usize * UNIT - begin <= left)
                }
            };
            n += whole;
            left -= section.offset(neurons.start + whole) - begin;
            if whole < neurons.len() {
                break;
            }
        }
        n
    }

    /// The layout of the first bundles where these take `lengths` ([`BundleLayout::trimmed_bytes`]); `None` for none.
    ///
    /// # Panics
    /// If there are more than neurons.
    pub fn trimmed(&self, lengths: &[usize]) -> Option<Self> {
        let (mut sections, mut at) = (Vec::new(), 0);
        for (neurons, section) in self.within(0..lengths.len()) {
            let mut end = 0;
            let ends = lengths[neurons.clone()].iter().map(|length| {
                end += (length / UNIT) as u32;
                end
            });
            let has_stream = section.bundles.encoding().has_stream();
            let places = has_stream.then(|| [0].into_iter().chain(ends).collect::<Vec<u32>>());
            let trimmed = LayoutSection { neurons, offset: at, bundles: section.bundles, places };
            at = trimmed.offset(trimmed.neurons.end);
            sections.push(trimmed);
        }
        (!sections.is_empty()).then_some(Self { sections })
    }

    /// The layout of neuron `n`'s bundle.
    #[inline]
    pub fn of(&self, n: usize) -> &BundleLayout {
        &self.section(n).bundles
    }

    #[inline]
    fn section(&self, n: usize) -> &LayoutSection {
        let found = self.sections.iter().find(|s| n < s.neurons.end);
        let Some(section) = found else { panic!("neuron {n} of {}", self.n_neurons()) };
        section
    }

    /// The bundle of neuron `n` among `bytes`, which begin with the bundle of neuron `first`.
    #[inline]
    pub fn bundle<'a>(&self, bytes: &'a [u8], first: usize, n: usize) -> &'a [u8] {
        self.section(n).bundle(bytes, self.offset(first), n)
    }

    /// Bytes of the longest bundle among `neurons`; 0 for none.
    pub fn longest(&self, neurons: Range<usize>) -> usize {
        self.within(neurons).map(|(_, s)| s.bundles.bundle_bytes()).max().unwrap_or(0)
    }

    /// What `neurons` have of each section, in order.
    pub fn within(&self, neurons: Range<usize>) -> impl Iterator<Item = (Range<usize>, &LayoutSection)> {
        let common = move |s: &LayoutSection| neurons.start.max(s.neurons.start)..neurons.end.min(s.neurons.end);
        self.sections.iter().map(move |s| (common(s), s)).filter(|(part, _)| !part.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_lie_behind_each_other_across_sections() {
        let [q4, q8, bf16] =
            [Encoding::Q4, Encoding::Q8, Encoding::Bf16].map(|e| BundleLayout::new(e, 64).expect("whole groups"));
        let layout = LayerLayout::new([(0, bf16), (3, bf16), (2, q8), (0, q4), (2, q8), (5, q4)]).expect("neurons");
        let sizes = [[bf16; 3].as_slice(), &[q8; 4], &[q4; 5]].concat();
        assert_eq!((layout.sections().len(), layout.n_neurons(), layout.uniform()), (3, 12, None));
        let all: Vec<u8> = sizes.iter().enumerate().flat_map(|(n, l)| vec![n as u8; l.bundle_bytes()]).collect();
        assert_eq!(layout.offset(12), all.len());
        for first in 0..=12 {
            let bytes = &all[layout.offset(first)..];
            for (n, size) in sizes.iter().enumerate().skip(first) {
                let bundle = layout.bundle(bytes, first, n);
                assert!(layout.of(n) == size && bundle.len() == size.bundle_bytes(), "{n}");
                assert!(bundle.iter().all(|&b| usize::from(b) == n), "{n} from {first}");
                let upto = layout.bytes(first..n);
                assert_eq!((layout.n_in(first, upto), layout.n_in(first, upto + 1)), (n - first, n - first));
            }
            let longest = sizes[first..].iter().map(BundleLayout::bundle_bytes).max();
            assert_eq!(layout.longest(first..12), longest.unwrap_or(0));
            let parts: Vec<usize> = layout.within(first..12).flat_map(|(part, _)| part).collect();
            assert!(parts.into_iter().eq(first..12));
        }
        assert_eq!(layout.largest().neurons(), 0..3);
        // Without the room behind streams.
        let bf16x = BundleLayout::with_streams(Encoding::Bf16x, 64, 500).expect("any width");
        let padded = LayerLayout::new([(2, q8), (4, bf16x), (3, q4)]).expect("neurons");
        for n in [1, 2, 4, 6, 8, 9] {
            let lengths: Vec<usize> =
                (0..n).map(|i| padded.of(i).bundle_bytes() - 16 * (i % 3 * usize::from((2..6).contains(&i)))).collect();
            let all: Vec<u8> = lengths.iter().enumerate().flat_map(|(n, &bytes)| vec![n as u8; bytes]).collect();
            let trimmed = padded.trimmed(&lengths).expect("neurons");
            assert_eq!((trimmed.n_neurons(), trimmed.offset(n)), (n, all.len()));
            for first in 0..n {
                for (i, &length) in lengths.iter().enumerate().skip(first) {
                    let bundle = trimmed.bundle(&all[trimmed.offset(first)..], first, i);
                    assert!(bundle.len() == length && bundle.iter().all(|&b| usize::from(b) == i), "{i} of {n}");
                    let upto = trimmed.bytes(first..i);
                    assert_eq!((trimmed.n_in(first, upto), trimmed.n_in(first, upto + 15)), (i - first, i - first));
                }
            }
        }
        assert!(padded.trimmed(&[]).is_none());
        let other = BundleLayout::new(Encoding::Q4, 32).expect("whole groups");
        assert!(LayerLayout::new([(3, q4), (1, other)]).is_none() && LayerLayout::new([(0, q4)]).is_none());
        assert_eq!(LayerLayout::new([(3, q4), (1, q4)]).as_ref().and_then(LayerLayout::uniform), Some(&q4));
    }
}
