//! `tokenizer.json`, special tokens and chat template out of a GGUF file's metadata.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::{Llm, sentencepiece};

/// `tokenizer.ggml.token_type`: tokens that text becomes, what stands for all others, tokens that text never becomes, that are matched before
/// anything else, that nothing has, and that are one byte.
pub(crate) const NORMAL: i32 = 1;
pub(crate) const UNKNOWN: i32 = 2;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;
pub(crate) const BYTE: i32 = 6;

/// The parts of `tokenizer.json` by which tokenizers differ.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
}

impl<B: AsRef<[u8]>> Llm<B> {
    /// HF's `tokenizer.json` of a byte-level BPE (`gpt2`), or of SentencePiece's BPE (`llama`). GGUF keeps no pattern that
    /// splits a byte-level BPE's text first, only its name: known are `smollm`, `gpt-2`, `llama-bpe` (Llama 3), `qwen2` and `tekken`.
    ///
    /// # Errors
    /// Names the metadata that is missing, or a tokenizer of another type.
    pub fn tokenizer(&self) -> Result<Value> {
        let kind = self.file().text("tokenizer.ggml.model")?;
        let tokens = self.tokens()?;
        let vocab: Map<String, Value> =
            tokens.iter().zip(0..).map(|(token, id)| ((*token).into(), id.into())).collect();
        ensure!(vocab.len() == tokens.len(), "tokenizer.ggml.tokens has a token twice");
        let Parts { normalizer, pre_tokenizer, decoder, model } = match kind {
            "gpt2" => self.byte_level(vocab)?,
            "llama" => self.sentencepiece(vocab)?,
            other => bail!(
                "tokenizer.ggml.model is `{other}`, known are `gpt2`, the byte-level BPE, and `llama`, SentencePiece's"
            ),
        };
        let added: Vec<Value> = self
            .added_tokens()?
            .into_iter()
            .map(|(id, special)| {
                let mut token = added_token(tokens[id], special);
                token["id"] = id.into();
                token
            })
            .collect();
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.first_token()?,
            "decoder": decoder,
            "model": model,
        }))
    }

    fn byte_level(&self, vocab: Map<String, Value>) -> Result<Parts> {
        let file = self.file();
        let pre = file.text("tokenizer.ggml.pre")?;
        if file.has(ADD_SPACE_PREFIX) {
            let prefix = file.bool(ADD_SPACE_PREFIX)?;
            ensure!(!prefix, "{ADD_SPACE_PREFIX} is true, which no byte-level BPE here has");
        }
        let (normalizer, pre_tokenizer) = splitting(pre)?;
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignores_merges(pre),
            "vocab": vocab,
            "merges": file.texts("tokenizer.ggml.merges")?,
        });
        Ok(Parts { normalizer, pre_tokenizer, decoder: byte_level(true, true), model })
    }

    fn sentencepiece(&self, vocab: Map<String, Value>) -> Result<Parts> {
        let file = self.file();
        let (tokens, types) = (self.tokens()?, self.types()?);
        let scores = file.floats("tokenizer.ggml.scores")?;
        ensure!(
            scores.len() == tokens.len(),
            "tokenizer.ggml.scores has {} entries for {} tokens",
            scores.len(),
            tokens.len()
        );
        let pieces = tokens.into_iter().zip(scores).zip(types);
        let pieces: Vec<(&str, f32)> = pieces.filter_map(|(piece, kind)| (kind == NORMAL).then_some(piece)).collect();
        let adds_prefix = !file.has(ADD_SPACE_PREFIX) || file.bool(ADD_SPACE_PREFIX)?;
        let (normalizer, decoder) = sentencepiece::normalizer_and_decoder(adds_prefix);
        let unknown = self.token_id("unknown")?.map(|id| self.tokens().map(|tokens| tokens[id])).transpose()?;
        let model = sentencepiece::model(vocab, sentencepiece::merges(&pieces), unknown);
        Ok(Parts { normalizer, pre_tokenizer: Value::Null, decoder, model })
    }

    /// The keys of HF's `tokenizer_config.json` that name special tokens; `chat_template` where the file has one.
    ///
    /// # Errors
    /// Names metadata of another type, or an id outside the vocabulary.
    pub fn tokenizer_config(&self) -> Result<Map<String, Value>> {
        let tokens = self.tokens()?;
        let mut config = Map::new();
        for (key, name) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]
        {
            if let Some(id) = self.token_id(name)? {
                config.insert(key.into(), tokens[id].into());
            }
        }
        let decoder =
            self.added_tokens()?.into_iter().map(|(id, special)| (id.to_string(), added_token(tokens[id], special)));
        config.insert("added_tokens_decoder".into(), Value::Object(decoder.collect()));
        if self.file().has("tokenizer.chat_template") {
            config.insert("chat_template".into(), self.file().text("tokenizer.chat_template")?.into());
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        // A class of its own would build its own splitting and drop that of `tokenizer.json`.
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        Ok(config)
    }

    fn tokens(&self) -> Result<Vec<&str>> {
        self.file().texts("tokenizer.ggml.tokens")
    }

    fn types(&self) -> Result<Vec<i32>> {
        let (types, tokens) = (self.file().integers("tokenizer.ggml.token_type")?, self.tokens()?.len());
        ensure!(types.len() == tokens, "tokenizer.ggml.token_type has {} entries for {tokens} tokens", types.len());
        Ok(types)
    }

    /// Ids of the tokens that are matched before the text is split, and whether they are special.
    fn added_tokens(&self) -> Result<Vec<(usize, bool)>> {
        let added = self.types()?.into_iter().enumerate();
        let added = added.filter(|(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind));
        Ok(added.map(|(id, kind)| (id, kind != USER_DEFINED)).collect())
    }

    /// The id of `bos`, `eos`, `padding` or `unknown`, where the file names one.
    fn token_id(&self, name: &str) -> Result<Option<usize>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        if !self.file().has(&key) {
            return Ok(None);
        }
        let (id, len) = (usize::try_from(self.file().unsigned(&key)?)?, self.tokens()?.len());
        ensure!(id < len, "{key} is {id}, the vocabulary has {len} tokens");
        Ok(Some(id))
    }

    /// The post-processor that begins every text with the first token, where the file asks for it.
    fn first_token(&self) -> Result<Value> {
        let (file, key) = (self.file(), "tokenizer.ggml.add_bos_token");
        // llama.cpp begins the texts of SentencePiece's models with it where a file does not say.
        if !(if file.has(key) { file.bool(key)? } else { file.text("tokenizer.ggml.model")? == "llama" }) {
            return Ok(Value::Null);
        }
        let id = self.token_id("bos")?.with_context(|| format!("{key} is true, but there is no bos_token_id"))?;
        let bos = self.tokens()?[id];
        let special = |type_id: i64| json!({ "SpecialToken": { "id": bos, "type_id": type_id } });
        let sequence = |id: &str, type_id: i64| json!({ "Sequence": { "id": id, "type_id": type_id } });
        Ok(json!({
            "type": "TemplateProcessing",
            "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } },
        }))
    }
}

