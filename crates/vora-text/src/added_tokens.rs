//! The tokens beside a tokenizer's vocabulary, as `AutoTokenizer` of HF transformers 5 takes them: `tokenizer.json` has
//! some, `tokenizer_config.json` may name more, or else `special_tokens_map.json` and `added_tokens.json`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use vora_files::tell_once;
use vora_gguf::folder::read_json;

use crate::class_parts::ClassParts;
use crate::tokenizer_class::TokenizerClass;

/// The special tokens that every tokenizer has a name for, in HF's order. Other keys on `_token` are a model's own.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files beside `tokenizer.json` say of tokens.
#[derive(Debug, Default)]
pub(crate) struct AddedTokens {
    /// `bos_token` and so on, then the model's own.
    named: Vec<(String, Value)>,
    /// `extra_special_tokens`, known as `additional_special_tokens` until 2025.
    extra: Vec<Value>,
    /// `added_tokens_decoder`, or what `added_tokens.json` has instead, in the order of the ids that they should have.
    listed: BTreeMap<u64, Value>,
    /// What the tokenizer's class is, in HF transformers.
    pub(crate) class: ClassParts,
}

impl AddedTokens {
    /// Reads the files of the folder `path`, or the metadata of a GGUF file.
    ///
    /// Errors name the file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut config: Pairs<Entry> = read_json(path, "tokenizer_config.json")?;
        let lists_tokens = config.get("added_tokens_decoder").is_some();
        rename_additional(&mut config);
        let map: Pairs<Entry> = read_json(path, "special_tokens_map.json")?;
        for (key, value) in map.0 {
            if let (Some(ours), Some(theirs)) = (config.get(&key).and_then(Entry::content), value.content())
                && ours != theirs
            {
                let (winner, taken) =
                    if lists_tokens { ("tokenizer_config.json", ours) } else { ("special_tokens_map.json", theirs) };
                tell_once(format!(
                    "{}: {key} is `{ours}` in tokenizer_config.json and `{theirs}` in special_tokens_map.json: `{taken}` \
                     of {winner} is taken, as in transformers",
                    path.display()
                ));
            }
            if !lists_tokens {
                config.insert(key, value);
            }
        }
        rename_additional(&mut config);
        let class = class(path, &config)?;
        for (key, token) in by_class(class, &config) {
            config.insert(key.to_owned(), Entry::Other(token.into()));
        }
        let setting = |key: &str| config.get(key).and_then(Entry::flag);
        let class = ClassParts { class, add_prefix_space: setting("add_prefix_space"), legacy: setting("legacy") };

