//! Forged costs of shares and forged curves, of predictors and of sketches: a typed error, never a share that was not measured.

use crate::support::forge;
use crate::support::{copy, fails, llama, model, ok, split, text};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use thermocline_split::{
    Curve, Error, FORMAT_VERSION, Format, GradedCurve, GradedCurves, GradedThresholds, LayerCost, Shares, Split,
};

/// A copy of a split with costs, and with a curve of three shares.
fn with_curve() -> (TempDir, PathBuf) {
    let (guard, dir) = copy(&split(&llama(), "q4", &["--chunk-neurons", "8"]));
    let config = Split::open(&dir).unwrap().manifest().config.clone();
    let cost = LayerCost { loss: vec![0.5, 0.1], left_out: vec![0.25; 2 * config.hidden_size] };
    let shares = Shares::new(vec![0.1, 0.5], vec![cost; config.n_layers], config.hidden_size).unwrap();
    let curve = Curve::new(vec![0.25, 0.5, 0.75], vec![0.5, 0.1, -0.01], vec![0.6, 0.2, 0.01], 96, 1 << 100).unwrap();
    Split::put_shares(&dir, &shares.with_curve(curve)).unwrap();
    (guard, dir)
}

const PROMISED: [&str; 8] = ["run", "-p", "a", "-n", "2", "--mode", "sparse", "--max-ppl-increase"];

