//! Parses the texts of lists into entries. Any mistake rejects the whole text, with one line that shows no more of a
//! key than logs may.

use serde_json::{Map, Value};
use time::{Date, Month, Time, UtcDateTime};

use crate::PublicKey;
use crate::access_lists::{Entry, List};
use crate::config::{self, Tree};
use crate::time_text;

/// The longest text, in bytes: a list of 100,000 keys is shorter.
const LIST_FILE_SIZE_MAX: usize = 16 << 20;
/// A longer text, in bytes, may be a key.
const NAME_MAX: usize = 30;
/// The year 2001 in Unix time: a smaller number is not meant as seconds, but perhaps as a year.
const UNTIL_MIN: u64 = 1_000_000_000;

/// The content of a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// The entries, in the order of the text or of the keys.
    pub entries: Vec<Entry>,
    /// Lines of keys that are given once more in the same mapping: the last one counts.
    pub duplicates: Vec<usize>,
    /// The text has no list, not even an empty one: comments alone, or YAML's null in any of its forms.
    pub is_blank: bool,
    /// A domain with no value, not even an empty list.
    pub blank_domain: Option<String>,
}

/// The keys of a file: a list of them, or `key: {reason, name, until}`, or `key: reason`. YAML or JSON; an empty text is an
/// empty list.
pub fn keys(text: &str, list: List) -> Result<Listed, String> {
    let Tree { value, duplicates } = config::tree(text, LIST_FILE_SIZE_MAX)?;
    Ok(Listed { entries: entries(&value, list)?, duplicates, is_blank: value.is_null(), blank_domain: None })
}

/// The allowed keys of a file, `domain: KEYS` with KEYS as [`keys`] has them.
pub fn keys_by_domain(text: &str) -> Result<Listed, String> {
    let Tree { value, duplicates } = config::tree(text, LIST_FILE_SIZE_MAX)?;
    let is_blank = value.is_null();
    let domains = match value {
        Value::Object(domains) => domains,
        Value::Null => Map::new(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            return Err("is not a mapping of domains, lines \"domain:\" with a list of keys below are allowed".into());
        }
    };
    let blank_domain = domains.iter().find_map(|(domain, keys)| keys.is_null().then(|| shown(domain)));
    let mut all = Vec::new();
    for (domain, keys) in domains {
        let keys = entries(&keys, List::Allow).map_err(|wrong| format!("{}: {wrong}", shown(&domain)))?;
        all.extend(keys.into_iter().map(|entry| Entry { domain: Some(domain.clone()), ..entry }));
    }
    Ok(Listed { entries: all, duplicates, is_blank, blank_domain })
}

/// Whether a text may be truncated: its last line has no line end, and does not end with a key, a bracket or a quote.
#[must_use]
pub fn may_be_cut_off(text: &str) -> bool {
    !text.ends_with(['\n', '=', ']', '}', '"', '\''])
}

/// The key of a file that has but one, among empty lines and lines that begin with `#`.
pub fn one_key(text: &str) -> Result<PublicKey, String> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    match (lines.next(), lines.next()) {
        (Some(line), None) => line.parse().map_err(|error| format!("{error}")),
        (None, _) => Err("has no key, a line with one is needed".into()),
        (Some(_), Some(_)) => Err("has more than one line, one with a key is allowed".into()),
    }
}

fn entries(value: &Value, list: List) -> Result<Vec<Entry>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(items) => {
            let item = |(index, item): (usize, &Value)| {
                let key = item.as_str().ok_or("is not a text, a key is allowed".to_owned()).and_then(key);
                key.map(|key| Entry::new(list, key)).map_err(|wrong| format!("entry {}: {wrong}", index + 1))
            };
            items.iter().enumerate().map(item).collect()
        }
        Value::Object(items) => {
            let item = |(text, about): (&String, &Value)| {
                let entry = key(text).and_then(|key| described(Entry::new(list, key), about));
                entry.map_err(|wrong| format!("{}: {wrong}", shown(text)))
            };
            items.iter().map(item).collect()
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            Err("is not a list of keys, lines \"- KEY\" or \"KEY: {reason: TEXT}\" are allowed".into())
        }
    }
}

