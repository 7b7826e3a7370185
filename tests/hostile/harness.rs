//! Runs the program on hostile inputs: what it says is a snapshot, its exit code is the one promised, and its peak memory
//! is measured and bounded by the input's own size.

use crate::support::{self, llama, model, text};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;
use wait4::Wait4;

/// What any run may take beyond the program's own memory with a sound model of 300 kB: buffers of fixed size, the
/// allocator's arenas, where the system puts pages.
const SLACK_BYTES: u64 = 8 << 20;
/// What a refused input may take for each of its bytes: a header is read whole and becomes names, numbers and maps.
const PER_BYTE: u64 = 8;

/// No message is longer, whatever names a file has.
const MESSAGE_BYTES: usize = 2600;

/// Folder with the arguments and variables of a run for [`measure`], and with what becomes of it.
const TASK: &str = "HOSTILE_TASK";

/// Hexadecimal digits of the shortest checksum.
const CHECKSUM_DIGITS: usize = 16;

/// A run that ended.
pub struct Measured {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub peak_bytes: u64,
}

/// What the kernel says of a child also counts what its parent held when it was started, and a test process may hold
/// anything: so a small process of its own starts and measures it.
#[test]
#[ignore = "the other tests start it as a process of its own"]
fn measure() {
    let Some(task) = std::env::var_os(TASK) else { return };
    let task = PathBuf::from(task);
    let (args, variables): (Vec<String>, Vec<(String, String)>) =
        serde_json::from_slice(&fs::read(task.join("given")).unwrap()).unwrap();
    let mut command = support::thermocline();
    command.env_remove(TASK).args(args).envs(variables);
    command.stdout(File::create(task.join("stdout")).unwrap()).stderr(File::create(task.join("stderr")).unwrap());
    let ended = command.spawn().unwrap().wait4().unwrap();
    fs::write(task.join("ended"), format!("{} {}", ended.status.code().unwrap_or(-1), ended.rusage.maxrss)).unwrap();
}

/// Runs the program, with `variables` in its environment, and measures its peak memory.
pub fn measured(args: &[&str], variables: &[(&str, &str)]) -> Measured {
    let task = TempDir::new().unwrap();
    fs::write(task.path().join("given"), serde_json::to_vec(&(args, variables)).unwrap()).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "harness::measure", "--ignored"]).env(TASK, task.path());
    let said = command.output().unwrap();
    let read = |name: &str| String::from_utf8_lossy(&fs::read(task.path().join(name)).unwrap_or_default()).into_owned();
    let ended = read("ended");
    let (code, peak) = ended.split_once(' ').unwrap_or_else(|| panic!("{args:?}: {said:?}"));
    let peak_bytes = peak.parse().unwrap();
    Measured { code: code.parse().ok(), stdout: read("stdout"), stderr: read("stderr"), peak_bytes }
}

/// The program's peak with a tiny sound model: the largest of some runs, which differ by where the system puts huge pages.
pub fn bare() -> u64 {
    static BARE: OnceLock<u64> = OnceLock::new();
    *BARE.get_or_init(|| {
        let sound = model(&llama());
        let once = |_| {
            let ran = measured(&["inspect", text(&sound)], &[]);
            assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            ran.peak_bytes
        };
        (0..4).map(once).max().unwrap()
    })
}

/// Bytes of a file, or of all files below a folder; links count nothing.
pub fn bytes_of(path: &Path) -> u64 {
    let Ok(found) = path.symlink_metadata() else { return 0 };
    match found.is_dir() {
        true => fs::read_dir(path).unwrap().map(|e| bytes_of(&e.unwrap().path())).sum(),
        false => found.len(),
    }
}

/// Checksums of what a profile or a split holds are sums of floats in the end, and those differ from CPU to CPU.
fn without_checksums(said: &str) -> String {
    let is_digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let mut out = String::new();
    let mut rest = said;
    while let Some(start) = rest.find(is_digit) {
        let (before, from) = rest.split_at(start);
        let (word, after) = from.split_at(from.find(|c| !is_digit(c)).unwrap_or(from.len()));
        // Numbers and names may be as long, but have one kind of character.
        let is_mixed = word.contains(|c: char| c.is_ascii_digit()) && word.contains(|c: char| c.is_ascii_lowercase());
        let is_checksum = word.len() >= CHECKSUM_DIGITS && is_mixed;
        out += before;
        out += if is_checksum { "CHECKSUM" } else { word };
        rest = after;
    }
    out + rest
}

