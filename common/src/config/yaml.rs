//! Parses YAML into a tree of values, by the `config` crate with a format of our own: the crate's format rejects
//! duplicate keys, and expands aliases without bound.

use std::collections::BTreeMap;
use std::error::Error;
use std::str::Chars;
use std::sync::Arc;

use config::{ConfigError, File, FileStoredFormat, Format, Map, Source as _, ValueKind};
use parking_lot::Mutex;
use serde_json::{Number, Value};
use yaml_rust2::parser::{Event, Parser, Tag};
use yaml_rust2::scanner::{ScanError, TScalarStyle};
use yaml_rust2::yaml::Yaml;

use super::diagnostics::{Diagnostics, Path};

/// The largest text: no config is as large.
const CONFIG_SIZE_MAX: usize = 1 << 20;
/// The deepest tree: functions that read it recurse once per level.
const DEPTH_MAX: usize = 200;
/// The largest size of expanded aliases, in multiples of the largest text.
const ALIAS_GROWTH_MAX: usize = 4;
/// The approximate size of a value beside its text.
const VALUE: usize = 100;
/// The most duplicate keys that are reported.
const DUPLICATES_MAX: usize = 50;

/// The deepest keys whose lines are remembered: those of a config are not deeper.
const LINES_DEPTH_MAX: usize = 8;

/// The content of a text.
pub(crate) struct Tree {
    /// The value at its top.
    pub(crate) value: Value,
    /// The lines of keys that are given once more in the same mapping, the first [`DUPLICATES_MAX`] of them.
    pub(crate) duplicates: Vec<usize>,
}

/// The mapping in `yaml`; without one the diagnostics has the reason. Of a key that is given twice the last one
/// counts, as for the original's parser.
pub(super) fn parse(yaml: &str, diagnostics: &mut Diagnostics) -> Option<Value> {
    let format = BoundedYaml::default();
    let reason = match File::from_str(yaml.trim_start_matches('\u{feff}'), format.clone()).collect() {
        Ok(keys) => {
            let ParseExtras { duplicates, lines } = format.extras();
            diagnostics.set_lines(lines.unwrap_or_default());
            for DuplicateKey { path, line } in duplicates {
                diagnostics.warn(&path, &format!("is given twice in one mapping (line {line}), the last one counts"));
            }
            return Some(convert(ValueKind::Table(keys)));
        }
        Err(ConfigError::FileParse { cause, .. }) => cause,
        Err(other) => other.into(),
    };
    match reason.downcast_ref::<Mistake>() {
        Some(mistake) => diagnostics.error_of_source(mistake.line(), &mistake.to_string()),
        None => diagnostics.error_of_source(None, "is not YAML"),
    }
    None
}

/// Parses `text`, YAML or JSON with any value at its top; the error shows nothing of it.
pub(super) fn any(text: &str, max: usize) -> Result<Tree, String> {
    let text = text.trim_start_matches('\u{feff}');
    match read(text, max, ParseExtras::default()) {
        Ok(Document { top, extras }) => Ok(Tree {
            value: convert(top),
            duplicates: extras.duplicates.into_iter().map(|duplicate| duplicate.line).collect(),
        }),
        // JSON with tabs is not valid YAML.
        Err(mistake @ (Mistake::Yaml { .. } | Mistake::Tab(_))) => match serde_json::from_str(text) {
            Ok(value) => Ok(Tree { value, duplicates: Vec::new() }),
            Err(_) => Err(without_text(text, &mistake)),
        },
        Err(mistake) => Err(mistake.with_line()),
    }
}

/// The mistake; nothing of `text` is in it.
fn without_text(text: &str, mistake: &Mistake) -> String {
    if let Mistake::Yaml { line, .. } = mistake {
        format!("line {}: is not YAML", (*line).clamp(1, text.lines().count().max(1)))
    } else {
        mistake.with_line()
    }
}

/// YAML for the `config` crate. Data beside the values are returned by another way, as the trait has none for them.
#[derive(Debug, Clone, Default)]
struct BoundedYaml(Arc<Mutex<ParseExtras>>);

