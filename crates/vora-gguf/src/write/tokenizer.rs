//! A `tokenizer.json` and what lies beside it, as GGUF's metadata.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::file::MetadataValue;
use super::llm::LlmWriter;
use crate::sentencepiece::{self, Prefix};
use crate::tokenizer::{BYTE, CONTROL, NORMAL, SPLITTINGS, UNKNOWN, UNUSED, USER_DEFINED, ignores_merges, splitting};

impl LlmWriter {
    /// Adds a byte-level BPE, or SentencePiece's: the objects of HF's `tokenizer.json` and `tokenizer_config.json`, the tokens that end an
    /// answer, and the chat template.
    ///
    /// A space before a text, but not after a special token (`prepend_scheme: first`), has no word in GGUF: of a model that chats none is
    /// added, for its prompts begin with a special token; of another one before every text.
    ///
    /// # Errors
    /// Where it is another tokenizer, splits text in a way that has no name here, has merges that no scores tell, or tokens beyond the
    /// embedding.
    pub fn put_tokenizer(
        &mut self,
        tokenizer: &Value,
        config: &Map<String, Value>,
        eos_ids: &[i64],
        chat_template: Option<&str>,
    ) -> Result<()> {
        use MetadataValue::{Bool, F32s, I32s, Text, Texts, U32};
        let model = &tokenizer["model"];
        let found = model["type"].as_str().unwrap_or("BPE");
        ensure!(found == "BPE", "the tokenizer is a {found}, GGUF files are written of BPEs");
        let falls_back = model["byte_fallback"] == true;
        let pre = if falls_back { "default" } else { name_of_splitting(tokenizer)? };
        let (tokens, mut types) = self.tokens(tokenizer)?;
        let merges = model["merges"].as_array().context("the tokenizer has no `merges`")?;
        let merges = merges.iter().map(merge).collect::<Result<Vec<_>>>()?;
        let (name, own, adds_prefix) = if falls_back {
            let adds_prefix = match sentencepiece::prefix(tokenizer)? {
                Prefix::Always => true,
                Prefix::First => chat_template.is_none(),
                Prefix::Never => false,
            };
            name_bytes(model, &tokens, &mut types);
            let scores = scores(&tokens, &types, &merges)?;
            ("llama", ("scores", F32s(scores)), adds_prefix)
        } else {
            let merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
            ("gpt2", ("merges", Texts(merges)), false)
        };
        let id_of = |token: &str| tokens.iter().position(|known| known == token).and_then(|id| u32::try_from(id).ok());
        let named = |key: &str| {
            let token = config.get(key).map(|token| token.get("content").unwrap_or(token));
            token.and_then(Value::as_str).and_then(id_of)
        };
        let [bos, unknown, padding] = ["bos_token", "unk_token", "pad_token"].map(named);
        let mut ends: Vec<u32> = named("eos_token").into_iter().collect();
        ends.extend(eos_ids.iter().filter_map(|&id| u32::try_from(id).ok()));
        let eos = ends.first().copied();
        let eot = ends.iter().copied().find(|&id| Some(id) != eos);
        let adds_bos =
            first_token(&tokenizer["post_processor"]).is_some_and(|first| id_of(first) == bos && bos.is_some());

        let writer = &mut self.model.writer;
        writer.put("tokenizer.ggml.model", Text(name.into()));
        writer.put("tokenizer.ggml.pre", Text(pre.into()));
        writer.put("tokenizer.ggml.tokens", Texts(tokens));
        writer.put("tokenizer.ggml.token_type", I32s(types));
        writer.put(format!("tokenizer.ggml.{}", own.0), own.1);
        for (key, id) in [("bos", bos), ("eos", eos), ("eot", eot), ("unknown", unknown), ("padding", padding)] {
            if let Some(id) = id {
                writer.put(format!("tokenizer.ggml.{key}_token_id"), U32(id));
            }
        }
        writer.put("tokenizer.ggml.add_bos_token", Bool(adds_bos));
        writer.put("tokenizer.ggml.add_space_prefix", Bool(adds_prefix));
        if let Some(template) = chat_template {
            writer.put("tokenizer.chat_template", Text(template.to_owned()));
        }
        Ok(())
    }

