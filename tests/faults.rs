//! Kills, second writers, full disks, and files that change under a running model.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{
    BINARY, budget_range, calibrating, demo, engine, fails, files, llama, medium, model, ok, profile, request, split,
    splitting, text, thermocline,
};
use thermocline_datasets::Random;
use thermocline_runtime::{Error, Logits, Mode};

/// Kills in each of three tests; `KILLS=200`, for all three together, is more than CI has time for.
fn kills() -> usize {
    std::env::var("KILLS").map_or(30usize, |n| n.parse().unwrap()).div_ceil(3)
}

/// Starts `args`, kills it at a random moment, and goes on from there, until so many have been killed; then lets it end. After
/// each kill `out` must not exist unless it is whole.
fn survives_kills(args: &[&str], out: &Path, expected: &dyn Fn(&Path)) {
    let begin = Instant::now();
    ok(args);
    let whole = begin.elapsed();
    expected(out);
    fs::remove_dir_all(out).unwrap();
    let (mut random, mut killed, mut ended) = (Random::new(22), 0, 0);
    while killed < kills() {
        let mut child = thermocline().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(f64::from(random.uniform())));
        // SIGKILL.
        child.kill().unwrap();
        let status = child.wait().unwrap();
        // What goes on from earlier work may be done before its moment comes.
        match status.signal() {
            Some(9) => killed += 1,
            other => assert!(status.success() && other.is_none(), "{args:?}: {status}"),
        }
        if out.exists() {
            expected(out);
            fs::remove_dir_all(out).unwrap();
            ended += 1;
        }
        assert!(ended <= 20 + 10 * kills(), "{killed} killed, {ended} outputs: it ends too early to be killed");
    }
    ok(args);
    expected(out);
    println!("{}: {killed} kills survived, {} outputs, every byte as without kills", args[0], ended + 1);
    let parent = out.parent().unwrap();
    let left: Vec<_> = fs::read_dir(parent).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [out.file_name().unwrap()], "nothing temporary is left");
}

#[test]
fn killed_splits_resume_to_the_same_bytes() {
    let (model, profile, folder) = (model(&medium()), profile(&medium()), tempfile::TempDir::new().unwrap());
    // What a layer's numbers are takes most of the time, and has nothing to do with kills.
    let quick = ["--chunk-neurons", "4", "--order", "random", "--scales", "absmax", "--predictor-rank", "32"];
    let whole = split(&medium(), "q4", &quick);
    let out = folder.path().join("split");
    let args = splitting(&model, &profile, &[&["--encoding", "q4"], &quick[..]].concat(), &out);
    survives_kills(&args, &out, &|dir| {
        for ((name, got), (expected_name, expected)) in files(dir).into_iter().zip(files(&whole)) {
            assert!(name == expected_name && got == expected, "{name} differs");
        }
        assert_eq!(files(dir).len(), files(&whole).len());
    });
}

#[test]
fn killed_calibrations_resume_to_the_same_bytes() {
    let (model, folder) = (model(&medium()), tempfile::TempDir::new().unwrap());
    let whole = profile(&medium());
    let out = folder.path().join("profile");
    let args = [&calibrating(&model, "1024", "128", &out)[..], &["--resume"]].concat();
    survives_kills(&args, &out, &|dir| {
        assert_eq!(files(dir).len(), files(&whole).len());
        for ((name, got), (expected_name, expected)) in files(dir).into_iter().zip(files(&whole)) {
            assert_eq!(name, expected_name);
            if name == "profile.json" {
                let timeless = |bytes: &[u8]| {
                    let mut value: serde_json::Value = serde_json::from_slice(bytes).unwrap();
                    assert!(value.as_object_mut().unwrap().remove("seconds").is_some());
                    value
                };
                assert_eq!(timeless(&got), timeless(&expected));
            } else {
                assert!(got == expected, "{name} differs");
            }
        }
    });
}

#[test]
fn killed_deltas_resume_to_the_same_bytes() {
    let (base, tuned, folder) = (demo::model(), demo::tuned(), tempfile::TempDir::new().unwrap());
    let whole = demo::delta();
    let out = folder.path().join("delta");
    let args = ["delta", text(&base), text(&tuned), "-o", text(&out)];
    survives_kills(&args, &out, &|dir| assert!(files(dir) == files(&whole)));
}

/// A process that writes `out`, stopped (SIGSTOP) once its work folder is there: the lock is held for certain.
fn held(args: &[&str], work: &Path) -> std::process::Child {
    let child = thermocline().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while !work.exists() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{} never appeared", work.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    signal("STOP", child.id());
    child
}

fn signal(name: &str, process: u32) {
    assert!(Command::new("kill").args([format!("-{name}"), process.to_string()]).status().unwrap().success());
}