/// Data of a text beside its values.
#[derive(Debug, Default)]
struct ParseExtras {
    duplicates: Vec<DuplicateKey>,
    /// The lines of keys and entries, if they are wanted.
    lines: Option<BTreeMap<Path, usize>>,
}

impl ParseExtras {
    /// With the lines of keys, which only the problems of a config need.
    fn with_lines() -> Self {
        Self { lines: Some(BTreeMap::new()), ..Self::default() }
    }
}

impl BoundedYaml {
    fn extras(&self) -> ParseExtras {
        std::mem::take(&mut *self.0.lock())
    }
}

impl Format for BoundedYaml {
    fn parse(
        &self,
        _: Option<&String>,
        text: &str,
    ) -> Result<Map<String, config::Value>, Box<dyn Error + Send + Sync>> {
        let Document { top, extras } = read(text, CONFIG_SIZE_MAX, ParseExtras::with_lines())?;
        *self.0.lock() = extras;
        match top {
            ValueKind::Table(keys) if !keys.is_empty() => Ok(keys),
            ValueKind::Table(_) | ValueKind::Nil => Err(Mistake::Empty.into()),
            ValueKind::Boolean(_)
            | ValueKind::I64(_)
            | ValueKind::I128(_)
            | ValueKind::U64(_)
            | ValueKind::U128(_)
            | ValueKind::Float(_)
            | ValueKind::String(_)
            | ValueKind::Array(_) => Err(Mistake::NoMapping.into()),
        }
    }
}

impl FileStoredFormat for BoundedYaml {
    fn file_extensions(&self) -> &'static [&'static str] {
        &["yaml"]
    }
}

/// Why a text is rejected. No line shows any of its content.
#[derive(Debug, thiserror::Error)]
enum Mistake {
    #[error("must have at most {1} bytes, not {0}")]
    Long(usize, usize),
    #[error("must have domains and domain_prefixes at least, and is empty")]
    Empty,
    #[error("must be a mapping, with keys such as \"domains:\" at its top")]
    NoMapping,
    #[error("must not have a NUL byte, as a file has that was not wholly written")]
    Nul(usize),
    #[error("must not open more than {DEPTH_MAX} levels")]
    Deep(usize),
    #[error("must not have aliases that stand for more than {1} bytes")]
    Copies(usize, usize),
    #[error("must not have an alias for what it stands in itself")]
    Circle(usize),
    #[error("must have one document only (no second line \"---\")")]
    Documents(usize),
    #[error("must not have a value that is no number and no text, such as .inf or .nan; quotes make it a text")]
    Number(usize),
    #[error("must have a text as each key, and has a list, a mapping or nothing")]
    Key(usize),
    #[error("must begin with spaces, not with a tab")]
    Tab(usize),
    #[error("is not YAML: {reason}")]
    Yaml { line: usize, reason: String },
}

/// The scanner's message for an unexpected value of a key.
const NO_VALUES: &str = "mapping values are not allowed";

/// The indentation of a line.
fn indent(line: &str) -> &str {
    &line[..line.len() - line.trim_start().len()]
}

/// Whether the line may be a key whose colon is missing.
fn lacks_colon(line: &str) -> bool {
    let text = line.split(" #").next().unwrap_or_default().trim();
    !text.is_empty()
        && !text.starts_with(['#', '-', '{', '[', ']', '}'])
        && !text.ends_with(':')
        && !text.contains(": ")
}

/// Whether a line has a key, and a value without quotes that contains a colon like one after a key.
fn has_colon_in_value(line: &str) -> bool {
    let Some((_, value)) = line.split(" #").next().and_then(|text| text.split_once(": ")) else { return false };
    let value = value.trim();
    !value.starts_with(['"', '\'', '{', '[']) && (value.contains(": ") || value.ends_with(':'))
}

/// Whether the scanner's error is about a line that begins in another column than those around it.
fn is_of_indentation(info: &str) -> bool {
    let of_block = info.starts_with("while parsing a block") && info.contains("did not find expected");
    of_block || info.starts_with(NO_VALUES)
}

