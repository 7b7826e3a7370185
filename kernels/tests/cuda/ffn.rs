use crate::{
    Random, U, additions, assert_near, device, dot, pinned, poisoned, read, term_sizes, upload, whole_input, whole_row,
    wide,
};
use proptest::prelude::*;
use std::time::Duration;
use thermocline_kernels::cuda::Memory;
use thermocline_kernels::cuda::launch::{
    Bundles, HostResult, HostWork, INPUT_FLAG, Nonlinearity, RESULT_FLAG, SketchedRows, WorkList, ask_host, ffn,
    finish, flag_value,
};
use thermocline_kernels::{BundleLayout, Encoding, SKETCH_UNIT, ScaleFit, pack, unpack};

const NONE: u32 = u32::MAX;

/// A row's values, and the sizes of its terms.
fn decoded(layout: &BundleLayout, bundle: &[u8], which: usize) -> (Vec<f32>, Vec<f64>) {
    let mut values = vec![0.0; layout.hidden_size()];
    let row = layout.row(bundle, which);
    unpack(layout.encoding(), row, &mut values);
    let sizes = term_sizes(layout.encoding(), row, &values).collect();
    (values, sizes)
}

pub(crate) fn random_bundles(layout: &BundleLayout, n: usize, random: &mut Random) -> Vec<u8> {
    bundles(layout, n, || random.values(layout.hidden_size()))
}

fn bundles(layout: &BundleLayout, n: usize, mut row: impl FnMut() -> Vec<f32>) -> Vec<u8> {
    let mut bytes = vec![0; n * layout.bundle_bytes()];
    let mut packed = vec![0; layout.encoding().row_stride(layout.hidden_size())];
    for bundle in bytes.chunks_exact_mut(layout.bundle_bytes()) {
        for which in 0..3 {
            pack(layout.encoding(), &row(), ScaleFit::Absmax, &mut packed).unwrap();
            layout.set_row(bundle, which, &packed);
        }
    }
    bytes
}

/// The sum over the neurons, and a bound of the kernel's error, for each column.
fn reference(layout: &BundleLayout, bundles: &[&[u8]], activation: Nonlinearity, x: &[f32]) -> Vec<(f64, f64)> {
    let x = wide(x);
    let mut out = vec![(0.0, 0.0); x.len()];
    for bundle in bundles {
        let products = [0, 1].map(|which| product(layout, bundle, which, &x));
        let h = activated(activation, products);
        add_down(layout, bundle, h, bundles.len(), &mut out);
    }
    out
}

/// A row's product, and a bound of the kernel's error.
pub(crate) fn product(layout: &BundleLayout, bundle: &[u8], which: usize, x: &[f64]) -> (f64, f64) {
    let (row, sizes) = decoded(layout, bundle, which);
    let size: f64 = sizes.iter().zip(x).map(|(s, x)| s * x.abs()).sum();
    (dot(&row, x), size * additions(layout.hidden_size()) * U)
}

/// What a sketch has of a product and what a residual row adds to it.
pub(crate) fn together((known, known_error): (f64, f64), (added, added_error): (f64, f64)) -> (f64, f64) {
    let (product, error) = (known + added, known_error + added_error);
    (product, error + (product.abs() + error) * 2.0 * U)
}

/// The same of the activation.
pub(crate) fn activated(activation: Nonlinearity, [(g, g_error), (u, u_error)]: [(f64, f64); 2]) -> (f64, f64) {
    let act = match activation {
        Nonlinearity::Silu => g / (1.0 + (-g).exp()),
        _ => g.max(0.0),
    };
    let up = if activation == Nonlinearity::Drelu { u.max(0.0) } else { u };
    // No activation is steeper than 1.1; the exponential and the reciprocal round a few times.
    let error = 1.1 * g_error * (up.abs() + u_error) + act.abs() * u_error + (act * up).abs() * 16.0 * U;
    (act * up, error)
}

