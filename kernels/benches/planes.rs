//! The fused kernel alone, for every encoding at the width of a 70B model: weights from device memory and over the link,
//! in GB/s of the bfloat16 that they stand for, with the limit that the bundles' bytes set beside it. Needs a GPU.
//!
//!     cargo bench -p thermocline-kernels --bench planes
//!
//! With `THERMOCLINE_TEST_DEVICE=emulated` it runs in the emulator, on next to nothing, to see that it runs.
#![allow(missing_docs, clippy::unwrap_used)]

use thermocline_kernels::cuda::launch::{Bundles, Nonlinearity, WorkList, ffn, ffn_blocks, host_item, hot_item};
use thermocline_kernels::cuda::{Device, Memory, Queue, build_emulator};
use thermocline_kernels::exact::{PackedRow, bf16x, bits16, residual};
use thermocline_kernels::{AlignedBuf, BundleLayout, Encoding, ScaleFit};

/// How much of everything there is.
struct Sizes {
    hidden: usize,
    /// Bytes over which bundles are scattered: far beyond any cache.
    pool_bytes: usize,
    /// Bytes of one launch: long enough that starting it counts little.
    launch_bytes: usize,
    repetitions: usize,
    /// Neurons that are packed; the pool repeats them.
    packed: usize,
}

const GPU: Sizes = Sizes { hidden: 8192, pool_bytes: 1 << 30, launch_bytes: 128 << 20, repetitions: 9, packed: 16 };
const EMULATED: Sizes = Sizes { hidden: 1056, pool_bytes: 1 << 16, launch_bytes: 1 << 15, repetitions: 1, packed: 2 };

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Normal (Box-Muller), as wide as the weights of large models.
    fn weight(&mut self) -> u16 {
        let mut uniform = || (self.bits() as f32 + 0.5) / (1u64 << 31) as f32;
        bits16(0.02 * (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos())
    }
}

fn packed(encoding: Encoding, bits: &[u16]) -> PackedRow {
    let fit = ScaleFit::Weighted(None);
    match encoding {
        Encoding::Bf16 => PackedRow { base: bits.iter().flat_map(|b| b.to_le_bytes()).collect(), ..Default::default() },
        Encoding::Bf16x => bf16x::pack(bits),
        Encoding::Q8 => PackedRow { base: residual::pack(Encoding::Q8Exact, bits, fit).base, ..Default::default() },
        Encoding::Q4 => PackedRow { base: residual::pack(Encoding::Q4Exact, bits, fit).base, ..Default::default() },
        Encoding::Q4Plus => PackedRow { head: vec![], stream: vec![], ..residual::pack(Encoding::Q4Exact, bits, fit) },
        Encoding::Q4Exact | Encoding::Q8Exact => residual::pack(encoding, bits, fit),
        Encoding::R4 => panic!("no weights are residuals"),
    }
}

/// Neurons of one layout, and the bytes that the rows of all use.
fn neurons(encoding: Encoding, sizes: &Sizes) -> (BundleLayout, Vec<Vec<u8>>, usize) {
    let random = &mut Random(1);
    let mut row = || packed(encoding, &(0..sizes.hidden).map(|_| random.weight()).collect::<Vec<_>>());
    let rows: Vec<[PackedRow; 3]> = (0..sizes.packed).map(|_| [row(), row(), row()]).collect();
    let stream = |rows: &[PackedRow; 3]| rows.iter().map(|row| row.stream.len()).sum::<usize>();
    let longest = rows.iter().map(stream).max().unwrap_or(0);
    let layout = BundleLayout::with_streams(encoding, sizes.hidden, longest).unwrap();
    let bundles: Vec<Vec<u8>> = rows.iter().map(|rows| bundle(&layout, rows)).collect();
    let used = rows.iter().map(|rows| layout.bundle_bytes() - longest + stream(rows)).sum();
    (layout, bundles, used)
}