/// The line with the mistake, and the reason, for the scanner's error `info`.
fn cause(line: usize, info: &str, text: &str) -> (usize, String) {
    let at = |line: usize| text.lines().nth(line - 1).unwrap_or_default();
    if info.starts_with("simple key") {
        // The scanner reports a key without its colon only at the next key.
        let lacks_colon = |(_, text): &(usize, &str)| lacks_colon(text);
        let before = text.lines().take(line).enumerate().filter(lacks_colon).last();
        let reason = "a key lacks the colon behind it, or the space behind that".to_owned();
        (before.map_or(line, |(at, _)| at + 1), reason)
    } else if info.starts_with(NO_VALUES) && has_colon_in_value(at(line)) {
        (line, "a value with a colon at its end, or before a space, needs quotes around it".to_owned())
    } else if is_of_indentation(info) {
        let before = text.lines().take(line - 1).filter(|text| !text.trim().is_empty()).last();
        let column = |text: &str| indent(text).len() + 1;
        let reason = format!(
            "this line begins in column {}, and the one before in column {}: the keys of one block begin in the same \
             column, and those below a key further right",
            column(at(line)),
            column(before.unwrap_or_default())
        );
        (line, reason)
    } else {
        (line, info.to_owned())
    }
}

impl Mistake {
    fn of(error: &ScanError, text: &str) -> Self {
        // The end of a text is after its last line.
        let (line, info) = (error.marker().line().clamp(1, text.lines().count().max(1)), error.info());
        let at = |line: usize| text.lines().nth(line - 1).unwrap_or_default();
        // If a text continues in the line with the tab, the scanner reports that line.
        let mut tabs = text.lines().enumerate().skip(line - 1).filter(|(_, text)| indent(text).contains('\t'));
        if indent(at(line)).contains('\t') || info.contains("tab") {
            return Self::Tab(tabs.next().map_or(line, |(at, _)| at + 1));
        }
        let (line, reason) = cause(line, info, text);
        Self::Yaml { line, reason }
    }

    /// Its line; none if it is not about a single line.
    fn line(&self) -> Option<usize> {
        match self {
            Self::Nul(line)
            | Self::Deep(line)
            | Self::Copies(line, _)
            | Self::Circle(line)
            | Self::Documents(line)
            | Self::Number(line)
            | Self::Key(line)
            | Self::Tab(line)
            | Self::Yaml { line, .. } => Some(*line),
            Self::Long(..) | Self::Empty | Self::NoMapping => None,
        }
    }

    fn with_line(&self) -> String {
        self.line().map_or_else(|| self.to_string(), |line| format!("line {line}: {self}"))
    }
}

/// A text as it was read.
struct Document {
    top: ValueKind,
    extras: ParseExtras,
}

/// A key that is given once more.
#[derive(Debug)]
struct DuplicateKey {
    path: Path,
    line: usize,
}

fn read(text: &str, max: usize, extras: ParseExtras) -> Result<Document, Mistake> {
    if text.len() > max {
        return Err(Mistake::Long(text.len(), max));
    }
    // The parser would take it for the end.
    if let Some(line) = text.lines().position(|line| line.contains('\0')) {
        return Err(Mistake::Nul(line + 1));
    }
    Reader::new(text, ALIAS_GROWTH_MAX * max, extras).document(text)
}

/// Builds values from the parser's events.
struct Reader<'a> {
    parser: Parser<Chars<'a>>,
    top: ValueKind,
    /// The open lists and mappings around the next value, from the top.
    open: Vec<OpenCollection>,
    /// The values of anchors; each counts as a copy when an alias refers to it.
    anchors: BTreeMap<usize, Finished>,
    copies_max: usize,
    copied: usize,
    extras: ParseExtras,
}

/// An open list or mapping.
struct OpenCollection {
    anchor: usize,
    line: usize,
    content: Items,
    size: usize,
    height: usize,
}

enum Items {
    List(Vec<config::Value>),
    /// The key whose value is next, and its line.
    Mapping(Map<String, config::Value>, Option<(String, usize)>),
}