/// Adds one of `n` neurons to the sum and its bound.
pub(crate) fn add_down(
    layout: &BundleLayout,
    bundle: &[u8],
    (h, h_error): (f64, f64),
    n: usize,
    out: &mut [(f64, f64)],
) {
    let (down, sizes) = decoded(layout, bundle, 2);
    for ((out, d), size) in out.iter_mut().zip(&down).zip(&sizes) {
        out.0 += h * f64::from(*d);
        out.1 += h_error * f64::from(d.abs()) + (h.abs() + h_error) * size * (n as f64 + 24.0) * U;
    }
}

fn hidden() -> impl Strategy<Value = usize> {
    prop_oneof![4 => (1usize..40).prop_map(|g| 32 * g), 1 => Just(576usize), 1 => Just(896), 1 => Just(5120), 1 => Just(8192)]
}

pub(crate) struct Case {
    pub layout: BundleLayout,
    pub activation: Nonlinearity,
    pub n_blocks: usize,
    /// Neurons over the link, in the cache, hot.
    pub counts: [usize; 3],
    /// Whether all numbers are whole and small, so that nothing rounds.
    pub whole: bool,
}

impl Case {
    /// Bundles that a check needs: hot, cold, in the cache.
    pub fn n_bundles(&self) -> [usize; 3] {
        let [n_link, n_cached, n_hot] = self.counts;
        [n_hot + 1, n_link + 1, n_cached]
    }
}

fn check(case: &Case, seed: u64) {
    let (layout, whole, random) = (case.layout, case.whole, &mut Random::new(seed));
    let hidden = layout.hidden_size();
    let x = if whole { whole_input(hidden, random) } else { random.values(hidden) };
    let made = case.n_bundles().map(|n| {
        bundles(&layout, n, || match whole {
            true => whole_row(layout.encoding(), hidden, random),
            false => random.values(hidden),
        })
    });
    check_bundles(case, made.each_ref().map(|part| &part[..]), &x, random);
}

/// What the kernel was given and what it made of it.
pub(crate) struct Outcome {
    /// In the order of the list.
    items: Vec<[u32; 2]>,
    slots: Vec<u8>,
    filled: Vec<u8>,
    partial: Vec<f32>,
}

/// Runs the kernel on `case`'s bundles, with slots to fill for some of those over the link.
pub(crate) fn run(case: &Case, [hot, cold, cached]: [&[u8]; 3], x: &[f32], random: &mut Random) -> Outcome {
    let Case { layout, activation, n_blocks, counts: [n_link, n_cached, n_hot], .. } = *case;
    // Every other cached one was fetched instead. Slots to fill lie behind those that are read.
    let mut slots = cached.to_vec();
    slots.chunks_exact_mut(layout.bundle_bytes()).skip(1).step_by(2).for_each(|slot| slot.fill(0x33));
    slots.resize((n_cached + n_link + 1) * layout.bundle_bytes(), 0x5a);
    let link = (0..n_link).map(|i| {
        let to = if random.below(2) == 0 { (n_cached + i) as u32 } else { NONE };
        [0x4000_0000 | (n_link - i) as u32, to]
    });
    let mut items: Vec<[u32; 2]> = link.collect();
    items.extend((0..n_cached).map(|i| [if i % 2 == 0 { 0x8000_0000 } else { 0xc000_0000 } | i as u32, NONE]));
    items.extend((0..n_hot).map(|i| [i as u32 + 1, NONE]));
    let n = items.len() as u32;
    let words = [n, n_link as u32, n_cached as u32, n_hot as u32, 0, n, 0, 0];
    items.push([0, 0]);
    let work = WorkList {
        ids: poisoned(4).view(),
        items: upload(&items).view(),
        counts: upload(&words).view(),
        totals: poisoned(64).view(),
    };
    items.pop();
    let cache = upload(&slots);
    let partial = poisoned(4 * n_blocks * layout.hidden_size());
    let (hot_memory, cold_memory) = (upload(hot).view(), pinned(cold).view());
    let (slots_view, fetched) = (cache.view(), upload(cached).view());
    let bundles = Bundles {
        hot: &hot_memory,
        cold: &cold_memory,
        cache: &slots_view,
        fetched: Some(&fetched),
        ahead: Some(&hot_memory),
    };
    let x_memory = upload(x);
    ffn(device(), layout, activation, &work, bundles, &x_memory.view(), n_blocks, &partial.view(), None).unwrap();
    Outcome { items, slots, filled: read(&cache), partial: read(&partial) }
}

