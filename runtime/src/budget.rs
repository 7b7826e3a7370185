//! Sizes as people write them: `8GiB`, `500MB`, `8` (GiB), `auto`.

/// Parses a memory budget in bytes; `None` is `auto`. A bare number is GiB.
///
/// # Errors
/// A sentence that says what was expected.
pub fn parse_budget(text: &str) -> Result<Option<u64>, String> {
    let trimmed = text.trim();
    if trimmed.eq_ignore_ascii_case("auto") {
        return Ok(None);
    }
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "g" | "gib" => 1u64 << 30,
        "gb" => 1_000_000_000,
        "m" | "mib" => 1 << 20,
        "mb" => 1_000_000,
        "k" | "kib" => 1 << 10,
        "b" => 1,
        _ => return Err(format!("{text:?}: expected a size such as 8GiB, 500MB or auto")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?}: expected a size such as 8GiB, 500MB or auto"))?;
    let bytes = number * scale as f64;
    if !(1.0..=1e18).contains(&bytes) {
        return Err(format!("{text:?} is not between one byte and an exabyte"));
    }
    Ok(Some(bytes as u64))
}

/// A size for people: `1.5 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", b / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", b / 1_048_576.0),
        _ => format!("{:.2} GiB", b / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(parse_budget("8"), Ok(Some(8 << 30)));
        assert_eq!(parse_budget("1.5GiB"), Ok(Some(3 << 29)));
        assert_eq!(parse_budget(" 64 MiB"), Ok(Some(64 << 20)));
        assert_eq!(parse_budget("500MB"), Ok(Some(500_000_000)));
        assert_eq!(parse_budget("AUTO"), Ok(None));
        for bad in ["", "GiB", "-1", "1e400", "8 parsecs", "nan", "0", "1.2.3"] {
            assert!(parse_budget(bad).is_err(), "{bad}");
        }
    }
}