/// On a slow machine a long work says how far it is.
fn without_progress(said: &str) -> String {
    said.split_inclusive('\n').filter(|line| !line.contains(" %, layer ")).collect()
}

/// How much a disk has free is the machine's affair.
fn without_free_space(said: &str) -> String {
    let parts: Vec<&str> = said.split(" are free").collect();
    let (last, before) = parts.split_last().unwrap();
    let plain = |part: &&str| format!("{}SPACE are free", part.trim_end_matches(|c: char| c.is_ascii_digit()));
    before.iter().map(plain).collect::<String>() + last
}

/// A family of cases: inputs in a folder, and what the program says of each.
pub struct Table {
    name: &'static str,
    folder: TempDir,
    transcript: String,
    worst: (f64, String),
}

impl Table {
    /// `name` is the snapshot's.
    pub fn new(name: &'static str) -> Self {
        Self { name, folder: TempDir::new().unwrap(), transcript: String::new(), worst: (0.0, String::new()) }
    }

    /// Where the inputs lie.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A file as input: `inspect` refuses it with exit code 4.
    pub fn file(&mut self, case: u8, name: &str, extension: &str, bytes: &[u8]) {
        let path = self.folder().join(format!("{case:02}-{name}.{extension}"));
        fs::write(&path, bytes).unwrap();
        self.refused(case, name, &path, &["inspect", text(&path)]);
        fs::remove_file(path).unwrap();
    }

    /// A folder as input, made by `make(folder)`.
    pub fn made(&mut self, case: u8, name: &str, make: impl FnOnce(&Path)) {
        let path = self.folder().join(format!("{case:02}-{name}"));
        fs::create_dir(&path).unwrap();
        make(&path);
        self.refused(case, name, &path, &["inspect", text(&path)]);
        fs::remove_dir_all(path).unwrap();
    }

    /// Exit code 4, a message, and no more memory than the input's own bytes justify. Returns the message.
    pub fn refused(&mut self, case: u8, name: &str, input: &Path, args: &[&str]) -> String {
        self.ends(4, PER_BYTE * bytes_of(input), case, name, args)
    }

    /// The same with another exit code, and other memory than the input's bytes justify.
    pub fn ends(&mut self, code: i32, allowed_bytes: u64, case: u8, name: &str, args: &[&str]) -> String {
        self.ends_with(&[], code, allowed_bytes, case, name, args)
    }

    /// The same with `variables` in the program's environment.
    pub fn ends_with(
        &mut self,
        variables: &[(&str, &str)],
        code: i32,
        allowed_bytes: u64,
        case: u8,
        name: &str,
        args: &[&str],
    ) -> String {
        let ran = measured(args, variables);
        assert_eq!(ran.code, Some(code), "{case:02} {name}: {} {}", ran.stdout, ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{case:02} {name}: {}", ran.stderr);
        assert!(code == 0 || ran.stderr.contains("error: "), "{case:02} {name}: {}", ran.stderr);
        let is_json = args.contains(&"--json");
        assert!(code == 0 || !is_json || ran.stdout.is_empty(), "{case:02} {name}: half an answer: {}", ran.stdout);
        let bound = bare() + SLACK_BYTES + allowed_bytes;
        assert!(ran.peak_bytes <= bound, "{case:02} {name}: {} bytes of at most {bound}", ran.peak_bytes);
        let share = ran.peak_bytes as f64 / bound as f64;
        if share > self.worst.0 {
            self.worst = (share, format!("{case:02} {name}"));
        }
        let sound = model(&llama());
        // Where the inputs lie, and what the tests share.
        let places = [(self.folder(), ""), (&sound, "MODEL"), (support::root(), ""), (support::repository(), "")];
        let plain = |said: &str| {
            let said = places.iter().fold(said.to_owned(), |said, (place, name)| said.replace(text(place), name));
            without_free_space(&without_checksums(&without_progress(&said)))
        };
        let (args, said) = (args.iter().map(|a| plain(a)).collect::<Vec<_>>(), plain(&ran.stderr));
        assert!(said.len() < MESSAGE_BYTES, "{case:02} {name}: a message of {} bytes", said.len());
        assert!(!said.contains(|c: char| c.is_control() && c != '\n'), "{case:02} {name}: {said:?}");
        self.transcript += &format!("{case:02} {name}\n$ thermocline {}\nexit {code}\n{said}\n", args.join(" "));
        ran.stderr
    }

    /// Compares everything that was said.
    pub fn check(self) {
        println!("{}: the most memory, {:.2} of its bound, took {}", self.name, self.worst.0, self.worst.1);
        insta::assert_snapshot!(self.name, self.transcript);
    }
}