        let mut named = Vec::new();
        for name in NAMES {
            named.extend(config.get(name).and_then(Entry::token).map(|token| (name.to_owned(), token)));
        }
        for (key, value) in &config.0 {
            if let Some(token) = value.token().filter(|_| key.ends_with("_token") && !NAMES.contains(&key.as_str())) {
                named.push((key.clone(), token));
            }
        }
        let extra = match config.get("extra_special_tokens") {
            Some(Entry::Object(own)) => {
                named.extend(own.0.iter().cloned());
                Vec::new()
            }
            Some(Entry::Other(Value::Array(tokens))) => tokens.clone(),
            _ => Vec::new(),
        };
        let mut tokens = Self { named, extra, listed: BTreeMap::new(), class };
        tokens.listed = match config.get("added_tokens_decoder") {
            Some(listed) => {
                listed.tokens_by_id().with_context(|| path.join("tokenizer_config.json").display().to_string())?
            }
            None => tokens.of_older_file(path)?,
        };
        Ok(tokens)
    }

    /// What `added_tokens.json` lists, a file of older libraries.
    fn of_older_file(&self, path: &Path) -> Result<BTreeMap<u64, Value>> {
        let file: Pairs<Value> = read_json(path, "added_tokens.json")?;
        let special = self.special();
        let mut listed = BTreeMap::new();
        for (token, id) in file.0 {
            let id = id.as_u64();
            let id =
                id.with_context(|| format!("{}: `{token}` has no id", path.join("added_tokens.json").display()))?;
            let is_special = special.contains(token.as_str());
            listed.insert(id, json!({"content": token, "special": is_special}));
        }
        Ok(listed)
    }

    /// `bos_token`, `eos_token` and so on.
    pub(crate) fn named(&self) -> Vec<(String, String)> {
        self.named.iter().filter_map(|(key, token)| Some((key.clone(), content(token)?.to_owned()))).collect()
    }

    fn special(&self) -> HashSet<&str> {
        self.named.iter().map(|(_, token)| token).chain(&self.extra).filter_map(content).collect()
    }

    /// Adds them to what `tokenizer.json` has, under the ids that the library gives them: its own where a token is in
    /// the vocabulary, else the next that is free, whatever id a file has for it.
    pub(crate) fn add_to(&self, json: &mut Value) -> Result<()> {
        if !json["model"].is_object() {
            return Ok(()); // not the file of a tokenizer: whoever reads it says so
        }
        let own = json.get("added_tokens").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut vocabulary = Vocabulary::of(&json["model"]["vocab"]);
        for token in &own {
            ensure!(content(token).is_some(), "`added_tokens` has an entry without `content`");
        }
        vocabulary.add(&own);
        for token in &own {
            let (name, id) = (content(token).unwrap_or_default(), token["id"].as_u64());
            let id = id.with_context(|| format!("added token `{name}` has no `id`"))?;
            if let Some(found) = vocabulary.id(name).filter(|&found| found != id) {
                tell_once(format!(
                    "tokenizer.json gives the added token `{name}` the id {id}, but it comes to {found} after the \
                     vocabulary: that is taken, as in transformers"
                ));
            }
        }

        let names: HashSet<&str> = self.named.iter().filter_map(|(_, token)| content(token)).collect();
        let mut batch = Vec::new();
        for token in self.listed.values() {
            let mut token = token.clone();
            if content(&token).is_some_and(|name| names.contains(name)) {
                token["special"] = true.into();
            }
            batch.push(token);
        }
        let mut known: HashSet<&str> = own.iter().chain(self.listed.values()).filter_map(content).collect();
        for (token, is_named) in self.named.iter().map(|(_, t)| (t, true)).chain(self.extra.iter().map(|t| (t, false)))
        {
            let Some(name) = content(token).filter(|name| known.insert(name)) else { continue };
            let mut token = if token.is_object() { token.clone() } else { json!({"content": name, "special": true}) };
            if is_named {
                token["special"] = true.into();
            }
            batch.push(token);
        }
        vocabulary.add(&batch);
        let added = vocabulary.added.into_values().collect();
        json["added_tokens"] = added;
        Ok(())
    }
}

/// `bos_token`, `eos_token` and so on, as `tokenizer_config.json` names them; where it lists no added tokens,
/// `special_tokens_map.json` goes first. Or from the metadata of a GGUF file.
///
/// # Errors
/// Names the file that cannot be read, or is no such JSON.
pub fn special_tokens(path: &Path) -> Result<Vec<(String, String)>> {
    Ok(AddedTokens::open(path)?.named())
}

/// Of [`special_tokens`] those that no file of the folder names, but the class of its tokenizer in HF transformers: a folder
/// that takes the tokenizer's files over has them too once its `tokenizer_config.json` names them.
///
/// # Errors
/// As [`special_tokens`].
pub fn special_tokens_by_class(path: &Path) -> Result<Vec<(&'static str, &'static str)>> {
    let mut config: Pairs<Entry> = read_json(path, "tokenizer_config.json")?;
    if config.get("added_tokens_decoder").is_none() {
        let map: Pairs<Entry> = read_json(path, "special_tokens_map.json")?;
        map.0.into_iter().for_each(|(key, value)| config.insert(key, value));
    }
    Ok(by_class(class(path, &config)?, &config))
}

/// The class of the folder's tokenizer.
fn class(path: &Path, config: &Pairs<Entry>) -> Result<TokenizerClass> {
    TokenizerClass::of(path, config.get("tokenizer_class").and_then(Entry::content))
}

/// The special tokens of a class that `config` has no key for; `null` is one that it has none of.
fn by_class(class: TokenizerClass, config: &Pairs<Entry>) -> Vec<(&'static str, &'static str)> {
    class.special_tokens().iter().filter(|(key, _)| config.get(key).is_none()).copied().collect()
}

