use crate::choose::no_cache;
use crate::ffn::{activated, activation, add_down, product, random_bundles, together};
use crate::prefill::{Halves, assert_split};
use crate::sketch::{Part, up_bits};
use crate::{Random, U, device, pinned, poisoned, read, upload, wide};
use proptest::prelude::*;
use thermocline_kernels::cuda::launch::{
    Bundles, Choose, DeviceSketch, HostWork, INPUT_FLAG, LayerInput, RowChoice, Selection, Sketched, SketchedRows,
    WorkList, add_sketched, choose, ffn, sketch_scores, unpack_bundles,
};
use thermocline_kernels::{BundleLayout, Encoding, SKETCH_UNIT, SketchBits, unpack};

/// A random sketch, with the channels of its columns.
struct RandomSketch {
    gate: Part,
    up: Part,
    down: Part,
    columns: Vec<u32>,
    on_device: DeviceSketch,
}

impl RandomSketch {
    fn new(up_bits: SketchBits, n_neurons: usize, hidden: usize, random: &mut Random) -> Self {
        let [gate, down] = [0, 1].map(|_| Part::random(SketchBits::Two, n_neurons, hidden, random));
        let up = Part::random(up_bits, n_neurons, hidden, random);
        let neurons: Vec<f32> = random.values(4 * n_neurons).iter().map(|v| v.abs()).collect();
        let mut columns: Vec<u32> = (0..hidden as u32).collect();
        (1..hidden).for_each(|i| columns.swap(i, random.below(i + 1)));
        let on_device = DeviceSketch {
            gate: upload(&gate.planes).view(),
            up: upload(&up.planes).view(),
            down: upload(&down.planes).view(),
            neurons: upload(&neurons).view(),
            columns: upload(&columns).view(),
            up_bits,
            first: 0,
            n_neurons,
            hidden,
        };
        Self { gate, up, down, columns, on_device }
    }