/// Compares sums, filled slots, and slots that must stay as they are.
pub(crate) fn check_bundles(case: &Case, made: [&[u8]; 3], x: &[f32], random: &mut Random) {
    let Case { layout, activation, n_blocks, counts: [n_link, n_cached, _], whole } = *case;
    let (hidden, bytes) = (layout.hidden_size(), layout.bundle_bytes());
    let Outcome { items, slots, filled, partial } = run(case, made, x, random);
    let [hot, cold, fetched] = made;
    let from = |item: u32| {
        let memory = match item >> 30 {
            0 => hot,
            1 => cold,
            2 => &slots,
            _ => fetched,
        };
        &memory[(item & 0x3fff_ffff) as usize * bytes..][..bytes]
    };
    let chosen: Vec<&[u8]> = items.iter().map(|item| from(item[0])).collect();
    let want = reference(&layout, &chosen, activation, x);
    for (c, (want, tolerance)) in want.into_iter().enumerate() {
        let sum: f64 = (0..n_blocks).map(|b| f64::from(partial[b * hidden + c])).sum();
        let tolerance = if whole { 0.0 } else { tolerance };
        assert!((sum - want).abs() <= tolerance + 1e-30, "{layout:?} column {c}: {sum} {want} {tolerance:e}");
    }
    for (i, [item, to]) in items[..n_link].iter().enumerate() {
        let slot = &filled[(n_cached + i) * bytes..][..bytes];
        if *to == NONE {
            assert!(slot.iter().all(|b| *b == 0x5a), "slot {i} was not to be filled");
            continue;
        }
        for which in 0..3 {
            let (got, want) = (layout.row(slot, which), layout.row(from(*item), which));
            let stream = layout.encoding().stream_bytes(want.head);
            assert!(got.codes == want.codes && got.scales == want.scales, "slot {i}, row {which}");
            assert!(got.coarse == want.coarse && got.head == want.head, "slot {i}, row {which}");
            assert!(got.stream[..stream] == want.stream[..stream], "slot {i}, row {which}");
        }
    }
    assert_eq!(filled[..n_cached * bytes], slots[..n_cached * bytes], "slots that are read stay as they are");
}

