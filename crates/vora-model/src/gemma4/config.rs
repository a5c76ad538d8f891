//! `config.json` of a Gemma 4 Unified, as HF transformers writes it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use vora_files::object;
use vora_llm::{LlmConfig, VisionAttention, absent_sizes};
use vora_lora::LoraConfig;
use vora_vision::Gemma4VisionConfig;

use crate::files::{lora_or_empty, read_config, to_object};

/// What a Gemma 4 Unified is made of.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Gemma4UnifiedConfig {
    /// `text_config`.
    pub llm: LlmConfig,
    /// `vision_config`.
    pub vision: Gemma4VisionConfig,
    /// The token that holds a picture's places in a prompt.
    pub image_token_id: i64,
    /// The token before a picture.
    pub boi_token_id: i64,
    /// The token after one.
    pub eoi_token_id: i64,
    /// The name of the model that it was trained from, or empty; not a key of Hugging Face's.
    pub llm_name: String,
    /// The adapters on the decoder; none once they are merged. Not a key of Hugging Face's.
    pub lora: Option<LoraConfig>,
    extra: Map<String, Value>,
}

/// The keys beside `text_config` and `vision_config`; what is absent is as in HF's `Gemma4UnifiedConfig`.
#[derive(Debug, Serialize, Deserialize)]
struct Keys {
    #[serde(default = "image_token_id")]
    image_token_id: i64,
    #[serde(default = "boi_token_id")]
    boi_token_id: i64,
    #[serde(default = "eoi_token_id")]
    eoi_token_id: i64,
    #[serde(default = "ties")]
    tie_word_embeddings: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    llm: String,
    #[serde(default, deserialize_with = "lora_or_empty", skip_serializing_if = "Option::is_none")]
    lora: Option<LoraConfig>,
    #[serde(flatten)]
    extra: Map<String, Value>,
}

fn image_token_id() -> i64 {
    258_880
}

fn boi_token_id() -> i64 {
    255_999
}

fn eoi_token_id() -> i64 {
    258_882
}

fn ties() -> bool {
    true
}

