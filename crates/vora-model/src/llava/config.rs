//! `config.json` of a LLaVA folder: the keys of Hugging Face's `LlavaConfig`, and where its halves came from.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use vora_files::{object, tell_once};
use vora_llm::{LlmConfig, absent_sizes};
use vora_lora::LoraConfig;
use vora_vision::{EncoderConfig, FeatureSelection, VisionFeatureSelectStrategy};

use crate::files::{lora_or_empty, read_config, to_object};

/// What stands between encoder and decoder, by the names of the original LLaVA code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MmProjectorType {
    /// One layer (LLaVA, arXiv 2304.08485). Hugging Face's classes have no such projection.
    #[serde(rename = "linear")]
    Linear,
    /// Two layers with a GELU between them (LLaVA-1.5, arXiv 2310.03744).
    #[default]
    #[serde(rename = "mlp2x_gelu")]
    Mlp2xGelu,
}

/// The keys of `LlavaConfig` beside `text_config` and `vision_config`, then the original code's, then ours.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Keys {
    #[serde(default = "default_image_token_index")]
    image_token_index: i64,
    #[serde(default = "default_image_seq_length")]
    image_seq_length: i64,
    #[serde(default = "gelu")]
    projector_hidden_act: String,
    #[serde(default = "yes")]
    multimodal_projector_bias: bool,
    #[serde(flatten)]
    features: FeatureSelection,
    #[serde(default)]
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    mm_projector_type: MmProjectorType,
    #[serde(default)]
    mm_vision_tower: String,
    #[serde(default)]
    llm: String,
    #[serde(default, deserialize_with = "lora_or_empty", skip_serializing_if = "Option::is_none")]
    lora: Option<LoraConfig>,
    #[serde(default, deserialize_with = "lora_or_empty", skip_serializing_if = "Option::is_none")]
    vision_lora: Option<LoraConfig>,
}

fn default_image_token_index() -> i64 {
    32_000
}

fn default_image_seq_length() -> i64 {
    576
}

/// The only `projector_hidden_act` of published models.
fn gelu() -> String {
    "gelu".to_owned()
}

fn yes() -> bool {
    true
}

/// PEFT's word for every linear layer: the target of [`LlavaConfig::vision_lora`] where none is named.
pub const ALL_LINEAR: &str = "all-linear";

/// What a LLaVA is made of.
#[derive(Debug, Clone)]
pub struct LlavaConfig {
    /// The decoder: `text_config`.
    pub llm: LlmConfig,
    /// Where the LLM came from: a hub name or a folder. The key is `llm`.
    pub llm_name: String,
    /// Where the encoder came from.
    pub mm_vision_tower: String,
    /// Which of the encoder's hidden states are projected.
    pub features: FeatureSelection,
    /// The projection.
    pub mm_projector_type: MmProjectorType,
    /// Whether its layers have biases.
    pub multimodal_projector_bias: bool,
    /// The id that stands at image places in what Hugging Face's processors write; a model of ours does not read it.
    pub image_token_index: i64,
    /// Tokens that a picture of the encoder's own size becomes, for Hugging Face's processors.
    pub image_seq_length: i64,
    /// The adapters that are attached to the LLM; none once merged.
    pub lora: Option<LoraConfig>,
    /// Those that are attached to the encoder, in the blocks that its chosen hidden states depend on. The target
    /// [`ALL_LINEAR`] stands for every linear layer there.
    pub vision_lora: Option<LoraConfig>,
    pub(super) vision_config: Value,
}

