//! The known keys: the tree of a file is normalized to the shape of [`Raw::every_key`], and keys that do not fit are
//! reported.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::diagnostics::{Diagnostics, Path};
use super::raw::{ANY, Raw};

/// The most wrong letters for which a similar key is suggested; at most a third of the key.
const TYPO_MAX: usize = 3;
/// Shown in place of a name that the operator chooses.
const NAME_PLACEHOLDER: &str = "NAME";

/// The paths of all keys; [`ANY`] stands for a name that the operator chooses.
pub(super) fn paths() -> Vec<Path> {
    fn walk(path: &Path, known: &Value, found: &mut Vec<Path>) {
        for (key, below) in known.as_object().into_iter().flatten() {
            let path = path.then(key);
            walk(&path, below, found);
            found.push(path);
        }
    }
    let mut found = Vec::new();
    walk(&Path::default(), &Raw::every_key(), &mut found);
    found
}

/// The names of all keys.
pub(super) fn names() -> BTreeSet<String> {
    paths().into_iter().flat_map(|path| path.0).collect()
}

/// Normalizes `tree`: mappings and lists are where the config has mappings and lists; unknown keys are removed, with a
/// warning.
pub(super) fn normalize(tree: &mut Value, diagnostics: &mut Diagnostics) {
    normalize_at(&Path::default(), &Path::default(), &Raw::every_key(), tree, diagnostics);
}

/// `place` is `path` with [`ANY`] in place of names.
fn normalize_at(path: &Path, place: &Path, known: &Value, value: &mut Value, diagnostics: &mut Diagnostics) {
    match known {
        Value::Object(keys) => normalize_mapping(path, place, keys, value, diagnostics),
        Value::Array(_) => normalize_list(path, value, diagnostics),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn normalize_list(path: &Path, value: &mut Value, diagnostics: &mut Diagnostics) {
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate().filter(|(_, item)| item.is_null()) {
                diagnostics.invalid(&path.index(index), item, "must be an entry, a value behind \"- \"");
            }
        }
        Value::Null => *value = Value::Array(Vec::new()),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            diagnostics.invalid(path, value, "must be a list, lines that begin with \"- \"");
            *value = Value::Array(vec![Value::Null]);
        }
    }
}

fn normalize_mapping(
    path: &Path,
    place: &Path,
    known: &Map<String, Value>,
    value: &mut Value,
    diagnostics: &mut Diagnostics,
) {
    if known.contains_key("host") && known.contains_key("port") {
        split_host_and_port(value);
    }
    let mut keys = match value.take() {
        Value::Object(keys) => keys,
        Value::Null => Map::new(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
            let names: Vec<&str> = known.keys().map(|key| if key == ANY { "a name" } else { key }).collect();
            diagnostics.invalid(path, &other, &format!("must be a mapping (keys: {})", names.join(", ")));
            Map::new()
        }
    };
    merge(&mut keys);
    let is_block = |key: &String| known.get(key).is_some_and(Value::is_object);
    let empty: Vec<String> =
        keys.iter().filter(|(key, value)| value.is_null() && is_block(key)).map(|(key, _)| key.clone()).collect();
    for (key, mut value) in keys.clone() {
        let Some((step, below)) = known.get_key_value(&key).or_else(|| known.get_key_value(ANY)) else {
            keys.remove(&key);
            warn_unknown(path, place, &key, &empty, diagnostics);
            continue;
        };
        normalize_at(&path.then(&key), &place.then(step), below, &mut value, diagnostics);
        keys.insert(key, value);
    }
    *value = Value::Object(keys);
}

/// `127.0.0.1:5000`, `[::1]:5000` or `::1` as host and port.
fn split_host_and_port(value: &mut Value) {
    let Some(text) = value.as_str() else { return };
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Value::from(port)),
        _ => (text, Value::Null),
    };
    *value = Value::Object(Map::from_iter([("host".into(), host.into()), ("port".into(), port)]));
}