/// Rows that are read or not, each alone: `counts` neurons over the link, always active, and others that are hot. Residual rows
/// are added to what is known, which every neuron has, and every activation goes to the sketch.
fn check_rows(layout: BundleLayout, activation: Nonlinearity, n_blocks: usize, counts: [usize; 3], seed: u64) {
    let [n_link, n_always, n_hot] = counts;
    let (hidden, random) = (layout.hidden_size(), &mut Random::new(seed));
    let is_residual = layout.encoding() == Encoding::R4;
    let x = random.values(hidden);
    let [hot, cold] = [n_always + n_hot, n_link].map(|n| random_bundles(&layout, n + 1, random));
    // Link, from the last to the first, then hot; those that are always active have no place.
    let n_between = random.below(5);
    let (hot_offset, cold_offset) = (-(n_always as i32), (n_hot + n_between) as i32);
    let place = |[from, _]: [u32; 2]| {
        let offset = if from >> 30 == 1 { cold_offset } else { hot_offset };
        usize::try_from((from & 0x3fff_ffff) as i32 + offset).ok()
    };
    let mut any_rows = || 0xffff_fff8 | random.below(8) as u32;
    let mut items: Vec<[u32; 2]> = (1..=n_link).rev().map(|i| [0x4000_0000 | i as u32, any_rows()]).collect();
    items.extend((0..n_always).map(|i| [i as u32, NONE]));
    items.extend((n_always..n_always + n_hot).map(|i| [i as u32, any_rows()]));
    let n_places = n_hot + n_between + n_link + 2;
    let bundle_of = |from: u32| {
        let memory = if from >> 30 == 1 { &cold } else { &hot };
        &memory[(from & 0x3fff_ffff) as usize * layout.bundle_bytes()..][..layout.bundle_bytes()]
    };

    // Products of rows that are read are not; nor is what there is of other neurons.
    let mut products = vec![[f32::NAN; 2]; n_places];
    let sketched = vec![7.5f32; n_places];
    let mut wanted: Vec<Option<(f64, f64)>> = vec![None; n_places];
    let mut sums = vec![(0.0, 0.0); hidden];
    let wide_x = wide(&x);
    for item in &items {
        let bundle = bundle_of(item[0]);
        let of_row = [0, 1].map(|which| {
            let is_read = item[1] >> which & 1 == 1;
            if is_read && !is_residual {
                return product(&layout, bundle, which, &wide_x);
            }
            let value = random.value();
            products[place(*item).unwrap()][which] = value;
            let known = (value.into(), 0.0);
            if is_read { together(known, product(&layout, bundle, which, &wide_x)) } else { known }
        });
        let h = activated(activation, of_row);
        if item[1] & 4 > 0 {
            add_down(&layout, bundle, h, items.len(), &mut sums);
        }
        if item[1] & 4 == 0 || is_residual {
            wanted[place(*item).unwrap()] = Some(h);
        }
    }

    let n = items.len() as u32;
    items.push([0, NONE]);
    let work = WorkList {
        ids: poisoned(4).view(),
        items: upload(&items).view(),
        counts: upload(&[n, n_link as u32, 0, n - n_link as u32, 0, n, 0, 0]).view(),
        totals: poisoned(64).view(),
    };
    let (hot_memory, cold_memory, no_slots) = (upload(&hot).view(), pinned(&cold).view(), poisoned(4).view());
    let bundles =
        Bundles { hot: &hot_memory, cold: &cold_memory, cache: &no_slots, fetched: None, ahead: Some(&hot_memory) };
    let (partial, sketched) = (poisoned(4 * n_blocks * hidden), upload(&sketched));
    let (products, sketched_view) = (upload(&products).view(), sketched.view());
    let rows = SketchedRows { products: &products, sketched: &sketched_view, hot_offset, cold_offset };
    let x = upload(&x).view();
    ffn(device(), layout, activation, &work, bundles, &x, n_blocks, &partial.view(), Some(rows)).unwrap();
    let partial = read::<f32>(&partial);
    for (c, (want, tolerance)) in sums.into_iter().enumerate() {
        let sum: f64 = (0..n_blocks).map(|b| f64::from(partial[b * hidden + c])).sum();
        assert!((sum - want).abs() <= tolerance + 1e-30, "{layout:?} column {c}: {sum} {want} {tolerance:e}");
    }
    for (i, (got, want)) in read::<f32>(&sketched).into_iter().zip(wanted).enumerate() {
        let (want, tolerance) = want.unwrap_or((7.5, 0.0));
        assert_near(got, want, tolerance, &format!("{layout:?}, activation {i}"));
    }
}