/// That the file of shares, or the manifest, is refused when it is read, by the library and by the program.
fn refused(dir: &Path, what: &str) -> String {
    let error = Split::open(dir).and_then(|split| split.shares()).err().unwrap_or_else(|| panic!("{what}: read"));
    assert!(matches!(error, Error::Corrupt { .. }), "{what}: {error:?}");
    let said = fails(4, &[&PROMISED[..], &["20%", "-m", text(dir)]].concat());
    assert!(said.contains(text(dir)), "{what}: {said}");
    said
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn a_sound_curve_is_read_and_used() {
    let (_guard, dir) = with_curve();
    forge::curve(&dir, |_| ());
    let split = Split::open(&dir).unwrap();
    assert_eq!(split.manifest().version, 4);
    let shares = split.shares().unwrap().unwrap();
    assert_eq!(shares.curve().unwrap().points().nth(1), Some((0.5, 0.1, 0.2)));
    let said = ok(&[&PROMISED[..], &["21%", "-m", text(&dir)]].concat()).stderr;
    let digest = format!("{:032x}", 1u128 << 100);
    assert!(said.contains("--active 0.49") && said.contains("96 tokens") && said.contains(&digest), "{said}");
}

/// What is done to the contents of a tensor.
type Forgery<'a> = (&'a str, usize, &'a [f32]);

#[test]
fn forged_curves_are_refused() {
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    let forgeries: &[Forgery<'_>] = &[
        ("shares that fall", 0, &[0.75, 0.5, 0.25]),
        ("a share twice", 0, &[0.25, 0.5, 0.5]),
        ("no share", 0, &[0.0, 0.5, 0.75]),
        ("a negative share", 0, &[-0.25, 0.5, 0.75]),
        ("all neurons", 0, &[0.25, 0.5, 1.0]),
        ("a share that is none", 0, &[0.25, nan, 0.75]),
        ("a last share that is none", 0, &[0.25, 0.5, nan]),
        ("an endless share", 0, &[0.25, 0.5, infinity]),
        ("fewer shares", 0, &[0.25, 0.5]),
        ("more shares", 0, &[0.1, 0.25, 0.5, 0.75]),
        ("no shares", 0, &[]),
        ("an increase that is none", 1, &[0.5, nan, -0.01]),
        ("an increase above its interval", 1, &[0.5, 0.3, -0.01]),
        ("an impossible gain", 1, &[0.5, -2.0, -0.01]),
        ("fewer increases", 1, &[0.5, 0.1]),
        ("more increases", 1, &[0.5, 0.1, 0.0, 0.0]),
        ("an upper end that is none", 2, &[0.6, nan, 0.01]),
        ("an endless upper end", 2, &[infinity, 0.2, 0.01]),
        ("fewer upper ends", 2, &[0.6, 0.2]),
    ];
    for (what, which, values) in forgeries {
        let (_guard, dir) = with_curve();
        forge::curve(&dir, |tensors| {
            (tensors[*which].2, tensors[*which].3) = (values.len(), bytes(values));
        });
        assert!(refused(&dir, what).contains("curve"), "{what}");
    }
}

/// Name, format, columns and contents of each tensor of a curve.
type Tensors = Vec<(String, Format, usize, Vec<u8>)>;

/// What is done to them.
type Rewrite<'a> = (&'a str, &'a dyn Fn(&mut Tensors));

#[test]
fn curves_with_other_tensors_are_refused() {
    let forgeries: &[Rewrite<'_>] = &[
        ("no shares", &|t| drop(t.remove(0))),
        ("no increases", &|t| drop(t.remove(1))),
        ("no upper ends", &|t| drop(t.remove(2))),
        ("no tokens", &|t| drop(t.remove(3))),
        ("another name", &|t| t[1].0 = "curve.kl_increase".to_owned()),
        ("a tensor more", &|t| t.push(("curve.later".to_owned(), Format::U8, 1, vec![0]))),
        ("a tensor twice", &|t| t.push(t[0].clone())),
        ("a tensor that is not a curve's", &|t| t.push(("later".to_owned(), Format::U8, 1, vec![0]))),
        ("another format", &|t| (t[0].1, t[0].2) = (Format::U8, 12)),
        ("a digest cut", &|t| (t[3].2, t[3].3) = (23, t[3].3[..23].to_vec())),
        ("two digests", &|t| (t[3].2, t[3].3) = (40, [&t[3].3[..], &[0; 16]].concat())),
        ("zero tokens", &|t| t[3].3[..8].fill(0)),
    ];
    for (what, change) in forgeries {
        let (_guard, dir) = with_curve();
        forge::curve(&dir, change);
        refused(&dir, what);
    }
}

#[test]
fn versions_that_do_not_fit_are_refused() {
    for version in [1, 2, 3, 0] {
        let (_guard, dir) = with_curve();
        forge::manifest(&dir, |m| m.version = version);
        let result = Split::open(&dir);
        assert!(matches!(result, Err(Error::Corrupt { .. } | Error::UnsupportedVersion { .. })), "version {version}");
    }
    // Costs without a curve are version 3, and say that they have none.
    let (_guard, dir) = with_curve();
    forge::curve(&dir, Vec::clear);
    assert!(refused(&dir, "version 4 without a curve").contains("version 3"));
    forge::manifest(&dir, |m| m.version = 3);
    assert_eq!(Split::open(&dir).unwrap().shares().unwrap().unwrap().curve(), None);
    let said = fails(2, &[&PROMISED[..], &["20%", "-m", text(&dir)]].concat());
    assert!(said.contains("--fit-shares"), "{said}");
}

/// A copy of a split with sketches, and with curves of two shares that are always computed; thresholds are of neurons.
fn with_graded_curves() -> (TempDir, PathBuf) {
    graded_curves_of(false)
}

/// The same with thresholds of rows, if these are wanted.
fn graded_curves_of(rows: bool) -> (TempDir, PathBuf) {
    let (guard, dir) = copy(&split(&llama(), "q4", &["--chunk-neurons", "8", "--sketch"]));
    let curve = |always: f32, high: [f32; 3]| {
        let low = high.map(|h| h - 0.125).to_vec();
        GradedCurve { always, curve: Curve::new(vec![0.1, 0.2, 0.5], low, high.to_vec(), 96, 1 << 100).unwrap() }
    };
    let n_layers = Split::open(&dir).unwrap().manifest().config.n_layers;
    let (always, active) = (vec![0.0, 0.5], vec![0.1, 0.2, 0.5]);
    let thresholds = [0.4, 0.2, 0.1, 0.3, 0.2, 0.1].to_vec();
    let mut thresholds = GradedThresholds::new(vec![1.0; n_layers], always, active, thresholds).unwrap();
    if rows {
        thresholds = thresholds.of_rows(vec![[1.5, 2.0]; n_layers]).unwrap();
    }
    let curves = vec![curve(0.0, [0.625, 0.375, 0.25]), curve(0.5, [0.5, 0.25, 0.125])];
    let curves = GradedCurves::new(thresholds, curves).unwrap();
    Split::put_graded_curves(&dir, &curves).unwrap();
    (guard, dir)
}

#[test]
fn sound_graded_curves_are_read_and_used() {
    let (_guard, dir) = with_graded_curves();
    forge::graded(&dir, |_| ());
    let split = Split::open(&dir).unwrap();
    assert_eq!(split.manifest().version, 6);
    let (_guard_of_rows, of_rows) = graded_curves_of(true);
    forge::graded(&of_rows, |_| ());
    let of_rows = Split::open(&of_rows).unwrap();
    assert_eq!(of_rows.manifest().version, 7);
    let n_layers = of_rows.manifest().config.n_layers;
    let curves = of_rows.graded_curves().unwrap().unwrap();
    assert_eq!(curves.thresholds().error_factors(), Some(&vec![[1.5, 2.0]; n_layers][..]));
    assert_eq!(split.graded_curves().unwrap().unwrap().curves()[1].curve.points().next(), Some((0.1, 0.375, 0.5)));
    let on_cpu = [&PROMISED[..], &["31.25%", "-m", text(&dir), "--vram-budget", "0"]].concat();
    assert!(ok(&on_cpu).stderr.contains("--active 0.35"));
    let said = ok(&[&on_cpu[..], &["--always", "0.6"]].concat()).stderr;
    assert!(
        said.contains("--active 0.175")
            && said.contains("with 50 % or more of the neurons always computed for at most +31.25 %"),
        "{said}"
    );
}

/// What is done to the tensors of graded curves or of sketches.
type TensorForgery<'a> = (&'a str, &'a dyn Fn(&mut Vec<forge::Tensor>));

#[test]
fn forged_graded_curves_are_refused() {
    let set = |values: &'static [f32]| move |t: &mut forge::Tensor| (t.2, t.3) = ([1, values.len()], bytes(values));
    let forgeries: &[TensorForgery<'_>] = &[
        ("not from 0", &|t| set(&[0.1, 0.5])(&mut t[0])),
        ("falling", &|t| set(&[0.0, -0.5])(&mut t[0])),
        ("everything always", &|t| set(&[0.0, 1.0])(&mut t[0])),
        ("a share that is none", &|t| set(&[0.0, f32::NAN])(&mut t[0])),
        ("more always than curves", &|t| set(&[0.0, 0.4, 0.5])(&mut t[0])),
        ("nothing always", &|t| set(&[])(&mut t[0])),
        ("active shares that fall", &|t| set(&[0.5, 0.2, 0.1])(&mut t[1])),
        ("fewer active shares", &|t| set(&[0.1, 0.2])(&mut t[1])),
        ("no active shares", &|t| set(&[])(&mut t[1])),
        ("an increase that is none", &|t| t[4].3[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
        ("an increase above its interval", &|t| t[4].3[..4].copy_from_slice(&9f32.to_le_bytes())),
        ("another shape", &|t| t[4].2 = [3, 2]),
        ("one row", &|t| t[5].2 = [1, 6]),
        ("a residual of nothing", &|t| t[2].3[..4].fill(0)),
        ("a residual of one layer", &|t| set(&[1.0])(&mut t[2])),
        ("a negative threshold", &|t| t[3].3[..4].copy_from_slice(&(-1f32).to_le_bytes())),
        ("thresholds that rise", &|t| t[3].3[8..12].copy_from_slice(&9f32.to_le_bytes())),
        ("thresholds of another shape", &|t| t[3].2 = [6, 1]),
        ("zero tokens", &|t| t[6].3[..8].fill(0)),
        ("a digest cut", &|t| (t[6].2, t[6].3) = ([1, 23], t[6].3[..23].to_vec())),
        ("a tensor less", &|t| drop(t.remove(5))),
        ("increases of nothing measured", &|t| drop(t.remove(6))),
        ("a tensor more", &|t| t.push(("graded.later".to_owned(), Format::U8, [1, 1], vec![0]))),
        ("another name", &|t| t[1].0 = "graded.share".to_owned()),
    ];
    let of_rows: &[TensorForgery<'_>] = &[
        ("thresholds of both kinds", &|t| t.push(("graded.threshold".to_owned(), t[3].1, t[3].2, t[3].3.clone()))),
        ("row thresholds that rise", &|t| t[3].3[8..12].copy_from_slice(&9f32.to_le_bytes())),
        ("no factors", &|t| drop(t.pop())),
        ("factors of one layer", &|t| (t[7].2, t[7].3) = ([1, 2], t[7].3[..8].to_vec())),
        ("factors of another shape", &|t| t[7].2 = [1, 2 * t[7].2[0]]),
        ("a negative factor", &|t| t[7].3[..4].copy_from_slice(&(-1f32).to_le_bytes())),
        ("a factor that is none", &|t| t[7].3[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
        ("a factor of nothing", &|t| t[7].3[..4].fill(0)),
    ];
    let forgeries = forgeries.iter().map(|f| (false, f)).chain(of_rows.iter().map(|f| (true, f)));
    for (rows, (what, change)) in forgeries {
        let (_guard, dir) = graded_curves_of(rows);
        forge::graded(&dir, change);
        let error = Split::open(&dir).and_then(|split| split.graded_curves()).err();
        assert!(matches!(error, Some(Error::Corrupt { .. })), "{what}: {error:?}");
        let said = fails(4, &[&PROMISED[..], &["20%", "-m", text(&dir), "--vram-budget", "0"]].concat());
        assert!(said.contains(text(&dir)), "{what}: {said}");
        let said = fails(4, &["verify", text(&dir), "-m", text(&model(&llama()))]);
        assert!(said.contains(text(&dir)), "{what}: {said}");
    }
    let newer = FORMAT_VERSION + 1;
    for version in [1, 3, 4, 5, newer] {
        let (_guard, dir) = with_graded_curves();
        forge::manifest(&dir, |m| m.version = version);
        match Split::open(&dir) {
            Err(Error::UnsupportedVersion { got, .. }) => assert_eq!((got, version), (newer.into(), newer)),
            Err(Error::OldSketches { version: got, .. }) => assert_eq!(got, version),
            other => panic!("version {version}: {other:?}"),
        }
        let said = fails(4, &["plan", "-m", text(&dir)]);
        assert!(said.contains(if version < newer { "split --sketch" } else { "update thermocline" }), "{said}");
    }
    // Thresholds may be alone; then nothing can be promised.
    let (_guard, dir) = with_graded_curves();
    forge::graded(&dir, |t| t.truncate(4));
    assert!(Split::open(&dir).unwrap().graded_curves().unwrap().unwrap().curves().is_empty());
    let said = fails(2, &[&PROMISED[..], &["20%", "-m", text(&dir), "--vram-budget", "0"]].concat());
    assert!(said.contains("--fit-shares"), "{said}");
    // The version says which thresholds there are.
    for (rows, version) in [(false, 7), (true, 6)] {
        let (_guard, dir) = graded_curves_of(rows);
        forge::manifest(&dir, |m| m.version = version);
        assert!(matches!(Split::open(&dir), Err(Error::Corrupt { field, .. }) if field == "version"));
    }
    let (_guard, dir) = with_graded_curves();
    forge::manifest(&dir, |m| m.sketches = None);
    assert!(matches!(Split::open(&dir), Err(Error::Corrupt { field, .. }) if field == "graded"));
    // Of no use without sketches, and so never put there.
    let curves = Split::open(&with_graded_curves().1).unwrap().graded_curves().unwrap().unwrap();
    let (_guard, plain) = copy(&split(&llama(), "q4", &["--chunk-neurons", "8"]));
    assert!(Split::put_graded_curves(&plain, &curves).is_err());
}

/// A sketch whose columns are not each channel once would read past the input, or not all of it.
#[test]
fn forged_sketches_are_refused() {
    let forgeries: &[TensorForgery<'_>] = &[
        ("a channel twice", &|t| t[4].3.copy_within(..4, 4)),
        ("a channel that is not there", &|t| t[4].3[..4].fill(0xff)),
        ("a channel less", &|t| (t[4].2, t[4].3) = ([t[4].2[0] - 1, 4], t[4].3[4..].to_vec())),
        ("an error that is not a number", &|t| t[3].3[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
        ("rows cut", &|t| (t[0].2[0], t[0].3) = (t[0].2[0] - 1, t[0].3[t[0].2[1]..].to_vec())),
    ];
    for (what, change) in forgeries {
        let (_guard, dir) = copy(&split(&llama(), "q4", &["--chunk-neurons", "8", "--sketch"]));
        forge::sketches(&dir, |_| ());
        assert!(Split::open(&dir).unwrap().sketch(0).is_ok());
        forge::sketches(&dir, change);
        let error = Split::open(&dir).and_then(|split| split.sketch(0)).err();
        assert!(matches!(error, Some(Error::Corrupt { .. })), "{what}: {error:?}");
        let said = fails(4, &["run", "-m", text(&dir), "-p", "a", "-n", "1", "--mode", "sparse", "--vram-budget", "0"]);
        assert!(said.contains("sketches.0."), "{what}: {said}");
    }
}
