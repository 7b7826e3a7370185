//! Rows in every encoding: what was packed comes back bit for bit where the encoding is exact, and rows of garbage are
//! decoded, multiplied and examined without a look beyond their bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thermocline_fuzz::Input;
use thermocline_kernels::exact::{PackedRow, bf16x, decode, residual, value16};
use thermocline_kernels::{Encoding, Isa, Kernels, PreparedInput, RowRef, ScaleFit, pack, unpack};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let encoding = Encoding::ALL[input.below(Encoding::ALL.len())];
    match input.byte() % 2 {
        0 => round_trip(encoding, input.rest()),
        _ => {
            let groups = 1 + input.below(70);
            garbage(encoding, groups * 32, input.rest());
        }
    }
});

fn kernels() -> impl Iterator<Item = Kernels> {
    Isa::ALL.into_iter().filter_map(Kernels::new)
}

/// The rest of the input as weights.
fn round_trip(encoding: Encoding, data: &[u8]) {
    let mut bits: Vec<u16> = data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let free = matches!(encoding, Encoding::Bf16 | Encoding::Bf16x);
    if !free {
        bits.truncate(bits.len() / 32 * 32);
    }
    if bits.is_empty() {
        return;
    }
    let columns = bits.len();
    let bytes = match encoding {
        Encoding::Bf16x => matrix_row(encoding, columns, &bf16x::pack(&bits)),
        Encoding::Q4Exact | Encoding::Q8Exact => {
            matrix_row(encoding, columns, &residual::pack(encoding, &bits, ScaleFit::Weighted(None)))
        }
        Encoding::Q4Plus => return,
        _ => {
            let values: Vec<f32> = bits.iter().map(|b| value16(*b)).collect();
            let mut out = vec![0; encoding.row_stride(columns)];
            if pack(encoding, &values, ScaleFit::Weighted(None), &mut out).is_err() {
                return;
            }
            out
        }
    }
    .into_boxed_slice();
    let row = RowRef::from_matrix_row(encoding, columns, &bytes);
    if encoding.is_exact() {
        let mut out = vec![0x5555; columns];
        decode(encoding, row, &mut out);
        assert!(out == bits, "{encoding}: decode");
        for kernels in kernels() {
            out.fill(0x5555);
            kernels.decode(encoding, row, &mut out);
            assert!(out == bits, "{encoding} {:?}", kernels.isa());
        }
    } else {
        let mut out = vec![0.0; columns];
        unpack(encoding, row, &mut out);
        // Codes and scales: packed again, they give the same values.
        assert!(out.iter().all(|v| v.is_finite()), "{encoding}");
    }
}

fn matrix_row(encoding: Encoding, columns: usize, row: &PackedRow) -> Vec<u8> {
    let mut bytes = row.base.clone();
    bytes.extend(&row.coarse);
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    bytes.extend(&row.head);
    assert_eq!(bytes.len(), encoding.row_stride(columns));
    bytes.extend(&row.stream);
    bytes
}

/// The rest of the input as a stored row, as long as it is: an allocation of its own, with nothing behind it.
fn garbage(encoding: Encoding, columns: usize, data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.resize(bytes.len().max(encoding.row_stride(columns)), 0xa5);
    let bytes = bytes.into_boxed_slice();
    let row = RowRef::from_matrix_row(encoding, columns, &bytes);
    let x: Vec<f32> = (0..columns).map(|i| (i % 7) as f32 - 3.0).collect();
    let x = x.into_boxed_slice();
    let (_, _) = (encoding.first_not_finite(row), encoding.is_zero(row));
    for kernels in kernels() {
        if encoding.is_exact() {
            kernels.decode(encoding, row, &mut vec![0; columns].into_boxed_slice());
        }
        kernels.unpack(encoding, row, &mut vec![0.0; columns].into_boxed_slice());
        let _ = kernels.dots(encoding, [row; 1], &x);
        let _ = kernels.dots(encoding, [row; 4], &x);
        let mut prepared = PreparedInput::default();
        kernels.prepare(encoding, &x, &mut prepared);
        let _ = kernels.prepared_dots(encoding, [row; 2], &prepared);
        let mut y = x.clone();
        kernels.axpy(encoding, row, 0.5, &mut y);
        kernels.axpys(encoding, [row; 3], [0.5, -2.0, 0.1], &mut y, &[]);
    }
    if encoding.is_exact() {
        decode(encoding, row, &mut vec![0; columns].into_boxed_slice());
    }
    unpack(encoding, row, &mut vec![0.0; columns].into_boxed_slice());
}
