//! Runs, interruptions, shards and merges on a random model.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};
use support::{RandomCheckpoint, random_tokens, tiny_config};
use tempfile::TempDir;
use thermocline_calibrate::{
    ActiveSet, Error, Event, Input, Profile, ProfileMeta, Result, RunOptions, Settings, Shard, TOP_SHARES, calibrate,
    dense, disk, merge,
};
use thermocline_datasets::Activation;

const N_WINDOWS: usize = 7;

fn settings() -> Settings {
    Settings { window_len: 40, n_samples: 100, sample_run_len: 10, ..Settings::default() }
}

fn model() -> RandomCheckpoint {
    RandomCheckpoint::new(tiny_config(Activation::Silu), 7)
}

fn tokens() -> Vec<u32> {
    random_tokens(N_WINDOWS * 40 + 5, 50, 3)
}

fn run(out: &Path, options: &RunOptions) -> Result<Profile> {
    calibrate(&model(), &tokens(), &settings(), options, out, &mut |_| ())
}

fn resume() -> RunOptions {
    RunOptions { resume: true, shard: None }
}

fn statistics(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("statistics.safetensors")).unwrap()
}

fn whole() -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("whole");
    run(&out, &RunOptions::default()).unwrap();
    (dir, out)
}

/// Stops a run the hard way at its `nth` progress report; returns the output's path.
fn interrupted(dir: &Path, nth: usize) -> PathBuf {
    let out = dir.join(format!("stopped-{nth}"));
    let mut count = 0;
    let mut stop = |_: Event| {
        count += 1;
        assert!(count <= nth, "stopped");
    };
    let options = RunOptions::default();
    let result =
        catch_unwind(AssertUnwindSafe(|| calibrate(&model(), &tokens(), &settings(), &options, &out, &mut stop)));
    assert!(result.is_err());
    assert!(!out.exists());
    out
}

#[test]
fn counts_equal_a_naive_count() {
    let (_dir, out) = whole();
    let (model, profile, tokens) = (model(), Profile::open(&out).unwrap(), tokens());
    profile.verify().unwrap();
    let (ffn, n) = (150, N_WINDOWS * 40);
    let mut x = dense::Embedding::load(&model).unwrap().rows(&tokens[..n]).unwrap();
    for index in 0..3 {
        let layer = dense::DenseLayer::load(&model, index).unwrap();
        let mut inputs = Vec::new();
        x = layer
            .attention_observed(&x, N_WINDOWS, 40, |seen| {
                inputs = vec![
                    (Input::Qkv, seen.qkv.to_vec()),
                    (Input::Mixture, seen.mixtures.to_vec()),
                    (Input::AttentionOutput, seen.output.to_vec()),
                ];
            })
            .unwrap();
        let input = layer.ffn_input(&x).unwrap();
        let h = layer.neurons(&input).unwrap().h;
        let (norms, got) = (layer.down_norms().unwrap(), profile.layer(index).unwrap());
        let mut top = vec![vec![0u32; ffn]; 4];
        for row in h.chunks(ffn) {
            let mut order: Vec<usize> = (0..ffn).collect();
            let score = |i: usize| row[i].abs() * norms[i];
            order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            for (top, share) in top.iter_mut().zip(TOP_SHARES) {
                order[..(share * ffn as f64).ceil() as usize].iter().for_each(|&i| top[i] += 1);
            }
        }
        // Batches of another size may round differently and move a neuron across a threshold.
        for (got, expected) in got.top.iter().zip(&top) {
            assert!(got.iter().zip(expected).all(|(a, b)| a.abs_diff(*b) <= 1), "layer {index}");
        }
        let square = |i: usize| h.chunks(ffn).map(|row| f64::from(row[i]).powi(2)).sum::<f64>() / n as f64;
        assert!((0..ffn).all(|i| (got.mean_square[i] / square(i) - 1.0).abs() < 1e-4));
        assert!(got.nonzero.iter().all(|&count| count == n as u32));
        inputs.push((Input::Ffn, input));
        for (which, input) in inputs {
            let squares = match which {
                Input::Ffn => &got.ffn_input_mean_square,
                Input::Qkv => &got.qkv_input_mean_square,
                Input::AttentionOutput => &got.attention_output_mean_square,
                Input::Mixture => &got.mixture_mean_square,
            };
            let moment = profile.second_moment(index, which).unwrap().unwrap();
            let width = input.len() / n;
            assert_eq!((moment.nrows(), moment.ncols(), squares.len()), (width, width, width));
            let exact = input.chunks(width).map(|x| f64::from(x[3]) * f64::from(x[11])).sum::<f64>() / n as f64;
            let told = moment[(3, 11)];
            assert!((told - exact).abs() < 1e-5 && told == moment[(11, 3)], "{which:?}: {told}, {exact}");
            assert!((moment[(5, 5)] / squares[5] - 1.0).abs() < 1e-4, "{which:?}");
        }
        let rows = profile.sample_tokens().unwrap();
        assert_eq!((rows.len(), got.active.n_rows()), (100, 100));
        assert!((0..100).all(|row| got.active.ones(row).count() == 45 && got.active_top10.ones(row).count() == 15));
        assert!(got.overlap(ActiveSet::Top(2)).is_sorted());
        assert_eq!(got.overlap(ActiveSet::Nonzero), [None; 3]);
        let median = got.quantile_abs(0, 0.5);
        let below = h.chunks(ffn).filter(|row| row[0].abs() <= median).count() as f64 / n as f64;
        assert!((0.35..0.65).contains(&below), "{below}");
        layer.ffn_output(&mut x, h).unwrap();
    }
}