impl LlavaConfig {
    /// A LLaVA of the encoder in the folder `vision_tower` and `llm`: `mlp2x_gelu` between them, no adapters, and the
    /// second-last hidden states without the class token, or whole where the encoder has none.
    ///
    /// `image_token_index` is the last row of the vocabulary, which larger ones keep free.
    ///
    /// # Errors
    /// Where the folder holds no encoder; names the file and the key.
    pub fn new(llm: LlmConfig, vision_tower: &Path) -> Result<Self> {
        let encoder = EncoderConfig::open(vision_tower)?;
        let mut features = FeatureSelection::default();
        if encoder.num_prefix_tokens() == 0 {
            features.vision_feature_select_strategy = VisionFeatureSelectStrategy::Full;
        }
        Ok(Self {
            image_token_index: llm.vocab_size - 1,
            llm,
            llm_name: String::new(),
            mm_vision_tower: String::new(),
            features,
            mm_projector_type: MmProjectorType::default(),
            multimodal_projector_bias: true,
            image_seq_length: encoder.num_patches(),
            lora: None,
            vision_lora: None,
            vision_config: Value::Object(vision_half(read_config(vision_tower)?)),
        })
    }

    /// Reads `config.json` of a LLaVA folder, ours or one of Hugging Face's. What a published config leaves out is as in
    /// Hugging Face's config classes.
    ///
    /// # Errors
    /// Names the file and the key.
    pub fn open(folder: &Path) -> Result<Self> {
        let json = read_config(folder)?;
        let ties = |config: &Map<String, Value>| config.get("tie_word_embeddings").and_then(Value::as_bool);
        let text = json.get("text_config").and_then(Value::as_object).and_then(ties);
        if let (Some(top), Some(text)) = (ties(&json), text)
            && top != text
        {
            tell_once(format!(
                "{}: tie_word_embeddings is {top} at the top of config.json and {text} in text_config: the head is tied \
                 where either says so, as in transformers",
                folder.display()
            ));
        }
        Self::from_json(json).with_context(|| format!("in {}", folder.join("config.json").display()))
    }

    pub(crate) fn from_json(mut json: Map<String, Value>) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
        ensure!(model_type == "llava", "model_type is `{model_type}`, a LLaVA folder says `llava`");
        let mut half = |key: &str| json.remove(key).filter(|half| !half.is_null());
        let mut text_config = half("text_config").unwrap_or_else(|| json!({}));
        let vision_config = half("vision_config").unwrap_or_else(clip_large_336);
        let vision_config = with_model_type(vision_config, "clip_vision_model").context("vision_config")?;
        // transformers knows both names of it; where both stand, it takes this one.
        if let Some(id) = half("image_token_id") {
            json.insert("image_token_index".to_owned(), id);
        }
        let keys: Keys = object(&Value::Object(json))?;
        let act = &keys.projector_hidden_act;
        ensure!(act == "gelu", "projector_hidden_act is `{act}`, known is gelu");

        text_config = with_model_type(text_config, "llama").context("text_config")?;
        fill(&mut text_config);
        let mut llm: LlmConfig = object(&text_config).context("text_config")?;
        // As in transformers, either place ties them.
        llm.tie_word_embeddings |= keys.tie_word_embeddings.unwrap_or(false);
        llm.validate().context("text_config")?;
        let config = Self {
            llm,
            llm_name: keys.llm,
            mm_vision_tower: keys.mm_vision_tower,
            features: keys.features,
            mm_projector_type: keys.mm_projector_type,
            multimodal_projector_bias: keys.multimodal_projector_bias,
            image_token_index: keys.image_token_index,
            image_seq_length: keys.image_seq_length,
            lora: keys.lora,
            vision_lora: keys.vision_lora,
            vision_config,
        };
        config.encoder()?;
        Ok(config)
    }

    /// The object that [`LlavaConfig::open`] reads, and Hugging Face's `LlavaConfig`.
    ///
    /// # Errors
    /// Where a value cannot be said in JSON.
    pub fn to_json(&self) -> Result<Value> {
        let keys = Keys {
            image_token_index: self.image_token_index,
            image_seq_length: self.image_seq_length,
            projector_hidden_act: gelu(),
            multimodal_projector_bias: self.multimodal_projector_bias,
            features: self.features.clone(),
            tie_word_embeddings: Some(self.llm.tie_word_embeddings),
            mm_projector_type: self.mm_projector_type,
            mm_vision_tower: self.mm_vision_tower.clone(),
            llm: self.llm_name.clone(),
            lora: self.lora.clone(),
            vision_lora: self.vision_lora.clone(),
        };
        let mut json = to_object(&keys)?;
        json.insert("architectures".into(), json!(["LlavaForConditionalGeneration"]));
        json.insert("model_type".into(), json!("llava"));
        json.insert("text_config".into(), serde_json::to_value(&self.llm)?);
        json.insert("vision_config".into(), self.vision_config.clone());
        Ok(Value::Object(json))
    }

    /// The encoder: `vision_config`.
    ///
    /// # Errors
    /// Where it is none known here, or is asked to leave out a class token that it does not have: Hugging Face leaves
    /// out the first patch then.
    pub fn encoder(&self) -> Result<EncoderConfig> {
        let encoder = EncoderConfig::from_json(&self.vision_config).context("vision_config")?;
        ensure!(
            self.features.vision_feature_select_strategy == VisionFeatureSelectStrategy::Full
                || encoder.num_prefix_tokens() > 0,
            "vision_feature_select_strategy is `default`, which leaves out the class token, but this encoder has none: \
             a patch would be missing; it takes `full`"
        );
        Ok(encoder)
    }
}

