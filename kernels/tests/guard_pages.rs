//! No kernel reads or writes outside of the slices that it is given: each one ends right before, or begins right behind, a
//! page that nobody may touch, so that a byte too far ends the test with a fault. Under Miri, which sees every byte itself
//! but does not know all vector instructions, the slices are allocations of their own: a test for each encoding, few cases
//! and short rows.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::ffi::c_void;
use thermocline_kernels::exact::{PackedRow, bf16x, residual};
use thermocline_kernels::patch::{Patcher, key_difference};
use thermocline_kernels::{
    Encoding, Isa, Kernels, PreparedInput, RowRef, SKETCH_UNIT, ScaleFit, SketchBits, SketchMatrix, unpack, unsketch,
};

const CASES: u32 = if cfg!(miri) { 2 } else { 100 };
const GROUPS_MAX: usize = if cfg!(miri) { 3 } else { 40 };

/// Which end of the bytes is watched.
#[derive(Debug, Clone, Copy)]
enum Watched {
    Start,
    End,
}

/// Memory for `len` bytes, of which one end is at a page that nobody may touch.
#[cfg(not(miri))]
mod memory {
    use super::{Watched, c_void};
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

    /// A page of this size, or a multiple of the system's.
    const PAGE: usize = 64 << 10;

    fn mapped(len: usize) -> usize {
        len.next_multiple_of(PAGE).max(PAGE) + 2 * PAGE
    }

    /// The mapping, and where in it the bytes lie.
    pub fn take(len: usize, watched: Watched) -> (*mut c_void, usize) {
        let mapped = mapped(len);
        let all = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at a place that the system chooses.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, all, MapFlags::PRIVATE) }.unwrap();
        for at in [0, mapped - PAGE] {
            // SAFETY: a page of the mapping that was just made, to which nothing refers.
            unsafe { mprotect(mapping.byte_add(at), PAGE, MprotectFlags::empty()) }.unwrap();
        }
        match watched {
            Watched::Start => (mapping, PAGE),
            Watched::End => (mapping, mapped - PAGE - len),
        }
    }

    /// # Safety
    /// What `take` gave for this `len`, once, and nothing may refer to it.
    pub unsafe fn give_back(mapping: *mut c_void, len: usize) {
        // SAFETY: by this function's contract.
        unsafe { munmap(mapping, mapped(len)) }.unwrap();
    }
}

/// Memory of exactly `len` bytes.
#[cfg(miri)]
mod memory {
    use super::{Watched, c_void};
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), 8).unwrap()
    }

    pub fn take(len: usize, _: Watched) -> (*mut c_void, usize) {
        // SAFETY: the layout's size is not zero.
        (unsafe { alloc_zeroed(layout(len)) }.cast(), 0)
    }

    /// # Safety
    /// What `take` gave for this `len`, once, and nothing may refer to it.
    pub unsafe fn give_back(mapping: *mut c_void, len: usize) {
        // SAFETY: by this function's contract.
        unsafe { dealloc(mapping.cast(), layout(len)) }
    }
}

/// Bytes of which one end is watched.
struct Guarded {
    mapping: *mut c_void,
    start: usize,
    len: usize,
}

