//! Every variant of the patch loops against one column at a time, and refusals in place of bounds.
#![allow(missing_docs, clippy::indexing_slicing)]

use proptest::prelude::*;
use thermocline_kernels::patch::{Patcher, apply_difference, key_difference};

fn variants() -> Vec<Patcher> {
    [Some(Patcher::portable()), Patcher::vbmi2()].into_iter().flatten().collect()
}

/// Base and changed bits: any pattern, each column changed with the chance of `density` in 256.
fn rows() -> impl Strategy<Value = Vec<(u16, u16)>> {
    (prop::sample::select(vec![0u16, 1, 13, 128, 256]), 0usize..200).prop_flat_map(|(density, n)| {
        let column = (any::<u16>(), any::<u16>(), 0u16..256);
        prop::collection::vec(column.prop_map(move |(a, b, c)| (a, if c < density { b } else { a })), n)
    })
}

fn sparse_form(rows: &[(u16, u16)]) -> (Vec<u8>, Vec<u16>) {
    let mut bitmap = vec![0u8; rows.len().div_ceil(8)];
    let mut differences = Vec::new();
    for (j, (a, b)) in rows.iter().enumerate().filter(|(_, (a, b))| a != b) {
        bitmap[j / 8] |= 1 << (j % 8);
        differences.push(key_difference(*a, *b));
    }
    (bitmap, differences)
}

#[test]
fn differences_of_every_pattern_come_back_and_small_steps_are_small() {
    for base in 0..=u16::MAX {
        for changed in [0, 1, base, base ^ 1, base ^ 0x8000, base.wrapping_add(1), 0x7f80, 0xff81, 0x7fc1, u16::MAX] {
            let difference = key_difference(base, changed);
            assert_eq!(apply_difference(base, difference), changed, "{base:04x} to {changed:04x}");
            assert_eq!(difference == 0, base == changed);
        }
    }
    // Across zero too: -0 is one step below +0.
    assert_eq!((key_difference(0x8000, 0), key_difference(0, 0x8000), key_difference(1, 0x8001)), (2, 1, 5));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn every_variant_gives_the_changed_rows(rows in rows(), offset in 0usize..3) {
        let (bitmap, differences) = sparse_form(&rows);
        let all: Vec<u16> = rows.iter().map(|(a, b)| key_difference(*a, *b)).collect();
        let low: Vec<u8> = all.iter().map(|d| *d as u8).collect();
        let high: Vec<u8> = all.iter().map(|d| (*d >> 8) as u8).collect();
        let changed: Vec<u16> = rows.iter().map(|(_, b)| *b).collect();
        for patcher in variants() {
            // Not aligned, and with neighbours that must stay.
            let mut row = vec![0xabcd; rows.len() + offset + 1];
            row[offset..][..rows.len()].iter_mut().zip(&rows).for_each(|(out, (a, _))| *out = *a);
            let before = row.clone();
            prop_assert!(patcher.sparse(&mut row[offset..][..rows.len()], &bitmap, &differences).is_some());
            prop_assert_eq!(&row[offset..][..rows.len()], &changed[..]);
            prop_assert_eq!((&row[..offset], row[row.len() - 1]), (&before[..offset], 0xabcd));
            row.copy_from_slice(&before);
            prop_assert!(patcher.dense(&mut row[offset..][..rows.len()], &low, &high).is_some());
            prop_assert_eq!(&row[offset..][..rows.len()], &changed[..]);
        }
    }

    #[test]
    fn counts_and_lengths_that_do_not_fit_are_refused(n in 1usize..100, bits in prop::collection::vec(any::<u8>(), 13), more in 0usize..70) {
        let bitmap = &bits[..n.div_ceil(8)];
        let set = (0..n).filter(|j| bitmap[j / 8] >> (j % 8) & 1 == 1).count();
        let stray = n % 8 > 0 && bitmap[n / 8] >> (n % 8) != 0;
        let differences = vec![7; more];
        for patcher in variants() {
            let mut row = vec![3; n];
            let done = patcher.sparse(&mut row, bitmap, &differences).is_some();
            prop_assert_eq!(done, set == more && !stray);
            prop_assert!(done || row.iter().all(|v| *v == 3));
            prop_assert!(patcher.sparse(&mut row, &bits[..n.div_ceil(8) - 1], &differences).is_none());
            prop_assert!(patcher.dense(&mut row, &vec![0; n], &vec![0; n + 1]).is_none());
        }
    }
}