/// A complete value, its size, and its depth.
#[derive(Clone)]
struct Finished {
    value: ValueKind,
    size: usize,
    height: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str, copies_max: usize, extras: ParseExtras) -> Self {
        let (parser, anchors) = (Parser::new_from_str(text), BTreeMap::new());
        Self { parser, top: ValueKind::Nil, open: Vec::new(), anchors, copies_max, copied: 0, extras }
    }

    fn document(mut self, text: &str) -> Result<Document, Mistake> {
        let mut documents = 0;
        loop {
            let (event, mark) = self.parser.next_token().map_err(|error| Mistake::of(&error, text))?;
            let line = mark.line();
            match event {
                Event::StreamEnd => return Ok(Document { top: self.top, extras: self.extras }),
                Event::DocumentStart if documents > 0 => return Err(Mistake::Documents(line)),
                Event::DocumentStart => documents += 1,
                Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
                Event::SequenceStart(anchor, _) => self.begin(anchor, Items::List(Vec::new()), line)?,
                Event::MappingStart(anchor, _) => self.begin(anchor, Items::Mapping(Map::new(), None), line)?,
                Event::SequenceEnd | Event::MappingEnd => self.end()?,
                Event::Scalar(text, style, anchor, tag) => self.scalar(scalar(text, style, tag), anchor, line)?,
                Event::Alias(anchor) => self.alias(anchor, line)?,
            }
        }
    }

    fn begin(&mut self, anchor: usize, content: Items, line: usize) -> Result<(), Mistake> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Mistake::Deep(line));
        }
        self.open.push(OpenCollection { anchor, line, content, size: VALUE, height: 1 });
        Ok(())
    }

    fn end(&mut self) -> Result<(), Mistake> {
        let Some(OpenCollection { anchor, line, content, size, height }) = self.open.pop() else { return Ok(()) };
        let value = match content {
            Items::List(items) => ValueKind::Array(items),
            Items::Mapping(keys, _) => ValueKind::Table(keys),
        };
        self.finish(Finished { value, size, height }, anchor, line)
    }

    fn scalar(&mut self, scalar: Yaml, anchor: usize, line: usize) -> Result<(), Mistake> {
        let wants_key = matches!(self.open.last(), Some(OpenCollection { content: Items::Mapping(_, None), .. }));
        let value = match scalar {
            Yaml::String(text) => ValueKind::String(text),
            Yaml::Integer(number) => ValueKind::I64(number),
            Yaml::Boolean(flag) => ValueKind::Boolean(flag),
            // As it is written.
            Yaml::Real(text) if wants_key => ValueKind::String(text),
            Yaml::Real(text) => ValueKind::Float(text.parse().map_err(|_| Mistake::Number(line))?),
            Yaml::Null | Yaml::BadValue | Yaml::Array(_) | Yaml::Hash(_) | Yaml::Alias(_) => ValueKind::Nil,
        };
        let length = if let ValueKind::String(text) = &value { text.len() } else { 0 };
        self.finish(Finished { value, size: VALUE + length, height: 0 }, anchor, line)
    }

    fn alias(&mut self, anchor: usize, line: usize) -> Result<(), Mistake> {
        let copied = self.anchors.get(&anchor).ok_or(Mistake::Circle(line))?;
        if self.open.len() + copied.height > DEPTH_MAX {
            return Err(Mistake::Deep(line));
        }
        let size = copied.size;
        self.count_copy(size, line)?;
        let copy = self.anchors.get(&anchor).cloned().ok_or(Mistake::Circle(line))?;
        self.finish(copy, 0, line)
    }

    fn count_copy(&mut self, size: usize, line: usize) -> Result<(), Mistake> {
        self.copied = self.copied.saturating_add(size);
        if self.copied > self.copies_max { Err(Mistake::Copies(line, self.copies_max)) } else { Ok(()) }
    }

    /// Adds a complete value to the list or mapping around it.
    fn finish(&mut self, finished: Finished, anchor: usize, line: usize) -> Result<(), Mistake> {
        if anchor > 0 {
            self.count_copy(finished.size, line)?;
            self.anchors.insert(anchor, finished.clone());
        }
        let Finished { value, size, height } = finished;
        self.note_line(line);
        let Some(open) = self.open.last_mut() else {
            self.top = value;
            return Ok(());
        };
        open.size += size;
        open.height = open.height.max(height + 1);
        match &mut open.content {
            Items::List(items) => items.push(config::Value::new(None, value)),
            Items::Mapping(_, key @ None) => *key = Some((name(value, line)?, line)),
            Items::Mapping(keys, key) => {
                let (name, line) = key.take().unwrap_or_default();
                if keys.insert(name.clone(), config::Value::new(None, value)).is_some() {
                    self.note_duplicate(&name, line);
                }
            }
        }
        Ok(())
    }

    fn note_duplicate(&mut self, name: &str, line: usize) {
        if self.extras.duplicates.len() < DUPLICATES_MAX {
            let path = path(&self.open[..self.open.len() - 1]).then(name);
            self.extras.duplicates.push(DuplicateKey { path, line });
        }
    }

    /// A value ends that begins in this line; the line of one with a key is the key's.
    fn note_line(&mut self, line: usize) {
        let line = match self.open.last().map(|open| &open.content) {
            Some(Items::Mapping(_, Some((_, line)))) => *line,
            Some(Items::List(_)) => line,
            Some(Items::Mapping(_, None)) | None => return,
        };
        if let Some(lines) = self.extras.lines.as_mut().filter(|_| self.open.len() <= LINES_DEPTH_MAX) {
            lines.insert(path(&self.open), line);
        }
    }
}

