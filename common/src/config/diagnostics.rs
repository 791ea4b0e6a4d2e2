//! Collects the errors and warnings about a config, for the operator. All of them are made here, so that none shows a
//! secret and each is one line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};

use serde_json::Value;
use serde_path_to_error::Segment;

use super::problem::ConfigProblem;

/// Keys with secret values.
const SECRET_KEYS: [&str; 5] = ["password", "password_hash", "api_key", "broker_signing_key", "admin_token_hash"];

/// Longer values are not shown.
const SHOWN_MAX: usize = 80;

/// The path of a value: keys, and `[n]` in a list.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Path(pub(super) Vec<String>);

impl Path {
    /// The path of a key of ours, such as `mqtt.broker_port`.
    pub fn of(dotted: &str) -> Self {
        Self(dotted.split('.').map(str::to_owned).collect())
    }

    pub fn then(&self, step: impl Into<String>) -> Self {
        let mut steps = self.0.clone();
        steps.push(step.into());
        Self(steps)
    }

    pub fn index(&self, index: usize) -> Self {
        self.then(format!("[{index}]"))
    }

    /// The path itself, and those of the values around it.
    fn upwards(&self) -> impl Iterator<Item = Self> + '_ {
        (1..=self.0.len()).rev().map(|steps| Self(self.0[..steps].to_vec()))
    }

    /// The value at this path.
    pub fn find<'a>(&self, tree: &'a mut Value) -> Option<&'a mut Value> {
        self.0.iter().try_fold(tree, |value, step| match value {
            Value::Object(keys) => keys.get_mut(step),
            Value::Array(items) => {
                let index: usize = step.strip_prefix('[')?.strip_suffix(']')?.parse().ok()?;
                items.get_mut(index)
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
        })
    }
}

impl From<&serde_path_to_error::Path> for Path {
    fn from(path: &serde_path_to_error::Path) -> Self {
        let step = |segment: &Segment| match segment {
            Segment::Seq { index } => format!("[{index}]"),
            Segment::Map { key } => key.clone(),
            Segment::Enum { .. } | Segment::Unknown => "?".to_owned(),
        };
        Self(path.iter().map(step).collect())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            if position > 0 && !step.starts_with('[') {
                f.write_char('.')?;
            }
            write!(f, "{}", step.escape_debug())?;
        }
        Ok(())
    }
}

/// The problems found so far.
pub(super) struct Diagnostics {
    file: Option<String>,
    /// The lines of the file's keys.
    lines: BTreeMap<Path, usize>,
    /// Names that stand for a path in the lines; empty for a file.
    aliases: &'static [(&'static str, &'static str)],
    /// The names of known keys, which are not secret even if a password is the same.
    known: BTreeSet<String>,
    secrets: Vec<String>,
    errors: Vec<ConfigProblem>,
    warnings: Vec<ConfigProblem>,
}

/// The locations of some keys.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// The file; none if they are variables.
    pub file: Option<String>,
    /// The line of each key that is there.
    pub lines: BTreeMap<&'static str, usize>,
}

/// The problems of a config: its errors and warnings.
#[derive(Debug, Default)]
pub(super) struct Problems {
    pub errors: Vec<ConfigProblem>,
    pub warnings: Vec<ConfigProblem>,
}

impl Diagnostics {
    /// For a file; `known` has the names of all keys.
    pub fn of_file(name: &str, yaml: &str, known: BTreeSet<String>) -> Self {
        let empty = Self::of_variables(&[], known);
        let known = &empty.known;
        let behind_keys = |line| SECRET_KEYS.iter().flat_map(move |key| after_key(line, key, known));
        let secrets = yaml.lines().flat_map(behind_keys).collect();
        Self { file: Some(name.to_owned()), secrets, ..empty }
    }

