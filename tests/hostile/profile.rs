//! Profiles, which come from strangers too: what their files say is checked before anything is allocated or computed.

use crate::harness::Table;
use crate::support::{copy_dir, fails, four_layers, llama, model, profile, splitting, text};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use tempfile::TempDir;

fn sound(folder: &Path) {
    copy_dir(&profile(&llama()), folder);
}

/// A change to the value at a path of keys in `profile.json`.
fn set(folder: &Path, keys: &str, value: Value) {
    let path = folder.join("profile.json");
    let mut meta: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    *meta.pointer_mut(keys).unwrap() = value;
    fs::write(path, meta.to_string()).unwrap();
}

#[test]
fn profiles_that_make_no_sense() {
    let mut table = Table::new("profile");
    for (case, keys, value) in [
        (2, "/format_version", json!(0)),
        (2, "/format_version", json!(9)),
        (3, "/config/n_layers", json!(1 << 20)),
        (3, "/config/n_layers", json!(4000)),
        (3, "/config/hidden_size", json!(u64::MAX)),
        (3, "/config/intermediate_size", json!(1 << 20)),
        (3, "/config/n_heads", json!(0)),
        (3, "/config/head_dim", json!(1 << 20)),
        (3, "/settings/window_len", json!(u64::MAX)),
        (3, "/settings/n_samples", json!(1 << 24)),
        (3, "/n_samples", json!(1025)),
        (3, "/n_samples", json!(u64::MAX)),
        (3, "/n_windows", json!(0)),
        (3, "/n_windows_total", json!(u64::MAX)),
        (3, "/n_tokens", json!(-1)),
        (13, "/settings/active_share", json!(0.25)),
        (13, "/config/rope_theta", Value::Null),
        (13, "/model_name", json!("\u{1b}[31m")),
    ] {
        let name = format!("{}-{value}", &keys[1..]).replace(['/', '"', '.', '\\', '[', '{', '}'], "_");
        table.made(case, &name, |folder| {
            sound(folder);
            set(folder, keys, value);
        });
    }
    table.made(3, "config-heads-whose-squares-overflow", |folder| {
        sound(folder);
        set(folder, "/config/n_heads", json!(1 << 14));
        set(folder, "/config/head_dim", json!(1 << 20));
    });
    for (name, bytes) in [
        ("empty-meta", Vec::new()),
        ("deep-meta", b"[".repeat(100_000)),
        ("large-meta", format!("{{\"format_version\":1,\"a\":[0{}]}}", ",0".repeat(2 << 20)).into_bytes()),
    ] {
        table.made(14, name, |folder| {
            sound(folder);
            fs::write(folder.join("profile.json"), bytes).unwrap();
        });
    }
    for (name, n) in [("statistics-empty", 0), ("statistics-7-bytes", 7), ("statistics-cut", 100_000)] {
        table.made(1, name, |folder| {
            sound(folder);
            fs::OpenOptions::new().write(true).open(folder.join("statistics.safetensors")).unwrap().set_len(n).unwrap();
        });
    }
    table.made(18, "statistics-missing", |folder| {
        sound(folder);
        fs::remove_file(folder.join("statistics.safetensors")).unwrap();
    });
    for name in ["profile.json", "statistics.safetensors"] {
        table.made(17, &format!("{name}-is-a-device"), |folder| {
            sound(folder);
            fs::remove_file(folder.join(name)).unwrap();
            symlink("/dev/zero", folder.join(name)).unwrap();
        });
    }
    table.check();
}

/// What `split` finds: statistics are only compared with their checksum when they are used.
#[test]
fn statistics_that_were_changed_are_not_split_with() {
    let mut table = Table::new("profile-split");
    let (folder, made) = (table.folder().join("profile"), model(&llama()));
    sound(&folder);
    let path = folder.join("statistics.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let out = table.folder().join("out");
    let args = ["split", "-m", text(&made), "--profile", text(&folder), "-o", text(&out)];
    table.refused(20, "flipped-bit", &folder, &args);
    assert!(!out.exists());
    table.check();
}

/// With the digest of a model that it is not of.
#[test]
fn a_profile_of_another_shape_is_refused() {
    let dir = TempDir::new().unwrap();
    let forged = dir.path().join("profile");
    copy_dir(&profile(&four_layers()), &forged);
    let meta: Value = serde_json::from_slice(&fs::read(profile(&llama()).join("profile.json")).unwrap()).unwrap();
    set(&forged, "/model_digest", meta["model_digest"].clone());
    let said = fails(4, &splitting(&model(&llama()), &forged, &[], &dir.path().join("split")));
    assert!(said.contains("profile.json: config: layers, widths and heads"), "{said}");
}