/// A name of the file, shortened if it may be a key.
fn shown(name: &str) -> String {
    let shown = if name.len() > NAME_MAX { 8 } else { NAME_MAX };
    format!("{:?}", name.chars().take(shown).collect::<String>())
}

fn key(text: &str) -> Result<PublicKey, String> {
    text.trim().parse().map_err(|error| format!("{error}"))
}

fn described(entry: Entry, about: &Value) -> Result<Entry, String> {
    match about {
        Value::Null => Ok(entry),
        Value::String(reason) => Ok(Entry { reason: Some(time_text::text("reason", reason)?), ..entry }),
        Value::Object(fields) => fields.iter().try_fold(entry, |entry, (field, value)| with(entry, field, value)),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) => {
            Err("is neither a reason nor a mapping, {reason, name, until} is allowed".into())
        }
    }
}

fn with(entry: Entry, field: &str, value: &Value) -> Result<Entry, String> {
    let text = || value.as_str().ok_or(format!("{field}: is not a text, one is allowed"));
    match field {
        _ if value.is_null() => Ok(entry),
        "reason" => Ok(Entry { reason: Some(time_text::text("reason", text()?)?), ..entry }),
        "name" => Ok(Entry { name: Some(time_text::text("name", text()?)?), ..entry }),
        "until" => until(value).map(|until| Entry { until: Some(until), ..entry }).ok_or_else(|| {
            "until: is not a time, one as 2030-12-31 or 2030-12-31T23:59:59Z (UTC), or seconds of Unix time, is allowed"
                .into()
        }),
        _ => Err("has a field that is not known, reason, name and until are allowed".into()),
    }
}