    /// For variables; `aliases` has the path that each variable stands for.
    pub fn of_variables(aliases: &'static [(&'static str, &'static str)], known: BTreeSet<String>) -> Self {
        Self {
            file: None,
            lines: BTreeMap::new(),
            aliases,
            known,
            secrets: Vec::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Hides the values of secret keys in `tree` from all later lines.
    pub fn keep_secret(&mut self, tree: &Value) {
        let Some(keys) = tree.as_object() else { return };
        for (key, value) in keys {
            if SECRET_KEYS.contains(&key.as_str()) {
                collect_scalars(value, &mut self.secrets);
            }
            self.keep_secret(value);
        }
        self.secrets.retain(|secret| !secret.is_empty());
    }

    /// An error: `value` at `path` does not meet `requirement`, such as "must be true or false".
    pub fn invalid(&mut self, path: &Path, value: &Value, requirement: &str) {
        match self.show(path, value) {
            Some(shown) => self.error(path, &format!("{requirement}, not {shown}")),
            None => self.error(path, requirement),
        }
    }

    /// An error that does not show the value.
    pub fn error(&mut self, path: &Path, complaint: &str) {
        let problem = self.problem(path, complaint);
        // An invalid value was dropped: the error that it is missing would be a second one about the same key.
        if self.errors.iter().all(|error| error.key != problem.key) {
            self.errors.push(problem);
        }
    }

    /// An error of the source as a whole, or in a line of it.
    pub fn error_of_source(&mut self, line: Option<usize>, complaint: &str) {
        self.errors.push(ConfigProblem { file: self.file.clone(), line, key: None, problem: complaint.to_owned() });
    }

    /// Sets the lines of the keys, which are shown with their problems.
    pub fn set_lines(&mut self, lines: BTreeMap<Path, usize>) {
        self.lines = lines;
    }

    /// The locations of these keys.
    pub fn places(&self, keys: &[&'static str]) -> Places {
        let line = |key: &&'static str| Some((*key, *self.lines.get(&Path::of(key))?));
        Places { file: self.file.clone(), lines: keys.iter().filter_map(line).collect() }
    }

    /// A warning.
    pub fn warn(&mut self, path: &Path, note: &str) {
        let problem = self.problem(path, note);
        self.warnings.push(problem);
    }

    fn problem(&self, path: &Path, problem: &str) -> ConfigProblem {
        let line = path.upwards().find_map(|path| self.lines.get(&path).copied());
        ConfigProblem { file: self.file.clone(), line, key: Some(self.name(path)), problem: problem.to_owned() }
    }

    /// Whether `text` holds a secret.
    pub fn contains_secret(&self, text: &str) -> bool {
        self.secrets.iter().any(|secret| text.contains(secret.as_str()))
    }

    /// All problems.
    pub fn into_problems(self) -> Problems {
        Problems { errors: self.errors, warnings: self.warnings }
    }

    /// A value as text for the operator; none if it may be secret, or is long.
    fn show(&self, path: &Path, value: &Value) -> Option<String> {
        // A user of the MQTT server is a mapping with a hash; another value there may be the password.
        let is_user = matches!(&path.0[..], [section, users] | [section, users, _] if section == "mqtt_listen" && users == "users");
        if is_user || path.0.iter().any(|step| SECRET_KEYS.contains(&step.as_str())) {
            return None;
        }
        match value {
            Value::Null => Some("nothing".into()),
            Value::Array(_) => Some("a list".into()),
            Value::Object(_) => Some("a mapping".into()),
            Value::Bool(flag) => Some(flag.to_string()),
            Value::Number(number) => Some(number.to_string()).filter(|number| !self.contains_secret(number)),
            // A URL with user information would show the password.
            Value::String(text) if text.len() > SHOWN_MAX || text.contains('@') || self.contains_secret(text) => None,
            Value::String(text) => Some(format!("{text:?}")),
        }
    }

    /// The path as the operator wrote it; without a step that contains a secret.
    fn name(&self, path: &Path) -> String {
        let unfit = |step: &str| !self.known.contains(step) && (step.len() > SHOWN_MAX || self.contains_secret(step));
        let step = |step: &String| if unfit(step) { "?".to_owned() } else { step.clone() };
        let name = Path(path.0.iter().map(step).collect()).to_string();
        let alias = self.aliases.iter().find_map(|(alias, long)| Some(format!("{alias}{}", name.strip_prefix(long)?)));
        alias.unwrap_or(name)
    }
}

fn collect_scalars(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Null | Value::Bool(_) => {}
        Value::Number(number) => found.push(number.to_string()),
        Value::String(text) => found.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| collect_scalars(item, found)),
        Value::Object(keys) => keys.values().for_each(|item| collect_scalars(item, found)),
    }
}

/// The value of the secret `key` in a line, however broken the text around it is: all of it, and its first word.
fn after_key(line: &str, key: &str, known: &BTreeSet<String>) -> Vec<String> {
    let Some((before, rest)) = line.split_once(key) else { return Vec::new() };
    let is_around = |c: char| c.is_whitespace() || "\"',{}[]".contains(c);
    let secret = if let Some(value) = rest.trim_start_matches(['"', '\'', ' ']).strip_prefix(':') {
        value.trim_matches(is_around)
    } else {
        // A key without its colon, whose value became part of a name or of another value; or a longer key, or prose.
        let (name, value) = rest.split_at(rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len()));
        if before.contains('#') || known.contains(&format!("{key}{name}")) && !name.is_empty() {
            return Vec::new();
        }
        value.trim_matches(|c: char| !c.is_alphanumeric())
    };
    let secrets = [Some(secret), secret.split(is_around).next(), secret.split(" #").next()];
    secrets.into_iter().flatten().filter(|secret| !secret.is_empty()).map(str::to_owned).collect()
}