/// What Hugging Face takes where there is no `vision_config`: CLIP ViT-L/14 for 336 pixels.
fn clip_large_336() -> Value {
    json!({
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32_000,
    })
}

fn with_model_type(mut config: Value, model_type: &str) -> Result<Value> {
    let object = config.as_object_mut().context("is no JSON object")?;
    object.entry("model_type").or_insert_with(|| json!(model_type));
    Ok(config)
}

/// The sizes that the config classes of Hugging Face's decoders have for absent keys. Other keys' values [`LlmConfig`]
/// knows by itself.
fn fill(text_config: &mut Value) {
    let defaults = absent_sizes(text_config["model_type"].as_str().unwrap_or_default());
    if let (Some(keys), Value::Object(defaults)) = (text_config.as_object_mut(), defaults) {
        for (key, value) in defaults {
            keys.entry(key).or_insert(value);
        }
    }
}

/// The vision half of a CLIP's config and its likes, under the `model_type` that it has alone; any other as it is.
fn vision_half(mut config: Map<String, Value>) -> Map<String, Value> {
    let half = ["vision_config_dict", "vision_config"].into_iter().find_map(|key| match config.remove(key) {
        Some(Value::Object(half)) => Some(half),
        _ => None,
    });
    match (half, config.remove("model_type")) {
        (Some(mut half), Some(Value::String(model_type))) => {
            half.insert("model_type".into(), json!(format!("{model_type}_vision_model")));
            half
        }
        (_, model_type) => {
            config.extend(model_type.map(|model_type| ("model_type".to_owned(), model_type)));
            config
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_vision::{ClipVisionConfig, VisionFeatureLayer};

    fn read(json: Value) -> Result<LlavaConfig> {
        LlavaConfig::from_json(json.as_object().unwrap().clone())
    }

    fn refuse(json: Value) -> String {
        format!("{:#}", read(json).unwrap_err())
    }

    #[test]
    fn a_published_config_is_read() {
        // llava-hf/llava-1.5-7b-hf
        let config = read(json!({
            "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
            "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5,
                "torch_dtype": "float16", "vocab_size": 32064,
            },
            "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
            "vision_config": {
                "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
        }))
        .unwrap();
        let llm = &config.llm;
        assert_eq!((llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers), (4096, 11_008, 32));
        assert_eq!((llm.vocab_size, llm.kv_heads(), llm.max_position_embeddings), (32_064, 32, 4096));
        assert_eq!((llm.rms_norm_eps, llm.tie_word_embeddings, config.image_token_index), (1e-5, false, 32_000));
        assert_eq!((config.mm_projector_type, config.multimodal_projector_bias), (MmProjectorType::Mlp2xGelu, true));
        assert_eq!((config.features, config.image_seq_length, config.lora), (FeatureSelection::default(), 576, None));
    }

    #[test]
    fn what_is_absent_is_as_in_hugging_faces_classes() {
        let both = json!({"model_type": "llava", "image_token_index": 5, "image_token_id": 7});
        assert_eq!(read(both).unwrap().image_token_index, 7);
        let config = read(json!({"model_type": "llava", "image_token_id": 7})).unwrap();
        assert_eq!((config.llm.vocab_size, config.llm.max_position_embeddings), (32_000, 2048));
        assert_eq!(config.image_token_index, 7);
        let encoder = config.encoder().unwrap();
        assert_eq!((encoder.num_patches(), encoder.num_prefix_tokens()), (576, 1));

        let config = read(json!({
            "model_type": "llava", "text_config": {"model_type": "mistral"}, "vision_config": {"patch_size": 16},
            "tie_word_embeddings": true,
        }))
        .unwrap();
        assert_eq!((config.llm.intermediate_size, config.llm.kv_heads()), (14_336, 8));
        assert!(config.llm.tie_word_embeddings);
        let clip = ClipVisionConfig { patch_size: 16, ..ClipVisionConfig::default() };
        assert_eq!(config.encoder().unwrap(), EncoderConfig::Clip(clip));
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let whole =
            json!({"model_type": "clip", "text_config": {}, "vision_config": {"patch_size": 14, "image_size": 56}});
        std::fs::write(folder.path().join("config.json"), whole.to_string()).unwrap();
        let mut config = LlavaConfig::new(LlmConfig::tiny(64), folder.path()).unwrap();
        assert_eq!((config.image_seq_length, config.image_token_index), (16, 63));
        config.llm_name = "some/llm".into();
        config.mm_vision_tower = "some/tower".into();
        config.features.vision_feature_layer = VisionFeatureLayer::Several(vec![-2, 1]);
        config.mm_projector_type = MmProjectorType::Linear;
        config.multimodal_projector_bias = false;
        config.lora = Some(LoraConfig::new(3, 1));
        let json = config.to_json().unwrap();
        assert_eq!((&json["model_type"], &json["mm_projector_type"]), (&json!("llava"), &json!("linear")));
        assert_eq!(
            json["vision_config"],
            json!({"patch_size": 14, "image_size": 56, "model_type": "clip_vision_model"})
        );
        let read = read(json.clone()).unwrap();
        assert_eq!(read.to_json().unwrap(), json);
        assert_eq!((read.llm, read.features, read.lora), (config.llm, config.features, config.lora));
    }

    #[test]
    fn an_encoder_without_a_class_token_is_seen_whole() {
        let folder = tempfile::tempdir().unwrap();
        let alone = json!({"model_type": "siglip_vision_model", "image_size": 32, "hidden_size": 16});
        std::fs::write(folder.path().join("config.json"), alone.to_string()).unwrap();
        let config = LlavaConfig::new(LlmConfig::tiny(64), folder.path()).unwrap();
        assert_eq!(config.features.vision_feature_select_strategy, VisionFeatureSelectStrategy::Full);
        assert_eq!((config.image_seq_length, &config.vision_config), (4, &alone));
        let error = refuse(json!({"model_type": "llava", "vision_config": alone}));
        assert!(error.contains("strategy is `default`, which leaves out the class token"), "{error}");
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let with = |key: &str, value: Value| refuse(json!({"model_type": "llava", key: value}));
        assert_eq!(refuse(json!({"model_type": "vora"})), "model_type is `vora`, a LLaVA folder says `llava`");
        assert_eq!(with("projector_hidden_act", json!("relu")), "projector_hidden_act is `relu`, known is gelu");
        let error = with("mm_projector_type", json!("cabstract"));
        assert!(error.contains("unknown variant `cabstract`, expected `linear` or `mlp2x_gelu`"), "{error}");
        let error = with("vision_config", json!({"model_type": "pixtral"}));
        assert!(error.starts_with("vision_config: model_type `pixtral` is not a vision encoder known here"), "{error}");
        let error = with("text_config", json!({"model_type": "gemma"}));
        assert!(error.starts_with("text_config: "), "{error}");
        let error = with("text_config", json!({"model_type": "llama", "hidden_act": "relu"}));
        assert!(error.starts_with("text_config: hidden_act is `relu`"), "{error}");
        assert!(with("vision_config", json!(3)).contains("vision_config: is no JSON object"));
    }
}
