//! YAML text to a tree of values, by the `config` crate; its complaints become ours.

use config::{File, FileFormat, Source as _, ValueKind};
use serde_json::{Number, Value};

use super::report::Report;

/// No config comes near this, and what does would only cost memory.
const SIZE_MAX: usize = 1 << 20;

/// The parser descends once per level, on a stack that ends.
const DEPTH_MAX: usize = 200;

/// What [`any`] puts above a text.
const TOP: &str = "top";

const EMPTY: &str = "is empty, domains and domain_prefixes are needed at least";

/// The mapping that `yaml` says; without one the report has the reason.
pub(super) fn parse(yaml: &str, report: &mut Report) -> Option<Value> {
    let text = yaml.trim_start_matches('\u{feff}');
    let reason = if text.len() > SIZE_MAX {
        format!("has {} bytes, {SIZE_MAX} are allowed", text.len())
    } else if text.lines().any(|line| depth(line) > DEPTH_MAX) {
        format!("has a line with more than {DEPTH_MAX} levels, fewer are allowed")
    } else {
        match File::from_str(text, FileFormat::Yaml).collect() {
            Ok(keys) if keys.is_empty() => EMPTY.to_owned(),
            Ok(keys) => return Some(convert(ValueKind::Table(keys))),
            Err(error) => explain(&error.to_string(), text, report),
        }
    };
    report.refuse_all(&reason);
    None
}

/// Whatever stands at the top of `text`, which is YAML or JSON; else why it is neither, without a word of it.
pub(super) fn any(text: &str, max: usize) -> Result<Value, String> {
    let text = text.trim_start_matches('\u{feff}');
    if text.len() > max {
        return Err(format!("has {} bytes, {max} are allowed", text.len()));
    }
    if let Ok(value) = serde_json::from_str(text) {
        return Ok(value);
    }
    if text.lines().any(|line| depth(line) > DEPTH_MAX) {
        return Err(format!("has a line with more than {DEPTH_MAX} levels, fewer are allowed"));
    }
    let indent = |text: &str| text.len() - text.trim_start().len();
    if let Some(number) = text.lines().position(|line| line[..indent(line)].contains('\t')) {
        return Err(format!("line {}: begins with a tab, spaces are allowed", number + 1));
    }
    // The parser wants a mapping at the top.
    let below: String =
        text.lines().map(|line| if line == "---" { "\n".into() } else { format!(" {line}\n") }).collect();
    match File::from_str(&format!("{TOP}:\n{below}"), FileFormat::Yaml).collect() {
        Ok(mut keys) if keys.len() == 1 => Ok(keys.remove(TOP).map_or(Value::Null, |top| convert(top.kind))),
        Ok(_) => Err("is not YAML".into()),
        Err(error) => Err(match scan_error(&error.to_string()) {
            Some((reason, line)) if reason.ends_with(": duplicated key in mapping") => {
                format!("line {}: a key is given twice in one mapping, once is allowed", line.saturating_sub(1))
            }
            Some((_, line)) => {
                format!("line {}: is not YAML", line.saturating_sub(1).clamp(1, text.lines().count().max(1)))
            }
            None => "is not YAML".into(),
        }),
    }
}

/// An upper bound of the levels that a line opens in block style (the parser itself bounds those in brackets).
fn depth(line: &str) -> usize {
    line.chars().take_while(|c| " \t-?:".contains(*c)).count()
}

fn convert(kind: ValueKind) -> Value {
    match kind {
        ValueKind::Nil => Value::Null,
        ValueKind::Boolean(flag) => flag.into(),
        ValueKind::I64(number) => number.into(),
        ValueKind::U64(number) => number.into(),
        ValueKind::I128(number) => number.to_string().into(),
        ValueKind::U128(number) => number.to_string().into(),
        // JSON has no infinity; as a text it is refused where a number is wanted.
        ValueKind::Float(number) => Number::from_f64(number).map_or_else(|| number.to_string().into(), Value::Number),
        ValueKind::String(text) => text.into(),
        ValueKind::Array(items) => items.into_iter().map(|item| convert(item.kind)).collect(),
        ValueKind::Table(keys) => keys.into_iter().map(|(key, value)| (key, convert(value.kind))).collect(),
    }
}

/// The parser's complaint in the operator's words. It is read as text, as its types are not the `config` crate's to
/// give; of the text itself only a key that is given twice is repeated.
fn explain(complaint: &str, yaml: &str, report: &Report) -> String {
    if let Some((reason, line)) = scan_error(complaint) {
        return explain_scan(reason, line, yaml, report);
    }
    let known = [
        ("invalid type: unit", EMPTY),
        ("invalid type", "is not a mapping, keys with values such as \"domains:\" are allowed at the top"),
        ("Got ", "has more than one document, one is allowed (no second line \"---\")"),
        ("Parsing ", "has a value that is no number and no text, such as .inf or .nan; quotes make it a text"),
        ("Cannot parse ", "has a key that is a list or a mapping or nothing, a text is allowed"),
    ];
    let found = known.iter().find(|(start, _)| complaint.starts_with(start));
    found.map_or("is not YAML", |(_, reason)| reason).to_owned()
}

/// Splits `REASON at byte B line L column C`.
fn scan_error(complaint: &str) -> Option<(&str, usize)> {
    let (reason, place) = complaint.rsplit_once(" at byte ")?;
    let (_, place) = place.split_once(" line ")?;
    let (line, _) = place.split_once(' ')?;
    Some((reason, line.parse().ok()?))
}

fn explain_scan(reason: &str, line: usize, yaml: &str, report: &Report) -> String {
    let indent = |text: &str| text.len() - text.trim_start().len();
    if let Some(number) = yaml.lines().take(line).position(|text| text[..indent(text)].contains('\t')) {
        return format!("line {}: begins with a tab, spaces are allowed", number + 1);
    }
    match reason.strip_suffix(": duplicated key in mapping") {
        Some(key) => {
            let key = key.trim_start_matches("String(").trim_end_matches(')').trim_matches('"');
            let name = if report.hides(key) || key.len() > 80 { "a key" } else { key };
            let line = line_of_key(key, line, yaml);
            format!("line {line}: {name} is given twice in one mapping, once is allowed")
        }
        None => format!("line {line}: is not YAML: {reason}"),
    }
}

/// Where `key` last stands up to `end`: the parser names the end of the value instead.
fn line_of_key(key: &str, end: usize, yaml: &str) -> usize {
    let is_here = |text: &&str| {
        let text = text.trim_start_matches([' ', '-', '{', '"', '\'']);
        text.strip_prefix(key).is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ']).starts_with(':'))
    };
    let lines: Vec<&str> = yaml.lines().take(end).collect();
    lines.iter().rposition(is_here).map_or(end, |index| index + 1)
}