/// The newer name of `additional_special_tokens`, where the file does not have both.
fn rename_additional(config: &mut Pairs<Entry>) {
    let is_empty = config.get("extra_special_tokens").is_none_or(Entry::is_empty);
    if let Some(at) = config.0.iter().position(|(key, _)| key == "additional_special_tokens").filter(|_| is_empty) {
        let (_, tokens) = config.0.remove(at);
        config.insert("extra_special_tokens".to_owned(), tokens);
    }
}

/// The words of a token, which files have as a string or as an object.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// Which id every token has, in the library's way of giving them.
#[derive(Debug)]
struct Vocabulary<'a> {
    model: &'a Value,              // an object, or a list of pieces
    pieces: HashMap<&'a str, u64>, // of such a list
    added: BTreeMap<u64, Value>,
    ids: HashMap<String, u64>, // of what is added
}

impl<'a> Vocabulary<'a> {
    fn of(model: &'a Value) -> Self {
        let pieces = model.as_array().into_iter().flatten().zip(0..);
        let pieces = pieces.filter_map(|(piece, id)| Some((piece[0].as_str()?, id))).collect();
        Self { model, pieces, added: BTreeMap::new(), ids: HashMap::new() }
    }

    fn id(&self, token: &str) -> Option<u64> {
        let in_model = || self.model.get(token).and_then(Value::as_u64).or_else(|| self.pieces.get(token).copied());
        self.ids.get(token).copied().or_else(in_model)
    }

    /// Adds tokens, in order. A token that is there already keeps its id; one that was special stays so.
    fn add(&mut self, tokens: &[Value]) {
        let len = self.model.as_object().map_or(self.pieces.len(), serde_json::Map::len) as u64;
        let last = self.added.last_key_value().map(|(&id, _)| id);
        let mut next = last.filter(|&last| last >= len || len == 0).map_or(len, |last| last + 1);
        for token in tokens {
            let Some(name) = content(token).filter(|name| !name.is_empty()) else { continue };
            let id = self.id(name).unwrap_or_else(|| {
                next += 1;
                next - 1
            });
            let flag = |key: &str| token[key].as_bool();
            let was_special = self.added.get(&id).is_some_and(|token| token["special"] == true);
            let special = flag("special").unwrap_or(false);
            let added = json!({
                "id": id, "content": name, "single_word": flag("single_word").unwrap_or(false),
                "lstrip": flag("lstrip").unwrap_or(false), "rstrip": flag("rstrip").unwrap_or(false),
                "normalized": flag("normalized").unwrap_or(!special), "special": special || was_special,
            });
            self.ids.insert(name.to_owned(), id);
            self.added.insert(id, added);
        }
    }
}

/// A key's value.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Entry {
    Object(Pairs<Value>),
    Other(Value),
}

impl Entry {
    /// As a token: a string, or an object with `content`.
    fn token(&self) -> Option<Value> {
        match self {
            Self::Object(object) => {
                object.get("content")?;
                Some(Value::Object(object.0.iter().cloned().collect()))
            }
            Self::Other(value) => value.is_string().then(|| value.clone()),
        }
    }

    fn content(&self) -> Option<&str> {
        match self {
            Self::Object(object) => object.get("content")?.as_str(),
            Self::Other(value) => value.as_str(),
        }
    }

    fn flag(&self) -> Option<bool> {
        match self {
            Self::Object(_) => None,
            Self::Other(value) => value.as_bool(),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Object(object) => object.0.is_empty(),
            Self::Other(value) => value.is_null() || value.as_array().is_some_and(Vec::is_empty),
        }
    }

    /// As `added_tokens_decoder`: ids as keys, tokens as values.
    fn tokens_by_id(&self) -> Result<BTreeMap<u64, Value>> {
        let Self::Object(listed) = self else { return Ok(BTreeMap::new()) };
        let token = |(id, token): &(String, Value)| {
            ensure!(token["content"].is_string(), "added_tokens_decoder: `{id}` is no token with `content`");
            Ok((id.parse().with_context(|| format!("added_tokens_decoder: `{id}` is no id"))?, token.clone()))
        };
        listed.0.iter().map(token).collect()
    }
}

