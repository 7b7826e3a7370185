//! GB/s of encoded weights, against a plain read of the same bytes.
#![allow(missing_docs)]
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use thermocline_kernels::{
    AlignedBuf, BundleLayout, CERTIFIED_ROWS, Certificate, Encoding, Isa, Kernels, MatrixRef, Pool, PreparedInput,
    QuantisedInput, SKETCH_UNIT, ScaleFit, SketchBits, SketchMatrix, gemv, gemv_rows, ops, pack, sketch_row,
};

/// 70B-wide rows, more of them than any cache holds.
const COLUMNS: usize = 8192;

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemv");
    for encoding in Encoding::PLAIN {
        let stride = encoding.row_stride(COLUMNS);
        let n_rows = (256 << 20) / stride;
        let row: Vec<f32> = (0..COLUMNS).map(|j| ((j * 31 % 97) as f32 - 48.0) / 100.0).collect();
        let mut packed = vec![0; stride];
        pack(encoding, &row, ScaleFit::LeastSquares, &mut packed).expect("finite weights");
        let data = packed.repeat(n_rows);
        let w = MatrixRef::new(encoding, n_rows, COLUMNS, &data);
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
    for encoding in Encoding::PLAIN {
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

/// Neurons far apart in memory that no cache holds, as a token picks them: gate, up and down rows of each.
fn scattered(c: &mut Criterion) {
    const NEURONS: usize = 100_000;
    const ACTIVE: usize = 512;
    let layout = BundleLayout::new(Encoding::Q4, COLUMNS).expect("whole groups");
    let size = layout.bundle_bytes();
    let kernels = Kernels::detect();
    let mut huge = AlignedBuf::zeroed(NEURONS * size).expect("memory");
    huge.fill(1);
    let small = vec![1u8; NEURONS * size];
    let mut y = vec![0.0; COLUMNS];
    let mut group = c.benchmark_group("scattered neurons");
    group.sample_size(20).throughput(Throughput::Bytes((ACTIVE * size) as u64));
    for (way, input) in inputs(&kernels, COLUMNS) {
        for (pages, data) in [("huge pages", &huge[..]), ("small pages", &small[..])] {
            let mut state = 1u64;
            group.bench_function(BenchmarkId::new(way, pages), |b| {
                b.iter(|| {
                    let picks: Vec<usize> = (0..ACTIVE)
                        .map(|_| {
                            state =
                                state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                            (state >> 33) as usize % NEURONS
                        })
                        .collect();
                    let bundle = |i: usize| &data[picks[i] * size..(picks[i] + 1) * size];
                    for first in (0..ACTIVE).step_by(4) {
                        let mine = [0, 1, 2, 3].map(|k| bundle(first + k));
                        let next = [4, 5, 6, 7].map(|k| bundle((first + k) % ACTIVE).split_at(size / 2));
                        for (mine, next) in mine.iter().zip(next) {
                            black_box(kernels.pre_activations(&layout, mine, black_box(&input), &[next.0]));
                        }
                        let (rows, ahead) = (mine.map(|b| layout.row(b, 2)), next.map(|n| n.1));
                        kernels.axpys(Encoding::Q4, rows, [0.5; 4], black_box(&mut y), &ahead);
                    }
                });
            });
        }
    }
    group.finish();
}

/// An input for q4 rows in f32, and as it is prepared for them where that is something else.
fn inputs(kernels: &Kernels, columns: usize) -> [(&'static str, PreparedInput); 2] {
    let x: Vec<f32> = (0..columns).map(|j| (j * 53 % 89) as f32 / 89.0 - 0.5).collect();
    [("f32", Encoding::Bf16), ("prepared", Encoding::Q4)].map(|(name, encoding)| {
        let mut input = PreparedInput::default();
        kernels.prepare(encoding, &x, &mut input);
        (name, input)
    })
}

/// Gate and up rows that a core's caches hold, and the making of an input.
fn cached(c: &mut Criterion) {
    let kernels = Kernels::detect();
    let mut group = c.benchmark_group("dots q4 from cache");
    for columns in [256, 576, COLUMNS] {
        let layout = BundleLayout::new(Encoding::Q4, columns).expect("whole groups");
        let bundles = vec![1u8; (200 << 10) / layout.bundle_bytes() * layout.bundle_bytes()];
        group.throughput(Throughput::Bytes(bundles.len() as u64 * 2 / 3));
        for (way, input) in inputs(&kernels, columns) {
            group.bench_function(BenchmarkId::new(way, columns), |b| {
                b.iter(|| {
                    for bundle in bundles.chunks_exact(layout.bundle_bytes()) {
                        black_box(kernels.pre_activations(&layout, bundle, black_box(&input), &[]));
                    }
                })
            });
        }
        let (x, mut input) = (vec![0.5; columns], PreparedInput::default());
        group.throughput(Throughput::Elements(columns as u64));
        group.bench_function(BenchmarkId::new("prepare", columns), |b| {
            b.iter(|| kernels.prepare(Encoding::Q4, black_box(&x), black_box(&mut input)))
        });
    }
    group.finish();
}

/// The gates of a small layer, which caches hold: judged by the certificate, and multiplied four at a time.
fn gates(c: &mut Criterion) {
    const HIDDEN: usize = 256;
    const NEURONS: usize = 2048;
    let mut group = c.benchmark_group("gates");
    let layout = BundleLayout::new(Encoding::Bf16, HIDDEN).expect("any width");
    let weight = |r: usize, j: usize| ((r * 37 + j * 31) % 97) as f32 / 100.0 - 0.48;
    let certificate = Certificate::new(NEURONS, HIDDEN, |r, out| {
        out.iter_mut().enumerate().for_each(|(j, v)| *v = weight(r, j));
    });
    let (certificate, mut input) = (certificate.expect("memory").expect("finite weights"), QuantisedInput::default());
    let mut bundles = vec![0u8; NEURONS * layout.bundle_bytes()];
    for (r, bundle) in bundles.chunks_exact_mut(layout.bundle_bytes()).enumerate() {
        let row: Vec<f32> = (0..HIDDEN).map(|j| weight(r, j)).collect();
        let mut packed = vec![0; layout.encoding().row_stride(HIDDEN)];
        pack(layout.encoding(), &row, ScaleFit::LeastSquares, &mut packed).expect("finite weights");
        layout.set_row(bundle, 0, &packed);
    }
    let x: Vec<f32> = (0..HIDDEN).map(|j| (j * 53 % 89) as f32 / 89.0 - 0.5).collect();
    group.throughput(Throughput::Elements(HIDDEN as u64));
    group.bench_function("input", |b| b.iter(|| black_box(&mut input).set(black_box(&x))));
    group.throughput(Throughput::Elements(NEURONS as u64));
    for kernels in Isa::ALL.into_iter().filter_map(Kernels::new).filter(|k| k.isa() != Isa::Portable) {
        let name = kernels.isa().name();
        group.bench_function(BenchmarkId::new("certificate", name), |b| {
            b.iter(|| {
                assert!(input.set(black_box(&x)));
                (0..NEURONS / CERTIFIED_ROWS)
                    .map(|i| certificate.negative(&kernels, i, &input).count_ones())
                    .sum::<u32>()
            })
        });
        group.bench_function(BenchmarkId::new("bf16", name), |b| {
            b.iter(|| {
                let (fours, _) = bundles.as_chunks::<{ 4 * 3 * 2 * HIDDEN }>();
                let dots = |four: &[u8]| {
                    let rows = [0, 1, 2, 3].map(|k| layout.row(&four[k * layout.bundle_bytes()..], 0));
                    kernels.dots(layout.encoding(), rows, black_box(&x))
                };
                fours.iter().map(|four| dots(four).iter().filter(|g| **g <= 0.0).count()).sum::<usize>()
            })
        });
    }
    group.finish();
}

/// Rows of sketches beside those of q4, in weights a second: from a core's caches, and one behind the other (dots) or two of
/// three (axpys) from memory that no cache holds.
fn sketch(c: &mut Criterion) {
    let x: Vec<f32> = (0..COLUMNS).map(|j| (j * 53 % 89) as f32 / 89.0 - 0.5).collect();
    let mut group = c.benchmark_group("sketch");
    for (place, total_bytes) in [("cache", 256 << 10), ("memory", 512 << 20)] {
        group.sample_size(if total_bytes > 1 << 20 { 10 } else { 100 });
        let codes: Vec<u8> = (0..COLUMNS).map(|j| (j * 31 % 97 % 4) as u8).collect();
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new).filter(|k| k.isa() != Isa::Portable) {
            let isa = kernels.isa().name();
            for bits in [SketchBits::Two, SketchBits::Three] {
                let mut row = vec![0; bits.row_bytes(COLUMNS)];
                sketch_row(bits, &codes, &vec![0.01; COLUMNS / SKETCH_UNIT], &mut row);
                let data = row.repeat(total_bytes / row.len());
                let matrix = SketchMatrix::new(bits, COLUMNS, &data);
                let (input, mut out) = (kernels.sketch_input(&x), vec![0.0; matrix.n_rows()]);
                group.throughput(Throughput::Elements((matrix.n_rows() * COLUMNS) as u64));
                group.bench_function(format!("dots/{} bits/{isa}/{place}", bits.bits()), |b| {
                    b.iter(|| kernels.sketch_dots(matrix, 0, black_box(&input), &mut out))
                });
                let picked: Vec<u32> = (0..matrix.n_rows() as u32).filter(|r| r % 3 != 1).collect();
                let (a, mut y) = (vec![1e-3; picked.len()], vec![0.0; COLUMNS]);
                group.throughput(Throughput::Elements((picked.len() * COLUMNS) as u64));
                group.bench_function(format!("axpys/{} bits/{isa}/{place}", bits.bits()), |b| {
                    b.iter(|| kernels.sketch_axpys(matrix, &picked, &a, black_box(&mut y)))
                });
            }
            let q4 = Encoding::Q4;
            let data = vec![1u8; total_bytes / q4.row_stride(COLUMNS) * q4.row_stride(COLUMNS)];
            let w = MatrixRef::new(q4, data.len() / q4.row_stride(COLUMNS), COLUMNS, &data);
            let mut y = vec![0.0; w.rows];
            group.throughput(Throughput::Elements((w.rows * COLUMNS) as u64));
            group.bench_function(format!("dots/q4/{isa}/{place}"), |b| {
                b.iter(|| gemv_rows(&kernels, &w, 0, black_box(&x), &mut y))
            });
            let mut y = vec![0.0; COLUMNS];
            let fours: Vec<usize> = (0..w.rows - 8).filter(|r| r % 3 != 1).collect();
            let (fours, _) = fours.as_chunks::<4>();
            group.throughput(Throughput::Elements((4 * fours.len() * COLUMNS) as u64));
            group.bench_function(format!("axpys/q4/{isa}/{place}"), |b| {
                b.iter(|| {
                    for (now, next) in fours.iter().zip(fours.iter().cycle().skip(1)) {
                        let ahead = next.map(|r| w.row(r).codes);
                        kernels.axpys(q4, now.map(|r| w.row(r)), [1e-3; 4], black_box(&mut y), &ahead);
                    }
                })
            });
        }
        let data = vec![1u8; total_bytes];
        group.throughput(Throughput::Bytes(total_bytes as u64));
        group.bench_function(format!("plain read/{place}"), |b| b.iter(|| ops::sum_bytes(black_box(&data))));
    }
    group.finish();
}

criterion_group!(benches, rows, bundles, scattered, cached, gates, sketch);
criterion_main!(benches);
