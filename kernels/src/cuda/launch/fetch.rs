//! Copies of what will probably be needed, beside other kernels.

use super::{Foreseen, address, u32_of};
use crate::BundleLayout;
use crate::cuda::backend::{Arg, Launch, Queue};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;

/// Threads of a block, as in `kernels/cuda/fetch.cu`.
const THREADS: u32 = 128;
/// Multiprocessors for each block: one alone reads about 2 GB/s over a link, and the kernels beside it need some whole.
const MULTIPROCESSORS: usize = 4;

/// Gives the copy queue the task to bring the listed bundles of `cold`, pinned host memory, to `places`; `totals` as in
/// [`super::WorkList`].
///
/// # Errors
/// See the module.
pub fn fetch_bundles(
    device: &Device,
    layout: BundleLayout,
    foreseen: &Foreseen,
    cold: &View,
    places: &View,
    totals: &View,
) -> Result<()> {
    assert!(places.len() >= foreseen.n_places * layout.bundle_bytes() && totals.len() >= 64, "places");
    let launch = Launch {
        kernel: "fetch_bundles".to_owned(),
        grid: [device.n_multiprocessors().div_ceil(MULTIPROCESSORS) as u32, 1],
        block: THREADS,
        shared_bytes: 0,
        args: vec![
            address(&foreseen.list),
            address(&foreseen.n_listed),
            address(cold),
            address(places),
            u32_of(layout.bundle_bytes()),
            // The last of eight.
            Arg::Address(totals.address() + 56),
        ],
    };
    device.launch_in(Queue::Copy, launch, &[&foreseen.list, &foreseen.n_listed, cold, places, totals])
}
