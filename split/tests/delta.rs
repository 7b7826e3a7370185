//! Deltas: every bit of every tensor comes back, whatever the bits and however many differ.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use proptest::prelude::*;
use std::path::Path;
use support::{Memory, config};
use tempfile::TempDir;
use thermocline_datasets::{Checkpoint, Random};
use thermocline_split::Error;
use thermocline_split::delta::{
    Delta, DeltaCheckpoint, DeltaKind, DeltaOptions, DeltaReport, Final, verify_delta, write,
};

fn make(base: &Memory, changed: &Memory, options: &DeltaOptions, out: &Path) -> DeltaReport {
    write(base, Final::Checkpoint(changed), options, out, &|_, _| ()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// What tests like to forget: signalling and quiet NaNs, infinities, zeros, subnormals, the largest.
const ODD: [u16; 14] =
    [0x7f81, 0xff81, 0x7fff, 0xffff, 0x7fc0, 0x7fa5, 0x7f80, 0xff80, 0x8000, 0x0000, 0x0001, 0x8001, 0x007f, 0x7f7f];

fn any_bits(random: &mut Random) -> u16 {
    if random.below(4) == 0 { ODD[random.below(ODD.len())] } else { random.next_u64() as u16 }
}

/// Checks all ways out of a delta against the final model.
fn assert_exact(base: &Memory, changed: &Memory, dir: &Path, random: &mut Random) {
    let delta = Delta::open(dir).unwrap();
    let (hidden, ffn) = (base.config.hidden_size, base.config.intermediate_size);
    for (name, (shape, want)) in &changed.tensors {
        assert_eq!(delta.touches(name), base.bits(name) != want, "{name}");
        let [rows, columns] = shape[..] else { continue };
        let first = random.below(rows);
        let range = first..first + random.below(rows - first + 1);
        for range in [0..rows, range] {
            let place = range.start * columns..range.end * columns;
            let mut got = base.bits(name)[place.clone()].to_vec();
            delta.patch_rows(name, range, &mut got).unwrap();
            assert!(got == want[place], "{name}");
        }
    }
    for layer in 0..base.config.n_layers {
        let all: Vec<u32> = random.permutation(ffn);
        let some: Vec<u32> = (0..random.below(9)).map(|_| random.below(ffn) as u32).collect();
        for ids in [all, some] {
            let name = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj.weight");
            let of = |model: &Memory, part: &str| -> Vec<u16> {
                let bits = model.bits(&name(part));
                let row =
                    |id: usize| (0..hidden).map(move |h| if part == "down" { h * ffn + id } else { id * hidden + h });
                ids.iter().flat_map(|id| row(*id as usize)).map(|at| bits[at]).collect()
            };
            let [mut gate, mut up, mut down] = ["gate", "up", "down"].map(|part| of(base, part));
            delta.patch_neurons(layer, &ids, &mut gate, &mut up, &mut down).unwrap();
            for (part, got) in [("gate", gate), ("up", up), ("down", down)] {
                assert!(got == of(changed, part), "{part} of layer {layer}");
            }
        }
    }
    let rebuilt = DeltaCheckpoint::new(Box::new(base.clone()), delta).unwrap();
    for name in changed.names() {
        assert!(bits(&rebuilt.load(&name).unwrap()) == bits(&changed.load(&name).unwrap()), "{name}");
    }
    for model in [Some(changed as &dyn Checkpoint), None] {
        let report = verify_delta(&rebuilt, model, &|_, _| ()).unwrap();
        assert_eq!((report.violations, report.tensors.len()), (vec![], changed.tensors.len()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn every_bit_comes_back_from_the_files(
        seed in any::<u64>(),
        (hidden, ffn, n_layers) in (1usize..70, 1usize..90, 1usize..3),
        density in prop::sample::select(vec![0.0, -1.0, 0.05, 0.5, 1.0]),
        block_weights in prop::sample::select(vec![1usize, 40, 333, 5000, 1 << 18]),
        zstd_level in prop::sample::select(vec![0, 3]),
        small in any::<bool>(),
    ) {
        let mut random = Random::new(seed);
        let base = Memory::new(config(hidden, ffn, n_layers), |_, _| any_bits(&mut random));
        let mut changed = base.clone();
        if density < 0.0 {
            // One weight, of whatever tensor.
            let (_, bits) = changed.tensors.values_mut().nth(random.below(base.tensors.len())).unwrap();
            let at = random.below(bits.len());
            bits[at] ^= 1 << random.below(16);
        } else {
            changed = base.changed(|b| match random.uniform() < density {
                true if small => b.wrapping_add(random.below(7) as u16).wrapping_sub(3),
                true => any_bits(&mut random),
                false => b,
            });
        }
        let dir = TempDir::new().unwrap();
        let out = dir.path().join("delta");
        let report = make(&base, &changed, &DeltaOptions { zstd_level, block_weights }, &out);
        let on_disk: u64 = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        prop_assert_eq!(report.bytes, on_disk);
        prop_assert_eq!(report.bytes, Delta::open(&out).unwrap().bytes());
        assert_exact(&base, &changed, &out, &mut random);
    }
}

/// Matrices large enough for several blocks of the default size, and for the threads of the pool.
#[test]
fn many_blocks_are_patched_by_all_threads_to_the_same_bits() {
    let mut random = Random::new(5);
    let base = Memory::new(config(517, 1300, 1), |_, _| any_bits(&mut random));
    let changed = base.changed(|b| if random.below(20) == 0 { b ^ 1 } else { b });
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("delta");
    let report = make(&base, &changed, &DeltaOptions { block_weights: 1 << 14, ..DeltaOptions::default() }, &out);
    assert!(report.sparse_blocks > 100 && report.dense_blocks == 0);
    assert_exact(&base, &changed, &out, &mut random);
}

#[test]
fn five_percent_of_small_changes_is_an_eighth_of_the_checkpoint_or_less() {
    let mut random = Random::new(6);
    let base = Memory::new(config(512, 1024, 2), |_, _| (random.normal() * 0.02).to_bits().wrapping_shr(16) as u16);
    let changed = base.changed(|b| {
        let step = 1 + random.below(8) as u16;
        if random.uniform() < 0.05 {
            if random.below(2) == 0 { b.wrapping_add(step) } else { b.wrapping_sub(step) }
        } else {
            b
        }
    });
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("delta");
    let report = make(&base, &changed, &DeltaOptions::default(), &out);
    assert!(report.bytes * 8 < report.checkpoint_bytes, "{report:?}");
    let share = report.changed_weights as f64 / report.n_weights as f64;
    assert!((0.048..0.052).contains(&share), "{share}");
}

#[test]
fn models_that_no_delta_leads_between_are_told_by_name() {
    let base = Memory::new(config(8, 12, 1), |i, j| (i * 31 + j) as u16);
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("delta");
    let refused = |changed: &Memory| {
        let error = write(&base, Final::Checkpoint(changed), &DeltaOptions::default(), &out, &|_, _| ()).unwrap_err();
        assert!(!out.exists());
        error
    };
    let other = Memory::new(config(8, 13, 1), |_, _| 0);
    let error = refused(&other);
    assert!(matches!(error, Error::DifferentModels { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("gate_proj") && text.contains("[12, 8]") && text.contains("[13, 8]"), "{text}");
    let error = refused(&Memory::new(config(8, 12, 2), |_, _| 0));
    assert!(error.to_string().contains("n_layers: 1 in the base, 2"), "{error}");
    let name = "model.layers.0.self_attn.o_proj.weight";
    let error = refused(&Memory { f32_tensor: Some(name.to_owned()), ..base.clone() });
    assert!(matches!(&error, Error::NotBf16 { tensor, dtype, .. } if tensor == name && dtype == "F32"), "{error:?}");
}

#[test]
fn another_base_is_refused_and_a_directory_is_never_overwritten() {
    let base = Memory::new(config(8, 12, 1), |i, j| (i * 31 + j) as u16);
    let changed = base.changed(|b| b ^ 1);
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("delta");
    make(&base, &changed, &DeltaOptions::default(), &out);
    let error = DeltaCheckpoint::new(Box::new(changed.clone()), Delta::open(&out).unwrap()).err().unwrap();
    assert!(matches!(error, Error::WrongSource { .. }), "{error:?}");
    let error = write(&base, Final::Checkpoint(&changed), &DeltaOptions::default(), &out, &|_, _| ()).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error:?}");
}

#[test]
fn templates_that_differ_are_kept_and_one_that_is_gone_stays_gone() {
    let mut base = Memory::new(config(8, 12, 1), |i, j| (i * 31 + j) as u16);
    base.template = Some("old".to_owned());
    for template in [Some("new".to_owned()), Some("old".to_owned()), None] {
        let changed = Memory { template: template.clone(), ..base.clone() };
        let dir = TempDir::new().unwrap();
        let out = dir.path().join("delta");
        let report = make(&base, &changed, &DeltaOptions::default(), &out);
        assert_eq!((report.kinds.len(), report.kinds[0].kind), (1, DeltaKind::Unchanged));
        let rebuilt = DeltaCheckpoint::new(Box::new(base.clone()), Delta::open(&out).unwrap()).unwrap();
        assert_eq!(rebuilt.chat_template(), template);
    }
}

#[test]
fn an_interrupted_run_leaves_nothing_that_is_seen_as_a_delta() {
    let base = Memory::new(config(8, 12, 1), |i, j| (i * 31 + j) as u16);
    let changed = base.changed(|b| b ^ 1);
    let dir = TempDir::new().unwrap();
    let (out, partial) = (dir.path().join("delta"), dir.path().join("delta.partial"));
    // Killed at each tensor in turn, as far as files can tell: a panic in the progress call unwinds without cleaning.
    for at in 0..=base.tensors.len() {
        let killed = std::panic::catch_unwind(|| {
            write(&base, Final::Checkpoint(&changed), &DeltaOptions::default(), &out, &|done, _| {
                assert!(done < at, "killed");
            })
        });
        assert!(killed.is_err() && !out.exists(), "killed at {at}");
        let error = Delta::open(&partial).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
    }
    make(&base, &changed, &DeltaOptions::default(), &out);
    assert!(!partial.exists());
    assert_exact(&base, &changed, &out, &mut Random::new(1));
}
