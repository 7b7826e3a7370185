//! GB/s of bfloat16 out of exact rows, on one core; ways to code exponents against each other.
//!
//! `decode/*`: rows of normal weights, packed and decoded to memory that the first-level cache holds; `memcpy` copies
//! as many bfloat16. `gemv/*`: products with 256 MB of bfloat16 in each encoding, read from RAM. `exponents/*`: the
//! candidates for `bf16x`, exponents alone; their sizes are printed first.
#![allow(missing_docs)]
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hint::black_box;
use thermocline_kernels::exact::{PackedRow, bf16x, bits16, residual};
use thermocline_kernels::{Encoding, Isa, Kernels, MatrixRef, Pool, RowRef, ScaleFit, gemv};

/// 70B-wide rows.
const COLUMNS: usize = 8192;
const ENCODINGS: [Encoding; 4] = [Encoding::Bf16, Encoding::Bf16x, Encoding::Q4Exact, Encoding::Q8Exact];

/// Normal weights (Box-Muller), as bfloat16.
fn weights(seed: u64, n: usize) -> Vec<u16> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 + 0.5) / (1 << 24) as f32
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos();
    (0..n).map(|_| bits16(0.02 * normal())).collect()
}

fn packed(encoding: Encoding, bits: &[u16]) -> Vec<u8> {
    let row = match encoding {
        Encoding::Bf16 => PackedRow { base: bits.iter().flat_map(|b| b.to_le_bytes()).collect(), ..Default::default() },
        Encoding::Bf16x => bf16x::pack(bits),
        _ => residual::pack(encoding, bits, ScaleFit::Weighted(None)),
    };
    [row.base, row.coarse, row.head, row.stream].concat()
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Bytes(2 * COLUMNS as u64));
    let bits = weights(1, COLUMNS);
    let mut out = vec![0; COLUMNS];
    group.bench_function("memcpy", |b| b.iter(|| black_box(&mut out).copy_from_slice(black_box(&bits))));
    for encoding in ENCODINGS.into_iter().skip(1) {
        let bytes = packed(encoding, &bits);
        println!("{encoding}: {:.2} % of bf16", 100.0 * bytes.len() as f64 / (2 * COLUMNS) as f64);
        let row = RowRef::from_matrix_row(encoding, COLUMNS, &bytes);
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let id = BenchmarkId::new(encoding.name(), kernels.isa().name());
            group.bench_function(id, |b| b.iter(|| kernels.decode(encoding, black_box(row), black_box(&mut out))));
        }
    }
    group.finish();
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemv");
    let n_rows = (256 << 20) / (2 * COLUMNS);
    let bits: Vec<Vec<u16>> = (0..64).map(|seed| weights(seed, COLUMNS)).collect();
    group.sample_size(10).throughput(Throughput::Bytes((2 * n_rows * COLUMNS) as u64));
    for encoding in ENCODINGS {
        let rows: Vec<Vec<u8>> = bits.iter().map(|bits| packed(encoding, bits)).collect();
        let stride = rows.iter().map(Vec::len).max().expect("rows").next_multiple_of(16);
        let mut data = vec![0; n_rows * stride];
        data.chunks_exact_mut(stride)
            .zip(rows.iter().cycle())
            .for_each(|(to, row)| to[..row.len()].copy_from_slice(row));
        let w = MatrixRef { encoding, rows: n_rows, columns: COLUMNS, stride, data: &data };
        let (x, mut y) = (vec![0.5; COLUMNS], vec![0.0; n_rows]);
        let kernels = Kernels::detect();
        for n_threads in [1, 2] {
            let mut pool = Pool::new(n_threads).expect("threads");
            let id = BenchmarkId::new(encoding.name(), n_threads);
            group.bench_function(id, |b| b.iter(|| gemv(&kernels, &mut pool, w, black_box(&x), &mut y)));
        }
    }
    group.finish();
}

/// Lengths of Huffman codes, by symbol.
fn huffman_lengths(counts: &[usize; 256]) -> [u8; 256] {
    let mut heap: BinaryHeap<_> =
        (0..256).filter(|&s| counts[s] > 0).map(|s| Reverse((counts[s], vec![s as u8]))).collect();
    let mut lengths = [0; 256];
    while heap.len() > 1 {
        if let (Some(Reverse((a, mut some))), Some(Reverse((b, others)))) = (heap.pop(), heap.pop()) {
            some.extend(others);
            some.iter().for_each(|&s| lengths[usize::from(s)] += 1);
            heap.push(Reverse((a + b, some)));
        }
    }
    lengths
}

/// A row's exponents by a Huffman code of its own, and the table that decodes up to 12 bits at once to the symbols that
/// end in them: what DFloat11 does with its tables, in a CPU's terms.
struct Huffman {
    bits: Vec<u8>,
    /// For the next 12 bits: up to four symbols, how many, and the bits that they take.
    table: Vec<([u8; 4], u8, u8)>,
}

const PEEK: usize = 12;