/// A time in seconds of Unix time: the number itself, a day (its beginning in UTC), or a day and a time in UTC.
fn until(value: &Value) -> Option<u64> {
    let text = value.as_str().unwrap_or_default();
    if let Some(seconds) = value.as_u64().or_else(|| text.parse().ok()) {
        return Some(seconds).filter(|seconds| *seconds >= UNTIL_MIN);
    }
    let (day, time) = text.trim().split_once(['T', ' ']).unwrap_or((text.trim(), "00:00:00"));
    let numbers = |text: &str, separator| -> Option<[u64; 3]> {
        let numbers: Option<Vec<u64>> = text.split(separator).map(|number| number.parse().ok()).collect();
        numbers?.try_into().ok()
    };
    let [year, month, day] = numbers(day, '-')?;
    let month = u8::try_from(month).ok().and_then(|month| Month::try_from(month).ok())?;
    let day = Date::from_calendar_date(year.try_into().ok()?, month, day.try_into().ok()?).ok()?;
    let [hour, minute, second] = numbers(time.trim_end_matches('Z'), ':')?.map(u8::try_from);
    let time = Time::from_hms(hour.ok()?, minute.ok()?, second.ok()?).ok()?;
    u64::try_from(UtcDateTime::new(day, time).unix_timestamp()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time_text::utc;

    const A: &str = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";
    const B: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    fn entry(text: &str) -> Entry {
        Entry::new(List::Deny, text.parse().unwrap())
    }

    fn because(reason: &str) -> Entry {
        Entry { reason: Some(reason.into()), ..entry(A) }
    }

    #[test]
    fn a_list_is_written_in_each_of_its_ways() {
        let all = Entry { name: Some("attic".into()), until: Some(1_924_905_600), ..because("spam") };
        for (text, wanted) in [
            (String::new(), vec![]),
            ("# nobody\n".into(), vec![]),
            ("[]".into(), vec![]),
            ("{}".into(), vec![]),
            (format!("- {A}\n- \"{B}\" # why\n"), vec![entry(A), entry(B)]),
            (format!("---\n- {A}\n"), vec![entry(A)]),
            (format!("[\"{A}\",\n\t\"{B}\"]"), vec![entry(A), entry(B)]),
            (format!("{A}: {{reason: spam}}"), vec![because("spam")]),
            (format!("{A}: spam\n{B}:\n"), vec![entry(B), because("spam")]),
            (format!("{{\"{A}\": {{\"reason\": \"spam\", \"name\": null}}}}"), vec![because("spam")]),
            (format!("{A}:\n  reason: spam\n  name: attic\n  until: 2030-12-31\n"), vec![all.clone()]),
            (format!("{A}: {{reason: spam, name: attic, until: 1924905600}}"), vec![all.clone()]),
            (format!("{A}: {{reason: spam, name: attic, until: 2030-12-31T00:00:00Z}}"), vec![all]),
        ] {
            assert_eq!(keys(&text, List::Deny).map(|listed| listed.entries), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn an_error_refuses_the_whole_list_and_shows_no_key() {
        for (text, said) in [
            (A.to_owned(), "is not a list of keys, lines \"- KEY\" or \"KEY: {reason: TEXT}\" are allowed"),
            (
                format!("- {A}\n- x"),
                "entry 2: not a WireGuard public key: 44 characters of canonical base64 are expected",
            ),
            (format!("- {A}\n- 7"), "entry 2: is not a text, a key is allowed"),
            (
                format!("{A}x: spam"),
                "\"o52Ge+Rp\": not a WireGuard public key: 44 characters of canonical base64 are expected",
            ),
            (format!("{A}: [x]"), "\"o52Ge+Rp\": is neither a reason nor a mapping, {reason, name, until} is allowed"),
            (
                format!("{A}: {{untill: 2030-01-01}}"),
                "\"o52Ge+Rp\": has a field that is not known, reason, name and until are allowed",
            ),
            (
                format!("{A}: {{until: tomorrow}}"),
                "\"o52Ge+Rp\": until: is not a time, one as 2030-12-31 or 2030-12-31T23:59:59Z (UTC), or seconds of Unix time, is allowed",
            ),
            (format!("- {A}\n\t- {B}"), "line 2: must begin with spaces, not with a tab"),
            ("[".into(), "line 1: is not YAML"),
            (format!("- {A}\n- \0\0"), "line 2: must not have a NUL byte"),
        ] {
            let wrong = keys(&text, List::Deny).unwrap_err();
            assert!(wrong.starts_with(said), "{text}: {wrong}");
            assert!(!wrong.contains(A) && !wrong.contains(B), "{wrong}");
        }
    }

    #[test]
    fn allowed_keys_stand_below_their_domains() {
        let allowed = |domain: &str, text: &str| Entry {
            domain: Some(domain.into()),
            ..Entry::new(List::Allow, text.parse().unwrap())
        };
        let text = format!("ff_a: [{A}]\nff_b:\n  - {A}\n  - {B}\nff_c:\n");
        let wanted = vec![allowed("ff_a", A), allowed("ff_b", A), allowed("ff_b", B)];
        let listed = keys_by_domain(&text).unwrap();
        assert_eq!((listed.entries, listed.blank_domain.as_deref()), (wanted, Some("\"ff_c\"")));
        assert_eq!(keys_by_domain(""), Ok(Listed { is_blank: true, ..Listed::default() }));
        assert!(keys_by_domain(&format!("- {A}")).unwrap_err().starts_with("is not a mapping of domains"));
        assert!(keys_by_domain("ff_a: [x]").unwrap_err().starts_with("\"ff_a\": entry 1: not a WireGuard"));
    }

    #[test]
    fn of_a_key_given_twice_the_last_counts_in_yaml_and_json() {
        for text in
            [format!("{A}: x\n{B}:\n{A}: spam\n"), format!("{{\"{A}\": \"x\",\n\"{B}\": null,\n\"{A}\": \"spam\"}}")]
        {
            let wanted = Listed { entries: vec![entry(B), because("spam")], duplicates: vec![3], ..Listed::default() };
            assert_eq!(keys(&text, List::Deny), Ok(wanted), "{text}");
        }
    }

    /// Lists after an interrupted copy: every prefix of these texts is rejected, or consists of whole lines.
    #[test]
    fn truncated_lists_are_refused_where_that_is_detectable() {
        let json = format!("{{\"ff_a\": [\"{A}\", \"{B}\"],\n\"ff_b\": [\"{B}\"]}}\n");
        let end = json.rfind('}').unwrap();
        for cut in 1..=end {
            assert!(keys_by_domain(&json[..cut]).is_err(), "{}", &json[..cut]);
        }
        let yaml = format!("- {A}\n- {B}\n- {A}\n");
        let line = yaml.len() / 3;
        for cut in 1..yaml.len() {
            let is_whole = (cut + 1) % line == 0 || cut % line == 0;
            assert_eq!(keys(&yaml[..cut], List::Deny).is_ok(), is_whole, "{}", &yaml[..cut]);
        }
        assert!(may_be_cut_off(&format!("{A}: {{until: 2030-01-01}}\n{B}: some rea")));
        for whole in [yaml.trim_end(), &yaml, json.trim_end(), "a: \"b\""] {
            assert!(!may_be_cut_off(whole), "{whole}");
        }
    }

    /// A file that is truncated before its first key.
    #[test]
    fn a_text_without_a_list_is_blank_and_an_empty_list_is_not() {
        for blank in [
            "",
            "\n \n",
            "# nobody\n",
            "---\n# x\n...\n",
            "\u{feff}",
            "~",
            "null",
            "--- # keys",
            "%YAML 1.2\n---\n",
            "!!null",
            "&keys",
        ] {
            assert!(keys(blank, List::Deny).is_ok_and(|listed| listed.is_blank), "{blank:?}");
            assert!(keys_by_domain(blank).is_ok_and(|listed| listed.is_blank), "{blank:?}");
        }
        assert!(!keys("[]", List::Deny).unwrap().is_blank && !keys_by_domain("{}").unwrap().is_blank);
    }

    #[test]
    fn a_large_list_is_read() {
        let one_line = format!("[{}]", vec![format!("\"{A}\""); 100_000].join(","));
        let lines = format!("- {A}\n").repeat(100_000);
        for text in [one_line, lines] {
            assert_eq!(keys(&text, List::Deny).unwrap().entries.len(), 100_000);
        }
    }

    #[test]
    fn a_key_file_has_one_key() {
        for text in [A.to_owned(), format!("{A}\n"), format!("# attic\n\n  {A} \n")] {
            assert_eq!(one_key(&text), Ok(A.parse().unwrap()));
        }
        for text in [String::new(), "# x".into(), format!("{A}\n{B}"), "x".into()] {
            assert!(!one_key(&text).unwrap_err().contains(A));
        }
    }

    #[test]
    fn times_are_read_or_refused() {
        for (text, seconds) in [
            ("1970-01-01", 0),
            ("2000-02-29", 951_782_400),
            ("2026-11-21T18:00:15Z", 1_795_284_015),
            ("2026-11-21 18:00:15", 1_795_284_015),
            ("1795284015", 1_795_284_015),
            ("2026-1-2", 1_767_312_000),
            ("2026-1-2T3:4:5", 1_767_323_045),
        ] {
            assert_eq!(until(&text.into()), Some(seconds), "{text}");
        }
        for text in [
            "",
            "2026",
            "2026-13-01",
            "2025-02-29",
            "2026-01-00",
            "2026-01-01T24:00:00",
            "x-y-z",
            "20301231",
            "1969-12-31",
        ] {
            assert_eq!(until(&text.into()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_time_is_read_as_it_is_written(seconds in 0..253_402_300_800_u64) {
            prop_assert_eq!(until(&utc(seconds).into()), Some(seconds));
        }

        #[test]
        fn any_text_is_a_list_or_one_line(text in "([-:{}\\[\\], \n#'\"a-z0-9=]|o52Ge\\+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=){0,20}") {
            for wrong in [keys(&text, List::Deny).err(), keys_by_domain(&text).err(), one_key(&text).err()] {
                let wrong = wrong.unwrap_or_default();
                prop_assert!(!wrong.contains('\n') && !wrong.contains(A), "{}", wrong);
            }
        }
    }
}
