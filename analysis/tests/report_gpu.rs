//! What the report makes of records of a GPU: their numbers, their groups, and those that no program wrote.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod records;

use polars::prelude::{AnyValue, DataFrame};
use records::{gpu_bench, gpu_run, planted_split, printed, write};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use thermocline_analysis::Error;
use thermocline_analysis::plots::Body;
use thermocline_analysis::report::{Figure, GpuBenchFile, Inputs, Page, Setting, sweeps};
use thermocline_runtime::{GpuBenchReport, Mode, TierBytes};
use thermocline_split::SketchForm;

fn page(paths: &[PathBuf]) -> Page {
    Page::new(Inputs::read(paths).unwrap(), Vec::new()).unwrap()
}

fn table(page: &Page, section: &str) -> DataFrame {
    page.sections().iter().find(|s| s.id == section).unwrap().tables[0].data.clone()
}

fn number(table: &DataFrame, column: &str, row: usize) -> f64 {
    match table.column(column).unwrap().get(row).unwrap() {
        AnyValue::Float64(v) => v,
        AnyValue::UInt64(v) => v as f64,
        other => panic!("{column}: {other}"),
    }
}

fn text(table: &DataFrame, column: &str, row: usize) -> String {
    table.column(column).unwrap().get(row).unwrap().get_str().unwrap().to_owned()
}

fn figure<'a>(page: &'a Page, section: &str, title: &str) -> &'a Figure {
    let section = page.sections().iter().find(|s| s.id == section).unwrap();
    section.figures.iter().find(|f| f.chart.title.contains(title)).unwrap()
}

#[test]
fn a_bench_is_a_row_with_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let page = page(&[write(dir.path(), "one", &printed(&gpu_bench(), "planted-70b-a"))]);
    let table = table(&page, "gpu");
    assert_eq!(table.height(), 1);
    for (column, value) in [
        ("VRAM budget, GiB", 16.0),
        ("VRAM counted by the driver, GiB", 15.0),
        ("context", 640.0),
        ("prompt", 512.0),
        ("threads", 8.0),
        ("tok/s", 50.0),
        ("planned tok/s", 110.0),
        // 50 tok/s at two fifths of the limit.
        ("limit tok/s", 125.0),
        ("of the limit", 0.4),
        ("link GB/s", 20.0),
        ("CPU GB/s", 30.0),
        ("link alone, GB/s", 50.0),
        ("CPU alone, GB/s", 100.0),
        ("VRAM GB/token", 9.0),
        ("cache GB/token", 0.2),
        ("link GB/token", 0.4),
        ("CPU GB/token", 0.6),
        ("cache hits", 0.25),
        ("prompt tok/s", 650.0),
    ] {
        let got = number(&table, column, 0);
        assert!((got - value).abs() < 1e-12 * value, "{column}: {got}");
    }
    for (column, value) in [
        ("bench", "one"),
        ("model", "planted-70b-a"),
        ("device", "Test GPU"),
        ("active", "10 %"),
        ("CPU share", "auto, 67 %"),
        ("min\u{2013}max", "49.00\u{2013}52.00"),
        ("limited by", "VRAM + link and RAM"),
    ] {
        assert_eq!(text(&table, column, 0), value, "{column}");
    }
    let html = page.html().unwrap();
    assert!(html.contains("<td class=\"text\">49.00\u{2013}52.00</td>") && html.contains("<td>125.0</td>"));
    assert!(html.contains("50.0 of 125.0, 40 %") && html.contains("planted models"));
    // All of RAM over link and threads at the speeds alone would take longer than VRAM: 1 - 9.2 GB / 4 TB/s * 125/s.
    assert!(html.contains("9.8 % to 9.8 % of the bytes, and 71 % to 71 % of the time"), "{html}");
}

