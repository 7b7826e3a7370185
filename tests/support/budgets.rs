//! The same bits from every budget.

use super::{answer, bits, budget_range_of, engine_at, request};
use std::path::Path;
use thermocline_runtime::Mode;
use thermocline_split::{Planes, Split};

/// Every plane is used by batches and by single tokens.
pub const DECODED: usize = 4;

pub fn logits(dir: &Path, planes: impl Into<Planes>, mode: Mode) -> Vec<f32> {
    answer(&mut engine_at(dir, planes, request(mode, None, 1)).unwrap(), DECODED).unwrap()
}

pub fn planes(text: &str) -> Planes {
    text.parse().unwrap()
}

/// All weights in memory, half and a quarter of what is more than the least, and the least.
pub fn budgets(split: &Split, mode: Mode) -> [Option<u64>; 4] {
    let (least, all) = budget_range_of(split, mode);
    [None, Some((least + all) / 2), Some(least + (all - least) / 4), Some(least)]
}

/// That every budget gives these bits, with two threads and with one in turn.
pub fn gives(dir: &Path, planes: impl Into<Planes>, mode: Mode, expected: &[u32]) {
    let planes = planes.into();
    for (i, budget) in budgets(&Split::open_at(dir, planes).unwrap(), mode).into_iter().enumerate() {
        let n_threads = 2 - i % 2;
        let mut engine = engine_at(dir, planes, request(mode, budget, n_threads)).unwrap();
        assert!(budget.is_none_or(|b| engine.plan().total_bytes <= b));
        assert_eq!(engine.plan().streams(), i > 0, "{} with {budget:?}", dir.display());
        let got = bits(&answer(&mut engine, DECODED).unwrap());
        assert!(got == expected, "{} at {planes} with {budget:?} and {n_threads} threads", dir.display());
        assert!(i == 0 || engine.account().bytes.disk > 0);
    }
}
