use super::{Continue, Piece, Take};
use crate::{Error, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A piece is handed out once it is this long.
const PIECE_BYTES: usize = 256 << 10;
/// A line is cut if it is longer than this.
const MAX_LINE_BYTES: usize = 4 << 20;

pub fn read(path: &Path, whole: bool, take: &mut Take<'_>) -> Result<Continue> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    // Where the bytes start in the file.
    let mut offset = 0u64;
    let mut any = false;
    loop {
        let limit = if whole { u64::MAX } else { PIECE_BYTES as u64 };
        let n = (&mut file).take(limit).read_to_end(&mut bytes).map_err(failed)?;
        let at_end = whole || n < PIECE_BYTES;
        let cut = if at_end { bytes.len() } else { cut(&bytes).unwrap_or(0) };
        let (piece, rest) = bytes.split_at_checked(cut).unwrap_or((&bytes, &[]));
        if !piece.is_empty() {
            let text = std::str::from_utf8(piece).map_err(|e| not_utf8(path, offset, e))?;
            any = true;
            if take(Piece::Text(text))?.is_break() {
                return Ok(Continue::Break(()));
            }
        }
        offset = offset.saturating_add(cut as u64);
        bytes = rest.to_vec();
        if at_end {
            break;
        }
    }
    if any { take(Piece::EndOfDocument) } else { Ok(Continue::Continue(())) }
}

/// Where to cut: after the last line end that text follows, else after the last line end, else, in a line that is
/// far too long, after the last space or character.
fn cut(bytes: &[u8]) -> Option<usize> {
    let line_ends = || bytes.iter().enumerate().rev().filter(|(_, b)| **b == b'\n').map(|(i, _)| i.saturating_add(1));
    let before_text = |at: &usize| bytes.get(*at).is_some_and(|b| !b.is_ascii_whitespace());
    if let Some(at) = line_ends().find(before_text).or_else(|| line_ends().next()) {
        return Some(at);
    }
    if bytes.len() < MAX_LINE_BYTES {
        return None;
    }
    let space = bytes.iter().rposition(|b| *b == b' ').filter(|at| *at > 0);
    space.or_else(|| (1..bytes.len()).rev().find(|i| bytes.get(*i).is_some_and(|b| b & 0xC0 != 0x80)))
}

/// The error for bytes that are not UTF-8, `error` being relative to byte `offset` of the file.
pub fn not_utf8(path: &Path, offset: u64, error: std::str::Utf8Error) -> Error {
    let at = offset.saturating_add(error.valid_up_to() as u64);
    Error::Corpus {
        path: path.to_owned(),
        reason: format!("is not UTF-8 at byte {at}; convert it, for example with iconv"),
    }
}
