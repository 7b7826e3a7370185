//! Damaged and forged deltas: a typed error, never a panic, never other bits.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use support::{Memory, config};
use tempfile::TempDir;
use thermocline_datasets::Random;
use thermocline_split::delta::{
    DATA_FILE, Delta, DeltaCheckpoint, DeltaKind, DeltaManifest, DeltaOptions, Final, LowRankEntry, MANIFEST_FILE,
    verify_delta, write,
};
use thermocline_split::{Error, PlainFile};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// A base, and a delta with sparse blocks, dense ones, unchanged ones, a vector and a template.
fn made() -> (TempDir, PathBuf, Memory) {
    let mut random = Random::new(3);
    let base = Memory::new(config(16, 24, 1), |_, _| random.next_u64() as u16);
    let mut changed = base.clone();
    for (name, (_, bits)) in &mut changed.tensors {
        let density = match name.as_str() {
            n if n.contains("gate_proj") => 1.0,
            n if n.contains("k_proj") => 0.0,
            _ => 0.1,
        };
        // The embedding has blocks without changes behind its first rows.
        let n = if name.contains("embed") { 40 } else { bits.len() };
        bits[..n].iter_mut().for_each(|b| *b = b.wrapping_add(u16::from(random.uniform() < density)));
    }
    changed.template = Some("template".to_owned());
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("delta");
    let options = DeltaOptions { block_weights: 100, ..DeltaOptions::default() };
    let report = write(&base, Final::Checkpoint(&changed), &options, &out, &|_, _| ()).unwrap();
    assert!(report.sparse_blocks > 0 && report.dense_blocks > 0 && report.unchanged_blocks > 0, "{report:?}");
    assert_eq!(report.kinds.len(), 3);
    (dir, out, base)
}

/// Opens and reads everything.
fn read(dir: &Path, base: &Memory) -> Result<(), Error> {
    let delta = Delta::open(dir)?;
    let (hidden, ffn) = (base.config.hidden_size, base.config.intermediate_size);
    let ids: Vec<u32> = (0..ffn as u32).collect();
    let mut parts = [(); 3].map(|()| vec![0u16; hidden * ffn]);
    let [gate, up, down] = &mut parts;
    delta.patch_neurons(0, &ids, gate, up, down)?;
    let report = verify_delta(&DeltaCheckpoint::new(Box::new(base.clone()), delta)?, None, &|_, _| ())?;
    assert_eq!(report.violations, Vec::<String>::new(), "wrong bits instead of an error");
    Ok(())
}

fn assert_refused(dir: &Path, base: &Memory, what: &str) -> String {
    match read(dir, base) {
        Ok(()) => panic!("{what}: accepted"),
        Err(e @ (Error::Corrupt { .. } | Error::UnsupportedVersion { .. })) => e.to_string(),
        // A vector or a row read through the checkpoint, and a configuration that no model has.
        Err(Error::Checkpoint(e)) => e.to_string(),
        Err(e) => panic!("{what}: {e:?}"),
    }
}

#[test]
fn every_damaged_bit_is_found() {
    let (_guard, dir, base) = made();
    read(&dir, &base).unwrap();
    for name in [MANIFEST_FILE, DATA_FILE, "chat_template.jinja"] {
        let path = dir.join(name);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            for bit in if name == DATA_FILE { 0..8 } else { at % 8..at % 8 + 1 } {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                fs::write(&path, &bad).unwrap();
                assert_refused(&dir, &base, &format!("{name}: bit {bit} of byte {at}"));
            }
        }
        for bad in
            [&good[..0], &good[..1], &good[..good.len() / 2], &good[..good.len() - 1], &[&good[..], b"x"].concat()]
        {
            fs::write(&path, bad).unwrap();
            assert_refused(&dir, &base, &format!("{name}: {} bytes of {}", bad.len(), good.len()));
        }
        fs::remove_file(&path).unwrap();
        assert_refused(&dir, &base, name);
        fs::write(&path, &good).unwrap();
    }
    fs::write(dir.join("lock"), "").unwrap();
    assert!(assert_refused(&dir, &base, "a lock").contains("never finished"));
}

/// Changes a manifest and seals it again.
fn forge(dir: &Path, change: impl FnOnce(&mut DeltaManifest)) {
    let path = dir.join(MANIFEST_FILE);
    let mut manifest: DeltaManifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    let pretty = |m: &DeltaManifest| serde_json::to_string_pretty(m).unwrap() + "\n";
    manifest.checksum = String::new();
    manifest.checksum = format!("{:032x}", xxh3_128(pretty(&manifest).as_bytes()));
    fs::write(path, pretty(&manifest)).unwrap();
}