#[test]
fn what_an_older_record_lacks_is_a_dash() {
    let dir = tempfile::tempdir().unwrap();
    let mut old = printed(&gpu_bench(), "planted-70b-a");
    let fields = ["planted", "device_used_bytes", "link_bytes_per_second", "host_bytes_per_second", "cache_hit_rate"];
    fields.into_iter().for_each(|field| drop(old.as_object_mut().unwrap().remove(field)));
    // Everything in VRAM: the link's speed is infinite, and nothing was measured twice.
    old["hardware"]["link"] = Value::Null;
    old["decode_tok_s"]["spread"] = Value::Null;
    old["limit_share"] = 0.into();
    let mut other = gpu_bench();
    (other.planted, other.host_share) = (true, 0.0);
    other.plan.request.base.mode = Mode::Exact;
    let page = page(&[write(dir.path(), "old", &old), write(dir.path(), "new", &printed(&other, "m"))]);
    let table = table(&page, "gpu");
    for column in ["VRAM counted by the driver, GiB", "link GB/s", "CPU GB/s", "link alone, GB/s", "cache hits"] {
        assert!(table.column(column).unwrap().get(0).unwrap().is_null(), "{column}");
    }
    assert!(table.column("limit tok/s").unwrap().get(0).unwrap().is_null());
    assert_eq!(text(&table, "model", 0), "planted-70b-a");
    assert_eq!([text(&table, "model", 1), text(&table, "active", 1)], ["m (planted)", "all (exact)"]);
    assert_eq!(text(&table, "CPU share", 1), "off");
    assert!(page.html().unwrap().contains("<td>\u{2013}</td>"));
    page.write_svg(&dir.path().join("svg")).unwrap();
}

fn bench(name: &str, change: impl FnOnce(&mut GpuBenchReport)) -> GpuBenchFile {
    let mut report = gpu_bench();
    change(&mut report);
    let model = if name.starts_with("other") { "other" } else { "m" };
    GpuBenchFile { name: name.to_owned(), ..serde_json::from_value(printed(&report, model)).unwrap() }
}

#[test]
fn benches_are_grouped_by_the_one_setting_in_which_they_differ() {
    let vram = |gib: u64| move |r: &mut GpuBenchReport| r.plan.request.vram_budget_bytes = gib << 30;
    let prompt = |n: usize| {
        move |r: &mut GpuBenchReport| {
            r.settings.n_prompt = n;
            r.plan.request.base.context = n + r.settings.n_gen;
        }
    };
    let mut benches = vec![
        bench("base", |_| ()),
        bench("vram-24", vram(24)),
        bench("vram-12", vram(12)),
        bench("context-8k", prompt(8000)),
        // A shorter measurement of the same, with so much less context.
        bench("threads-2", |r| {
            (r.n_threads, r.settings.n_gen, r.plan.request.base.context) = (2, 64, 576);
        }),
        // Two settings at once, another share of the CPU, layers of it that were given, other sketches, a smaller group with an earlier name, a lone model.
        bench("both", |r| {
            r.n_threads = 4;
            vram(20)(r);
        }),
        bench("given", |r| (r.host_share, r.host_share_given, r.n_threads) = (0.9, true, 16)),
        bench("layers-0", |r| (r.plan.request.host_layers, r.n_threads) = (Some(0), 32)),
        bench("two-bits", |r| (r.plan.sketch_bits, r.n_threads) = (Some(SketchForm::AllInTwo), 64)),
        bench("a-cpu-0", |r| r.host_share = 0.0),
        bench("a-cpu-0-vram-30", |r| {
            r.host_share = 0.0;
            vram(30)(r);
        }),
        bench("other", vram(48)),
    ];
    let seen = |benches: &[GpuBenchFile]| -> Vec<(Setting, Vec<(f64, String)>)> {
        let points = |s: &thermocline_analysis::report::Sweep<'_>| {
            s.points.iter().map(|(x, b)| (*x, b.name.clone())).collect::<Vec<_>>()
        };
        sweeps(benches).iter().map(|s| (s.over, points(s))).collect()
    };
    let expected = |over, points: &[(f64, &str)]| (over, points.iter().map(|(x, n)| (*x, (*n).to_owned())).collect());
    let want: Vec<(Setting, Vec<(f64, String)>)> = vec![
        expected(Setting::Vram, &[(12.0, "vram-12"), (16.0, "base"), (24.0, "vram-24")]),
        expected(Setting::Prompt, &[(512.0, "base"), (8000.0, "context-8k")]),
        expected(Setting::Threads, &[(2.0, "threads-2"), (8.0, "base")]),
    ];
    assert_eq!(seen(&benches), want);
    benches.reverse();
    assert_eq!(seen(&benches), want);
    benches.rotate_left(3);
    assert_eq!(seen(&benches), want);

    // Of groups of one size the one with the earlier name; the same setting twice is no line.
    let active = |share: f32| move |r: &mut GpuBenchReport| r.plan.request.base.mode = Mode::Sparse { active: share };
    let pairs = ["x", "other-x", "other-y", "y"].into_iter().zip([0.2, 0.2, 0.3, 0.3]);
    let pairs: Vec<GpuBenchFile> = pairs.map(|(name, share)| bench(name, active(share))).collect();
    assert_eq!(seen(&pairs)[0].1.iter().map(|p| p.1.as_str()).collect::<Vec<_>>(), ["other-x", "other-y"]);
    assert!(sweeps(&[bench("a", |_| ()), bench("b", |_| ())]).is_empty() && sweeps(&[]).is_empty());
}

