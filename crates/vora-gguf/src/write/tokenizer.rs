//! A `tokenizer.json` and what lies beside it, as GGUF's metadata.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::file::MetadataValue;
use super::llm::LlmWriter;
use crate::tokenizer::{CONTROL, SPLITTINGS, USER_DEFINED, splitting};

/// `tokenizer.ggml.token_type` of tokens that text becomes, and of rows of the embedding that no token has.
const NORMAL: i32 = 1;
const UNUSED: i32 = 5;

impl LlmWriter {
    /// Adds a byte-level BPE: the objects of HF's `tokenizer.json` and `tokenizer_config.json`, the tokens that end an
    /// answer, and the chat template.
    ///
    /// # Errors
    /// Where it is another tokenizer, splits text in a way that has no name here, or has tokens beyond the embedding.
    pub fn put_tokenizer(
        &mut self,
        tokenizer: &Value,
        config: &Map<String, Value>,
        eos_ids: &[i64],
        chat_template: Option<&str>,
    ) -> Result<()> {
        use MetadataValue::{Bool, I32s, Text, Texts, U32};
        let model = &tokenizer["model"];
        let found = model["type"].as_str().unwrap_or("BPE");
        ensure!(
            found == "BPE" && model["byte_fallback"] != true,
            "the tokenizer is a {found}{}, GGUF files are written of byte-level BPEs",
            if found == "BPE" { " of characters with bytes to fall back on" } else { "" }
        );
        let pre = name_of_splitting(tokenizer)?;
        let (tokens, types) = self.tokens(tokenizer)?;
        let merges = model["merges"].as_array().context("the tokenizer has no `merges`")?;
        let merges = merges.iter().map(merge).collect::<Result<Vec<String>>>()?;
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
        writer.put("tokenizer.ggml.model", Text("gpt2".into()));
        writer.put("tokenizer.ggml.pre", Text(pre.into()));
        writer.put("tokenizer.ggml.tokens", Texts(tokens));
        writer.put("tokenizer.ggml.token_type", I32s(types));
        writer.put("tokenizer.ggml.merges", Texts(merges));
        for (key, id) in [("bos", bos), ("eos", eos), ("eot", eot), ("unknown", unknown), ("padding", padding)] {
            if let Some(id) = id {
                writer.put(format!("tokenizer.ggml.{key}_token_id"), U32(id));
            }
        }
        writer.put("tokenizer.ggml.add_bos_token", Bool(adds_bos));
        writer.put("tokenizer.ggml.add_space_prefix", Bool(false));
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
        let ignores_merges = tokenizer["model"]["ignore_merges"] == true;
        if found == known && ignores_merges == (pre == "llama-bpe") {
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

/// `a b`, from either way of writing a merge.
fn merge(merge: &Value) -> Result<String> {
    let pair = merge.as_array().map(|pair| (pair.first().and_then(Value::as_str), pair.get(1).and_then(Value::as_str)));
    match (merge.as_str(), pair) {
        (Some(merge), _) => Ok(merge.to_owned()),
        (_, Some((Some(left), Some(right)))) => Ok(format!("{left} {right}")),
        _ => bail!("{merge} is no merge of two tokens"),
    }
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
    fn rows_without_a_token_are_filled_and_tokens_without_a_row_refused() {
        let from = Llm::new(Gguf::parse(FILE).unwrap()).unwrap();
        let (mut tokenizer, config) = (from.tokenizer().unwrap(), from.tokenizer_config().unwrap());
        let (tokens, types) = writer(21).tokens(&tokenizer).unwrap();
        assert_eq!((tokens[20].as_str(), types[20], types[2], types[18]), ("[PAD20]", UNUSED, CONTROL, NORMAL));
        let put = |tokenizer: &Value| writer(18).put_tokenizer(tokenizer, &config, &[], None).unwrap_err().to_string();
        assert!(put(&tokenizer).ends_with("is 18, the embedding has 18 rows"));
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into();
        assert!(put(&tokenizer).ends_with("known are gpt-2, smollm, llama-bpe, qwen2"));
        tokenizer["model"]["type"] = "Unigram".into();
        assert!(put(&tokenizer).starts_with("the tokenizer is a Unigram, GGUF files"));
    }
}