impl Huffman {
    fn new(exponents: &[u8]) -> Self {
        let mut counts = [0; 256];
        exponents.iter().for_each(|&e| counts[usize::from(e)] += 1);
        let lengths = huffman_lengths(&counts);
        let mut order: Vec<u8> = (0..=255).filter(|&s| lengths[usize::from(s)] > 0).collect();
        order.sort_by_key(|&s| (lengths[usize::from(s)], s));
        let (mut codes, mut next, mut last) = ([0u32; 256], 0u32, 0);
        for &s in &order {
            let length = lengths[usize::from(s)];
            next <<= length - last;
            // Least significant bit first in the stream.
            codes[usize::from(s)] = next.reverse_bits() >> (32 - u32::from(length));
            (next, last) = (next + 1, length);
        }
        let mut bits = vec![0u8; exponents.len() * 2 + 16];
        let mut at = 0;
        for &e in exponents {
            for i in 0..lengths[usize::from(e)] {
                bits[at / 8] |= ((codes[usize::from(e)] >> i & 1) as u8) << (at % 8);
                at += 1;
            }
        }
        bits.truncate(at.div_ceil(8) + 8);
        let table = (0..1u32 << PEEK)
            .map(|word| {
                let (mut symbols, mut n, mut used) = ([0; 4], 0, 0);
                while n < 4 {
                    let fits = |s: &&u8| {
                        let length = usize::from(lengths[usize::from(**s)]);
                        let mask = (1 << length) - 1;
                        used + length <= PEEK && word >> used & mask == codes[usize::from(**s)]
                    };
                    let Some(&s) = order.iter().find(fits) else { break };
                    symbols[n] = s;
                    used += usize::from(lengths[usize::from(s)]);
                    n += 1;
                }
                (symbols, n as u8, used as u8)
            })
            .collect();
        Self { bits, table }
    }

    fn decode(&self, out: &mut [u8]) {
        let (mut at, mut done) = (0, 0);
        while done + 4 <= out.len() {
            let word = self.bits[at / 8..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b)) >> (at % 8);
            let (symbols, n, used) = self.table[word as usize % (1 << PEEK)];
            out[done..done + 4].copy_from_slice(&symbols);
            // Codes beyond 12 bits are as rare as outliers; a whole decoder would look them up elsewhere.
            done += usize::from(n.max(1));
            at += usize::from(used.max(1));
        }
    }
}

fn exponents(c: &mut Criterion) {
    let mut group = c.benchmark_group("exponents");
    let bits = weights(3, COLUMNS);
    let exponents: Vec<u8> = bits.iter().map(|b| (b >> 7) as u8).collect();
    group.throughput(Throughput::Bytes(2 * COLUMNS as u64));
    let share = |bytes: usize| 100.0 * (COLUMNS + bytes) as f64 / (2 * COLUMNS) as f64;
    let mut counts = [0usize; 256];
    exponents.iter().for_each(|&e| counts[usize::from(e)] += 1);
    let entropy: f64 =
        counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / COLUMNS as f64).map(|p| -p * p.log2()).sum();
    println!("entropy bound: {:.2} % of bf16", share((entropy * COLUMNS as f64 / 8.0) as usize));

    // 4 bits for the 15 most frequent, the others in a list of columns.
    let mut order: Vec<u8> = (0..=255).collect();
    order.sort_by_key(|&e| Reverse(counts[usize::from(e)]));
    let code = |e: u8| order[..15].iter().position(|&o| o == e).unwrap_or(15) as u8;
    let nibbles: Vec<u8> = exponents.chunks_exact(2).map(|pair| code(pair[0]) | code(pair[1]) << 4).collect();
    let rest = exponents.iter().filter(|&&e| code(e) == 15).count();
    println!("fixed length, 15 exponents: {:.2} % of bf16, {rest} escapes", share(nibbles.len() + 16 + 3 * rest));
    let (mut table, mut out) = ([0u8; 16], vec![0u8; COLUMNS]);
    table.copy_from_slice(&order[..16]);
    group.bench_function("fixed length", |b| {
        b.iter(|| {
            for (pair, &byte) in black_box(&mut out).chunks_exact_mut(2).zip(black_box(&nibbles)) {
                (pair[0], pair[1]) = (table[usize::from(byte & 15)], table[usize::from(byte >> 4)]);
            }
        })
    });

    let huffman = Huffman::new(&exponents);
    huffman.decode(&mut out);
    assert_eq!(out[..COLUMNS - 4], exponents[..COLUMNS - 4]);
    println!("Huffman: {:.2} % of bf16", share(huffman.bits.len() - 8 + 32));
    group.bench_function("huffman", |b| b.iter(|| huffman.decode(black_box(&mut out))));

    let bytes = packed(Encoding::Bf16x, &bits);
    println!("cascade: {:.2} % of bf16", share(bytes.len() - COLUMNS));
    let row = RowRef::from_matrix_row(Encoding::Bf16x, COLUMNS, &bytes);
    let mut whole = vec![0; COLUMNS];
    let kernels = Kernels::detect();
    group.bench_function("cascade, whole weights", |b| {
        b.iter(|| kernels.decode(Encoding::Bf16x, black_box(row), black_box(&mut whole)))
    });
    group.finish();
}

criterion_group!(benches, decode, products, exponents);
criterion_main!(benches);
