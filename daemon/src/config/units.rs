//! Durations and sizes: a number and a unit, always both.

use std::time::Duration;

use super::problem::Complaint;

/// Reads `30s`, `1h30m`, `500ms`: whole numbers with the units ms, s, m, h, d.
pub(super) fn duration(text: &str) -> Result<Duration, Complaint> {
    let wrong = |what: &str| Complaint::new(format!("`{text}` is not a duration: {what}"));
    if text.starts_with('-') {
        return Err(wrong("it can't be negative"));
    }
    if let Ok(number) = text.parse::<f64>() {
        return Err(wrong("the unit is missing").help(format!("write {number}s, or {number}m for minutes")));
    }
    let form = "write a number and a unit, such as 500ms, 30s, 15m, 12h, 1h30m or 7d";
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(wrong("it does not begin with a number").help(form));
    }
    let units = text.split(|c: char| c.is_ascii_digit()).filter(|unit| !unit.is_empty());
    if let Some(unit) = units.into_iter().find(|unit| !["ms", "s", "m", "h", "d"].contains(unit)) {
        return Err(wrong(&format!("the unit `{unit}` is unknown")).help(form));
    }
    humantime::parse_duration(text).map_err(|error| match error {
        humantime::DurationError::NumberOverflow => wrong("the number is too large"),
        _ => wrong("the last number has no unit").help(form),
    })
}

const SIZE_UNITS: [(&str, u64); 7] = [
    ("B", 1),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// Reads `4MiB`: a whole number of B, KB, MB, GB, KiB, MiB or GiB; gives bytes.
pub(super) fn size(text: &str) -> Result<u64, Complaint> {
    let wrong = |what: &str| Complaint::new(format!("`{text}` is not a size: {what}"));
    if text.starts_with('-') {
        return Err(wrong("it can't be negative"));
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(
            wrong("it does not begin with a number").help("write a whole number and a unit, such as 4MiB")
        );
    }
    let Some((_, factor)) = SIZE_UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(unknown_size_unit(number, unit, wrong));
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(*factor))
        .ok_or_else(|| wrong("the number is too large"))
}

fn unknown_size_unit(number: &str, unit: &str, wrong: impl Fn(&str) -> Complaint) -> Complaint {
    if unit.is_empty() {
        return wrong("the unit is missing")
            .help(format!("write {number}B, or a larger unit such as {number}KiB"));
    }
    let alike = |name: &str| {
        let (name, unit) = (name.to_ascii_lowercase(), unit.trim().to_ascii_lowercase());
        name == unit || name == format!("{unit}b")
    };
    let complaint = wrong(&format!("the unit `{unit}` is unknown"));
    match SIZE_UNITS.iter().rev().find(|(name, _)| alike(name)) {
        Some((name, _)) => complaint.help(format!("write {number}{name}")),
        None => complaint.help("the units are B, KB, MB, GB, KiB, MiB and GiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        for (text, millis) in
            [("500ms", 500), ("0s", 0), ("15m", 900_000), ("1h30m", 5_400_000), ("2d", 172_800_000)]
        {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for (text, part) in [
            ("15", "unit is missing"),
            ("1.5", "unit is missing"),
            ("-5s", "negative"),
            ("5 s", "` s` is unknown"),
            ("5min", "`min` is unknown"),
            ("1.5h", "`.` is unknown"),
            ("5s3", "no unit"),
            ("s", "does not begin"),
            ("", "does not begin"),
            ("99999999999999999999s", "too large"),
            ("999999999999999999d", "too large"),
        ] {
            let complaint = duration(text).unwrap_err();
            assert!(complaint.message.contains(part), "{text}: {complaint:?}");
        }
        assert_eq!(duration("15").unwrap_err().help.unwrap(), "write 15s, or 15m for minutes");
    }

    #[test]
    fn sizes_have_a_unit() {
        for (text, bytes) in [("0B", 0), ("4MiB", 4 << 20), ("1GiB", 1 << 30), ("5KB", 5000)] {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for (text, part, help) in [
            ("4096", "unit is missing", "4096B"),
            ("-1B", "negative", ""),
            ("1Gi", "`Gi` is unknown", "write 1GiB"),
            ("1M", "`M` is unknown", "write 1MB"),
            ("1mib", "`mib` is unknown", "write 1MiB"),
            ("1.5MiB", "`.5MiB` is unknown", "the units are"),
            ("MiB", "does not begin", "such as 4MiB"),
            ("99999999999GiB", "too large", ""),
        ] {
            let complaint = size(text).unwrap_err();
            assert!(complaint.message.contains(part), "{text}: {complaint:?}");
            assert!(complaint.help.unwrap_or_default().contains(help), "{text}");
        }
    }
}