fn bundle(layout: &BundleLayout, rows: &[PackedRow; 3]) -> Vec<u8> {
    let mut bytes = vec![0; layout.bundle_bytes()];
    rows.iter().enumerate().for_each(|(which, row)| layout.set_row(&mut bytes, which, &row.base));
    let parts = [(layout.base_bytes(), 0), (layout.base_bytes() + layout.coarse_bytes(), 1)];
    for (mut at, part) in parts {
        let planes = rows.iter().map(|row| if part == 0 { &row.coarse } else { &row.head });
        let streams = rows.iter().map(|row| &row.stream).filter(|_| part == 1);
        for plane in planes.chain(streams) {
            bytes[at..at + plane.len()].copy_from_slice(plane);
            at += plane.len();
        }
    }
    bytes
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// GB/s of bundles in `pool`, read in any order.
fn speed(device: &Device, sizes: &Sizes, layout: BundleLayout, pool: &Memory, is_cold: bool) -> f64 {
    let (hidden, bundle, n_blocks) = (layout.hidden_size(), layout.bundle_bytes(), ffn_blocks(device));
    let (n, n_pool) = (sizes.launch_bytes / bundle, sizes.pool_bytes / bundle);
    let view = |bytes: usize| device.allocate(bytes).unwrap().view();
    let work = WorkList { ids: view(16), items: view(8 * n), counts: view(32), totals: view(64) };
    let (x, partial, none) = (view(4 * hidden), view(4 * hidden * n_blocks), view(16));
    device.write(&x, bytemuck::cast_slice(&vec![0.01f32; hidden])).unwrap();
    let n_link = if is_cold { n as u32 } else { 0 };
    device
        .write(&work.counts, bytemuck::cast_slice(&[n as u32, n_link, 0, n as u32 - n_link, 0, n as u32, 0, 0]))
        .unwrap();
    let mut random = Random(7);
    let speeds = (0..sizes.repetitions).map(|_| {
        let item = |i: usize| if is_cold { host_item(i) } else { hot_item(i) };
        let items: Vec<[u32; 2]> = (0..n).map(|_| item(random.bits() as usize % n_pool)).collect();
        device.write(&work.items, bytemuck::cast_slice(&items)).unwrap();
        let pool = pool.view();
        let (hot, cold) = if is_cold { (&none, &pool) } else { (&pool, &none) };
        let bundles = Bundles { hot, cold, cache: &none, fetched: None, ahead: None };
        let begin = device.record().unwrap();
        ffn(device, layout, Nonlinearity::Silu, &work, bundles, &x, n_blocks, &partial, None).unwrap();
        (n * bundle) as f64 / device.record().unwrap().since(&begin).unwrap() / 1e6
    });
    median(speeds.collect())
}

/// GB/s of copies from `from` to `to`.
fn copy_speed(device: &Device, sizes: &Sizes, from: &Memory, to: &Memory) -> f64 {
    let n = sizes.launch_bytes.min(sizes.pool_bytes / 2);
    let copies = (0..sizes.repetitions).map(|_| {
        let begin = device.record().unwrap();
        device.copy(Queue::Compute, &to.slice(n, n), &from.slice(0, n)).unwrap();
        n as f64 / device.record().unwrap().since(&begin).unwrap() / 1e6
    });
    median(copies.collect())
}

fn main() {
    // `cargo test` runs benches too, in a build that says so.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let emulated = std::env::var("THERMOCLINE_TEST_DEVICE").as_deref() == Ok("emulated");
    let opened = if emulated {
        build_emulator(&std::env::temp_dir()).and_then(|library| Device::emulated(&library))
    } else {
        Device::open(0)
    };
    let device = match opened {
        Ok(device) => device,
        Err(e) => return println!("nothing measured: {e}"),
    };
    let sizes = if emulated { EMULATED } else { GPU };
    let hot = device.allocate(sizes.pool_bytes).unwrap();
    let pinned = |bytes: &[u8]| {
        let mut host = AlignedBuf::zeroed(sizes.pool_bytes).unwrap();
        host[..bytes.len()].copy_from_slice(bytes);
        device.pin(host).unwrap()
    };
    // A copy within device memory reads and writes.
    let link = copy_speed(&device, &sizes, &pinned(&[]), &hot);
    let memory = 2.0 * copy_speed(&device, &sizes, &hot, &hot);
    println!("{}; copies: {link:.1} GB/s over the link, {memory:.0} GB/s of device memory", device.name());
    println!("GB/s of bfloat16 at hidden size {}, of the bundles' bytes' limit:", sizes.hidden);
    println!("{:>9} {:>8} {:>16} {:>16}", "encoding", "of bf16", "device memory", "link");
    for encoding in Encoding::ALL {
        let (layout, bundles, used) = neurons(encoding, &sizes);
        let n_pool = sizes.pool_bytes / layout.bundle_bytes();
        let bytes: Vec<u8> = bundles.iter().cycle().take(n_pool).flatten().copied().collect();
        device.write(&hot.view(), &bytes).unwrap();
        let cold = pinned(&bytes);
        let bf16_bytes = (6 * sizes.hidden) as f64;
        let share = used as f64 / bundles.len() as f64 / bf16_bytes;
        // Of a bundle what is used crosses the link.
        let out = bf16_bytes / layout.bundle_bytes() as f64;
        let column = |speed: f64, limit: f64| format!("{:.1} / {:.1}", speed * out, limit / share);
        let from_memory = column(speed(&device, &sizes, layout, &hot, false), memory);
        let over_link = column(speed(&device, &sizes, layout, &cold, true), link);
        println!("{:>9} {:>7.1}% {from_memory:>16} {over_link:>16}", encoding.name(), 100.0 * share);
    }
}