impl Guarded {
    fn new(bytes: &[u8], watched: Watched) -> Self {
        let (mapping, start) = memory::take(bytes.len(), watched);
        let mut guarded = Self { mapping, start, len: bytes.len() };
        guarded.of::<u8>().copy_from_slice(bytes);
        guarded
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` on may be used, are zeroed when they are made, and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.mapping.byte_add(self.start).cast(), self.len) }
    }

    /// As numbers, of which the bytes are a whole number: both ends of a page are aligned for every number.
    fn of<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as in `bytes`; `&mut self` makes the access exclusive.
        let bytes: &mut [u8] =
            unsafe { std::slice::from_raw_parts_mut(self.mapping.byte_add(self.start).cast(), self.len) };
        bytemuck::cast_slice_mut(bytes)
    }

    fn numbers<T: bytemuck::Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: from `take`; references to it have ended with `self`.
        unsafe { memory::give_back(self.mapping, self.len) }
    }
}

/// A row whose parts are all guarded.
struct GuardedRow([Guarded; 5]);

impl GuardedRow {
    fn new(row: RowRef<'_>, watched: Watched) -> Self {
        Self([row.codes, row.scales, row.coarse, row.head, row.stream].map(|part| Guarded::new(part, watched)))
    }

    fn row(&self) -> RowRef<'_> {
        let [codes, scales, coarse, head, stream] = self.0.each_ref().map(Guarded::bytes);
        RowRef { codes, scales, coarse, head, stream }
    }
}

/// The bytes of a row in the layout of a matrix, with nothing behind its stream; of weights with any bits, or of garbage.
fn row_bytes(encoding: Encoding, bits: &[u16], garbage: Option<&[u8]>) -> Vec<u8> {
    let columns = bits.len();
    let mut bytes = match encoding {
        Encoding::Bf16 => bits.iter().flat_map(|b| b.to_le_bytes()).collect(),
        Encoding::Q8 | Encoding::Q4 => vec![0; encoding.row_stride(columns)],
        _ => {
            let PackedRow { base, coarse, head, stream } = match encoding {
                Encoding::Bf16x => bf16x::pack(bits),
                _ => residual::pack(encoding, bits, ScaleFit::Weighted(None)),
            };
            let mut bytes = [base, coarse].concat();
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            [bytes, head, stream].concat()
        }
    };
    if let Some(garbage) = garbage {
        bytes.iter_mut().zip(garbage.iter().cycle()).for_each(|(b, g)| *b ^= g);
    } else if matches!(encoding, Encoding::Q8 | Encoding::Q4) {
        // Codes of any kind, and scales of ordinary size.
        let code_bytes = encoding.code_bytes(columns);
        bytes.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 37) as u8);
        bytes[code_bytes..].chunks_exact_mut(2).for_each(|s| s.copy_from_slice(&0x2c00u16.to_le_bytes()));
    }
    bytes
}

/// What there is behind a row's parts, padding and the room for streams, is not the row's.
fn trimmed(encoding: Encoding, columns: usize, row: RowRef<'_>) -> RowRef<'_> {
    let stream = encoding.stream_bytes(row.head).min(row.stream.len());
    RowRef {
        codes: &row.codes[..encoding.code_bytes(columns)],
        scales: &row.scales[..encoding.scale_bytes(columns)],
        coarse: &row.coarse[..encoding.coarse_bytes(columns)],
        head: &row.head[..encoding.head_bytes(columns)],
        stream: &row.stream[..stream],
    }
}

/// Bits of a row, or what to make of them, and which end is watched.
fn rows(encoding: Encoding) -> impl Strategy<Value = (Vec<u16>, Option<Vec<u8>>, Watched)> {
    let watched = prop_oneof![Just(Watched::Start), Just(Watched::End)];
    (0..GROUPS_MAX, 0usize..32, watched).prop_flat_map(move |(groups, more, watched)| {
        let free = matches!(encoding, Encoding::Bf16 | Encoding::Bf16x);
        let columns = if free { (groups * 32 + more).max(1) } else { (groups + 1) * 32 };
        // Ordinary weights, whose streams are short, and any bits.
        let bits = prop_oneof![0x3c00u16..0x4000, any::<u16>()];
        let garbage = prop::option::weighted(0.3, prop::collection::vec(any::<u8>(), 61));
        (prop::collection::vec(bits, columns), garbage, Just(watched))
    })
}

/// Everything that there is for rows in `encoding`, by every instruction set that this CPU has.
fn stays_inside(encoding: Encoding) {
    // The plainest first: what Miri knows of it is seen before what it does not know.
    for kernels in Isa::ALL.into_iter().rev().filter_map(Kernels::new) {
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        let case = |(bits, garbage, watched): (Vec<u16>, Option<Vec<u8>>, Watched)| {
            stays_inside_at(encoding, &kernels, &bits, garbage.as_deref(), watched)
        };
        TestRunner::new(config).run(&rows(encoding), case).unwrap();
        println!("{encoding}, {}: nothing outside", kernels.isa().name());
    }
}

fn stays_inside_at(
    encoding: Encoding,
    kernels: &Kernels,
    bits: &[u16],
    garbage: Option<&[u8]>,
    watched: Watched,
) -> Result<(), TestCaseError> {
    let columns = bits.len();
    let bytes = row_bytes(encoding, bits, garbage);
    let row = trimmed(encoding, columns, RowRef::from_matrix_row(encoding, columns, &bytes));
    let guarded = GuardedRow::new(row, watched);
    let values: Vec<f32> = (0..columns).map(|i| (i % 13) as f32 - 6.0).collect();
    let x = Guarded::new(bytemuck::cast_slice(&values), watched);
    let mut y = Guarded::new(bytemuck::cast_slice(&values), watched);
    let mut decoded = Guarded::new(&vec![0; 2 * columns], watched);
    let (row, x) = (guarded.row(), x.numbers::<f32>());
    if encoding.has_stream() {
        kernels.decode(encoding, row, decoded.of());
        prop_assert!(garbage.is_some() || decoded.numbers::<u16>() == bits);
    }
    let four = kernels.dots(encoding, [row; 4], x);
    let [one] = kernels.dots(encoding, [row], x);
    prop_assert!(four.iter().all(|v| v.to_bits() == one.to_bits()) || one.is_nan());
    let mut input = PreparedInput::default();
    kernels.prepare(encoding, x, &mut input);
    kernels.prepared_dots(encoding, [row; 4], &input);
    kernels.axpys(encoding, [row; 4], [1.0, -0.5, 0.25, 2.0], y.of(), &[row.codes, row.stream]);
    kernels.axpy(encoding, row, 0.5, y.of());
    kernels.unpack(encoding, row, y.of());
    unpack(encoding, row, y.of());
    Ok(())
}

#[test]
fn rows_in_bf16() {
    stays_inside(Encoding::Bf16);
}

#[test]
fn rows_in_q8() {
    stays_inside(Encoding::Q8);
}

#[test]
fn rows_in_q4() {
    stays_inside(Encoding::Q4);
}

#[test]
fn rows_in_bf16x() {
    stays_inside(Encoding::Bf16x);
}

#[test]
fn rows_in_q4_exact() {
    stays_inside(Encoding::Q4Exact);
}

#[test]
fn rows_in_q8_exact() {
    stays_inside(Encoding::Q8Exact);
}

#[test]
fn sketches() {
    let units = prop_oneof![1usize..GROUPS_MAX.min(20), prop::sample::select(vec![1usize, 2, 3, 9, 14, 16, 17])];
    let watched = prop_oneof![Just(Watched::Start), Just(Watched::End)];
    let cases = (units, 1usize..12, any::<bool>(), watched, prop::collection::vec(any::<u8>(), 61));
    for kernels in Isa::ALL.into_iter().rev().filter_map(Kernels::new) {
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        let ran = TestRunner::new(config).run(&cases, |(units, n_rows, three, watched, bytes)| {
            let bits = if three { SketchBits::Three } else { SketchBits::Two };
            let (columns, guard) = (units * SKETCH_UNIT, |bytes: &[u8]| Guarded::new(bytes, watched));
            // Any bytes are rows, of numbers, infinities and NaN.
            let bytes: Vec<u8> = bytes.into_iter().cycle().take(n_rows * bits.row_bytes(columns)).collect();
            let bytes = guard(&bytes);
            #[cfg(feature = "cuda")]
            let arranged = [SketchMatrix::new, SketchMatrix::of_planes];
            #[cfg(not(feature = "cuda"))]
            let arranged = [SketchMatrix::new];
            let values: Vec<f32> = (0..columns).map(|i| (i % 13) as f32 - 6.0).collect();
            let (x, mut y) = (guard(bytemuck::cast_slice(&values)), guard(bytemuck::cast_slice(&values)));
            for arranged in arranged {
                let matrix = arranged(bits, columns, bytes.bytes());
                let mut out = guard(&vec![0; 4 * n_rows]);
                for first in [0, n_rows - 1] {
                    kernels.sketch_dots(matrix, first, &kernels.sketch_input(x.numbers()), &mut out.of()[first..]);
                }
                let rows: Vec<u32> = (0..2 * n_rows as u32).map(|r| r * 7 % n_rows as u32).collect();
                let (rows, a) =
                    (guard(bytemuck::cast_slice(&rows)), guard(bytemuck::cast_slice(&vec![0.5f32; rows.len()])));
                kernels.sketch_axpys(matrix, rows.numbers(), a.numbers(), y.of());
            }
            let matrix = SketchMatrix::new(bits, columns, bytes.bytes());
            unsketch(bits, matrix.row(n_rows - 1), y.of());
            Ok(())
        });
        ran.unwrap();
        println!("sketches, {}: nothing outside", kernels.isa().name());
    }
}

#[test]
fn patches() {
    let row = (any::<u16>(), any::<u16>(), any::<bool>());
    let rows = (prop::collection::vec(row, 1..8 * GROUPS_MAX), any::<bool>());
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
    let ran = TestRunner::new(config).run(&rows, |(rows, at_start)| {
        let watched = if at_start { Watched::Start } else { Watched::End };
        let guard = |bytes: &[u8]| Guarded::new(bytes, watched);
        let base: Vec<u16> = rows.iter().map(|r| r.0).collect();
        let changed: Vec<u16> = rows.iter().map(|&(a, b, moves)| if moves { b } else { a }).collect();
        let all: Vec<u16> = base.iter().zip(&changed).map(|(a, b)| key_difference(*a, *b)).collect();
        let mut bitmap = vec![0u8; rows.len().div_ceil(8)];
        all.iter().enumerate().filter(|(_, d)| **d != 0).for_each(|(j, _)| bitmap[j / 8] |= 1 << (j % 8));
        let few: Vec<u16> = all.iter().copied().filter(|&d| d != 0).collect();
        let (bitmap, few) = (guard(&bitmap), guard(bytemuck::cast_slice(&few)));
        let low = guard(&all.iter().map(|d| *d as u8).collect::<Vec<u8>>());
        let high = guard(&all.iter().map(|d| (*d >> 8) as u8).collect::<Vec<u8>>());
        for patcher in [Some(Patcher::portable()), Patcher::vbmi2()].into_iter().flatten() {
            let mut row = guard(bytemuck::cast_slice(&base));
            prop_assert!(patcher.sparse(row.of(), bitmap.bytes(), few.numbers()).is_some());
            prop_assert_eq!(row.numbers::<u16>(), &changed[..]);
            row.of::<u16>().copy_from_slice(&base);
            prop_assert!(patcher.dense(row.of(), low.bytes(), high.bytes()).is_some());
            prop_assert_eq!(row.numbers::<u16>(), &changed[..]);
        }
        Ok(())
    });
    ran.unwrap();
}