pub(crate) fn activation() -> impl Strategy<Value = Nonlinearity> {
    prop_oneof![Just(Nonlinearity::Silu), Just(Nonlinearity::Relu), Just(Nonlinearity::Drelu)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn ffn_adds_up_the_neurons_and_fills_the_cache(
        encoding in 0usize..3, hidden in hidden(), activation in activation(), n_blocks in 1usize..7,
        counts in [0usize..20, 0usize..12, 0usize..25], seed: u64,
    ) {
        let layout = BundleLayout::new(Encoding::PLAIN[encoding], hidden).unwrap();
        let counts = if hidden > 5000 { counts.map(|n| n / 4) } else { counts };
        check(&Case { layout, activation, n_blocks, counts, whole: false }, seed);
    }

    #[test]
    fn ffn_reads_the_rows_that_items_name(
        encoding in 0usize..3, hidden in hidden(), activation in activation(), n_blocks in 1usize..7,
        counts in [0usize..20, 0usize..5, 0usize..25], seed: u64,
    ) {
        let layout = BundleLayout::new(Encoding::PLAIN[encoding], hidden).unwrap();
        let counts = if hidden > 5000 { counts.map(|n| n / 4) } else { counts };
        check_rows(layout, activation, n_blocks, counts, seed);
    }

    #[test]
    fn ffn_adds_residual_rows_to_what_is_known(
        units in prop_oneof![4 => 1usize..40, 1 => Just(80usize), 1 => Just(128)], activation in activation(), n_blocks in 1usize..7,
        counts in [0usize..20, 0usize..25], seed: u64,
    ) {
        let layout = BundleLayout::new(Encoding::R4, SKETCH_UNIT * units).unwrap();
        let [n_link, n_hot] = if units > 70 { counts.map(|n| n / 4) } else { counts };
        check_rows(layout, activation, n_blocks, [n_link, 0, n_hot], seed);
    }

    #[test]
    fn ffn_is_exact_where_sums_are(
        encoding in 0usize..3, groups in 1usize..16, drelu: bool, n_blocks in 1usize..7,
        counts in [0usize..20, 0usize..12, 0usize..25], seed: u64,
    ) {
        let layout = BundleLayout::new(Encoding::PLAIN[encoding], 32 * groups).unwrap();
        let activation = if drelu { Nonlinearity::Drelu } else { Nonlinearity::Relu };
        check(&Case { layout, activation, n_blocks, counts, whole: true }, seed);
    }

    #[test]
    fn finish_adds_up_the_blocks_and_the_hosts_part(
        n_partials in 1usize..80, hidden in hidden(), host in 0usize..3, n_threads in 1usize..70, serial: u32, layer in 0usize..3, seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let (partial, x, y) =
            (random.values(n_partials * hidden), random.values(hidden), random.values(n_threads * hidden));
        // 0: no host; 1: a host without work; 2: a host with work.
        let counts = upload(&[0u32, 0, 0, 0, u32::from(host == 2), 0, 0, 0]);
        let step = upload(&[0u32, 0, serial, 0]);
        let flag = flag_value(serial, layer, 3);
        // One may be further already.
        let mut flags = vec![flag; RESULT_FLAG * n_threads];
        if seed % 2 == 0 && flag < u32::MAX - 1 {
            flags[RESULT_FLAG * (seed as usize % n_threads)] += 1;
        }
        let result = HostResult { n_threads, y: pinned(&y).view(), flags: pinned(&flags).view() };
        let sum = upload(&x);
        let left_out = (seed % 3 == 0).then(|| random.values(hidden));
        let stands = left_out.as_ref().map(|v| upload(v).view());
        finish(
            device(), &upload(&partial).view(), n_partials, hidden, &counts.view(), stands.as_ref(), (host > 0).then_some(&result),
            &step.view(), (layer, 3), &sum.view(),
        ).unwrap();
        let gave_up = flag == u32::MAX;
        for (c, got) in read::<f32>(&sum).into_iter().enumerate() {
            let mut terms: Vec<f64> = partial.iter().skip(c).step_by(hidden).map(|v| f64::from(*v)).collect();
            terms.push(x[c].into());
            terms.extend(left_out.iter().map(|v| f64::from(v[c])));
            if host == 2 && !gave_up {
                terms.extend(y.iter().skip(c).step_by(hidden).map(|v| f64::from(*v)));
            }
            let (want, size) = terms.iter().fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            assert_near(got, want, size * (n_partials as f64 / 32.0 + n_threads as f64 + 16.0) * U, &format!("column {c}"));
        }
    }
}

#[test]
fn ffn_takes_the_widest_rows() {
    for encoding in Encoding::PLAIN {
        for hidden in [10_240, 16_384, 32_768] {
            let layout = BundleLayout::new(encoding, hidden).unwrap();
            check(
                &Case { layout, activation: Nonlinearity::Silu, n_blocks: 2, counts: [3, 1, 2], whole: false },
                hidden as u64,
            );
            check_rows(layout, Nonlinearity::Silu, 2, [5, 1, 5], hidden as u64);
        }
    }
    for hidden in [10_240, 16_384, 32_768] {
        let layout = BundleLayout::new(Encoding::R4, hidden).unwrap();
        check_rows(layout, Nonlinearity::Silu, 2, [5, 0, 5], hidden as u64);
    }
}

#[test]
fn finish_waits_for_every_thread_of_the_host() {
    use std::sync::atomic::Ordering;
    const N: usize = 3;
    let hidden = 64;
    let flags = pinned(&[flag_value(8, 1, 2); N * RESULT_FLAG]);
    let y = pinned(&vec![0.0f32; N * hidden]);
    let (host_flags, host_y) = (flags.clone(), y.clone());
    let host = std::thread::spawn(move || {
        for t in [2, 0, 1] {
            std::thread::sleep(Duration::from_millis(10));
            host_y.copy_from(t * hidden, &[10f32.powi(t as i32); 64]);
            host_flags.words()[t * RESULT_FLAG].store(flag_value(9, 1, 2), Ordering::Release);
        }
    });
    let (partial, x) = (upload(&vec![1.0f32; hidden]), upload(&vec![0.5f32; hidden]));
    let counts = upload(&[0u32, 0, 0, 0, 1, 0, 0, 0]);
    let result = HostResult { n_threads: N, y: y.view(), flags: flags.view() };
    let step = upload(&[0u32, 0, 9, 0]);
    finish(device(), &partial.view(), 1, hidden, &counts.view(), None, Some(&result), &step.view(), (1, 2), &x.view())
        .unwrap();
    assert_eq!(read::<f32>(&x), vec![112.5; hidden]);
    host.join().unwrap();
}

#[test]
fn the_host_is_asked_for_a_whole_layer_and_waited_for() {
    use std::sync::atomic::Ordering;
    let (hidden, flag) = (64, flag_value(9, 1, 2));
    let request = pinned(&[0u32; INPUT_FLAG + 1]);
    let (flags, y) = (pinned(&[flag_value(8, 1, 2); RESULT_FLAG]), pinned(&vec![0.0f32; hidden]));
    let (asked, host_flags, host_y) = (request.clone(), flags.clone(), y.clone());
    let host = std::thread::spawn(move || {
        while asked.words()[0].load(Ordering::Acquire) != flag {
            std::thread::yield_now();
        }
        host_y.copy_from(0, &[3.0; 64]);
        host_flags.words()[0].store(flag, Ordering::Release);
    });
    let (none, x) = (upload(&[0.0f32]), upload(&vec![0.5f32; hidden]));
    // What the layer before has left.
    let (counts, step) = (upload(&[7u32; 8]), upload(&[0u32, 0, 9, 0, 0]));
    let view = |memory: &Memory| memory.view();
    let work = HostWork { list: view(&none), known: view(&none), count: view(&none), flag: view(&request) };
    ask_host(device(), &work, &counts.view(), &step.view(), (1, 2)).unwrap();
    let result = HostResult { n_threads: 1, y: y.view(), flags: flags.view() };
    finish(device(), &none.view(), 0, hidden, &counts.view(), None, Some(&result), &step.view(), (1, 2), &x.view())
        .unwrap();
    assert_eq!(read::<f32>(&x), vec![3.5; hidden]);
    assert_eq!(read::<u32>(&counts)[..7], [0, 0, 0, 0, 1, 0, 0]);
    host.join().unwrap();
}