impl Gemma4UnifiedConfig {
    /// Reads `config.json` of a folder.
    ///
    /// # Errors
    /// Names the file and the key.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::from_json(read_config(folder)?).with_context(|| format!("in {}", folder.join("config.json").display()))
    }

    pub(crate) fn from_json(mut json: Map<String, Value>) -> Result<Self> {
        let model_type = json.remove("model_type").unwrap_or_default();
        ensure!(
            model_type == "gemma4_unified",
            "model_type is {model_type}, a Gemma 4 Unified folder says \"gemma4_unified\""
        );
        let audio = json.get("audio_config").is_some_and(|audio| !audio.is_null());
        ensure!(
            !audio,
            "audio_config: sounds are not heard here; with null in its place the folder opens for words and pictures"
        );
        let mut part = |key: &str| json.remove(key).filter(|part| !part.is_null());
        let mut text = part("text_config").unwrap_or_else(|| json!({}));
        let vision = part("vision_config").context(
            "vision_config is missing: such a model sees nothing; the decoder alone is a \"gemma4_unified_text\"",
        )?;
        let keys: Keys = object(&Value::Object(json))?;
        let in_text = text.as_object_mut().context("text_config is no JSON object")?;
        let model_type = in_text.entry("model_type").or_insert_with(|| json!("gemma4_unified_text")).clone();
        if let Value::Object(absent) = absent_sizes(model_type.as_str().unwrap_or_default()) {
            for (key, value) in absent {
                in_text.entry(key).or_insert(value);
            }
        }
        in_text.entry("use_bidirectional_attention").or_insert_with(|| json!("vision"));
        let mut llm: LlmConfig = object(&text).context("text_config")?;
        llm.tie_word_embeddings |= keys.tie_word_embeddings; // either place ties them, as in transformers
        llm.validate().context("text_config")?;
        let vision: Gemma4VisionConfig = object(&vision).context("vision_config")?;
        vision.validate().context("vision_config")?;
        let Keys { image_token_id, boi_token_id, eoi_token_id, llm: llm_name, lora, extra, .. } = keys;
        for (key, id) in [("boi_token_id", boi_token_id), ("eoi_token_id", eoi_token_id)] {
            ensure!((0..llm.vocab_size).contains(&id), "{key} is {id}, vocab_size is {}", llm.vocab_size);
        }
        Ok(Self { llm, vision, image_token_id, boi_token_id, eoi_token_id, llm_name, lora, extra })
    }

    /// Whether the tokens of a picture attend to all of each other, as `use_bidirectional_attention: "vision"` says. Pictures
    /// without a token between them are one, as in transformers.
    pub fn vision_attention(&self) -> VisionAttention {
        match self.llm.extra.get("use_bidirectional_attention").and_then(Value::as_str) {
            Some("vision") => VisionAttention::BidirectionalFused,
            _ => VisionAttention::Causal,
        }
    }

    /// The tokens that hold the places of pictures, films and sounds, and padding: a place that nothing is put into has the
    /// embedding of that, as in transformers.
    pub(super) fn placeholders(&self) -> ([i64; 3], i64) {
        let id = |key: &str, absent: i64| self.extra.get(key).and_then(Value::as_i64).unwrap_or(absent);
        let places = [self.image_token_id, id("video_token_id", 258_884), id("audio_token_id", 258_881)];
        (places, self.llm.pad_token_id.unwrap_or(0))
    }

    /// The object that [`Gemma4UnifiedConfig::open`] reads, and HF's `Gemma4UnifiedConfig`.
    ///
    /// # Errors
    /// Where a value cannot be said in JSON.
    pub fn to_json(&self) -> Result<Value> {
        let mut json = to_object(&Keys {
            image_token_id: self.image_token_id,
            boi_token_id: self.boi_token_id,
            eoi_token_id: self.eoi_token_id,
            tie_word_embeddings: self.llm.tie_word_embeddings,
            llm: self.llm_name.clone(),
            lora: self.lora.clone(),
            extra: self.extra.clone(),
        })?;
        json.insert("architectures".into(), json!(["Gemma4UnifiedForConditionalGeneration"]));
        json.insert("model_type".into(), json!("gemma4_unified"));
        json.insert("text_config".into(), serde_json::to_value(&self.llm)?);
        json.insert("vision_config".into(), serde_json::to_value(&self.vision)?);
        Ok(Value::Object(json))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Map<String, Value> {
        read_config(&fixtures::root().join("tiny/gemma4")).unwrap()
    }

    #[test]
    fn a_folder_of_hf_is_read_and_written_back() {
        let config = Gemma4UnifiedConfig::from_json(tiny()).unwrap();
        assert_eq!(config.vision_attention(), VisionAttention::BidirectionalFused);
        let Value::Object(written) = config.to_json().unwrap() else { panic!("no object") };
        for key in tiny().keys().filter(|key| !["text_config", "vision_config"].contains(&key.as_str())) {
            assert_eq!(written[key], tiny()[key], "{key}");
        }
        for part in ["text_config", "vision_config"] {
            for (key, value) in tiny()[part].as_object().unwrap() {
                assert_eq!(&written[part][key], value, "{part}.{key}");
            }
        }
        assert_eq!(Gemma4UnifiedConfig::from_json(written).unwrap(), config);
    }

    #[test]
    fn absent_keys_are_those_of_hfs_config_class() {
        let bare = json!({"model_type": "gemma4_unified", "text_config": {}, "vision_config": {}});
        let config = Gemma4UnifiedConfig::from_json(bare.as_object().unwrap().clone()).unwrap();
        assert_eq!(
            (config.llm.hidden_size, config.llm.num_hidden_layers, config.llm.sliding_window),
            (2304, 30, Some(1024))
        );
        assert_eq!((config.image_token_id, config.boi_token_id, config.eoi_token_id), (258_880, 255_999, 258_882));
        assert_eq!((config.vision.token_size(), config.vision.mm_embed_dim), (48, 3840));
        assert!(config.llm.tie_word_embeddings);
        assert_eq!(config.vision_attention(), VisionAttention::BidirectionalFused);
    }

    #[test]
    fn what_is_not_built_is_named() {
        let refused = |key: &str, value: Value| {
            let mut json = tiny();
            match key.split_once('.') {
                Some((part, key)) => json[part][key] = value,
                None => _ = json.insert(key.to_owned(), value),
            }
            format!("{:#}", Gemma4UnifiedConfig::from_json(json).unwrap_err())
        };
        let error = refused("audio_config", json!({"audio_embed_dim": 640}));
        assert!(error.starts_with("audio_config: sounds are not heard here; with null in its place"), "{error}");
        assert!(refused("vision_config", Value::Null).starts_with("vision_config is missing"));
        assert!(refused("vision_config.patch_size", json!(0)).starts_with("vision_config: patch_size is 0"));
        assert!(
            refused("text_config.enable_moe_block", json!(true)).starts_with("text_config: enable_moe_block is true")
        );
        assert!(refused("model_type", json!("gemma4")).starts_with("model_type is \"gemma4\""));
        assert!(refused("boi_token_id", json!(521)).starts_with("boi_token_id is 521, vocab_size is 521"));
    }
}