/// An object's keys and values in the order of the file, which decides about the ids of new tokens.
#[derive(Debug, Clone)]
struct Pairs<T>(Vec<(String, T)>);

impl<T> Default for Pairs<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Pairs<T> {
    fn get(&self, key: &str) -> Option<&T> {
        self.0.iter().rev().find_map(|(name, value)| (name == key).then_some(value))
    }

    /// Puts a value in the place of the one that the key had, else at the end.
    fn insert(&mut self, key: String, value: T) {
        match self.0.iter_mut().find(|(name, _)| *name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Pairs::default();
                while let Some(pair) = map.next_entry()? {
                    pairs.0.push(pair);
                }
                Ok(pairs)
            }
        }

        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::Tokenizer;

    fn tiny(file: &str) -> PathBuf {
        fixtures::root().join("tiny/tokenizer").join(file)
    }

    fn golden() -> Value {
        serde_json::from_slice(&fs::read(fixtures::root().join("golden/added_tokens.json")).unwrap()).unwrap()
    }

    /// The folder of a case of the golden file.
    fn folder(files: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(tiny("tokenizer.json")).unwrap()).unwrap();
        tokenizer.as_object_mut().unwrap().extend(files["tokenizer"].as_object().unwrap().clone());
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (file, text) in files.as_object().unwrap() {
            if let Some(text) = text.as_str() {
                fs::write(folder.path().join(file), text).unwrap();
            }
        }
        folder
    }

    fn ids(value: &Value) -> Vec<i64> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn tokens_beside_the_vocabulary_are_the_references() {
        let golden = golden();
        let text = golden["text"].as_str().unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let (name, folder) = (&case["name"], folder(&case["files"]));
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            assert_eq!(tokenizer.vocab_size(), case["vocab_size"], "{name}");
            let found = tokenizer.encode_template(text).unwrap();
            assert_eq!(found, ids(&case["ids"]), "{name}");
            assert_eq!(tokenizer.decode(&found, false).unwrap(), case["decoded"], "{name}");
            assert_eq!(tokenizer.decode(&found, true).unwrap(), case["decoded_plain"], "{name}");
            assert_eq!(tokenizer.encode_whole("a red ring").unwrap(), ids(&case["whole"]), "{name}");
            let named: BTreeMap<String, String> = special_tokens(folder.path()).unwrap().into_iter().collect();
            assert_eq!(json!(named), case["named"], "{name}");
            let eos = named.get("eos_token").map(|eos| tokenizer.token_to_id(eos).unwrap());
            assert_eq!(tokenizer.eos_ids(), eos.as_slice(), "{name}");
        }
    }

    #[test]
    fn tokens_of_a_class_are_told_apart_from_those_of_the_files() {
        let of = |config: &str| {
            let files = json!({"tokenizer": {}, "tokenizer_config.json": config, "special_tokens_map.json": r#"{"bos_token": "<x>"}"#});
            special_tokens_by_class(folder(&files).path()).unwrap()
        };
        let end = |key| (key, "<|endoftext|>");
        assert_eq!(of(r#"{"tokenizer_class": "GPT2Tokenizer"}"#), [end("eos_token"), end("unk_token")]);
        let listed = r#"{"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {}, "unk_token": null}"#;
        assert_eq!(of(listed), [end("bos_token"), end("eos_token")]);
        assert!(of(r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#).is_empty());
    }

    #[test]
    fn what_is_no_token_is_named_with_its_file() {
        for (file, text, expected) in [
            (
                "tokenizer_config.json",
                r#"{"added_tokens_decoder": {"512": "<loc>"}}"#,
                "`512` is no token with `content`",
            ),
            ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "<loc>"}}}"#, "`x` is no id"),
            ("tokenizer_config.json", "[]", "is not JSON as it should be"),
            ("added_tokens.json", r#"{"<loc>": "512"}"#, "`<loc>` has no id"),
            ("special_tokens_map.json", "nothing", "is not JSON as it should be"),
        ] {
            let folder = folder(&json!({"tokenizer": {}, file: text}));
            let error = format!("{:#}", Tokenizer::open(folder.path()).unwrap_err());
            assert!(error.contains(file) && error.contains(expected), "{error}");
        }
    }
}