#[test]
fn a_manifest_that_lies_under_a_right_checksum_is_refused() {
    let (_guard, dir, base) = made();
    let path = dir.join(MANIFEST_FILE);
    let good = fs::read(&path).unwrap();
    let gate = |m: &DeltaManifest| m.tensors.iter().position(|t| t.name.contains("gate_proj")).unwrap();
    type Lie = Box<dyn Fn(&mut DeltaManifest)>;
    let mut lies: Vec<(&str, Lie)> = vec![
        ("format", Box::new(|m| m.format = "thermocline-split".into())),
        ("version", Box::new(|m| m.version = 2)),
        ("data size", Box::new(|m| m.data_bytes += 1)),
        ("no tensors", Box::new(|m| m.tensors.clear())),
        ("a tensor less", Box::new(|m| drop(m.tensors.pop()))),
        ("a tensor twice", Box::new(|m| m.tensors.push(m.tensors[0].clone()))),
        ("a file outside", Box::new(|m| m.files[0].file = "../x".into())),
        ("a file that is not there", Box::new(|m| m.files.push(PlainFile { file: "x".into(), checksum: "0".into() }))),
        ("huge layers", Box::new(|m| m.config.n_layers = 4096)),
        ("huge hidden", Box::new(|m| m.config.hidden_size = 1 << 20)),
        ("absurd hidden", Box::new(|m| m.config.hidden_size = usize::MAX)),
        ("no heads", Box::new(|m| m.config.n_kv_heads = 0)),
        ("unknown name", Box::new(|m| m.tensors[0].name = "x".into())),
    ];
    type Change = fn(&mut thermocline_split::delta::DeltaTensor);
    let of_gate: [(&str, Change); 22] = [
        ("rows", |t| t.rows = usize::MAX),
        ("rows 0", |t| t.rows = 0),
        ("columns", |t| t.columns = usize::MAX),
        ("offset", |t| t.offset = u64::MAX),
        ("offset 0", |t| t.offset = 0),
        ("bytes", |t| t.bytes = u64::MAX),
        ("bytes 0", |t| t.bytes = 0),
        ("block rows 0", |t| t.block_rows = 0),
        ("block rows 1", |t| t.block_rows = 1),
        ("block rows", |t| t.block_rows = usize::MAX),
        ("index", |t| t.index_offset = u64::MAX),
        ("index 0", |t| t.index_offset = 0),
        ("index + 1", |t| t.index_offset += 1),
        ("index - 40", |t| t.index_offset -= 40),
        ("changed", |t| t.changed += 1),
        ("changed 0", |t| t.changed = 0),
        ("checksum", |t| t.checksum = "0".repeat(16)),
        ("unchanged", |t| t.kind = DeltaKind::Unchanged),
        ("vector", |t| t.kind = DeltaKind::Vector),
        ("low rank without factors", |t| t.kind = DeltaKind::LowRank),
        ("low rank", |t| {
            (t.kind, t.block_rows, t.index_offset) = (DeltaKind::LowRank, 0, 0);
            t.low_rank = Some(LowRankEntry { rank: usize::MAX, scale: 1.0, bf16: true });
        }),
        ("factors of blocks", |t| t.low_rank = Some(LowRankEntry { rank: 1, scale: 1.0, bf16: true })),
    ];
    lies.extend(of_gate.into_iter().map(|(what, change)| {
        let lie: Lie = Box::new(move |m| {
            let i = gate(m);
            change(&mut m.tensors[i]);
        });
        (what, lie)
    }));
    for (what, lie) in lies {
        forge(&dir, lie);
        assert_refused(&dir, &base, what);
        fs::write(&path, &good).unwrap();
    }
    read(&dir, &base).unwrap();
}

/// Changes the data of a tensor's block `b` under right checksums: `change` gets its index entry and stored bytes, which
/// must keep their number.
fn forge_block(dir: &Path, name: &str, b: usize, change: impl FnOnce(&mut [u8], &mut [u8])) {
    let path = dir.join(DATA_FILE);
    let mut data = fs::read(&path).unwrap();
    forge(dir, |m| {
        let t = m.tensors.iter_mut().find(|t| t.name.contains(name)).unwrap();
        let (index, end) = (t.index_offset as usize, (t.offset + t.bytes) as usize);
        let (blocks, entries) = data[..end].split_at_mut(index);
        let entry = &mut entries[40 * b..40 * (b + 1)];
        let word = |entry: &[u8], at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()) as usize;
        let start = word(entry, 0);
        let n = word(entry, 16) + word(entry, 20) + word(entry, 24);
        let stored = &mut blocks[start..start + n];
        change(entry, stored);
        let sum = xxh3_64(stored).to_le_bytes();
        entry[32..].copy_from_slice(&sum);
        t.checksum = format!("{:016x}", xxh3_64(entries));
    });
    fs::write(path, data).unwrap();
}

