//! A run file as a tree of values: reading it, setting one by its dotted key, comparing two.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_saphyr::{DefaultMessageFormatter, MessageFormatter};

/// Reads YAML. Only `true` and `false` are booleans, as in YAML 1.2: `no` is a word. Errors carry line, column and the
/// lines around.
pub(crate) fn from_yaml<T: DeserializeOwned>(text: &str) -> Result<T> {
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let text = error.render_with_formatter(&Words);
        anyhow!("{}", text.strip_prefix("error: ").unwrap_or(&text))
    })
}

/// What is wrong with YAML, in words for whoever wrote it.
struct Words;

impl MessageFormatter for Words {
    fn format_message<'a>(&self, error: &'a serde_saphyr::Error) -> Cow<'a, str> {
        match error {
            serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
                format!("`{key}` is there twice: leave one of them out").into()
            }
            serde_saphyr::Error::NonFiniteFloat { value, .. } => format!("`{value}` is not a finite number").into(),
            _ => DefaultMessageFormatter.format_message(error),
        }
    }
}

/// The same entry with its value as text, where that is a number or a boolean: `run_name=2024`.
pub(crate) fn as_text(entry: &str) -> Option<String> {
    let (key, raw) = entry.split_once('=')?;
    let is_scalar = matches!(from_yaml(raw).ok()?, Value::Number(_) | Value::Bool(_));
    is_scalar.then(|| format!("{key}={}", Value::from(raw)))
}

/// Keys of two names, by their places: serde's `alias` of each is here.
const NAMES: [[&str; 2]; 2] =
    [["evaluation_strategy", "eval_strategy"], ["model.vision_attention", "model.vision_attention_mask"]];

/// What stands in a tree at a dotted key.
fn at<'a>(tree: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(tree, |place, part| place.get(part))
}

/// An error where a tree has one key by two names.
pub(crate) fn no_two_names(tree: &Value) -> Result<()> {
    for [name, other] in NAMES {
        ensure!(
            at(tree, name).is_none() || at(tree, other).is_none(),
            "`{name}` and `{other}` are two names of one key: leave one of them out"
        );
    }
    Ok(())
}

/// Takes out of a tree what stands there by the other name of `key`.
fn take_other_name(tree: &mut Value, key: &str) {
    let other = NAMES.iter().find_map(|[a, b]| if *a == key { Some(b) } else { (*b == key).then_some(a) });
    let Some(other) = other else { return };
    let (parent, last) = other.rsplit_once('.').unwrap_or(("", other));
    let place = if parent.is_empty() { Some(tree) } else { tree.get_mut(parent) };
    if let Some(Value::Object(map)) = place {
        map.remove(last);
    }
}

/// Sets `a.b=c` in a tree, where `c` is YAML; numbers step into lists. A key of two names loses what stands by the other.
pub(crate) fn set(tree: &mut Value, entry: &str) -> Result<()> {
    let (key, value) = entry.split_once('=').with_context(|| format!("--set {entry}: it must be key.key=value"))?;
    let value: Value = from_yaml(value).with_context(|| format!("--set {entry}"))?;
    let mut place = &mut *tree;
    for part in key.split('.') {
        ensure!(!part.is_empty(), "--set {entry}: the key has an empty part");
        if place.is_null() {
            *place = Value::Object(serde_json::Map::new());
        }
        place = match place {
            Value::Object(map) => map.entry(part).or_insert(Value::Null),
            Value::Array(list) => {
                let len = list.len();
                part.parse::<usize>()
                    .ok()
                    .and_then(|i| list.get_mut(i))
                    .with_context(|| format!("--set {entry}: `{part}` is no place in a list of {len}"))?
            }
            _ => bail!("--set {entry}: `{part}` would go into a single value"),
        };
    }
    *place = value;
    take_other_name(tree, key);
    Ok(())
}

/// A key that two runs do not agree on.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The dotted key.
    pub key: String,
    /// Its value in the first.
    pub first: String,
    /// Its value in the second.
    pub second: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {}, is {}", self.key, self.first, self.second)
    }
}

/// Collects the keys, below `key`, whose values differ.
pub(crate) fn compare(key: &str, first: &Value, second: &Value, found: &mut Vec<Difference>) {
    if let (Value::Object(a), Value::Object(b)) = (first, second) {
        let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for name in keys {
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(&key, a.get(name).unwrap_or(&Value::Null), b.get(name).unwrap_or(&Value::Null), found);
        }
    } else if first != second {
        let text = |value: &Value| if value.is_null() { "absent".to_owned() } else { value.to_string() };
        found.push(Difference { key: key.to_owned(), first: text(first), second: text(second) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_value_is_set_where_its_key_says() {
        let mut tree = json!({"a": {"b": 1}, "list": [{"x": 1}, {"x": 2}], "empty": null});
        for entry in ["a.b=2e-3", "a.c=True", "list.1.x=[1, two]", "empty.new.deep=no", "text='3'"] {
            set(&mut tree, entry).unwrap();
        }
        let expected = json!({
            "a": {"b": 2e-3, "c": true},
            "list": [{"x": 1}, {"x": [1, "two"]}],
            "empty": {"new": {"deep": "no"}},
            "text": "3",
        });
        assert_eq!(tree, expected);
    }

    /// A new alias has to be known here.
    #[test]
    fn every_alias_has_its_other_name() {
        let src = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let (mut folders, mut aliases) = (vec![src], 0);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(path).unwrap();
                aliases +=
                    text.lines().filter(|line| line.trim().starts_with("#[serde(") && line.contains("alias =")).count();
            }
        }
        assert_eq!(aliases, NAMES.len());
    }

    #[test]
    fn a_key_that_leads_nowhere_is_named() {
        let mut tree = json!({"a": {"b": 1}, "list": [1]});
        for (entry, expected) in [
            ("a", "--set a: it must be key.key=value"),
            ("a.b.c=1", "`c` would go into a single value"),
            ("a..b=1", "the key has an empty part"),
            ("list.1=1", "`1` is no place in a list of 1"),
            ("a=[", "--set a=["),
        ] {
            let error = format!("{:#}", set(&mut tree, entry).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn differences_have_dotted_keys() {
        let mut found = Vec::new();
        compare("", &json!({"a": {"b": 1, "c": 2}, "l": [1]}), &json!({"a": {"b": 1, "d": 2}, "l": [2]}), &mut found);
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["a.c was 2, is absent", "a.d was absent, is 2", "l was [1], is [2]"]);
    }
}
