//! Outputs that somebody else writes, and work that cannot be taken up as it is (cases 27 and 28).

use crate::harness::{Table, bytes_of};
use crate::support::{calibrating, copy_dir, medium, model, ok, profile, splitting, text, with_file_limit};
use std::fs::{self, File};
use std::path::Path;

/// Holds the lock that a writer of `work` would hold.
fn held(work: &Path) -> File {
    fs::create_dir_all(work).unwrap();
    let lock = File::create(work.join("lock")).unwrap();
    lock.lock().unwrap();
    lock
}

#[test]
fn a_second_writer_is_told_so() {
    let mut table = Table::new("locked");
    let (made, profile) = (model(&medium()), profile(&medium()));
    let (a, b) = (table.folder().join("split"), table.folder().join("profile"));
    let allowed = bytes_of(&made) + bytes_of(&profile);
    let splitting = splitting(&made, &profile, &["-t", "1"], &a);
    let calibrating = [&calibrating(&made, "1024", "128", &b)[..], &["-t", "1"]].concat();
    for (name, args, work) in [("split", &splitting, "split.partial"), ("calibrate", &calibrating, "profile.work")] {
        let _lock = held(&table.folder().join(work));
        let said = table.ends(1, allowed, 28, name, args);
        assert!(said.contains("another process"), "{said}");
    }
    table.check();
}

#[test]
fn interrupted_calibrations_say_what_they_go_on_from() {
    let mut table = Table::new("resumed");
    let (made, out, work) = (model(&medium()), table.folder().join("profile"), table.folder().join("profile.work"));
    let allowed = bytes_of(&made);
    let calibrating =
        |tokens, window| [&calibrating(&made, tokens, window, &out)[..], &["--resume", "-t", "1"]].concat();
    let args = calibrating("1024", "128");
    // Layers fit, statistics of all of them do not.
    assert_eq!(with_file_limit(3000, &args).code, Some(1));
    let kept = table.folder().join("kept");
    copy_dir(&work, &kept);
    for (name, changed) in [("another-window", calibrating("1024", "64")), ("other-texts", calibrating("512", "128"))] {
        table.ends(1, allowed, 27, name, &changed);
    }
    // A record is text: its first byte tells the same wherever the others lie.
    let damages =
        [("last-record", Some(("record.json", 0))), ("first-layer", Some(("layer-000.bin", 1000))), ("intact", None)];
    for (name, damage) in damages {
        fs::remove_dir_all(&work).unwrap();
        copy_dir(&kept, &work);
        if let Some((file, at)) = damage {
            let path = work.join(file);
            let mut bytes = fs::read(&path).unwrap();
            bytes[at] ^= 1;
            fs::write(path, bytes).unwrap();
        }
        table.ends(0, allowed, 27, name, &args);
        let statistics = |dir: &Path| fs::read(dir.join("statistics.safetensors")).unwrap();
        assert!(statistics(&out) == statistics(&profile(&medium())), "{name}");
        ok(&["inspect", text(&out)]);
        fs::remove_dir_all(&out).unwrap();
        fs::create_dir_all(&work).unwrap();
    }
    table.check();
}