#[test]
fn an_index_that_lies_under_right_checksums_is_refused() {
    let (_guard, dir, base) = made();
    let files = [MANIFEST_FILE, DATA_FILE].map(|name| (dir.join(name), fs::read(dir.join(name)).unwrap()));
    type Lie = fn(&mut [u8], &mut [u8]);
    let lies: [(&str, Lie); 14] = [
        ("offset", |e, _| e[0] ^= 1),
        ("far offset", |e, _| e[7] = 0xff),
        ("kind", |e, _| e[8] = 3),
        ("kind unchanged", |e, _| e[8] = 0),
        ("kind swapped", |e, _| e[8] ^= 3),
        ("one change more", |e, _| e[12] += 1),
        ("many changes", |e, _| e[12..16].fill(0xff)),
        ("no changes", |e, _| e[12..16].fill(0)),
        ("bitmap longer", |e, _| e[16..20].fill(0xff)),
        ("low longer", |e, _| e[20..24].fill(0xff)),
        ("low shorter", |e, _| e[20] -= 1),
        ("planes moved", |e, _| (e[20], e[24]) = (e[20] + 1, e[24] - 1)),
        ("high longer", |e, _| e[24..28].fill(0xff)),
        ("reserved", |e, _| e[28] = 1),
    ];
    for name in ["up_proj", "gate_proj", "down_proj"] {
        for (what, lie) in lies {
            forge_block(&dir, name, 0, lie);
            assert_refused(&dir, &base, &format!("{what} of {name}"));
            files.iter().for_each(|(path, good)| fs::write(path, good).unwrap());
        }
    }
    read(&dir, &base).unwrap();
}

#[test]
fn bitmaps_that_do_not_fit_their_values_and_frames_that_grow_are_refused() {
    let mut random = Random::new(9);
    // Wide rows of few changes: bitmaps compress, and columns are no multiple of 8.
    let base = Memory::new(config(1003, 5, 1), |_, _| random.next_u64() as u16);
    let changed = base.changed(|b| b.wrapping_add(u16::from(random.below(300) == 0)));
    let guard = TempDir::new().unwrap();
    for level in [0, 3] {
        let dir = guard.path().join(format!("delta{level}"));
        let options = DeltaOptions { zstd_level: level, ..DeltaOptions::default() };
        write(&base, Final::Checkpoint(&changed), &options, &dir, &|_, _| ()).unwrap();
        let files = [MANIFEST_FILE, DATA_FILE].map(|name| (dir.join(name), fs::read(dir.join(name)).unwrap()));
        if level == 0 {
            // One bit more, one less, and one past the last column (1003 = 125 * 8 + 3).
            type Lie = fn(&mut [u8], &mut [u8]);
            let lies: [Lie; 3] = [
                |_, stored| {
                    let zero = stored.iter().position(|b| *b == 0).unwrap();
                    stored[zero] = 1;
                },
                |_, stored| {
                    let set = stored.iter().position(|b| *b != 0).unwrap();
                    stored[set] &= stored[set] - 1;
                },
                |_, stored| {
                    let set = stored.iter().position(|b| *b != 0).unwrap();
                    stored[set] &= stored[set] - 1;
                    stored[125] |= 0x80;
                },
            ];
            for lie in lies {
                forge_block(&dir, "up_proj", 0, lie);
                assert_refused(&dir, &base, "bitmap");
                files.iter().for_each(|(path, good)| fs::write(path, good).unwrap());
            }
        } else {
            // A frame that decodes to a gigabyte in place of the bitmap's, as far as it goes.
            let bomb = zstd::bulk::compress(&vec![0; 1 << 30], 1).unwrap();
            forge_block(&dir, "up_proj", 0, |entry, stored| {
                let n = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
                let n = n.min(bomb.len());
                stored[..n].copy_from_slice(&bomb[..n]);
            });
            assert_refused(&dir, &base, "bomb");
            files.iter().for_each(|(path, good)| fs::write(path, good).unwrap());
            forge_block(&dir, "up_proj", 0, |_, stored| stored.fill(0x28));
            assert_refused(&dir, &base, "no frame");
            files.iter().for_each(|(path, good)| fs::write(path, good).unwrap());
        }
        read(&dir, &base).unwrap();
    }
}