/// YAML 1.1's `<<`: adds the keys of other mappings that the mapping itself does not have.
fn merge(keys: &mut Map<String, Value>) {
    let sources = match keys.remove("<<") {
        Some(Value::Array(items)) => items,
        Some(source) => vec![source],
        None => return,
    };
    for source in sources {
        let Value::Object(source) = source else { continue };
        for (key, value) in source {
            keys.entry(key).or_insert(value);
        }
    }
}

/// `empty` are the empty blocks beside the key.
fn warn_unknown(path: &Path, place: &Path, key: &str, empty: &[String], diagnostics: &mut Diagnostics) {
    let guess = match nearest(path, place, key, empty) {
        None => String::new(),
        Some(SimilarKey { path, parent: Some(parent), .. }) if !parent.0.is_empty() => {
            format!(", did you mean {path}? It belongs below {parent}, with spaces before it")
        }
        Some(SimilarKey { path, .. }) if path.0.last().is_some_and(|name| name == "password_hash") => {
            format!(", did you mean {path}? \"wgkex-broker hash-password\" prints what it must be")
        }
        Some(SimilarKey { path, .. }) => format!(", did you mean {path}?"),
    };
    diagnostics.warn(&path.then(key), &format!("is not a known key and is ignored{guess}"));
}

/// A known key that is similar to an unknown one.
struct SimilarKey {
    path: Path,
    /// How many letters differ; a part that is left out counts as one.
    edit_distance: usize,
    is_elsewhere: bool,
    /// Whether it belongs to a block that is present and empty.
    is_in_empty: bool,
    /// The block that it belongs to, if the names are equal and only that block is missing around the unknown key.
    parent: Option<Path>,
}

/// The known key that is most similar to `key`: one of the same mapping, else of the whole file. If several blocks have
/// such a key, that of the empty block.
fn nearest(path: &Path, place: &Path, key: &str, empty: &[String]) -> Option<SimilarKey> {
    let candidates = paths().into_iter().filter_map(|known| {
        let (name, parent) = known.0.split_last()?;
        let is_elsewhere = parent != place.0;
        // In other blocks, and at the top, a single word is part of too many keys.
        let may_lack_words = key.contains('_') || !(is_elsewhere || parent.is_empty());
        let edit_distance = edit_distance(&name.to_ascii_lowercase(), &key.to_ascii_lowercase(), may_lack_words)?;
        let named = |steps: &[String]| {
            Path(steps.iter().map(|step| if step == ANY { NAME_PLACEHOLDER } else { step }.into()).collect())
        };
        let parent = (edit_distance == 0 && parent.starts_with(&place.0)).then(|| named(parent));
        let path = if is_elsewhere { named(&known.0) } else { path.then(name) };
        let is_in_empty = is_elsewhere && known.0.get(place.0.len()).is_some_and(|block| empty.contains(block));
        (name != ANY).then_some(SimilarKey { path, edit_distance, is_elsewhere, is_in_empty, parent })
    });
    let mut candidates: Vec<_> = candidates.collect();
    candidates.sort_by_key(|near| (near.is_elsewhere, near.edit_distance, !near.is_in_empty, near.path.0.len()));
    let rank = |near: &SimilarKey| (near.edit_distance, near.is_in_empty);
    let is_ambiguous = matches!(&candidates[..], [first, second, ..]
        if first.is_elsewhere && first.parent.is_some() && second.parent.is_some() && rank(first) == rank(second));
    candidates.into_iter().next().filter(|_| !is_ambiguous)
}

/// How many letters differ between `key` and the `known` one; none if too many. A first or last word that is left out,
/// if that `may_lack_words`, counts as one.
fn edit_distance(known: &str, key: &str, may_lack_words: bool) -> Option<usize> {
    let edit_distance = strsim::damerau_levenshtein(known, key);
    let lacks_a_word = may_lack_words && (known.ends_with(&format!("_{key}")) || known.starts_with(&format!("{key}_")));
    match edit_distance {
        _ if edit_distance <= TYPO_MAX.min(known.len() / 3) => Some(edit_distance),
        _ => lacks_a_word.then_some(1),
    }
}
