//! The work of a layer whose bundles have several layouts.

use super::WorkList;
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use std::ops::Range;

/// Sections of a launch, as in `kernels/cuda/divide.cu`.
const PARTS: usize = 4;

/// Divides `work`, which [`super::choose`] has made for a layer of `ffn` neurons, the first `n_hot` of which are in device
/// memory, among the layer's sections: neighbouring neurons, in order, and the list that each gets, for as many items as it has
/// neurons, and for the last one all of the cache and of what was fetched. In these lists bundles are counted from the first of
/// the section's that is in device memory, or in host memory. `counts` are as in [`WorkList`] but for the host's part, which is
/// left out; `totals` grow as there.
///
/// Only neurons of the last section may be cached or fetched.
///
/// # Errors
/// See the module.
pub fn divide_work(
    device: &Device,
    work: &WorkList,
    n_hot: usize,
    ffn: usize,
    sections: &[(Range<usize>, &WorkList)],
) -> Result<()> {
    assert!(work.items.len() >= 8 * ffn && work.counts.len() >= 32, "work list");
    let fits = |(neurons, list): &(Range<usize>, &WorkList)| {
        neurons.end <= ffn
            && list.items.len() >= 8 * neurons.len()
            && list.counts.len() >= 32
            && list.totals.len() >= 64
    };
    assert!(sections.iter().all(fits), "work lists of sections");
    let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
    for parts in sections.chunks(PARTS) {
        // The fields of `struct DivideWork` in kernels/cuda/divide.cu.
        let mut words = vec![work.items.address(), work.counts.address(), pair(n_hot, ffn)];
        for (neurons, list) in parts {
            words.extend([&list.items, &list.counts, &list.totals].map(|view| view.address()));
            words.push(pair(neurons.start, neurons.end));
        }
        words.resize(3 + 4 * PARTS, 0);
        let launch = Launch {
            kernel: "divide_work".to_owned(),
            grid: [parts.len() as u32, 1],
            block: 1024,
            shared_bytes: 0,
            args: vec![Arg::Struct(words)],
        };
        let mut uses = vec![&work.items, &work.counts];
        uses.extend(parts.iter().flat_map(|(_, list)| [&list.items, &list.counts, &list.totals]));
        device.launch(launch, &uses)?;
    }
    Ok(())
}