#[test]
fn sparse_models_have_their_zeros_counted() {
    let dir = TempDir::new().unwrap();
    let model = RandomCheckpoint::new(tiny_config(Activation::Drelu), 7);
    let out = dir.path().join("p");
    let profile = calibrate(&model, &tokens(), &settings(), &RunOptions::default(), &out, &mut |_| ()).unwrap();
    let layer = profile.layer(1).unwrap();
    let rate = layer.activation_rate(ActiveSet::Nonzero).iter().sum::<f64>() / 150.0;
    let sampled = layer.active.rates().iter().sum::<f64>() / 150.0;
    assert!((0.15..0.35).contains(&rate) && (rate - sampled).abs() < 0.05, "{rate} {sampled}");
    assert!(layer.overlap(ActiveSet::Nonzero)[0].is_some());
}

#[test]
fn a_resumed_run_gives_the_same_bytes() {
    let (dir, out) = whole();
    // A layer reports eight times: stop before, within and between layers.
    for nth in [0, 3, 8, 11, 16, 20] {
        let resumed = interrupted(dir.path(), nth);
        run(&resumed, &resume()).unwrap();
        assert_eq!(statistics(&resumed), statistics(&out), "stopped at report {nth}");
        assert!(!resumed.with_file_name(format!("stopped-{nth}.work")).exists());
    }
}

#[test]
fn a_corrupt_checkpoint_falls_back_and_says_so() {
    let (dir, out) = whole();
    // After two layers, before the third starts to write: both records are usable.
    let damage: [(&str, &str); 5] = [
        ("record.json", "resuming at layer 1"),
        ("hidden-0.f32", "resuming at layer 1"),
        ("layer-001.bin", "resuming at layer 1"),
        ("layer-000.bin", "starting over"),
        ("record.previous.json", "resuming at layer 2"),
    ];
    for (name, expected) in damage {
        let stopped = interrupted(dir.path(), 16);
        let work = stopped.with_file_name("stopped-16.work");
        // The interrupted third layer has begun to overwrite hidden-1; put back what the second one read.
        let hidden = dense_hidden_after(1);
        fs::write(work.join("hidden-1.f32"), hidden).unwrap();
        let path = work.join(name);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        fs::write(&path, bytes).unwrap();
        let mut notices = String::new();
        let mut note = |event: Event| {
            if let Event::Notice(text) = event {
                notices += &text;
                notices += "; ";
            }
        };
        calibrate(&model(), &tokens(), &settings(), &resume(), &stopped, &mut note).unwrap();
        assert!(notices.contains(expected), "{name}: {notices}");
        assert_eq!(statistics(&stopped), statistics(&out), "{name}");
        fs::remove_dir_all(&stopped).unwrap();
    }
}