#[test]
fn a_second_writer_is_told_that_the_output_is_locked() {
    let (model, profile) = (model(&medium()), profile(&medium()));
    let folder = tempfile::TempDir::new().unwrap();
    let (a, b) = (folder.path().join("split"), folder.path().join("profile"));
    let splitting = splitting(&model, &profile, &[], &a);
    let calibrating = calibrating(&model, "1024", "128", &b);
    for (args, work, out, said) in [
        (&splitting[..], "split.partial/identity.json", &a, "another process"),
        (&calibrating[..], "profile.work/hidden-0.f32", &b, "locked by another process"),
    ] {
        let mut first = held(args, &folder.path().join(work));
        let message = fails(1, args);
        assert!(message.contains(said), "{message}");
        signal("CONT", first.id());
        assert!(first.wait().unwrap().success() && out.exists(), "the first is not disturbed");
    }
}

/// Runs the binary where every thread wants more stack than there is address space: none can be started.
fn without_threads(args: &[&str]) -> support::Ran {
    thermocline().env("RUST_MIN_STACK", (1u64 << 60).to_string()).args(args).output().unwrap().into()
}

#[test]
fn threads_that_cannot_be_started_are_errors_that_name_the_flag() {
    let dir = split(&medium(), "q4", &["--chunk-neurons", "4", "--order", "random"]);
    let budget = format!("{}B", budget_range(&dir, Mode::Exact).0 * 2);
    let (folder, model) = (tempfile::TempDir::new().unwrap(), model(&medium()));
    let out = folder.path().join("profile");
    let whole = ["run", "-m", text(&dir), "-p", "the lake", "-n", "2"];
    let streamed = [&whole[..], &["-t", "1", "--ram-budget", &budget]].concat();
    let calibrating = [&calibrating(&model, "256", "512", &out)[..], &["-t", "2"]].concat();
    let profile = profile(&medium());
    let splitting = splitting(&model, &profile, &["-t", "2"], &out);
    for (args, said) in [
        (&[&whole[..], &["-t", "2"]].concat()[..], "cannot start thread 2 of 2"),
        (&["plan", "-m", text(&dir), "-t", "3"], "cannot start thread 2 of 3"),
        (&["doctor", "-t", "2"], "cannot start thread 2 of 2"),
        (&streamed, "cannot start reader thread 1 of 4"),
        (&calibrating, "cannot start 2 threads"),
        (&splitting, "cannot start 2 threads"),
    ] {
        let ran = without_threads(args);
        assert_eq!(ran.code, Some(1), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(said) && ran.stderr.contains("-t"), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked") && !out.exists(), "{args:?}: {}", ran.stderr);
    }
    // One thread and everything in memory need none.
    assert_eq!(without_threads(&[&whole[..], &["-t", "1"]].concat()).code, Some(0));
}

/// Runs the binary where no file may grow beyond `blocks` of 1024 bytes: writes fail half way, as on a full disk.
fn with_file_limit(blocks: u32, args: &[&str]) -> support::Ran {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    Command::new("bash").args(["-c", &script, "bash", BINARY]).args(args).output().unwrap().into()
}

#[test]
fn a_write_that_fails_half_way_can_be_resumed() {
    let (model, profile) = (model(&medium()), profile(&medium()));
    let folder = tempfile::TempDir::new().unwrap();
    let (a, b) = (folder.path().join("split"), folder.path().join("profile"));
    let splitting = splitting(&model, &profile, &["--encoding", "bf16"], &a);
    let calibrating = [&calibrating(&model, "1024", "128", &b)[..], &["--resume"]].concat();
    for (args, out, blocks) in
        [(&splitting[..], &a, 3100), (&splitting, &a, 100), (&calibrating, &b, 900), (&calibrating, &b, 3000)]
    {
        let failed = with_file_limit(blocks, args);
        assert_eq!(failed.code, Some(1), "{blocks}: {}", failed.stderr);
        assert!(failed.stderr.contains(text(folder.path())), "{}", failed.stderr);
        assert!(!out.exists() && !failed.stderr.contains("panicked"), "{}", failed.stderr);
    }
    ok(&splitting);
    ok(&calibrating);
    let expected = split(&medium(), "bf16", &[]);
    assert!(files(&a) == files(&expected));
    assert!(
        fs::read(b.join("statistics.safetensors")).unwrap()
            == fs::read(profile.join("statistics.safetensors")).unwrap()
    );
}

#[test]
fn a_full_disk_says_how_much_is_needed_and_is_resumed_when_there_is_room() {
    let (model, profile) = (model(&medium()), profile(&medium()));
    let dir = tempfile::TempDir::new().unwrap();
    // The mount lives in a namespace of its own and ends with it.
    let script = "set -e; mount -t tmpfs -o size=8m none \"$1\"; shift; set +e; \"$@\"; first=$?; \
                  mount -o remount,size=200m \"$DISK\"; \"$@\"; echo \"$first $?\"; ls \"$DISK\"";
    let out = dir.path().join("split");
    let args = splitting(&model, &profile, &["--encoding", "bf16"], &out);
    let may_mount = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", text(dir.path())]).output();
    if !may_mount.is_ok_and(|o| o.status.success()) {
        // Without the right to mount there is no disk to fill; the file limit above covers the writing half.
        eprintln!("SKIPPED: this user may not mount a small disk");
        return;
    }
    let ran: support::Ran = Command::new("unshare")
        .env("DISK", dir.path())
        .args(["-m", "bash", "-c", script, "bash", text(dir.path()), BINARY])
        .args(args)
        .output()
        .unwrap()
        .into();
    assert!(ran.stdout.contains("1 0\nsplit\n"), "{} {}", ran.stdout, ran.stderr);
    assert!(ran.stderr.contains("disk full") && ran.stderr.contains("bytes"), "{}", ran.stderr);
}

/// An engine that streams, on a copy of a split, having answered once; and a layer file of it.
fn streaming() -> (tempfile::TempDir, PathBuf, thermocline_runtime::Engine, Vec<u32>) {
    let (guard, dir) = support::copy(&split(&llama(), "bf16", &["--chunk-neurons", "8"]));
    let least = budget_range(&dir, Mode::Exact).0;
    let mut engine = engine(&dir, request(Mode::Exact, Some(least), 3)).unwrap();
    let logits = engine.forward(&[5, 6, 7], Logits::Last).unwrap();
    (guard, dir.join("layers/001.thm"), engine, logits.iter().map(|l| l.to_bits()).collect())
}

/// Runs until the reads made ahead are used up and the file itself is asked.
fn first_error(engine: &mut thermocline_runtime::Engine) -> Error {
    (0..8).find_map(|_| engine.forward(&[9], Logits::Last).err()).expect("the change is noticed")
}

#[test]
fn a_file_cut_while_it_is_in_use_is_an_error_and_mending_it_mends_the_engine() {
    let (_guard, path, mut engine, expected) = streaming();
    let good = fs::read(&path).unwrap();
    for len in [good.len() / 2, 4096, 100, 0] {
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len as u64).unwrap();
        let error = first_error(&mut engine);
        let named = matches!(&error, Error::ModelChanged { path: p, .. } if *p == path);
        assert!(
            named || matches!(error, Error::Split(thermocline_split::Error::CorruptChunk { layer: 1, .. })),
            "{error}"
        );
        // Written in place: the engine's open file sees it. No buffer was lost, however often it failed.
        for _ in 0..20 {
            assert!(engine.forward(&[9], Logits::Last).is_err());
        }
        fs::write(&path, &good).unwrap();
        engine.clear();
        let again = engine.forward(&[5, 6, 7], Logits::Last).unwrap();
        assert!(again.iter().map(|l| l.to_bits()).eq(expected.iter().copied()), "{len}");
    }
}

