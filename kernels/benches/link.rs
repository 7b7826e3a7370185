//! The fused kernel alone: bundles of several sizes, scattered in pinned memory, read in place; whole, single rows of
//! them, and single rows of residuals. Needs a GPU; prints one line a size, with the copy engine's speed as the limit.
//!
//!     cargo bench -p thermocline-kernels --bench link
#![allow(missing_docs, clippy::unwrap_used)]

use thermocline_kernels::cuda::launch::{Bundles, Nonlinearity, SketchedRows, WorkList, ffn, ffn_blocks, host_item};
use thermocline_kernels::cuda::{Device, Queue};
use thermocline_kernels::{AlignedBuf, BundleLayout, Encoding};

/// Pinned memory over which the bundles are scattered: far beyond any cache.
const POOL_BYTES: usize = 2 << 30;
/// Bytes of one launch: long enough that starting it counts little.
const LAUNCH_BYTES: usize = 64 << 20;
const REPETITIONS: usize = 9;
/// Of a hundred neurons of which rows are read, how many have these: 1 gate, 2 up, 4 down. As graded precision reads 30 % of
/// SmolLM2's rows on wikitext-2.
const ROWS: [(u32, u64); 6] = [(1, 20), (2, 10), (4, 19), (5, 22), (6, 14), (7, 15)];

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo test` runs benches too, in a build that says so.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(e) => return println!("nothing measured: {e}"),
    };
    let mut host = AlignedBuf::zeroed(POOL_BYTES).unwrap();
    let mut state = 1u64;
    for word in bytemuck::cast_slice_mut::<u8, u64>(&mut host) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Scales are halves: no exponent of all ones.
        *word = (state ^ state >> 29) & 0x3fff_3fff_3fff_3fff;
    }
    let cold = device.pin(host).unwrap();
    let target = device.allocate(LAUNCH_BYTES).unwrap();
    let copies = (0..REPETITIONS).map(|i| {
        let begin = device.record().unwrap();
        device.copy(Queue::Compute, &target.view(), &cold.slice(i * LAUNCH_BYTES, LAUNCH_BYTES)).unwrap();
        LAUNCH_BYTES as f64 / device.record().unwrap().since(&begin).unwrap() / 1e6
    });
    let limit = median(copies.collect());
    println!("{}; copy engine {limit:.1} GB/s", device.name());
    print!("{:>8}", "hidden");
    ["bundle B", "q4 row B", "r4 row B"].iter().for_each(|what| print!(" {what:>10} {:>10} {:>8}", "GB/s", "of copy"));
    println!();
    let n_blocks = ffn_blocks(&device);
    for hidden in [1024, 2048, 4096, 8192, 16384] {
        let view = |bytes: usize| device.allocate(bytes).unwrap().view();
        let (x, partial, none) = (view(4 * hidden), view(4 * hidden * n_blocks), view(16));
        device.write(&x, bytemuck::cast_slice(&vec![0.01f32; hidden])).unwrap();
        print!("{hidden:>8}");
        for (encoding, is_single) in [(Encoding::Q4, false), (Encoding::Q4, true), (Encoding::R4, true)] {
            let layout = BundleLayout::new(encoding, hidden).unwrap();
            let (bundle, n_pool) = (layout.bundle_bytes(), POOL_BYTES / layout.bundle_bytes());
            let (products, sketched) = (view(8 * n_pool), view(4 * n_pool));
            let n = if is_single { 3 * LAUNCH_BYTES / (5 * bundle) } else { LAUNCH_BYTES / bundle };
            let work = WorkList { ids: view(16), items: view(8 * n), counts: view(32), totals: view(64) };
            device.write(&work.counts, bytemuck::cast_slice(&[n as u32, n as u32, 0, 0, 0, n as u32, 0, 0])).unwrap();
            let speeds = (0..REPETITIONS).map(|_| {
                let mut random = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    state >> 33
                };
                let mut n_rows = 0;
                let mut item = || {
                    let [bundle, none_filled] = host_item(random() as usize % n_pool);
                    let mut place = random() % 100;
                    let chosen = ROWS.iter().find(|(_, of_hundred)| {
                        let is_here = place < *of_hundred;
                        place = place.saturating_sub(*of_hundred);
                        is_here
                    });
                    let rows = if is_single { chosen.map_or(7, |(rows, _)| *rows) } else { 7 };
                    n_rows += rows.count_ones() as usize;
                    [bundle, none_filled & !7 | rows]
                };
                let items: Vec<[u32; 2]> = (0..n).map(|_| item()).collect();
                device.write(&work.items, bytemuck::cast_slice(&items)).unwrap();
                let bundles = Bundles { hot: &none, cold: &cold.view(), cache: &none, fetched: None, ahead: None };
                let rows = SketchedRows { products: &products, sketched: &sketched, hot_offset: 0, cold_offset: 0 };
                let rows = is_single.then_some(rows);
                let begin = device.record().unwrap();
                ffn(&device, layout, Nonlinearity::Silu, &work, bundles, &x, n_blocks, &partial, rows).unwrap();
                (n_rows * bundle / 3) as f64 / device.record().unwrap().since(&begin).unwrap() / 1e6
            });
            let speed = median(speeds.collect());
            let bytes = if is_single { bundle / 3 } else { bundle };
            print!(" {bytes:>10} {speed:>10.1} {:>8}", format!("{:.0}%", 100.0 * speed / limit));
        }
        println!();
    }
}