/// Hidden states after the first `n` layers, window by window as a run computes them.
fn dense_hidden_after(n: usize) -> Vec<u8> {
    let (model, tokens) = (model(), tokens());
    let mut bytes = Vec::new();
    for window in tokens[..N_WINDOWS * 40].chunks(40) {
        let mut x = dense::Embedding::load(&model).unwrap().rows(window).unwrap();
        for index in 0..n {
            let layer = dense::DenseLayer::load(&model, index).unwrap();
            x = layer.attention(&x, 1, 40).unwrap();
            let h = layer.neurons(&layer.ffn_input(&x).unwrap()).unwrap().h;
            layer.ffn_output(&mut x, h).unwrap();
        }
        bytes.extend(x.iter().flat_map(|v| v.to_le_bytes()));
    }
    bytes
}

#[test]
fn resuming_something_else_is_refused() {
    let dir = TempDir::new().unwrap();
    let out = interrupted(dir.path(), 9);
    let refused = |result: Result<Profile>, expected: &str| match result {
        Err(Error::ResumeMismatch { what, .. }) => assert_eq!(what, expected),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("resumed with another {expected}"),
    };
    let changed = Settings { n_samples: 50, ..settings() };
    refused(calibrate(&model(), &tokens(), &changed, &resume(), &out, &mut |_| ()), "setting n_samples");
    let other = RandomCheckpoint::new(tiny_config(Activation::Silu), 8);
    refused(calibrate(&other, &tokens(), &settings(), &resume(), &out, &mut |_| ()), "model");
    let text = random_tokens(N_WINDOWS * 40, 50, 4);
    refused(calibrate(&model(), &text, &settings(), &resume(), &out, &mut |_| ()), "corpus");
    let shard = RunOptions { resume: true, shard: Some(Shard { index: 0, count: 2 }) };
    refused(run(&out, &shard), "shard");
    run(&out, &resume()).unwrap();
    // Finished: resuming is a no-op, running again is refused.
    run(&out, &resume()).unwrap();
    assert!(matches!(run(&out, &RunOptions::default()), Err(Error::OutputExists { .. })));
}

#[test]
fn two_writers_on_one_output() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("p");
    let mut second = None;
    let mut first = |_: Event| {
        if second.is_none() {
            second = Some(run(&out, &resume()).err());
        }
    };
    calibrate(&model(), &tokens(), &settings(), &RunOptions::default(), &out, &mut first).unwrap();
    assert!(matches!(second, Some(Some(Error::Locked { .. }))));
}

#[test]
fn merged_shards_equal_one_run() {
    let (dir, out) = whole();
    let shards: Vec<PathBuf> = (0..3)
        .map(|index| {
            let path = dir.path().join(format!("shard-{index}"));
            run(&path, &RunOptions { resume: false, shard: Some(Shard { index, count: 3 }) }).unwrap();
            path
        })
        .collect();
    let merged = dir.path().join("merged");
    let order = [shards[2].clone(), shards[0].clone(), shards[1].clone()];
    let profile = merge(&order, &merged).unwrap();
    assert_eq!(statistics(&merged), statistics(&out));
    assert_eq!((profile.meta().n_tokens, profile.meta().shard), (280, None));
    let refused = |dirs: &[PathBuf], expected: &str| match merge(dirs, &dir.path().join("bad")) {
        Err(Error::Merge { reason, .. }) => assert!(reason.contains(expected), "{reason}"),
        _ => panic!("{expected}"),
    };
    refused(&shards[..2], "missing");
    refused(&shards[1..], "missing");
    refused(&[shards.clone(), vec![shards[1].clone()]].concat(), "overlap");
    refused(&[], "no profiles");
    let other = dir.path().join("other");
    let changed = Settings { active_share: 0.5, ..settings() };
    let options = RunOptions { resume: false, shard: Some(Shard { index: 2, count: 3 }) };
    calibrate(&model(), &tokens(), &changed, &options, &other, &mut |_| ()).unwrap();
    refused(&[shards[0].clone(), shards[1].clone(), other], "settings");
}

