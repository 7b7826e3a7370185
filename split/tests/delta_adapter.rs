//! LoRA adapters as deltas: the same bits as a naive sum, and refusals of everything that is no plain LoRA.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use support::{Memory, config};
use tempfile::TempDir;
use thermocline_datasets::huggingface::LoraAdapter;
use thermocline_datasets::{Checkpoint, Error, Random};
use thermocline_split::delta::{
    AdapterCheckpoint, Delta, DeltaCheckpoint, DeltaKind, DeltaOptions, Final, verify_delta, write,
};

const RANK: usize = 3;
const MODULES: [&str; 4] = ["self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

type Factors = BTreeMap<String, (Vec<f32>, Vec<f32>)>;

fn base() -> Memory {
    let mut random = Random::new(11);
    Memory::new(config(37, 23, 2), |_, i| {
        if i % 50 == 7 { random.next_u64() as u16 } else { bf16::from_f32(random.normal()).to_bits() }
    })
}

fn settings() -> Value {
    json!({
        "peft_type": "LORA", "r": RANK, "lora_alpha": 5, "bias": "none", "fan_in_fan_out": false, "use_dora": false,
        "use_rslora": false, "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.1,
        "init_lora_weights": true, "layers_to_transform": null, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    })
}

fn factors(base: &Memory) -> Factors {
    let mut random = Random::new(12);
    let mut out = Factors::new();
    for layer in 0..base.config.n_layers {
        for module in MODULES {
            let name = format!("model.layers.{layer}.{module}.weight");
            let shape = &base.tensors[&name].0;
            let mut values = |n: usize| (0..n).map(|_| bf16::from_f32(random.normal() * 0.3).to_f32()).collect();
            out.insert(name, (values(RANK * shape[1]), values(shape[0] * RANK)));
        }
    }
    out
}

fn save(folder: &Path, base: &Memory, settings: &Value, factors: &Factors, dtype: Dtype) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), settings.to_string()).unwrap();
    let bytes = |values: &[f32]| -> Vec<u8> {
        match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    };
    let mut tensors = Vec::new();
    for (name, (a, b)) in factors {
        let shape = &base.tensors[name].0;
        let module = name.strip_suffix(".weight").unwrap();
        tensors.push((
            format!("base_model.model.{module}.lora_A.weight"),
            vec![a.len() / shape[1], shape[1]],
            bytes(a),
        ));
        tensors.push((
            format!("base_model.model.{module}.lora_B.weight"),
            vec![shape[0], b.len() / shape[0]],
            bytes(b),
        ));
    }
    let views = tensors.iter().map(|(n, s, b)| (n.as_str(), TensorView::new(dtype, s.clone(), b).unwrap()));
    std::fs::write(folder.join("adapter_model.safetensors"), serialize(views, None).unwrap()).unwrap();
}

/// The naive sum, weight by weight.
fn folded(base: &Memory, factors: &Factors, scale: f32) -> Memory {
    let mut out = base.clone();
    for (name, (a, b)) in factors {
        let (shape, bits) = out.tensors.get_mut(name).unwrap();
        for i in 0..shape[0] {
            for j in 0..shape[1] {
                let mut acc = 0.0f32;
                for k in 0..RANK {
                    let product = b[i * RANK + k] * a[k * shape[1] + j];
                    acc += product;
                }
                let old = bf16::from_bits(bits[i * shape[1] + j]);
                let sum = f32::from_bits(u32::from(old.to_bits()) << 16) + scale * acc;
                if !sum.is_nan() {
                    bits[i * shape[1] + j] = bf16::from_f32(sum).to_bits();
                } else if !old.is_nan() {
                    bits[i * shape[1] + j] = 0x7fc0;
                }
            }
        }
    }
    out
}

