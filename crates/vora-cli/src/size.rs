//! Numbers of bytes as people write them.

/// `5GB` in bytes.
pub(crate) fn bytes(size: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 8] = [
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
    ];
    let parsed = UNITS.iter().find_map(|(unit, factor)| {
        let at = size.len().checked_sub(unit.len())?;
        let (number, suffix) = size.split_at_checked(at)?;
        let number: f64 = suffix.eq_ignore_ascii_case(unit).then(|| number.trim().parse().ok())??;
        (number.is_finite() && number > 0.0).then_some((number * *factor as f64) as u64)
    });
    parsed.filter(|&bytes| bytes > 0).ok_or_else(|| "a number above 0 and its unit, as 5GB or 500MiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (size, expected) in
            [("5GB", 5_000_000_000), ("1.5 mb", 1_500_000), ("2KiB", 2048), ("1TB", 1_000_000_000_000)]
        {
            assert_eq!(bytes(size), Ok(expected), "{size}");
        }
        for wrong in ["", "5", "GB", "-1GB", "0MB", "nanGB", "infGB", "5GG", "5€", "0.0001KB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