    /// A neuron's row, channel by channel.
    fn row(&self, neuron: usize, which: usize) -> Vec<f32> {
        let (part, n) = ([&self.gate, &self.up, &self.down][which], self.columns.len());
        let stored = &part.weights[neuron * n..(neuron + 1) * n];
        if which == 2 {
            return stored.to_vec();
        }
        let mut row = vec![f32::NAN; n];
        self.columns.iter().zip(stored).for_each(|(channel, w)| row[*channel as usize] = *w);
        row
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A layer from its norm to its sums, as rows are chosen by chance: a weight is the sketch's and, if its row is read, the
    /// residual one.
    #[test]
    fn layers_of_residual_rows_are_their_sketch_and_what_is_read(
        units in 1usize..20, counts in [0usize..30, 1usize..60], activation in activation(), n_blocks in 1usize..7,
        share in prop_oneof![Just(None), (0.0f32..=1.0).prop_map(Some)], up_bits in up_bits(), seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let ([n_hot, n_cold], hidden) = (counts, units * SKETCH_UNIT);
        let n = n_hot + n_cold;
        let layout = BundleLayout::new(Encoding::R4, hidden).unwrap();
        let sketch = RandomSketch::new(up_bits, n, hidden, random);
        let (x, weight, eps) = (random.values(hidden), random.values(hidden), 1e-3f32);
        let bundles = random_bundles(&layout, n, random);
        let (hot, cold) = bundles.split_at(n_hot * layout.bundle_bytes());
        let masks: Vec<u32> = (0..n).map(|_| if random.below(3) == 0 { 0 } else { random.below(8) as u32 }).collect();

        let (normed, activations, products) = (poisoned(4 * hidden), poisoned(4 * n), poisoned(8 * n));
        let (x_view, normed_view, activations_view, products_view) =
            (upload(&x).view(), normed.view(), activations.view(), products.view());
        let from = LayerInput { hidden, x: &x_view, eps, normed: &normed_view, host_x: None };
        let rows = Some(RowChoice { least: 0.0, whole: false, products: &products_view });
        let out = Sketched { scores: &poisoned(4 * n).view(), activations: &activations_view, rows };
        sketch_scores(device(), &sketch.on_device, from, &upload(&weight).view(), activation, out).unwrap();

        let scores: Vec<f32> = masks.iter().map(|m| *m as f32).chain([7.0; 3]).collect();
        let (list, known) = (pinned(&vec![0u32; n_cold]), pinned(&vec![0f32; 2 * n_cold]));
        let (count, flag) = (pinned(&[0u32]), pinned(&[0u32; INPUT_FLAG + 1]));
        let host = HostWork { list: list.view(), known: known.view(), count: count.view(), flag: flag.view() };
        let (ids, items, work_counts, totals) = (poisoned(4 * n), poisoned(8 * n), poisoned(32), upload(&[0u64; 8]));
        let work = WorkList { ids: ids.view(), items: items.view(), counts: work_counts.view(), totals: totals.view() };
        choose(device(), &Choose {
            scores: &upload(&scores).view(), ffn: n, n_hot, n_always: 0, selection: Selection::Above(0.5), cache: &no_cache(),
            step: &upload(&[0u32, 3, 1, share.unwrap_or(0.0).to_bits(), 0]).view(), layer: 0, n_layers: 1,
            host: share.is_some().then_some(&host), fetched: None, ahead: None, out: &work,
            rows: true, sketched: Some(&activations_view), products: Some(&products_view),
        }).unwrap();

        let (hot_memory, cold_memory, no_slots) = (upload(&[hot, &[0; 16]].concat()).view(), pinned(cold).view(), poisoned(4).view());
        let memory = Bundles { hot: &hot_memory, cold: &cold_memory, cache: &no_slots, fetched: None, ahead: None };
        let (partial, of_sketch) = (poisoned(4 * n_blocks * hidden), poisoned(4 * hidden));
        let rows = SketchedRows { products: &products_view, sketched: &activations_view, hot_offset: 0, cold_offset: n_hot as i32 };
        ffn(device(), layout, activation, &work, memory, &normed_view, n_blocks, &partial.view(), Some(rows)).unwrap();
        add_sketched(device(), &sketch.on_device, &activations_view, 1, &of_sketch.view()).unwrap();

        // What the host has is the host's as a whole.
        let n_host = if share.is_some() { read::<[u32; 8]>(&work_counts)[0][4] as usize } else { 0 };
        let left = read::<f32>(&activations);
        let of_host: Vec<usize> = read::<u32>(&list)[..n_host].iter().map(|entry| n_hot + (entry & 0x1fff_ffff) as usize).collect();
        prop_assert!(of_host.iter().all(|i| masks[*i] & 4 > 0 && left[*i] == 0.0), "the host adds the sketch's down row itself");

        let squares: f64 = wide(&x).iter().map(|x| x * x).sum();
        let scale = 1.0 / (squares / hidden as f64 + f64::from(eps)).sqrt();
        let input: Vec<f64> = wide(&x).iter().zip(wide(&weight)).map(|(x, w)| x * scale * w).collect();
        let in_columns: Vec<f64> = sketch.columns.iter().map(|c| input[*c as usize]).collect();
        let mut sums = vec![(0.0, 0.0); hidden];
        for i in (0..n).filter(|i| !of_host.contains(i)) {
            let bundle = &bundles[i * layout.bundle_bytes()..][..layout.bundle_bytes()];
            let of_row = [0, 1].map(|which| {
                // The input that is computed with misses a little by its norm, less than sums of so many terms do.
                let doubled = |(product, error): (f64, f64)| (product, 2.0 * error);
                let known = doubled([&sketch.gate, &sketch.up][which].dot(i, &in_columns));
                if masks[i] >> which & 1 == 0 {
                    return known;
                }
                together(known, doubled(product(&layout, bundle, which, &input)))
            });
            let (h, h_error) = activated(activation, of_row);
            for (sum, w) in sums.iter_mut().zip(sketch.row(i, 2)) {
                let w = f64::from(w);
                sum.0 += h * w;
                // A level is made of a byte from 0 to 255, twice, and 255 that are taken away; it is at least 25.
                let size = 765.0 / 25.0 * w.abs();
                sum.1 += h_error * w.abs() + (h.abs() + h_error) * size * (n as f64 + 12.0) * U;
            }
            if masks[i] & 4 > 0 {
                add_down(&layout, bundle, (h, h_error), n, &mut sums);
            }
        }
        let (partial, of_sketch) = (read::<f32>(&partial), read::<f32>(&of_sketch));
        for (c, (want, tolerance)) in sums.into_iter().enumerate() {
            let rest: f64 = (0..n_blocks).map(|b| f64::from(partial[b * hidden + c])).sum();
            let sum = f64::from(of_sketch[c]) + rest;
            prop_assert!((sum - want).abs() <= tolerance + 1e-30, "column {}: {} {} {:e}", c, sum, want, tolerance);
        }
    }

    #[test]
    fn residual_bundles_are_unpacked_with_their_sketch(
        units in prop_oneof![1usize..30, Just(130)], n in 0usize..6, before in 0usize..5, after in 0usize..5,
        up_bits in up_bits(), seed: u64,
    ) {
        let (random, hidden) = (&mut Random::new(seed), units * SKETCH_UNIT);
        let layout = BundleLayout::new(Encoding::R4, hidden).unwrap();
        let sketch = RandomSketch::new(up_bits, (before + n + after).max(1), hidden, random);
        let bundles = random_bundles(&layout, n, random);
        let out: [Halves; 3] = std::array::from_fn(|_| Halves::new(n * hidden));
        let views = out.each_ref().map(|o| o.0.each_ref().map(|half| half.view()));
        let refs = views.each_ref().map(|pair| pair.each_ref());
        unpack_bundles(device(), layout, &upload(&bundles).view(), n, Some((&sketch.on_device, before)), refs).unwrap();
        for (which, out) in out.iter().enumerate() {
            let mut want = Vec::with_capacity(n * hidden);
            for (i, bundle) in bundles.chunks_exact(layout.bundle_bytes()).enumerate() {
                let mut residual = vec![0.0; hidden];
                unpack(Encoding::R4, layout.row(bundle, which), &mut residual);
                want.extend(sketch.row(before + i, which).iter().zip(residual).map(|(w, r)| w + r));
            }
            assert_split(out, &want);
        }
    }
}
