//! What the classes of HF transformers 5 build in place of parts of `tokenizer.json`, compared with what the file has:
//! where they mean something else, a program that reads the file as it stands says so.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::tokenizer_class::TokenizerClass;

/// Qwen2's way to cut words.
const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A class with the settings of `tokenizer_config.json` that its parts depend on.
#[derive(Debug, Default)]
pub(crate) struct ClassParts {
    pub(crate) class: TokenizerClass,
    pub(crate) add_prefix_space: Option<bool>,
    pub(crate) legacy: Option<bool>,
}

impl ClassParts {
    /// What to say of the file `origin`, if the class builds something else than it has: `tokenizer` is its JSON with
    /// every added token.
    ///
    /// Errors name the part that is none.
    pub(crate) fn remark(&self, origin: &Path, tokenizer: &Value) -> Result<Option<String>> {
        let differing = self.differing(tokenizer)?;
        Ok((!differing.is_empty()).then(|| {
            format!(
                "{}: {} of transformers 5 has another {}; the file is read as it stands, as transformers up to 4.57 does",
                origin.display(),
                self.class.name(),
                differing.join(", ")
            )
        }))
    }

    fn differing(&self, tokenizer: &Value) -> Result<Vec<&'static str>> {
        let Some(built) = self.built() else { return Ok(Vec::new()) };
        let (built, own) = (Parts::of(&built)?, Parts::of(tokenizer)?);
        let is_same = [
            ("normalizer", built.normalizer == own.normalizer),
            ("pre_tokenizer", built.pre_tokenizer == own.pre_tokenizer),
            ("decoder", built.decoder == own.decoder),
            ("model", self.builds_model(&tokenizer["model"])),
        ];
        Ok(is_same.into_iter().filter_map(|(part, same)| (!same).then_some(part)).collect())
    }

    /// The parts as the class builds them, in the words of `tokenizer.json`.
    fn built(&self) -> Option<Value> {
        let with_space = |or| self.add_prefix_space.unwrap_or(or);
        let bytes = |add_prefix_space: bool, use_regex: bool| {
            let trim_offsets = true;
            json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex})
        };
        Some(match self.class {
            TokenizerClass::Plain => return None,
            TokenizerClass::Gpt2 => {
                json!({"pre_tokenizer": bytes(with_space(false), true), "decoder": bytes(true, true)})
            }
            TokenizerClass::Qwen2 => json!({
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false},
                    bytes(with_space(false), false),
                ]},
                "decoder": bytes(true, true),
            }),
            TokenizerClass::Llama => {
                let scheme = match (with_space(true), self.legacy.unwrap_or(false)) {
                    (false, _) => "never",
                    (true, false) => "first",
                    (true, true) => "always",
                };
                let mut decoders = vec![
                    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                    json!({"type": "ByteFallback"}),
                    json!({"type": "Fuse"}),
                ];
                if with_space(true) {
                    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                json!({
                    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false},
                    "decoder": {"type": "Sequence", "decoders": decoders},
                })
            }
        })
    }

    /// Whether `model` means what the class makes of its vocabulary and merges: BPE without any other setting, but for
    /// Llama's that characters without a token fall back to bytes.
    fn builds_model(&self, model: &Value) -> bool {
        let is_set = |key: &str| match &model[key] {
            Value::Bool(set) => *set,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(text) => !text.is_empty(),
            _ => false,
        };
        let has = |token: &str| model["vocab"].get(token).is_some();
        let is_bpe = model.get("type").map_or(model["merges"].is_array(), |kind| kind == "BPE");
        let others = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"];
        let falls_back = is_set("byte_fallback");
        let means_the_same = if self.class == TokenizerClass::Llama {
            let mut bytes = (0..=u8::MAX).filter(|byte| !is_never_in_text(*byte));
            falls_back && (!is_set("unk_token") || bytes.all(|byte| has(&format!("<0x{byte:02X}>"))))
        } else {
            let is_never = |c: char| u8::try_from(c).is_ok_and(is_never_in_text); // such bytes stand for themselves
            !(falls_back || is_set("unk_token"))
                || ByteLevel::alphabet().into_iter().all(|c| is_never(c) || has(c.encode_utf8(&mut [0; 4])))
        };
        is_bpe && means_the_same && !others.into_iter().any(is_set)
    }
}

/// Whether UTF-8 has no such byte.
fn is_never_in_text(byte: u8) -> bool {
    matches!(byte, 0xc0 | 0xc1 | 0xf5..)
}

/// The steps of each part: not in sequences of sequences, with every field that the library fills in, without those that
/// change neither ids nor text.
struct Parts {
    normalizer: Vec<Value>,
    pre_tokenizer: Vec<Value>,
    decoder: Vec<Value>,
}

impl Parts {
    fn of(tokenizer: &Value) -> Result<Self> {
        let mut parts = Self {
            normalizer: steps::<NormalizerWrapper>(&tokenizer["normalizer"]).context("normalizer")?,
            pre_tokenizer: steps::<PreTokenizerWrapper>(&tokenizer["pre_tokenizer"]).context("pre_tokenizer")?,
            decoder: steps::<DecoderWrapper>(&tokenizer["decoder"]).context("decoder")?,
        };
        let is_bytes = |step: &&mut Value| step["type"] == "ByteLevel";
        for step in parts.pre_tokenizer.iter_mut().filter(is_bytes) {
            step["trim_offsets"].take();
        }
        for step in parts.decoder.iter_mut().filter(is_bytes) {
            *step = json!({"type": "ByteLevel"});
        }
        // Spaces may be replaced before the splitting or in it: only a token that is looked for in between can tell.
        let added = tokenizer["added_tokens"].as_array();
        let in_between = added.is_some_and(|tokens| tokens.iter().any(|token| token["normalized"] == true));
        if let ([replace], [], false) = (&parts.normalizer[..], &parts.pre_tokenizer[..], in_between)
            && replace["pattern"]["String"] == " "
        {
            let never = json!({"type": "Metaspace", "replacement": replace["content"], "prepend_scheme": "never", "split": false});
            (parts.normalizer, parts.pre_tokenizer) = (Vec::new(), vec![never]);
        }
        Ok(parts)
    }
}