#[test]
fn a_file_overwritten_while_it_is_in_use_is_an_error() {
    let (_guard, path, mut engine, _) = streaming();
    let mut bytes = fs::read(&path).unwrap();
    bytes[4096..].iter_mut().for_each(|b| *b = !*b);
    fs::write(&path, bytes).unwrap();
    let error = first_error(&mut engine);
    assert!(matches!(error, Error::Split(thermocline_split::Error::CorruptChunk { layer: 1, .. })), "{error}");
}

#[test]
fn a_file_replaced_by_name_does_not_reach_the_engine() {
    let (_guard, path, mut engine, expected) = streaming();
    let other = path.with_extension("new");
    fs::write(&other, b"another model").unwrap();
    fs::rename(&other, &path).unwrap();
    for _ in 0..4 {
        engine.clear();
        let again = engine.forward(&[5, 6, 7], Logits::Last).unwrap();
        assert!(again.iter().map(|l| l.to_bits()).eq(expected.iter().copied()));
    }
}

#[test]
fn sparse_mode_survives_failed_reads_too() {
    let (_guard, dir) = support::copy(&split(&medium(), "q4", &["--chunk-neurons", "4", "--order", "random"]));
    let mode = Mode::Sparse { active: 0.1 };
    let (least, all) = budget_range(&dir, mode);
    // Matrices in memory, most neurons on disk: lookahead is at work.
    let budget = least + (all - least) / 3;
    let mut engine = engine(&dir, request(mode, Some(budget), 2)).unwrap();
    let tokens = [5, 60, 7, 80, 9, 100];
    let answer = |engine: &mut thermocline_runtime::Engine| -> Result<Vec<u32>, Error> {
        engine.clear();
        let logits: Result<Vec<_>, Error> = tokens.iter().map(|t| engine.forward(&[*t], Logits::Last)).collect();
        Ok(logits?.concat().iter().map(|l| l.to_bits()).collect())
    };
    let expected = answer(&mut engine).unwrap();
    let path = dir.join("layers/006.thm");
    let good = fs::read(&path).unwrap();
    for _ in 0..5 {
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(200_000).unwrap();
        // Other tokens: what the cache holds is no longer read.
        let error = (0..200u32).find_map(|t| engine.forward(&[3 + t], Logits::Last).err());
        assert!(
            matches!(error, Some(Error::ModelChanged { .. } | Error::Split(_) | Error::PromptTooLong { .. })),
            "{error:?}"
        );
        fs::write(&path, &good).unwrap();
        assert!(answer(&mut engine).unwrap() == expected);
    }
}