#[test]
fn lines_over_a_setting_carry_speed_and_limit() {
    let dir = tempfile::tempdir().unwrap();
    let mut slow = gpu_bench();
    (slow.n_threads, slow.decode_tok_s.median, slow.limit_share) = (2, 30.0, 0.5);
    let paths =
        [write(dir.path(), "fast", &printed(&gpu_bench(), "m")), write(dir.path(), "slow", &printed(&slow, "m"))];
    let page = page(&paths);
    let Body::Lines(series) = &figure(&page, "gpu", "by threads").chart.body else { panic!("lines") };
    assert_eq!(series[0].points, [(2.0, 30.0), (8.0, 50.0)]);
    assert_eq!(series[1].points, [(2.0, 60.0), (8.0, 125.0)]);
    assert!(series[1].dashed && series[1].label.as_deref() == Some("physical limit"));
    let Body::Rows(rows) = &figure(&page, "gpu", "Decode speed and its limit").chart.body else { panic!("rows") };
    assert_eq!(rows.rows.iter().map(|r| r.values.clone()).collect::<Vec<_>>(), [[50.0, 125.0], [30.0, 60.0]]);
    let Body::Rows(rows) = &figure(&page, "gpu", "Bytes").chart.body else { panic!("rows") };
    assert!(rows.stacked && rows.rows[0].values == [9.0, 0.2, 0.4, 0.6]);
    let files = page.write_svg(&dir.path().join("plots")).unwrap();
    let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(names, ["gpu-speed.svg", "gpu-bytes.svg", "gpu-over-threads.svg"]);
    for file in files {
        let svg = fs::read_to_string(&file).unwrap();
        // Alone, it needs its namespace and its colours; of a page's theme it knows nothing.
        assert!(svg.starts_with("<svg ") && svg.contains("xmlns=\"") && !svg.contains("var("), "{}", file.display());
    }
}

#[test]
fn a_run_shows_what_share_of_its_neurons_vram_held() {
    let dir = tempfile::tempdir().unwrap();
    // The plan's matrices and predictors, 1000 bytes a position, and 600 000 of 1 000 000 bytes of neurons; after
    // 40 tokens 200 000.
    let token = |i: usize| {
        let hot = if i <= 40 { 600_000 } else { 200_000 };
        let device = 1_200_000 + 1000 * (10 + i as u64) + hot;
        (i, TierBytes { device, cache: 100_000, host: 900_000 - hot, disk: 0 })
    };
    let run = gpu_run((1..=80).map(token).collect());
    let page = page(&[write(dir.path(), "shift", &run)]);
    let vram = figure(&page, "runs", "found in VRAM");
    let Body::Lines(series) = &vram.chart.body else { panic!("lines") };
    let [each, mean, hot] = &series[..] else { panic!("three lines") };
    let at = |points: &[(f64, f64)], token: f64| points.iter().find(|p| p.0 == token).unwrap().1;
    for (points, token, share) in [
        (each, 1.0, 70.0),
        (each, 41.0, 30.0),
        (hot, 40.0, 60.0),
        (hot, 80.0, 20.0),
        (mean, 40.0, 70.0),
        // Eight of sixteen tokens from before the change.
        (mean, 48.0, 50.0),
        (mean, 80.0, 30.0),
    ] {
        let got = at(&points.points, token);
        assert!((got - share).abs() < 1e-9, "token {token}: {got} instead of {share}");
    }
    assert!(vram.reading.contains("70 % of the active neurons at first, 30 % at last"), "{}", vram.reading);
    let table = table(&page, "runs");
    assert!(text(&table, "model", 0).contains("planted"));
    assert!((number(&table, "VRAM budget, MB", 0) - 17_179.869_184).abs() < 1e-6);

    // Without what it is computed from, or in exact mode, there is no such figure.
    for (pointer, value) in [("/plan/fixed", json!({})), ("/plan/request/base/context", json!(0)), ("/mode", json!({}))]
    {
        let mut run = run.clone();
        *run.pointer_mut(pointer).unwrap() = value;
        let page = self::page(&[write(dir.path(), "other", &run)]);
        assert_eq!(page.sections().iter().find(|s| s.id == "runs").unwrap().figures.len(), 1, "{pointer}");
    }
}

