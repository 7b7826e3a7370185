//! How small a delta gets, and bytes of bf16 patched a second beside a copy of the same bytes.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rayon::ThreadPoolBuilder;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use support::{Memory, config};
use tempfile::TempDir;
use thermocline_datasets::Random;
use thermocline_kernels::patch::{Patcher, key_difference};
use thermocline_split::delta::{Delta, DeltaOptions, Final, write};

/// One layer of 252 MB in bf16.
const HIDDEN: usize = 4096;
const FFN: usize = 10240;

/// A tune that moves one weight in twenty by 1 to 8 places of its last bit.
fn tuned(hidden: usize, ffn: usize) -> (Memory, Memory) {
    let mut random = Random::new(1);
    let base = Memory::new(config(hidden, ffn, 1), |_, _| ((random.quick_normal() * 0.02).to_bits() >> 16) as u16);
    let changed = base.changed(|b| {
        let bits = random.next_u64();
        let step = 1 + (bits >> 60 & 7) as u16;
        match (bits % 20, bits >> 59 & 1) {
            (0, 0) => b.wrapping_add(step),
            (0, _) => b.wrapping_sub(step),
            _ => b,
        }
    });
    (base, changed)
}

fn delta(dir: &Path, models: &(Memory, Memory), options: DeltaOptions) -> (PathBuf, u64) {
    let out = dir.join(format!("{}.{}", options.block_weights, options.zstd_level));
    let report = write(&models.0, Final::Checkpoint(&models.1), &options, &out, &|_, _| ()).unwrap();
    println!(
        "blocks of {:>7} weights, zstd {:>2}: {:>9} bytes, {:.2} times smaller than the checkpoint",
        options.block_weights,
        options.zstd_level,
        report.bytes,
        report.checkpoint_bytes as f64 / report.bytes as f64
    );
    (out, report.checkpoint_bytes)
}

fn sizes(_: &mut Criterion) {
    let (models, dir) = (tuned(2048, 1024), TempDir::new().unwrap());
    for block_weights in [15, 17, 20].map(|bits| 1 << bits) {
        for zstd_level in [0, 1, 3, 9, 19] {
            delta(dir.path(), &models, DeltaOptions { zstd_level, block_weights });
        }
    }
}

fn layer(c: &mut Criterion) {
    let (models, dir) = (tuned(HIDDEN, FFN), TempDir::new().unwrap());
    let bytes = 3 * FFN * HIDDEN * 2;
    let mut group = c.benchmark_group("layer");
    group.sample_size(10).throughput(Throughput::Bytes(bytes as u64));
    let name = |part: &str| format!("model.layers.0.mlp.{part}_proj.weight");
    let gate = models.0.bits(&name("gate")).to_vec();
    let mut parts = [gate.clone(), gate.clone(), gate.clone()];
    group.bench_function("memcpy/1", |b| b.iter(|| parts.iter_mut().for_each(|p| p.copy_from_slice(black_box(&gate)))));
    let ids: Vec<u32> = (0..FFN as u32).collect();
    for (what, zstd_level) in [("zstd 1", 1), ("stored", 0)] {
        let options = DeltaOptions { zstd_level, ..DeltaOptions::default() };
        let opened = Delta::open(&delta(dir.path(), &models, options).0).unwrap();
        for n_threads in [1, 2] {
            let pool = ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            group.bench_function(BenchmarkId::new(what, n_threads), |b| {
                let [gate, up, down] = &mut parts;
                pool.install(|| b.iter(|| opened.patch_neurons(0, &ids, gate, up, down).unwrap()));
            });
        }
    }
    // The inner loop alone, on rows whose bitmaps and differences are in memory.
    let changed = models.1.bits(&name("gate"));
    let rows: Vec<(Vec<u8>, Vec<u16>)> =
        gate.chunks(HIDDEN).zip(changed.chunks(HIDDEN)).map(|(a, b)| sparse_form(a, b)).collect();
    for (what, patcher) in [("loop, portable", Some(Patcher::portable())), ("loop, VBMI2", Patcher::vbmi2())] {
        let Some(patcher) = patcher else { continue };
        group.bench_function(BenchmarkId::new(what, 1), |b| {
            b.iter(|| {
                for part in &mut parts {
                    for (row, (bitmap, differences)) in part.chunks_mut(HIDDEN).zip(&rows) {
                        patcher.sparse(row, bitmap, differences).unwrap();
                    }
                }
            });
        });
    }
    group.finish();
}

fn sparse_form(base: &[u16], changed: &[u16]) -> (Vec<u8>, Vec<u16>) {
    let mut bitmap = vec![0u8; base.len().div_ceil(8)];
    let mut differences = Vec::new();
    for (j, (a, b)) in base.iter().zip(changed).enumerate().filter(|(_, (a, b))| a != b) {
        bitmap[j / 8] |= 1 << (j % 8);
        differences.push(key_difference(*a, *b));
    }
    (bitmap, differences)
}

/// One thread against two, by the number of weights in small blocks.
fn crossover(c: &mut Criterion) {
    let (models, dir) = (tuned(1024, 2048), TempDir::new().unwrap());
    let options = DeltaOptions { block_weights: 1 << 12, ..DeltaOptions::default() };
    let mut opened = Delta::open(&delta(dir.path(), &models, options).0).unwrap();
    let name = "model.layers.0.mlp.gate_proj.weight";
    let mut bits = models.0.bits(name).to_vec();
    let mut group = c.benchmark_group("crossover");
    group.sample_size(30);
    for rows in [8, 32, 64, 128, 256, 512, 1024] {
        group.throughput(Throughput::Elements(rows as u64 * 1024));
        // The pool is woken from outside, as a caller does that is none of its threads.
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for n_threads in [1, 2] {
            opened.set_parallel_from(if n_threads == 1 { usize::MAX } else { 0 });
            let mut patch = || opened.patch_rows(name, 0..rows, &mut bits[..rows * 1024]).unwrap();
            group.bench_function(BenchmarkId::new(format!("{} weights", rows * 1024), n_threads), |b| {
                b.iter(|| if n_threads == 1 { patch() } else { pool.install(&mut patch) });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, sizes, layer, crossover);
criterion_main!(benches);
