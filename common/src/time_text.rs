//! Times, durations and short texts, as operators write and read them. No clock.

use std::time::{SystemTime, UNIX_EPOCH};

use time::format_description::well_known::Rfc3339;
use time::{Date, Time, UtcDateTime};

/// The longest name or reason, in bytes.
pub const TEXT_MAX: usize = 200;
/// Ten years, in seconds: the longest duration.
const FOR_MAX: u64 = 10 * 366 * 86_400;

/// Seconds of Unix time.
#[must_use]
pub fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A name or reason that fits into one line.
pub fn text(field: &str, text: &str) -> Result<String, String> {
    if text.len() > TEXT_MAX || text.chars().any(char::is_control) {
        return Err(format!(
            "{field}: is too long or has more than one line, {TEXT_MAX} bytes in one line are allowed"
        ));
    }
    Ok(text.to_owned())
}

/// A time in seconds of Unix time as `2030-12-31T23:59:59Z`; the end of the year 9999 for later ones.
#[must_use]
pub fn utc(seconds: u64) -> String {
    let last = UtcDateTime::new(Date::MAX, Time::MAX);
    let time = i64::try_from(seconds).ok().and_then(|seconds| UtcDateTime::from_unix_timestamp(seconds).ok());
    let time = time.unwrap_or(last).truncate_to_second();
    time.format(&Rfc3339).unwrap_or_default()
}

/// The seconds of a duration such as `90s`, `30m`, `12h`, `7d` or `2w`; none if the text is invalid, or not from 1
/// second to ten years.
#[must_use]
pub fn duration(text: &str) -> Option<u64> {
    let unit = text.chars().last()?;
    let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        'w' => 7 * 86_400,
        _ => return None,
    };
    number.checked_mul(seconds).filter(|seconds| (1..=FOR_MAX).contains(seconds))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_written_and_durations_are_read_or_refused() {
        assert_eq!([utc(0), utc(u64::MAX)], ["1970-01-01T00:00:00Z", "9999-12-31T23:59:59Z"]);
        for (text, seconds) in [("90s", 90), ("30m", 1_800), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)] {
            assert_eq!(duration(text), Some(seconds));
        }
        for text in ["", "7", "d", "-1d", "0d", "1.5h", "1y", "7 d", "99999999999999999999d", "600w"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_time_can_be_written(seconds: u64) {
            prop_assert_eq!(utc(seconds).len(), "2030-12-31T23:59:59Z".len());
        }
    }
}