fn added_token(content: &str, special: bool) -> Value {
    json!({ "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special })
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex })
}

const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// The splittings that [`splitting`] knows.
pub(crate) const SPLITTINGS: [&str; 5] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"];

/// Whether a word that is a token stays whole, whatever its merges are.
pub(crate) fn ignores_merges(pre: &str) -> bool {
    ["llama-bpe", "tekken"].contains(&pre)
}

/// Normalizer and pre-tokenizer of a splitting that llama.cpp knows by this name.
pub(crate) fn splitting(pre: &str) -> Result<(Value, Value)> {
    // Llama 3 keeps up to three digits together, Qwen none.
    let words = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    // Mistral's: a word is cut where small letters are followed by large ones.
    let tekken = || {
        let (start, large, small) =
            (r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]");
        format!(
            r"{start}{large}*{small}+|{start}{large}+{small}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let sequence = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
    let split = |pattern: String| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    Ok(match pre {
        "gpt-2" => (Value::Null, byte_level(false, true)),
        "smollm" => {
            (Value::Null, sequence(json!({ "type": "Digits", "individual_digits": true }), byte_level(false, true)))
        }
        "llama-bpe" => (Value::Null, sequence(split(words(r"\p{N}{1,3}")), byte_level(false, false))),
        "qwen2" => (json!({ "type": "NFC" }), sequence(split(words(r"\p{N}")), byte_level(false, false))),
        "tekken" => (Value::Null, sequence(split(tekken()), byte_level(false, false))),
        _ => anyhow::bail!("tokenizer.ggml.pre is `{pre}`, known are {}", SPLITTINGS.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gguf;

    const FILE: &[u8] = include_bytes!("../../../fixtures/golden/gguf_file.gguf");
    const GOLDEN: &str = include_str!("../../../fixtures/golden/gguf_tokenizers.json");

    #[test]
    fn texts_are_split_as_hf_splits_them() {
        let golden: Map<String, Value> = serde_json::from_str(GOLDEN).unwrap();
        assert_eq!(golden.len(), 4);
        for (pre, expected) in golden {
            let (normalizer, pre_tokenizer) = splitting(&pre).unwrap();
            assert_eq!((&normalizer, &pre_tokenizer), (&expected["normalizer"], &expected["pre_tokenizer"]), "{pre}");
            assert_eq!(byte_level(true, true), expected["decoder"]);
        }
        let error = splitting("viking").unwrap_err().to_string();
        assert!(error.contains("`viking`, known are gpt-2"), "{error}");
    }

    #[test]
    fn special_tokens_and_the_first_one() {
        let model = Llm::new(Gguf::parse(FILE).unwrap()).unwrap();
        let tokenizer = model.tokenizer().unwrap();
        assert_eq!(tokenizer["model"]["vocab"]["<|im_end|>"], 2);
        assert_eq!(tokenizer["model"]["merges"][3], "hell o");
        let added = tokenizer["added_tokens"].as_array().unwrap();
        assert_eq!((added.len(), &added[1]["content"], &added[1]["id"]), (3, &json!("<|im_start|>"), &json!(1)));
        assert_eq!(tokenizer["post_processor"], Value::Null);
        let config = model.tokenizer_config().unwrap();
        assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!("<|im_start|>"), &json!("<|im_end|>")));
        assert!(config["chat_template"].as_str().unwrap().starts_with("{% for m"), "{config:?}");

        // The same file asking for a first token: the one byte after the key and its kind.
        let key = b"tokenizer.ggml.add_bos_token";
        let at = FILE.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
        let mut bytes = FILE.to_vec();
        bytes[at] = 1;
        let processor = &Llm::new(Gguf::parse(bytes).unwrap()).unwrap().tokenizer().unwrap()["post_processor"];
        assert_eq!(processor["single"][0]["SpecialToken"]["id"], "<|im_start|>");
        assert_eq!(processor["special_tokens"]["<|im_start|>"]["ids"], json!([1]));
    }

    #[test]
    fn pieces_are_merged_as_hf_merges_them() {
        let golden: Value = serde_json::from_str(include_str!("../../../fixtures/golden/sentencepiece.json")).unwrap();
        let file = include_bytes!("../../../fixtures/golden/sentencepiece.gguf");
        let tokenizer = Llm::new(Gguf::parse(&file[..]).unwrap()).unwrap().tokenizer().unwrap();
        assert_eq!(tokenizer["model"]["merges"], golden["merges"]);
        assert_eq!(
            (&tokenizer["model"]["unk_token"], &tokenizer["model"]["vocab"]["<0x0A>"]),
            (&json!("<unk>"), &json!(13))
        );
        let added: Vec<_> =
            tokenizer["added_tokens"].as_array().unwrap().iter().map(|token| &token["content"]).collect();
        assert_eq!(added, ["<unk>", "<s>", "</s>"]);
        // Where a file does not say, a space goes before every text, and the first token before that.
        assert_eq!(tokenizer["normalizer"]["normalizers"][0]["type"], "Prepend");
        assert_eq!(tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
    }
}
