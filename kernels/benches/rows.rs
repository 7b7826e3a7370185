//! GB/s of encoded weights, against a plain read of the same bytes.
#![allow(missing_docs)]
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use thermocline_kernels::{BundleLayout, Encoding, Isa, Kernels, MatrixRef, Pool, ScaleFit, gemv, ops, pack};

/// 70B-wide rows, more of them than any cache holds.
const COLUMNS: usize = 8192;

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemv");
    for encoding in Encoding::ALL {
        let stride = encoding.row_stride(COLUMNS);
        let n_rows = (256 << 20) / stride;
        let row: Vec<f32> = (0..COLUMNS).map(|j| ((j * 31 % 97) as f32 - 48.0) / 100.0).collect();
        let mut packed = vec![0; stride];
        pack(encoding, &row, ScaleFit::LeastSquares, &mut packed).expect("finite weights");
        let data = packed.repeat(n_rows);
        let w = MatrixRef { encoding, rows: n_rows, columns: COLUMNS, data: &data };
        let (x, mut y) = (vec![0.5; COLUMNS], vec![0.0; n_rows]);
        group.sample_size(10).throughput(Throughput::Bytes(data.len() as u64));
        for isa in Isa::ALL.into_iter().filter_map(Kernels::new).filter(|k| k.isa() != Isa::Portable) {
            for n_threads in [1, 2] {
                let mut pool = Pool::new(n_threads).expect("threads");
                let id = BenchmarkId::new(format!("{encoding}/{}", isa.isa().name()), n_threads);
                group.bench_function(id, |b| b.iter(|| gemv(&isa, &mut pool, w, black_box(&x), &mut y)));
            }
        }
    }
    let words = vec![1.0f32; 64 << 20];
    group.throughput(Throughput::Bytes(4 * words.len() as u64));
    group.bench_function("plain read/1", |b| b.iter(|| ops::dot(black_box(&words), black_box(&words))));
    group.finish();
}

fn bundles(c: &mut Criterion) {
    let mut group = c.benchmark_group("axpy");
    for encoding in Encoding::ALL {
        let layout = BundleLayout::new(encoding, COLUMNS).expect("whole groups");
        let bundle = vec![0u8; layout.bundle_bytes()];
        let mut y = vec![0.0; COLUMNS];
        let row = layout.row(&bundle, 2);
        group.throughput(Throughput::Bytes((row.codes.len() + row.scales.len()) as u64));
        let kernels = Kernels::detect();
        group.bench_function(encoding.name(), |b| b.iter(|| kernels.axpy(encoding, row, 0.5, black_box(&mut y))));
    }
    group.finish();
}

criterion_group!(benches, rows, bundles);
criterion_main!(benches);