#[test]
fn every_kind_of_record_may_stand_beside_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let cpu = json!({
        "model": "m", "decode_tok_s": {"median": 10.0, "spread": null},
        "predicted": {"tok_s": 11.0, "limit_tok_s": 12.0, "bottleneck": "RAM", "formula": ""},
    });
    let tiers = TierBytes { device: 3_000_000, cache: 1, host: 2, disk: 0 };
    let mut paths = vec![
        write(dir.path(), "cpu", &cpu),
        write(dir.path(), "run", &gpu_run(vec![(1, tiers), (2, tiers)])),
        write(dir.path(), "planted", &planted_split("planted-70b-a")),
    ];
    // More benches than a chart has rows.
    paths.extend((0..45).map(|i| write(dir.path(), &format!("gpu-{i}"), &printed(&gpu_bench(), "m"))));
    let inputs = Inputs::read(&paths).unwrap();
    assert_eq!(
        [inputs.benches.len(), inputs.gpu_benches.len(), inputs.runs.len(), inputs.planted.len()],
        [1, 45, 1, 1]
    );
    let page = Page::new(inputs, Vec::new()).unwrap();
    assert_eq!(table(&page, "gpu").height(), 45);
    let speed = figure(&page, "gpu", "Decode speed and its limit");
    assert!(matches!(&speed.chart.body, Body::Rows(rows) if rows.rows.len() == 40));
    assert!(speed.reading.contains("5 more benches"));
    assert!(page.html().unwrap().contains("planted-70b-a"));
    page.write_png(&dir.path().join("png")).unwrap();
}

fn refused(dir: &Path, content: &str) -> Error {
    let path = dir.join("hostile.json");
    fs::write(&path, content).unwrap();
    let error = Inputs::read(std::slice::from_ref(&path)).unwrap_err();
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    error
}

