use crate::{Random, device, poisoned, read, upload};
use proptest::prelude::*;
use std::ops::Range;
use thermocline_kernels::cuda::launch::{WorkList, divide_work};

const NONE: u32 = u32::MAX;

/// A layer's list as `choose` makes it, by what each item is: over the link, fetched, cached, hot.
fn items(layer: &Layer, random: &mut Random) -> [Vec<[u32; 2]>; 4] {
    let last = layer.borders[layer.borders.len() - 2];
    let mut kinds = [const { Vec::new() }; 4];
    for neuron in 0..layer.ffn() {
        if random.below(layer.one_in) > 0 {
            continue;
        }
        // A slot to fill, or rows to read.
        let none = if layer.rows { 0xffff_fff8 | random.below(8) as u32 } else { NONE };
        let slot = if !layer.rows && random.below(3) == 0 { neuron as u32 } else { none };
        // Any number may be that of a place or a slot.
        let (place, cold) = (random.below(1 << 20) as u32, neuron.wrapping_sub(layer.n_hot) as u32);
        let (kind, item) = match if neuron < last { 0 } else { random.below(3) } {
            _ if neuron < layer.n_hot => (3, [neuron as u32, none]),
            0 => (0, [0x4000_0000 | cold, slot]),
            1 => (1, [0xc000_0000 | place, slot]),
            _ => (2, [0x8000_0000 | place, NONE]),
        };
        kinds[kind].push(item);
    }
    kinds
}

#[derive(Debug)]
struct Layer {
    /// Where sections begin, and where the last ends.
    borders: Vec<usize>,
    n_hot: usize,
    /// One neuron in so many is active.
    one_in: usize,
    /// Whether rows are read alone.
    rows: bool,
}

impl Layer {
    fn ffn(&self) -> usize {
        self.borders[self.borders.len() - 1]
    }
}

fn layers() -> impl Strategy<Value = Layer> {
    let sizes = prop::collection::vec(prop_oneof![4 => 1usize..40, 1 => 1000usize..3000], 1..7);
    (sizes, 0.0..1.0f64, 1usize..12, 0usize..3, any::<bool>()).prop_map(|(sizes, share, one_in, at, rows)| {
        let borders: Vec<usize> = std::iter::once(0)
            .chain(sizes.iter().scan(0, |end, n| {
                *end += n;
                Some(*end)
            }))
            .collect();
        let ffn = borders[borders.len() - 1];
        // Within a section, or on a border.
        let n_hot = match at {
            0 => borders[(share * borders.len() as f64) as usize],
            _ => (share * (ffn + 1) as f64) as usize,
        };
        Layer { borders, n_hot, one_in, rows }
    })
}

/// A section's part, in the order of the list.
fn part(
    layer: &Layer,
    neurons: &Range<usize>,
    [link, fetched, cached, hot]: &[Vec<[u32; 2]>; 4],
) -> Vec<Vec<[u32; 2]>> {
    let first_cold = neurons.start.max(layer.n_hot) as u32;
    let is_mine = |n: u32| neurons.contains(&(n as usize));
    let n_hot = layer.n_hot as u32;
    let link = link.iter().map(|[from, to]| [(from & 0x3fff_ffff) + n_hot, *to]).filter(|[n, _]| is_mine(*n));
    let hot = hot.iter().filter(|[n, _]| is_mine(*n)).map(|[n, to]| [n - neurons.start as u32, *to]);
    let of_last = |items: &[[u32; 2]]| if neurons.end == layer.ffn() { items.to_vec() } else { Vec::new() };
    vec![
        link.map(|[n, to]| [0x4000_0000 | (n - first_cold), to]).collect(),
        of_last(fetched),
        of_last(cached),
        hot.collect(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn sections_get_their_items_in_order(layer in layers(), seed: u64) {
        let kinds = items(&layer, &mut Random::new(seed));
        let ffn = layer.ffn();
        let n = kinds.each_ref().map(|kind| kind.len() as u32);
        let n_items = n.iter().sum::<u32>();
        let mut listed = kinds.concat();
        listed.resize(ffn, [NONE; 2]);
        let (ids, totals) = (poisoned(4).view(), poisoned(64).view());
        let work = WorkList {
            ids: ids.clone(),
            items: upload(&listed).view(),
            // The host's are not listed.
            counts: upload(&[n_items, n[0], n[2], n[3], 9, n_items + 9, n[1], 0]).view(),
            totals,
        };
        let neurons: Vec<Range<usize>> = layer.borders.windows(2).map(|ends| ends[0]..ends[1]).collect();
        let expected: Vec<_> = neurons.iter().map(|neurons| part(&layer, neurons, &kinds)).collect();
        let lists: Vec<_> =
            neurons.iter().map(|n| (poisoned(8 * n.len()), poisoned(32), upload(&[7u64; 8]))).collect();
        let views: Vec<WorkList> = lists.iter().map(|(items, counts, totals)| WorkList {
            ids: ids.clone(), items: items.view(), counts: counts.view(), totals: totals.view(),
        }).collect();
        let parts: Vec<_> = neurons.iter().cloned().zip(&views).collect();
        divide_work(device(), &work, layer.n_hot, ffn, &parts).unwrap();
        for (i, ((items, counts, totals), want)) in lists.iter().zip(&expected).enumerate() {
            let [link, fetched, cached, hot] = [0, 1, 2, 3].map(|kind| want[kind].len() as u32);
            let n = link + fetched + cached + hot;
            let want_counts = [n, link, cached, hot, 0, n, fetched, 0];
            prop_assert_eq!(read::<u32>(counts), want_counts, "section {} of {:?}", i, layer);
            let mut grown = want_counts.map(|count| 7 + u64::from(count));
            let n_rows = |[_, to]: &[u32; 2]| if *to >= 0xffff_fff8 { u64::from((to & 7).count_ones()) } else { 3 };
            [grown[1], grown[3]] = [0, 3].map(|kind| 7 + want[kind].iter().map(n_rows).sum::<u64>());
            prop_assert_eq!(read::<u64>(totals), grown, "section {} of {:?}", i, layer);
            let got = read::<[u32; 2]>(items);
            prop_assert_eq!(&got[..n as usize], &want.concat()[..], "section {} of {:?}", i, layer);
            prop_assert!(got[n as usize..].iter().flatten().all(|word| *word == NONE), "nothing behind the last item");
        }
    }
}