#[test]
fn an_adapter_gives_the_bits_of_the_naive_sum() {
    let (base, guard) = (base(), TempDir::new().unwrap());
    let factors = factors(&base);
    for (i, (dtype, rslora)) in [(Dtype::F32, false), (Dtype::BF16, true), (Dtype::F16, false)].into_iter().enumerate()
    {
        let mut settings = settings();
        settings["use_rslora"] = rslora.into();
        let folder = guard.path().join(format!("adapter{i}"));
        let exact: Factors = factors
            .iter()
            .map(|(n, (a, b))| {
                let as_saved = |v: &f32| if dtype == Dtype::F16 { f16::from_f32(*v).to_f32() } else { *v };
                (n.clone(), (a.iter().map(as_saved).collect(), b.iter().map(as_saved).collect()))
            })
            .collect();
        save(&folder, &base, &settings, &factors, dtype);
        let scale = if rslora { (5.0 / (RANK as f64).sqrt()) as f32 } else { (5.0 / RANK as f64) as f32 };
        let want = folded(&base, &exact, scale);
        let adapter = LoraAdapter::open(&folder, &base).unwrap();
        let out = guard.path().join(format!("delta{i}"));
        let report = write(&base, Final::Adapter(&adapter), &DeltaOptions::default(), &out, &|_, _| ()).unwrap();
        let low_rank = report.kinds.iter().find(|k| k.kind == DeltaKind::LowRank).unwrap();
        assert_eq!(low_rank.tensors, factors.len());
        let values: usize = factors.values().map(|(a, b)| a.len() + b.len()).sum();
        assert_eq!(low_rank.bytes, (values * if dtype == Dtype::BF16 { 2 } else { 4 }) as u64);
        let delta = Delta::open(&out).unwrap();
        let ids = [22u32, 0, 5, 5];
        for layer in 0..2 {
            let name = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj.weight");
            let of = |model: &Memory, part: &str| -> Vec<u16> {
                let bits = model.bits(&name(part));
                let row = |id: usize| (0..37).map(move |h| if part == "down" { h * 23 + id } else { id * 37 + h });
                ids.iter().flat_map(|id| row(*id as usize)).map(|at| bits[at]).collect()
            };
            let [mut gate, mut up, mut down] = ["gate", "up", "down"].map(|part| of(&base, part));
            delta.patch_neurons(layer, &ids, &mut gate, &mut up, &mut down).unwrap();
            for (part, got) in [("gate", gate), ("up", up), ("down", down)] {
                assert!(got == of(&want, part), "{part} of layer {layer}");
            }
        }
        let rebuilt = DeltaCheckpoint::new(Box::new(base.clone()), delta).unwrap();
        let folded = AdapterCheckpoint::new(&base, &adapter);
        let mut same = vec![None, Some(&folded as &dyn Checkpoint)];
        same.push(Some(&want));
        for model in same {
            assert_eq!(verify_delta(&rebuilt, model, &|_, _| ()).unwrap().violations, Vec::<String>::new());
        }
    }
}

#[test]
fn what_is_no_plain_adapter_is_refused_with_what_to_do() {
    let (base, guard) = (base(), TempDir::new().unwrap());
    let (factors, folder) = (factors(&base), guard.path().join("adapter"));
    let refused = |settings: &Value, factors: &Factors, dtype: Dtype| {
        save(&folder, &base, settings, factors, dtype);
        LoraAdapter::open(&folder, &base).unwrap_err()
    };
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({"q_proj": 4})),
        ("alpha_pattern", json!({"q_proj": 4})),
        ("peft_type", json!("LOHA")),
        ("lora_bias", json!(true)),
        ("layer_replication", json!([[0, 1]])),
        ("init_lora_weights", json!("pissa_niter_4")),
    ] {
        let mut settings = settings();
        settings[key] = value;
        let error = refused(&settings, &factors, Dtype::F32);
        let text = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{key}: {error:?}");
        assert!(text.contains(key) && text.contains("merge"), "{text}");
    }
    for (key, value) in [
        ("r", json!(0)),
        ("r", json!(RANK + 1)),
        ("r", json!(u64::MAX)),
        ("r", json!("3")),
        ("lora_alpha", json!(1e300)),
        ("target_modules", json!(["q_proj"])),
        ("target_modules", json!(["q_proj", "gate_proj", "up_proj", "down_proj", "k_proj"])),
    ] {
        let mut settings = settings();
        settings[key] = value;
        let error = refused(&settings, &factors, Dtype::F32);
        assert!(matches!(error, Error::Corrupt { .. }), "{key}: {error:?}");
    }
    let mut few = factors.clone();
    few.values_mut().next().unwrap().0.truncate(2 * 23);
    let error = refused(&settings(), &few, Dtype::F32);
    assert!(error.to_string().contains("lora_A") && matches!(error, Error::Corrupt { .. }), "{error}");
    let path = folder.join("adapter_model.safetensors");
    save(&folder, &base, &settings(), &factors, Dtype::BF16);
    LoraAdapter::open(&folder, &base).unwrap();
    let good = std::fs::read(&path).unwrap();
    for end in [0, 7, 8, 100, good.len() - 1] {
        std::fs::write(&path, &good[..end]).unwrap();
        assert!(matches!(LoraAdapter::open(&folder, &base).unwrap_err(), Error::Corrupt { .. }), "{end}");
    }
    for bad in ["lora_magnitude_vector", "lora_embedding_A"] {
        let text = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
        let mut other = text.replace("lora_A.weight", bad);
        other.truncate(text.len());
        let mut bytes = good.clone();
        let at = bytes.windows(text.len()).position(|w| w == text.as_bytes()).unwrap();
        let padded = format!("{other:x<width$}", width = text.len());
        bytes[at..at + text.len()].copy_from_slice(padded.as_bytes());
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(LoraAdapter::open(&folder, &base).unwrap_err(), Error::Unsupported { .. }), "{bad}");
    }
}