    /// A token for every row of the embedding, and their types.
    fn tokens(&self, tokenizer: &Value) -> Result<(Vec<String>, Vec<i32>)> {
        let rows = self.vocab_size;
        let mut tokens: Vec<Option<(String, i32)>> = vec![None; rows];
        let mut place = |token: &str, id: Option<u64>, kind: i32| {
            let id =
                id.and_then(|id| usize::try_from(id).ok()).with_context(|| format!("token `{token}` has no id"))?;
            let place = tokens.get_mut(id);
            *place.with_context(|| format!("token `{token}` is {id}, the embedding has {rows} rows"))? =
                Some((token.to_owned(), kind));
            anyhow::Ok(())
        };
        let vocab = tokenizer["model"]["vocab"].as_object().context("the tokenizer has no `vocab`")?;
        for (token, id) in vocab {
            place(token, id.as_u64(), NORMAL)?;
        }
        for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let content = token["content"].as_str().context("`added_tokens` has an entry without `content`")?;
            place(content, token["id"].as_u64(), if token["special"] == true { CONTROL } else { USER_DEFINED })?;
        }
        let all = tokens.into_iter().enumerate();
        Ok(all.map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))).unzip())
    }
}

/// llama.cpp's name for the way in which a tokenizer splits text.
fn name_of_splitting(tokenizer: &Value) -> Result<&'static str> {
    let parts = |tokenizer: &Value| {
        let mut parts = [tokenizer["normalizer"].clone(), tokenizer["pre_tokenizer"].clone()];
        parts.iter_mut().for_each(without_offsets);
        parts
    };
    let found = parts(tokenizer);
    for pre in SPLITTINGS {
        let (normalizer, pre_tokenizer) = splitting(pre)?;
        let known = parts(&serde_json::json!({"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}));
        if found == known && (tokenizer["model"]["ignore_merges"] == true) == ignores_merges(pre) {
            return Ok(pre);
        }
    }
    bail!("the tokenizer splits text in a way that has no name in GGUF here, known are {}", SPLITTINGS.join(", "))
}

/// Takes out what changes no token: which bytes of the text a token covers.
fn without_offsets(part: &mut Value) {
    match part {
        Value::Object(keys) => {
            keys.remove("trim_offsets");
            keys.values_mut().for_each(without_offsets);
        }
        Value::Array(parts) => parts.iter_mut().for_each(without_offsets),
        _ => {}
    }
}

/// The two tokens of a merge, from either way of writing it.
fn merge(merge: &Value) -> Result<(&str, &str)> {
    let pair = merge.as_array().and_then(|pair| Some((pair.first()?.as_str()?, pair.get(1)?.as_str()?)));
    let pair = pair.or_else(|| merge.as_str()?.split_once(' '));
    pair.with_context(|| format!("{merge} is no merge of two tokens"))
}

/// Says which tokens are a byte each, and which is for all that has no piece.
fn name_bytes(model: &Value, tokens: &[String], types: &mut [i32]) {
    for (token, kind) in tokens.iter().zip(types) {
        let is_byte = || token.strip_prefix("<0x")?.strip_suffix('>').filter(|hex| hex.len() == 2);
        if *kind == NORMAL && is_byte().is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok()) {
            *kind = BYTE;
        } else if model["unk_token"] == token.as_str() {
            *kind = UNKNOWN;
        }
    }
}

/// `tokenizer.ggml.scores`: those of the pieces that text becomes, 0 for all others, as SentencePiece has them.
fn scores(tokens: &[String], types: &[i32], merges: &[(&str, &str)]) -> Result<Vec<f32>> {
    let is_piece = tokens.iter().zip(types).filter(|(_, kind)| **kind == NORMAL);
    let pieces: Vec<&str> = is_piece.map(|(token, _)| token.as_str()).collect();
    let scores = sentencepiece::scores(merges, &pieces)?;
    Ok(tokens.iter().map(|token| scores.get(token.as_str()).copied().unwrap_or_default()).collect())
}

/// The token that a post-processor begins every text with.
fn first_token(processor: &Value) -> Option<&str> {
    if let Some(parts) = processor["processors"].as_array() {
        return parts.iter().find_map(first_token);
    }
    processor["single"][0]["SpecialToken"]["id"].as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::{FileKind, LlmMetadata, RopeScaling};
    use crate::{Gguf, Llm};

    const FILE: &[u8] = include_bytes!("../../../../fixtures/golden/gguf_file.gguf");
    const PIECES: &[u8] = include_bytes!("../../../../fixtures/golden/sentencepiece.gguf");

    fn writer(vocab_size: u32) -> LlmWriter {
        let metadata = LlmMetadata {
            model_type: "llama".into(),
            name: "tiny".into(),
            vocab_size,
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 16,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-5,
            rope_theta: 1e5,
            rope_scaling: RopeScaling::Default,
            sliding_window: None,
        };
        let shape = (vocab_size as usize, 32);
        LlmWriter::new(&metadata, FileKind::F32, &[("model.embed_tokens.weight".into(), vec![shape.0, shape.1])])
            .unwrap()
    }

    #[test]
    fn a_tokenizer_is_written_and_read() {
        let from = Llm::new(Gguf::parse(FILE).unwrap()).unwrap();
        let (tokenizer, config) = (from.tokenizer().unwrap(), from.tokenizer_config().unwrap());
        let template = config["chat_template"].as_str();
        let mut writer = writer(19);
        writer.put_tokenizer(&tokenizer, &config, &[2, 1], template).unwrap();
        let mut bytes = Vec::new();
        writer.finish().write(&mut bytes, |_| Ok(vec![0.5; 19 * 32])).unwrap();
        let model = Llm::new(Gguf::parse(bytes).unwrap()).unwrap();
        assert_eq!(model.tokenizer().unwrap(), tokenizer);
        assert_eq!(model.tokenizer_config().unwrap(), config);
        assert_eq!(model.config().unwrap()["eos_token_id"], serde_json::json!([2, 1]));
        assert_eq!(model.file().unsigned("tokenizer.ggml.bos_token_id").unwrap(), 1);
    }

    #[test]
    fn pieces_of_sentencepiece_are_written_and_read() {
        let from = Llm::new(Gguf::parse(PIECES).unwrap()).unwrap();
        let (tokenizer, config) = (from.tokenizer().unwrap(), from.tokenizer_config().unwrap());
        let written = |tokenizer: &Value, template: Option<&str>| {
            let mut writer = writer(420);
            writer.put_tokenizer(tokenizer, &config, &[2], template)?;
            let mut bytes = Vec::new();
            writer.finish().write(&mut bytes, |_| Ok(vec![0.5; 420 * 32]))?;
            Llm::new(Gguf::parse(bytes)?)
        };
        let model = written(&tokenizer, None).unwrap();
        assert_eq!(model.tokenizer().unwrap(), tokenizer);
        let (ours, theirs) = (model.file(), &Gguf::parse(PIECES.to_vec()).unwrap());
        for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"] {
            let list = |file: &Gguf<Vec<u8>>| match key {
                "tokenizer.ggml.tokens" => format!("{:?}", file.texts(key).unwrap()),
                "tokenizer.ggml.token_type" => format!("{:?}", file.integers(key).unwrap()),
                _ => format!("{:?}", file.floats(key).unwrap().iter().map(|score| score + 0.0).collect::<Vec<_>>()),
            };
            assert_eq!(list(ours), list(theirs), "{key}");
        }
        assert!(ours.bool("tokenizer.ggml.add_space_prefix").unwrap());

        // A space before the first piece alone: none where prompts begin with a special token.
        let mut first = tokenizer;
        first["normalizer"] = Value::Null;
        first["pre_tokenizer"] =
            serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        for (template, adds) in [(None, true), (Some("{{ bos_token }}"), false)] {
            let model = written(&first, template).unwrap();
            assert_eq!(model.file().bool("tokenizer.ggml.add_space_prefix").unwrap(), adds);
        }
        first["model"]["merges"].as_array_mut().unwrap().pop();
        let error = written(&first, None).unwrap_err().to_string();
        assert!(error.starts_with("`merges` do not join"), "{error}");
    }

    #[test]
    fn rows_without_a_token_are_filled_and_tokens_without_a_row_refused() {
        let from = Llm::new(Gguf::parse(FILE).unwrap()).unwrap();
        let (mut tokenizer, config) = (from.tokenizer().unwrap(), from.tokenizer_config().unwrap());
        let (tokens, types) = writer(21).tokens(&tokenizer).unwrap();
        assert_eq!((tokens[20].as_str(), types[20], types[2], types[18]), ("[PAD20]", UNUSED, CONTROL, NORMAL));
        let put = |tokenizer: &Value| writer(18).put_tokenizer(tokenizer, &config, &[], None).unwrap_err().to_string();
        assert!(put(&tokenizer).ends_with("is 18, the embedding has 18 rows"));
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into();
        assert!(put(&tokenizer).ends_with("known are gpt-2, smollm, llama-bpe, qwen2, tekken"));
        tokenizer["model"]["type"] = "Unigram".into();
        assert!(put(&tokenizer).ends_with("is a Unigram, GGUF files are written of BPEs"));
    }
}