#[test]
fn hostile_records_are_refused_with_file_and_field() {
    let dir = tempfile::tempdir().unwrap();
    for content in ["", "{", "[]", "null", "3", "\"device\"", "{}", "{\"measured\": 1}", "\u{0}\u{1}"] {
        let error = refused(dir.path(), content);
        assert!(matches!(error, Error::Input { .. }), "{content:?}: {error}");
    }
    let record = printed(&gpu_bench(), "m");
    // 1e999 does not fit a float: the file is no JSON.
    let infinite = record.to_string().replace("50.0", "1e999");
    assert!(matches!(refused(dir.path(), &infinite), Error::Input { .. }));

    let hostile = [
        ("/decode_tok_s/median", json!(-1.0)),
        ("/decode_tok_s/median", Value::Null),
        ("/decode_tok_s/median", json!(1e300)),
        ("/decode_tok_s/runs", json!([1.0, "fast"])),
        ("/decode_tok_s", json!([])),
        ("/prompt_tok_s/median", json!("NaN")),
        ("/predicted/tok_s", json!(-0.5)),
        ("/predicted/host_share", json!(1.5)),
        ("/host_share", json!(-0.1)),
        ("/limit_share", json!(-3)),
        ("/limit", json!(7)),
        ("/cache_hit_rate", json!(2.0)),
        ("/link_bytes_per_second", json!(-1.0)),
        ("/hardware/host", json!(-1.0)),
        ("/bytes_per_token/host", json!(-1)),
        ("/bytes_per_token/device", json!(1e40)),
        ("/device_used_bytes", json!(0.5)),
        ("/n_threads", json!(-2)),
        ("/settings/n_prompt", json!(1e30)),
        ("/plan/request/vram_budget_bytes", json!("16GiB")),
        ("/plan/request/base/mode", json!({"mode": "sparse", "active": 3.0})),
        ("/plan/request/base/mode/mode", json!("guess")),
        ("/plan/request/base/context", json!(-640)),
        ("/plan", json!(null)),
        ("/model", json!(["m"])),
        // A part that is more than the whole.
        ("/link_bytes_per_token", json!(2_000_000_000u64)),
    ];
    for (pointer, value) in hostile {
        let mut record = record.clone();
        *record.pointer_mut(pointer).unwrap() = value.clone();
        match refused(dir.path(), &record.to_string()) {
            Error::Field { field, .. } => {
                // A place in a list is counted after its name.
                let field = field.split('[').next().unwrap();
                assert_eq!(format!("/{}", field.replace('.', "/")), pointer, "{value}");
            }
            other => panic!("{pointer} = {value}: {other}"),
        }
    }

    let required = [
        "/model",
        "/settings",
        "/settings/n_gen",
        "/n_threads",
        "/hardware",
        "/plan",
        "/plan/request",
        "/plan/request/base/mode",
        "/plan/request/vram_budget_bytes",
        "/host_share",
        "/decode_tok_s",
        "/decode_tok_s/median",
        "/predicted/tok_s",
        "/bytes_per_token",
        "/bytes_per_token/cache",
        "/link_bytes_per_token",
        "/limit_share",
        "/limit",
    ];
    for pointer in required {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let mut record = record.clone();
        record.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name).unwrap();
        match refused(dir.path(), &record.to_string()) {
            Error::Field { field, reason, .. } => {
                assert_eq!(
                    (format!("/{}", field.replace('.', "/")).as_str(), reason.as_str()),
                    (pointer, "is missing")
                );
            }
            other => panic!("{pointer}: {other}"),
        }
    }

    // Other kinds are no less strict about what they have.
    let mut run = gpu_run(vec![(1, TierBytes::default())]);
    run["timeline"] = json!([[1, {"device": -1, "cache": 0, "host": 0, "disk": 0}]]);
    assert!(matches!(refused(dir.path(), &run.to_string()), Error::Field { field, .. } if field.contains("timeline")));
    let mut split = planted_split("m");
    split["measured"]["hot_cover"] = Value::Null;
    let error = refused(dir.path(), &split.to_string());
    assert!(matches!(error, Error::Field { field, .. } if field == "measured.hot_cover"));
}

#[test]
fn extreme_but_possible_numbers_are_drawn_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut record = printed(&gpu_bench(), &"m".repeat(500));
    for (pointer, value) in [
        ("/decode_tok_s/median", json!(0.0)),
        ("/decode_tok_s/runs", json!([])),
        ("/limit_share", json!(0.0)),
        ("/bytes_per_token/device", json!(u64::MAX)),
        ("/bytes_per_token/cache", json!(u64::MAX)),
        ("/plan/request/base/context", json!(0)),
        ("/settings/n_prompt", json!(usize::MAX)),
        ("/settings/n_gen", json!(usize::MAX)),
    ] {
        *record.pointer_mut(pointer).unwrap() = value;
    }
    let mut other = record.clone();
    other["n_threads"] = json!(usize::MAX);
    let paths = [write(dir.path(), &"long ".repeat(40), &record), write(dir.path(), "<b>", &other)];
    let page = page(&paths);
    page.html().unwrap();
    assert_eq!(page.write_svg(&dir.path().join("svg")).unwrap().len(), 3);
    assert_eq!(page.write_png(&dir.path().join("png")).unwrap().len(), 3);
}