fn steps<T: DeserializeOwned + Serialize>(part: &Value) -> Result<Vec<Value>> {
    fn flatten(mut part: Value, steps: &mut Vec<Value>) {
        let key = ["normalizers", "pretokenizers", "decoders"].into_iter().find(|key| part[key].is_array());
        let inner = key.and_then(|key| part[key].as_array_mut());
        match inner.map(std::mem::take) {
            Some(inner) => inner.into_iter().for_each(|part| flatten(part, steps)),
            None => steps.push(part),
        }
    }

    let mut steps = Vec::new();
    if !part.is_null() {
        flatten(serde_json::to_value(serde_json::from_value::<T>(part.clone())?)?, &mut steps);
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::added_tokens::AddedTokens;

    fn golden() -> Value {
        serde_json::from_slice(&fs::read(fixtures::root().join("golden/tokenizer_class.json")).unwrap()).unwrap()
    }

    /// `tokenizer.json` of a case.
    fn tokenizer(golden: &Value, case: &Value) -> Value {
        let mut json = golden["tokenizers"][case["tokenizer"].as_str().unwrap()].clone();
        json.as_object_mut().unwrap().extend(case["keys"].as_object().unwrap().clone());
        if case["model"]["type"].is_string() {
            json["model"] = case["model"].clone();
        } else {
            json["model"].as_object_mut().unwrap().extend(case["model"].as_object().unwrap().clone());
        }
        if let Some(lacking) = case["lacks"].as_str() {
            json["model"]["vocab"].as_object_mut().unwrap().remove(lacking).unwrap();
        }
        json
    }

    /// What the folder of a case has, and what is said of it.
    fn read(golden: &Value, case: &Value) -> (ClassParts, Option<String>) {
        let folder = tempfile::tempdir().unwrap();
        let mut json = tokenizer(golden, case);
        let config = json!({"model_type": case["model_type"]});
        for (file, json) in
            [("tokenizer.json", &json), ("tokenizer_config.json", &case["config"]), ("config.json", &config)]
        {
            fs::write(folder.path().join(file), json.to_string()).unwrap();
        }
        let added = AddedTokens::open(folder.path()).unwrap();
        added.add_to(&mut json).unwrap();
        let remark = added.class.remark(Path::new("llm/tokenizer.json"), &json).unwrap();
        (added.class, remark)
    }

    #[test]
    fn a_class_is_spoken_of_where_it_reads_a_text_otherwise() {
        let golden = golden();
        for case in golden["cases"].as_array().unwrap() {
            let (parts, remark) = read(&golden, case);
            assert_eq!(remark.is_some(), case["differs"].as_bool().unwrap(), "{}: {remark:?}", case["name"]);
            let class = case["class"].as_str().unwrap();
            let Some(built) = parts.built() else {
                assert_eq!(class, "TokenizersBackend", "{}", case["name"]);
                continue;
            };
            assert_eq!(parts.class.name(), class, "{}", case["name"]);
            let (ours, theirs) = (Parts::of(&built).unwrap(), Parts::of(&case["built"]).unwrap());
            assert_eq!(ours.normalizer, theirs.normalizer, "{}", case["name"]);
            assert_eq!(ours.pre_tokenizer, theirs.pre_tokenizer, "{}", case["name"]);
            assert_eq!(ours.decoder, theirs.decoder, "{}", case["name"]);
        }
    }

    #[test]
    fn the_remark_names_file_class_and_parts() {
        let golden = golden();
        for (name, class, parts) in [
            ("GPT-2's over SmolLM2's", "GPT2Tokenizer", "pre_tokenizer"),
            ("GPT-2's over Qwen2's", "GPT2Tokenizer", "normalizer, pre_tokenizer"),
            ("GPT-2's without merges", "GPT2Tokenizer", "model"),
            ("GPT-2's without a decoder", "GPT2Tokenizer", "decoder"),
            ("Qwen2's without NFC", "Qwen2Tokenizer", "normalizer"),
            ("Qwen2's over pieces", "Qwen2Tokenizer", "normalizer, pre_tokenizer, decoder, model"),
            ("Llama's over an older file", "LlamaTokenizer", "normalizer, pre_tokenizer"),
            ("Llama's without Strip", "LlamaTokenizer", "decoder"),
            ("Llama's without bytes", "LlamaTokenizer", "model"),
        ] {
            let case = golden["cases"].as_array().unwrap().iter().find(|case| case["name"] == name).unwrap();
            let expected = format!(
                "llm/tokenizer.json: {class} of transformers 5 has another {parts}; the file is read as it stands, as \
                 transformers up to 4.57 does"
            );
            assert_eq!(read(&golden, case).1, Some(expected), "{name}");
        }
    }

    #[test]
    fn a_part_that_is_none_is_named() {
        let parts = ClassParts { class: TokenizerClass::Gpt2, ..ClassParts::default() };
        let error = parts.remark(Path::new("tokenizer.json"), &json!({"decoder": {"type": "Wrong"}})).unwrap_err();
        assert!(format!("{error:#}").starts_with("decoder: "), "{error:#}");
    }
}
