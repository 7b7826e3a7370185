//! Files that a stranger may have put where a model is read from: regular ones only, because a pipe would be waited for
//! and a device never ends, and no more bytes than the reader has room for.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Opens a regular file.
///
/// # Errors
/// If it cannot be opened, or is a pipe, a device or a folder ([`ErrorKind::InvalidInput`]).
pub fn open(path: &Path) -> Result<File> {
    // Looked at before it is opened: opening a pipe waits for its writer.
    check(&std::fs::metadata(path)?)?;
    let file = File::open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

fn check(found: &std::fs::Metadata) -> Result<()> {
    let reason = "is no regular file (a pipe, a device or a folder); put the file itself there";
    if found.is_file() { Ok(()) } else { Err(Error::new(ErrorKind::InvalidInput, reason)) }
}

/// Reads a regular file of at most `max_bytes`.
///
/// # Errors
/// As [`open`]; if the file is longer ([`ErrorKind::FileTooLarge`]), or cannot be read.
pub fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let len = file.metadata()?.len();
    let too_large = |n: u64| Error::new(ErrorKind::FileTooLarge, format!("{n} bytes, at most {max_bytes} are read"));
    if len > max_bytes {
        return Err(too_large(len));
    }
    let mut out = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    // It may grow meanwhile.
    file.take(max_bytes.saturating_add(1)).read_to_end(&mut out)?;
    if out.len() as u64 > max_bytes {
        return Err(too_large(out.len() as u64));
    }
    Ok(out)
}

/// Whether `error` says that the file itself is at fault, not the system.
pub fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::FileTooLarge | ErrorKind::IsADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_bounded_length_are_read() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let len = std::fs::metadata(&file).expect("there").len();
        assert_eq!(read(&file, len).expect("read").len() as u64, len);
        assert_eq!(read(&file, len.saturating_sub(1)).expect_err("longer").kind(), ErrorKind::FileTooLarge);
        for path in [Path::new("/dev/zero"), Path::new("/")] {
            assert!(is_refusal(&read(path, 10).expect_err("refused")), "{}", path.display());
            assert!(is_refusal(&open(path).expect_err("refused")), "{}", path.display());
        }
        assert_eq!(open(Path::new("/nonexistent")).expect_err("none").kind(), ErrorKind::NotFound);
    }
}
