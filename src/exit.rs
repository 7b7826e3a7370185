//! Errors for people, and the exit codes that scripts rely on:
//! 0 done, 1 failed at run time, 2 usage, 3 does not fit, 4 corrupt or foreign model.

use std::process::ExitCode;
use thermocline_calibrate::Error as CalibrateError;
use thermocline_datasets::Error as DatasetsError;
#[cfg(feature = "cuda")]
use thermocline_kernels::cuda::CudaError;
use thermocline_runtime::Error as RuntimeError;
use thermocline_split::Error as SplitError;

const MODEL_HELP: &str = "the model is damaged or incomplete; fetch it again, or save it again with what made it";
const PROFILE_HELP: &str = "the profile is damaged; fetch it again, or run `thermocline calibrate` again";
#[cfg(feature = "cuda")]
const GPU_HELP: &str =
    "a GPU's error stays until the process ends: run the command again, or on the CPU with --vram-budget 0";
const SPLIT_HELP: &str = "the directory is damaged; fetch it again, or make it again";

/// Longest message.
const MESSAGE_BYTES: usize = 2000;

/// An argument that clap cannot judge but that is wrong all the same.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Prints the error with its causes and returns its code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(|e| e.downcast_ref::<std::io::Error>().is_some_and(is_broken_pipe)) {
        return ExitCode::SUCCESS;
    }
    // Typed errors carry their cause in their text already; only our own context is added in front.
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    eprintln!("error: {}", printable(&text));
    if let Some(help) =
        error.chain().find_map(help).filter(|_| !["again", "`thermocline"].iter().any(|said| text.contains(said)))
    {
        eprintln!("help: {help}");
    }
    ExitCode::from(code(error))
}

/// Names in a message come from files: they neither drive the terminal nor fill it.
pub fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c };
    if text.len() <= MESSAGE_BYTES {
        return text.chars().map(plain).collect();
    }
    let (mut head, mut tail) = (MESSAGE_BYTES / 2, text.len().saturating_sub(MESSAGE_BYTES / 2));
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    let parts = [&text[..head], " [...] ", &text[tail..]];
    parts.into_iter().flat_map(str::chars).map(plain).collect()
}

/// What mends a damaged file, where its error does not say so itself.
fn help(e: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    let model = |e: &DatasetsError| {
        matches!(e, DatasetsError::Corrupt { .. } | DatasetsError::MissingTensor { .. }).then_some(MODEL_HELP)
    };
    let profile = |e: &CalibrateError| match e {
        CalibrateError::Corrupt { .. } => Some(PROFILE_HELP),
        CalibrateError::Model(e) => model(e),
        _ => None,
    };
    let split = |e: &SplitError| match e {
        SplitError::Corrupt { .. } => Some(SPLIT_HELP),
        SplitError::Checkpoint(e) => model(e),
        SplitError::Profile(e) => profile(e),
        _ => None,
    };
    if let Some(e) = e.downcast_ref::<DatasetsError>() {
        return model(e);
    }
    if let Some(e) = e.downcast_ref::<CalibrateError>() {
        return profile(e);
    }
    if let Some(e) = e.downcast_ref::<SplitError>() {
        return split(e);
    }
    match e.downcast_ref::<RuntimeError>()? {
        RuntimeError::Split(e) => split(e),
        RuntimeError::Text(e) => model(e),
        #[cfg(feature = "cuda")]
        RuntimeError::Cuda(CudaError::Driver { .. }) => Some(GPU_HELP),
        _ => None,
    }
}

fn code(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|e| {
            if e.is::<Usage>() {
                return Some(2);
            }
            if let Some(e) = e.downcast_ref::<DatasetsError>() {
                return Some(datasets(e));
            }
            if let Some(e) = e.downcast_ref::<CalibrateError>() {
                return Some(calibrate(e));
            }
            if let Some(e) = e.downcast_ref::<SplitError>() {
                return Some(split(e));
            }
            e.downcast_ref::<RuntimeError>().map(runtime)
        })
        .unwrap_or(1)
}

fn datasets(error: &DatasetsError) -> u8 {
    match error {
        DatasetsError::Planted { .. } => 2,
        DatasetsError::Corrupt { .. }
        | DatasetsError::UnsupportedVersion { .. }
        | DatasetsError::Unsupported { .. }
        | DatasetsError::MissingTensor { .. }
        | DatasetsError::Tokenizer { .. }
        | DatasetsError::Template { .. } => 4,
        _ => 1,
    }
}

fn calibrate(error: &CalibrateError) -> u8 {
    match error {
        CalibrateError::Setting { .. } => 2,
        CalibrateError::Corrupt { .. } | CalibrateError::UnsupportedVersion { .. } => 4,
        CalibrateError::Model(e) => datasets(e),
        _ => 1,
    }
}

fn split(error: &SplitError) -> u8 {
    match error {
        SplitError::Settings { .. } => 2,
        SplitError::Corrupt { .. }
        | SplitError::CorruptChunk { .. }
        | SplitError::Unsound { .. }
        | SplitError::UnsupportedVersion { .. }
        | SplitError::OldSketches { .. }
        | SplitError::WrongSource { .. }
        | SplitError::DifferentModels { .. }
        | SplitError::NotBf16 { .. }
        | SplitError::Pack { .. } => 4,
        SplitError::Checkpoint(e) => datasets(e),
        SplitError::Profile(e) => calibrate(e),
        _ => 1,
    }
}

fn runtime(error: &RuntimeError) -> u8 {
    match error {
        RuntimeError::DoesNotFit { .. } | RuntimeError::OutOfMemory(_) | RuntimeError::VramTooSmall { .. } => 3,
        #[cfg(feature = "cuda")]
        RuntimeError::VramRefused { .. }
        | RuntimeError::Cuda(CudaError::OutOfMemory { .. } | CudaError::Pin { .. }) => 3,
        RuntimeError::Setting { .. } | RuntimeError::PromptTooLong { .. } => 2,
        RuntimeError::Split(e) => split(e),
        RuntimeError::Text(e) => datasets(e),
        _ => 1,
    }
}

fn is_broken_pipe(e: &std::io::Error) -> bool {
    e.kind() == std::io::ErrorKind::BrokenPipe
}

/// `thermocline ... | head` ends quietly: a print to a closed pipe panics in the standard library, and that one panic
/// is a normal end.
pub fn quiet_on_broken_pipe() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>().map(String::as_str).unwrap_or_default();
        if text.contains("Broken pipe") {
            std::process::exit(0);
        }
        // Such a panic becomes an error.
        if !thermocline_datasets::is_contained() {
            default(info);
        }
    }));
}
