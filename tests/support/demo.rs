//! The demo's model, its splits, and a tune of it.

use super::{calibrating, copy_dir, ok, once, splitting, text};
use serde_json::{Value, json as value};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_datasets::Random;

pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/demo/model")
}

fn profile_of(name: &str, model: &Path) -> PathBuf {
    once(&format!("{name}.profile"), |path| drop(ok(&calibrating(model, "1024", "128", path))))
}

/// A split of the demo's model. The shuffled order is the same for every profile.
pub fn split(encoding: &str, more: &[&str]) -> PathBuf {
    split_of("demo-model", &model(), encoding, more)
}

/// The same of the tuned model.
pub fn tuned_split(encoding: &str) -> PathBuf {
    split_of("demo-tuned", &tuned(), encoding, &[])
}

fn split_of(name: &str, model: &Path, encoding: &str, more: &[&str]) -> PathBuf {
    let profile = profile_of(name, model);
    let given = [&["--encoding", encoding, "--order", "random", "--chunk-neurons", "16"], more].concat();
    // Other tests have splits of this model in the measured order.
    once(&format!("{name}.shuffled.{encoding}{}", more.concat()), |path| {
        drop(ok(&splitting(model, &profile, &given, path)))
    })
}

/// Where the tensors' bytes start in a safetensors file.
fn data_start(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// The demo's model with one weight in twenty moved by one to four places of its last bit.
pub fn tuned() -> PathBuf {
    once("demo-tuned", |path| {
        copy_dir(&model(), path);
        let file = path.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let start = data_start(&bytes);
        let mut random = Random::new(20);
        for pair in bytes[start..].chunks_exact_mut(2) {
            if random.below(20) == 0 {
                let step = 1 + random.below(4) as u16;
                let moved = u16::from_le_bytes([pair[0], pair[1]]).wrapping_add(step);
                pair.copy_from_slice(&moved.to_le_bytes());
            }
        }
        fs::write(file, bytes).unwrap();
    })
}

pub fn delta() -> PathBuf {
    once("demo-tuned.delta", |path| drop(ok(&["delta", text(&model()), text(&tuned()), "-o", text(path)])))
}

/// Settings of an adapter.
pub fn lora() -> Value {
    value!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "down_proj"]})
}

/// An adapter of rank 2 to the first layer's query and down projections.
pub fn adapter(folder: &Path, settings: &Value) {
    let config: Value = serde_json::from_slice(&fs::read(model().join("config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, ffn, heads) = (size("hidden_size"), size("intermediate_size"), size("num_attention_heads"));
    let queries = config["head_dim"].as_u64().map_or(hidden, |d| d as usize * heads);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut random = Random::new(4);
    for (module, n_in, n_out) in [("self_attn.q_proj", hidden, queries), ("mlp.down_proj", ffn, hidden)] {
        for (factor, shape) in [("A", [2, n_in]), ("B", [n_out, 2])] {
            let from = data.len();
            (0..shape[0] * shape[1]).for_each(|_| data.extend((random.normal() * 0.05).to_le_bytes()));
            let name = format!("base_model.model.model.layers.0.{module}.lora_{factor}.weight");
            header.insert(name, value!({"dtype": "F32", "shape": shape, "data_offsets": [from, data.len()]}));
        }
    }
    let header = Value::Object(header).to_string();
    fs::create_dir_all(folder).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    fs::write(folder.join("adapter_config.json"), settings.to_string()).unwrap();
}
