//! Records as the program writes them, made from the structs that it writes.
#![allow(dead_code)]

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_datasets::planted::Measured;
use thermocline_runtime::{
    BenchSettings, FinishReason, GpuBenchReport, GpuBytes, GpuPlan, GpuPrediction, GpuRequest, GpuSpeeds, Mode,
    PlanRequest, RunReport, Speeds, TierBytes, Timing,
};
use thermocline_split::PlantedSplit;

const GIB: u64 = 1 << 30;

pub fn gpu_bench() -> GpuBenchReport {
    let timing = |runs: [f64; 3]| Timing { runs: runs.to_vec(), median: runs[1], spread: 0.01 };
    GpuBenchReport {
        planted: true,
        settings: BenchSettings { n_prompt: 512, n_gen: 128, greedy: true, repetitions: 3 },
        device: "Test GPU".to_owned(),
        n_threads: 8,
        hardware: GpuSpeeds { device: 4e12, link: 50e9, copies: 0.0, host: 100e9, sketches: 0.0 },
        plan: gpu_plan(),
        host_share: 2.0 / 3.0,
        host_share_given: false,
        host_layers: 0,
        lookahead: 200,
        foreseen_used: Some(0.8),
        prompt_tok_s: timing([600.0, 650.0, 700.0]),
        decode_tok_s: timing([49.0, 50.0, 52.0]),
        predicted: GpuPrediction {
            host_layers: 0,
            tok_s: 110.0,
            host_share: 2.0 / 3.0,
            bottleneck: "link + host",
            formula: "as said".to_owned(),
        },
        bytes_per_token: TierBytes { device: 9_000_000_000, cache: 200_000_000, host: 1_000_000_000, disk: 0 },
        link_bytes_per_token: 400_000_000,
        early_link_bytes_per_token: 100_000_000,
        host_sketch_bytes_per_token: 0,
        link_bytes_per_second: 20e9,
        host_bytes_per_second: 30e9,
        cache_hit_rate: Some(0.25),
        limit_share: 0.4,
        limit: "VRAM + link and RAM",
        device_used_bytes: 15 * GIB,
        peak_rss_bytes: 24 * GIB,
    }
}

pub fn gpu_plan() -> GpuPlan {
    let base = PlanRequest {
        mode: Mode::Sparse { active: 0.1 },
        always: None,
        ram_budget_bytes: None,
        context: 640,
        batch: 512,
        n_threads: 8,
    };
    GpuPlan {
        request: GpuRequest {
            base,
            vram_budget_bytes: 16 * GIB,
            context_bytes: GIB,
            n_blocks: 264,
            cache_share: None,
            lookahead: None,
            host_layers: None,
        },
        fixed: GpuBytes { matrices: 1_000_000, predictors: 200_000, kv_cache: 640_000, ..GpuBytes::default() },
        hot_neurons: vec![100, 100],
        always_neurons: 0,
        residuals: false,
        sketch_bits: None,
        streamed_sketches: 0,
        streamed_bytes_per_token: 0,
        streamed_in_two_bits: None,
        attention_in_q4_spares: None,
        chooser_bytes_per_token: 200_000,
        spare_sketch_bytes: 0,
        host_sketch_bytes: 0,
        audit_bytes: 0,
        hot_bytes: 8 * GIB,
        sections: Vec::new(),
        mixed_cold_layers: 0,
        cache_sets: vec![4, 4],
        cache_ways: 16,
        cache_bytes: GIB,
        cache_lambda: 0.5,
        cache_policies: vec![("LRU".to_owned(), 0.2)],
        pinned_bytes: 20 * GIB,
        total_bytes: 16 * GIB,
        dense_bytes: 36 * GIB,
        lookahead_neurons: 200,
        lookahead_bytes_per_token: 2 * 200 * 13_824,
        hidden_size: 8192,
        n_splits: 20,
        prefill_neurons: 4096,
        device_bytes_per_token: 9_000_000_000,
        cache_bytes_per_token: 200_000_000,
        host_bytes_per_token: 1_000_000_000,
        cache_hit_rate: 0.2,
    }
}

/// What `bench --json` adds.
pub fn printed(report: &GpuBenchReport, model: &str) -> Value {
    let mut value = serde_json::to_value(report).unwrap();
    value["version"] = "0.1.0".into();
    value["command"] = json!(["bench", "-m", model]);
    value["cpu"] = "Test CPU".into();
    value["model"] = model.into();
    value
}

/// What `run --json` prints, with this timeline on this plan.
pub fn gpu_run(timeline: Vec<(usize, TierBytes)>) -> Value {
    let report = RunReport {
        tokens: vec![1; timeline.len() + 1],
        prompt_tokens: 10,
        finish_reason: FinishReason::Length,
        mode: Mode::Sparse { active: 0.1 },
        prompt_tok_s: 100.0,
        decode_tok_s: 30.0,
        ttft_s: 0.1,
        bytes_per_token: timeline[0].1,
        cache_hit_rate: Some(0.5),
        computed_share: 0.1,
        foreseen_used: None,
        disk_wait_share: 0.0,
        link_bytes_per_token: 1000,
        bytes_per_second: Speeds { device: Some(4e12), link: Some(50e9), ram: None, sketches: None, disk: None },
        limit_share: 0.7,
        limit: "VRAM + link",
        peak_rss_bytes: GIB,
        audit: None,
        timeline,
    };
    let mut value = serde_json::to_value(report).unwrap();
    value["plan"] = serde_json::to_value(gpu_plan()).unwrap();
    value["warnings"] = json!(["m has random weights with planted activations: it measures speed and says nothing"]);
    value
}

/// What `split --planted --json` prints.
pub fn planted_split(model: &str) -> Value {
    let measured = Measured {
        trace_tokens: 256,
        active_share: 0.099,
        active_share_sd: 0.004,
        hot_cover: 0.6,
        reuse: [0.4, 0.6, 0.8],
        coactivation_inside: None,
        coactivation_outside: 1.0,
        predictor_tokens: 16,
        predictor_recall: 0.94,
        foresight_recall: Some(0.64),
    };
    let (path, model) = (PathBuf::from(model), model.to_owned());
    let split = PlantedSplit { path, model, bytes: 39_000_000_000, ffn_bytes: 1, measured, resumed_layers: 0 };
    serde_json::to_value(split).unwrap()
}

pub fn write(dir: &Path, name: &str, value: &Value) -> PathBuf {
    let path = dir.join(format!("{name}.json"));
    fs::write(&path, value.to_string()).unwrap();
    path
}