#[test]
fn damaged_profiles_are_refused() {
    let (_dir, out) = whole();
    let path = out.join("statistics.safetensors");
    let good = fs::read(&path).unwrap();
    for (length, offset) in [(good.len() - 1, 0), (good.len(), 3), (good.len(), 200)] {
        let mut bad = good[..length].to_vec();
        bad[offset] ^= u8::from(length == good.len());
        fs::write(&path, &bad).unwrap();
        assert!(matches!(Profile::open(&out), Err(Error::Corrupt { .. })));
    }
    let mut bad = good.clone();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    fs::write(&path, &bad).unwrap();
    assert!(matches!(Profile::open(&out).unwrap().verify(), Err(Error::Corrupt { .. })));
    fs::write(&path, &good).unwrap();
    let meta = fs::read_to_string(out.join("profile.json")).unwrap();
    for (from, to) in [
        ("\"hidden_size\": 24", "\"hidden_size\": 25"),
        ("\"n_layers\": 3", "\"n_layers\": 4000000000"),
        ("\"n_tokens\": 280", "\"n_tokens\": 281"),
        ("\"format_version\": 2", "\"format_version\": 9"),
        ("\"window_len\": 40", "\"window_len\": 18446744073709551615"),
    ] {
        assert!(meta.contains(from));
        fs::write(out.join("profile.json"), meta.replace(from, to)).unwrap();
        assert!(Profile::open(&out).is_err(), "{to}");
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let dir = TempDir::new().unwrap();
    let mut model = model();
    model.tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().1[5] = f32::NAN;
    let out = dir.path().join("p");
    let result = calibrate(&model, &tokens(), &settings(), &RunOptions::default(), &out, &mut |_| ());
    assert!(matches!(result, Err(Error::NotFinite { layer: 1, window: 0, .. })));
}

#[test]
fn the_bytes_on_disk_are_those_that_were_announced() {
    let dir = TempDir::new().unwrap();
    let (out, work) = (dir.path().join("p"), dir.path().join("p.work"));
    let mut most = 0;
    let mut watch = |_: Event| most = most.max(disk::bytes_below(&work));
    let profile = calibrate(&model(), &tokens(), &settings(), &RunOptions::default(), &out, &mut watch).unwrap();
    // The last report comes before the profile is written beside the layers' statistics.
    most += disk::bytes_below(&out);
    let meta = profile.meta();
    let announced = disk::disk_bytes(&meta.config, &meta.settings, meta.n_tokens, meta.n_samples);
    assert!(most <= announced, "{most} of {announced}");
    assert!(announced < 2 * most + (1 << 20), "not wildly more: {most} of {announced}");
}

/// Profiles from before attention's moments were kept, or without them, are read; with the others they do not merge.
#[test]
fn profiles_without_attention_moments_are_read() {
    let (dir, whole) = whole();
    let out = dir.path().join("without");
    let without = Settings { attention_moments: false, ..settings() };
    let profile = calibrate(&model(), &tokens(), &without, &RunOptions::default(), &out, &mut |_| ()).unwrap();
    let moment = |profile: &Profile, input| profile.second_moment(1, input).unwrap();
    assert!([Input::Qkv, Input::Mixture, Input::AttentionOutput].iter().all(|i| moment(&profile, *i).is_none()));
    assert_eq!(moment(&profile, Input::Ffn), moment(&Profile::open(&whole).unwrap(), Input::Ffn));
    assert!(statistics(&out).len() < statistics(&whole).len());
    let (mut with, lacking) = (Profile::open(&whole).unwrap().layer(2).unwrap(), profile.layer(2).unwrap());
    assert!(lacking.mixture_mean_square.is_empty());
    with.mixture_mean_square.clear();
    assert_eq!(lacking, with);

    let path = out.join("profile.json");
    let mut meta: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    meta["format_version"] = 1.into();
    meta["settings"].as_object_mut().unwrap().remove("attention_moments").unwrap();
    fs::write(&path, meta.to_string()).unwrap();
    let old = Profile::open(&out).unwrap();
    assert_eq!(old.layer(2).unwrap(), lacking);
    meta["format_version"] = (ProfileMeta::VERSION + 1).into();
    fs::write(&path, meta.to_string()).unwrap();
    assert!(matches!(Profile::open(&out), Err(Error::UnsupportedVersion { got: 3, max: 2, .. })));

    let parts: Vec<PathBuf> = [settings(), without]
        .into_iter()
        .enumerate()
        .map(|(index, settings)| {
            let out = dir.path().join(format!("part-{index}"));
            let options = RunOptions { resume: false, shard: Some(Shard { index, count: 2 }) };
            calibrate(&model(), &tokens(), &settings, &options, &out, &mut |_| ()).unwrap();
            out
        })
        .collect();
    assert!(matches!(merge(&parts, &dir.path().join("merged")), Err(Error::Merge { .. })));
}
