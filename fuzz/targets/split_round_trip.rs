//! Weights of any bits through `split` and back: `verify` finds no violation, and exact encodings give every bit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use thermocline_calibrate::Profile;
use thermocline_fuzz::{Input, Overlaid, split, temporary};
use thermocline_kernels::Encoding;
use thermocline_split::{Compression, Error, Precision, Split, verify};

const ENCODINGS: [&str; 8] = ["bf16", "q8", "q4", "bf16x", "q4+exact", "q8+exact", "q4,0=bf16x", "bf16,1=q4+exact"];

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let encoding = ENCODINGS[input.below(ENCODINGS.len())];
    let compression = [Compression::None, Compression::Zstd(1), Compression::Archive(1)][input.below(3)];
    let chunk_neurons = 1 + input.below(48);
    let checkpoint = Overlaid::new(input.rest());
    let profile = Profile::open(thermocline_fuzz::profile()).unwrap();
    let out = temporary().join("round-trip");
    match split(&checkpoint, &profile, encoding.parse().unwrap(), chunk_neurons, compression, &out) {
        // Quantised rows have no code for what is not finite or too large, and predictors are quantised.
        Err(Error::Pack { tensor, .. }) => {
            assert!(!is_exact(encoding) || tensor.starts_with("predictors."), "{encoding}: {tensor}");
        }
        // Nor is a predictor fitted to what is not finite.
        Err(Error::Profile(_)) => {}
        Err(e) => panic!("{encoding}: {e}"),
        Ok(()) => {
            let split = Split::open_at(&out, Precision::Exact).unwrap();
            let report = verify(split, &checkpoint, &|_, _| ()).unwrap();
            assert!(report.violations.is_empty(), "{encoding}: {:?}", report.violations);
            if is_exact(encoding) {
                let inexact = report.tensors.iter().find(|t| !t.exact);
                assert!(inexact.is_none(), "{encoding}: {}", inexact.unwrap().name);
            }
        }
    }
    let _ = fs::remove_dir_all(&out);
    let _ = fs::remove_dir_all(temporary().join("round-trip.partial"));
});

/// Whether every layer is.
fn is_exact(encoding: &str) -> bool {
    let of = |e: &str| e.rsplit('=').next().unwrap().parse::<Encoding>().unwrap().is_exact();
    encoding.split(',').all(of)
}