/// The position of the next value.
fn path(open: &[OpenCollection]) -> Path {
    open.iter().fold(Path::default(), |path, open| match &open.content {
        Items::List(items) => path.index(items.len()),
        Items::Mapping(_, key) => path.then(key.as_ref().map_or("", |(key, _)| key)),
    })
}

/// The value of a scalar, as by the parser's own loader.
fn scalar(text: String, style: TScalarStyle, tag: Option<Tag>) -> Yaml {
    match tag {
        _ if style != TScalarStyle::Plain => Yaml::String(text),
        None => Yaml::from_str(&text),
        Some(tag) if tag.handle != "tag:yaml.org,2002:" => Yaml::String(text),
        Some(tag) => match (tag.suffix.as_str(), Yaml::from_str(&text)) {
            ("bool", flag @ Yaml::Boolean(_)) => flag,
            ("int", number @ Yaml::Integer(_)) => number,
            ("float", Yaml::Integer(_) | Yaml::Real(_)) => Yaml::Real(text),
            ("bool" | "int" | "float" | "null", _) => Yaml::Null,
            _ => Yaml::String(text),
        },
    }
}

/// A key as a text, in this line.
fn name(key: ValueKind, line: usize) -> Result<String, Mistake> {
    match key {
        ValueKind::String(text) => Ok(text),
        ValueKind::I64(number) => Ok(number.to_string()),
        ValueKind::Boolean(flag) => Ok(flag.to_string()),
        ValueKind::Float(number) => Ok(number.to_string()),
        ValueKind::I128(number) => Ok(number.to_string()),
        ValueKind::U64(number) => Ok(number.to_string()),
        ValueKind::U128(number) => Ok(number.to_string()),
        ValueKind::Nil | ValueKind::Array(_) | ValueKind::Table(_) => Err(Mistake::Key(line)),
    }
}

fn convert(kind: ValueKind) -> Value {
    match kind {
        ValueKind::Nil => Value::Null,
        ValueKind::Boolean(flag) => flag.into(),
        ValueKind::I64(number) => number.into(),
        ValueKind::U64(number) => number.into(),
        ValueKind::I128(number) => number.to_string().into(),
        ValueKind::U128(number) => number.to_string().into(),
        // JSON has no infinity; as a text it is rejected where a number is required.
        ValueKind::Float(number) => Number::from_f64(number).map_or_else(|| number.to_string().into(), Value::Number),
        ValueKind::String(text) => text.into(),
        ValueKind::Array(items) => items.into_iter().map(|item| convert(item.kind)).collect(),
        ValueKind::Table(keys) => keys.into_iter().map(|(key, value)| (key, convert(value.kind))).collect(),
    }
}
