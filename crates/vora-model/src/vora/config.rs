//! `config.json` of a VoRA folder: the LLM's keys and the published VoRA keys, side by side in one object.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use vora_files::object;
use vora_llm::{LlmConfig, VisionAttention};
use vora_lora::LoraConfig;
use vora_vision::{PatchEmbedConfig, PositionTable};

use super::vision_embedding_type::VisionEmbeddingType;
use crate::few_bits::QUANTIZATION_CONFIG;
use crate::files::{keep_auto_map, lora_or_empty, read_config, to_object};

/// The keys that the published VoRA code adds to the LLM's own (its `VoRAConfig`), and `fuse_adjacent_images`,
/// `pos_embed` and `lora_layer_bias`, which say what that code does without asking.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct VisionKeys {
    #[serde(default)]
    llm: String,
    #[serde(default)]
    vision_embedding: VisionEmbeddingType,
    vision_embedding_intermediate_size: i64,
    patch_size: i64,
    image_size: i64,
    #[serde(default)]
    vision_attention_mask: VisionAttention,
    #[serde(default)]
    fuse_adjacent_images: Option<bool>,
    #[serde(default)]
    pos_embed: Option<PositionTable>,
    #[serde(default)]
    aux_vision: String,
    #[serde(default)]
    lora_layer_bias: Option<bool>,
    #[serde(default, deserialize_with = "lora_or_empty", skip_serializing_if = "Option::is_none")]
    lora: Option<LoraConfig>,
}

/// The keys of `lora` that the published code follows. It takes any other without a word: an alpha changes nothing there.
const PUBLISHED_LORA: [&str; 3] = ["layers", "r", "target_modules"];

/// The key of a folder that HF transformers opens too: what stands for a picture in its token ids.
pub(crate) const IMAGE_TOKEN_ID: &str = "image_token_id";

/// The rank that the published code takes where `lora` names none.
const PUBLISHED_RANK: i64 = 1024;

/// What a VoRA is made of.
#[derive(Debug, Clone)]
pub struct VoraConfig {
    /// The decoder.
    pub llm: LlmConfig,
    /// Where the LLM came from: a hub name or a folder.
    pub llm_name: String,
    /// Where the teacher came from.
    pub aux_vision: String,
    /// What its pictures go through.
    pub vision_embedding: VisionEmbeddingType,
    /// Channels between patchifier and projection.
    pub vision_embedding_intermediate_size: i64,
    /// Side of a patch, in pixels.
    pub patch_size: i64,
    /// Side of the pictures that the position table was made for, in pixels.
    pub image_size: i64,
    /// Whether the tokens of a picture see each other in both directions; with `"fuse_adjacent_images": true`, those of
    /// the pictures right beside it too.
    pub vision_attention: VisionAttention,
    /// Of an `AIMv2Embedding`: which rows of the position table a picture of another size gets: `"pos_embed": "interpolate"` or `"first_rows"`.
    pub pos_embed: PositionTable,
    /// The adapters that are attached; none once merged.
    pub lora: Option<LoraConfig>,
    /// Whose linears have a trained bias of their own, where the LLM has none: those that this asks adapters for. The
    /// published code's layers with adapters have one, and keep it when they are merged.
    pub biases: Option<LoraConfig>,
}

impl VoraConfig {
    /// A VoRA over `llm` with bidirectional vision attention and no adapters.
    pub fn new(llm: LlmConfig, vision_embedding_intermediate_size: i64, patch_size: i64, image_size: i64) -> Self {
        Self {
            llm,
            llm_name: String::new(),
            aux_vision: String::new(),
            vision_embedding: VisionEmbeddingType::default(),
            vision_embedding_intermediate_size,
            patch_size,
            image_size,
            vision_attention: VisionAttention::Bidirectional,
            pos_embed: PositionTable::Interpolated,
            lora: None,
            biases: None,
        }
    }

    /// Reads `config.json` of a VoRA folder, ours or a published one. A published one, known by having no key
    /// `llm_model_type`, was trained with adjacent pictures fused and position rows taken flat, and has both unless its
    /// keys say otherwise; and its layers with adapters have biases. An `r` below 0 there says that adapters were merged.
    ///
    /// # Errors
    /// Names the file and the key.
    pub fn open(folder: &Path) -> Result<Self> {
        let json = read_config(folder)?;
        Self::from_json(json).with_context(|| format!("in {}", folder.join("config.json").display()))
    }

    /// Reads such an object; see [`VoraConfig::open`].
    ///
    /// # Errors
    /// Names the key.
    pub(crate) fn from_json(mut json: Map<String, Value>) -> Result<Self> {
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
        ensure!(model_type == "vora", "model_type is `{model_type}`, a VoRA folder says `vora`");
        let llm_type = json.remove("llm_model_type");
        let published = llm_type.is_none();
        let llm_type = llm_type.unwrap_or_else(|| json!(published_llm_type(&json)));
        if let Some(Value::Object(lora)) = json.get_mut("lora")
            && published
            && !lora.is_empty()
        {
            lora.retain(|key, _| PUBLISHED_LORA.contains(&key.as_str()));
            lora.entry("r").or_insert(PUBLISHED_RANK.into());
        }
        let keys: VisionKeys = object(&Value::Object(json.clone()))?;
        let vision_attention = match keys.vision_attention_mask {
            VisionAttention::Bidirectional if keys.fuse_adjacent_images.unwrap_or(published) => {
                VisionAttention::BidirectionalFused
            }
            mask => mask,
        };
        let trained_with = if published { PositionTable::FirstRows } else { PositionTable::Interpolated };
        json.insert("model_type".into(), llm_type);
        // The published class is a `PretrainedConfig` of transformers 4.50.3, which ties where the key is absent and
        // leaves a `true` out of what it writes.
        if published {
            json.entry("tie_word_embeddings").or_insert(Value::Bool(true));
        }
        let vision = to_object(&keys)?;
        json.retain(|key, _| {
            !vision.contains_key(key)
                && !["lora", "architectures", IMAGE_TOKEN_ID, QUANTIZATION_CONFIG].contains(&key.as_str())
        });
        let llm: LlmConfig = object(&Value::Object(json))?;
        llm.validate()?;
        let adapted = keys.lora.map(|lora| lora.over(llm.num_hidden_layers));
        let biases = adapted.clone().filter(|_| keys.lora_layer_bias.unwrap_or(published));
        Ok(Self {
            llm,
            llm_name: keys.llm,
            aux_vision: keys.aux_vision,
            vision_embedding: keys.vision_embedding,
            vision_embedding_intermediate_size: keys.vision_embedding_intermediate_size,
            patch_size: keys.patch_size,
            image_size: keys.image_size,
            vision_attention,
            pos_embed: keys.pos_embed.unwrap_or(trained_with),
            lora: adapted.filter(|lora| lora.r >= 0),
            biases,
        })
    }

    /// The object that [`VoraConfig::open`] reads and HF's `LlamaConfig.from_pretrained` takes the LLM's keys from.
    ///
    /// # Errors
    /// Where a value cannot be said in JSON.
    pub fn to_json(&self) -> Result<Value> {
        let mut json = to_object(&self.llm)?;
        let llm_type = json.remove("model_type").unwrap_or_default();
        keep_auto_map(&mut json, |_| false);
        let fused = self.vision_attention == VisionAttention::BidirectionalFused;
        let keys = VisionKeys {
            llm: self.llm_name.clone(),
            vision_embedding: self.vision_embedding,
            vision_embedding_intermediate_size: self.vision_embedding_intermediate_size,
            patch_size: self.patch_size,
            image_size: self.image_size,
            vision_attention_mask: if fused { VisionAttention::Bidirectional } else { self.vision_attention },
            fuse_adjacent_images: Some(fused),
            pos_embed: (self.vision_embedding == VisionEmbeddingType::Aimv2).then_some(self.pos_embed),
            aux_vision: self.aux_vision.clone(),
            lora_layer_bias: self.biases.is_some().then_some(true),
            lora: self.lora.clone().or_else(|| Some(LoraConfig { r: MERGED, ..self.biases.clone()? })),
        };
        json.extend(to_object(&keys)?);
        json.insert("model_type".into(), json!("vora"));
        json.insert("llm_model_type".into(), llm_type);
        json.insert("architectures".into(), json!(["VoRAForCausalLM"]));
        Ok(Value::Object(json))
    }

    /// Whether this name of the LLM's is a bias that only [`VoraConfig::biases`] puts there.
    pub fn has_layer_bias(&self, name: &str) -> bool {
        let Some(adapted) = &self.biases else { return false };
        let Some(path) = name.strip_suffix(".bias") else { return false };
        let parts = path.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((Ok(layer), module)) = parts.map(|(layer, module)| (layer.parse::<i64>(), module)) else {
            return false;
        };
        let (of_qkv, of_o) = self.llm.attention_biases();
        let own = match module {
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => of_qkv,
            "self_attn.o_proj" => of_o,
            _ => self.llm.mlp_bias,
        };
        layer < adapted.layers && adapted.targets(path) && !own
    }

    /// The patch embedding of these sizes.
    pub fn patch_embed(&self) -> PatchEmbedConfig {
        PatchEmbedConfig {
            patch_size: self.patch_size,
            image_size: self.image_size,
            embed_dim: self.vision_embedding_intermediate_size,
            hidden_size: self.llm.hidden_size,
        }
    }
}

/// The `r` of layers whose adapters were merged and whose biases are left.
pub(crate) const MERGED: i64 = -1;

/// The type of the LLM in a published config, which keeps the LLM's keys but not its type: by the keys that only its
/// class writes.
fn published_llm_type(json: &Map<String, Value>) -> &'static str {
    let has = |key: &str| json.contains_key(key);
    match () {
        () if has("use_sliding_window") || has("max_window_layers") => {
            if has("attention_bias") {
                "qwen3"
            } else {
                "qwen2"
            }
        }
        () if has("mlp_bias") || has("pretraining_tp") => "llama",
        () if has("sliding_window") => "mistral",
        () => "qwen2", // the only one that was published
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_published_config_is_read() {
        let published = json!({
            "model_type": "vora", "llm": "Qwen/Qwen2.5-7B-Instruct", "vocab_size": 152064, "hidden_size": 3584,
            "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
            "tie_word_embeddings": false, "vision_embedding": "AIMv2Embedding", "patch_size": 14, "image_size": 448,
            "vision_embedding_intermediate_size": 1536, "vision_attention_mask": "bidirectional", "lora": {},
            "aux_vision": "", "skip_aux_cls": false,
        });
        let config = VoraConfig::from_json(object(published)).unwrap();
        assert_eq!(config.llm.model_type, "qwen2");
        assert_eq!((config.image_size, config.vision_embedding_intermediate_size, &config.lora), (448, 1536, &None));
        assert!(!config.llm.tie_word_embeddings);
    }

    #[test]
    fn a_published_config_ties_where_it_says_nothing() {
        let mut json = object(VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8).to_json().unwrap());
        json.remove("tie_word_embeddings");
        let ties = |json: &Map<String, Value>| VoraConfig::from_json(json.clone()).unwrap().llm.tie_word_embeddings;
        assert!(!ties(&json)); // ours always writes the key, and its LLM's class decides
        json.remove("llm_model_type");
        assert!(ties(&json));
        json.insert("tie_word_embeddings".into(), json!(false));
        assert!(!ties(&json));
    }

    #[test]
    fn what_the_published_code_does_unasked_is_told_by_keys() {
        let ours = object(VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8).to_json().unwrap());
        assert_eq!((&ours["fuse_adjacent_images"], &ours["pos_embed"]), (&json!(false), &json!("interpolate")));
        let read = |change: &dyn Fn(&mut Map<String, Value>)| {
            let mut json = ours.clone();
            change(&mut json);
            let config = VoraConfig::from_json(json).unwrap();
            // Once read, it is written so that it is read as the same.
            let again = VoraConfig::from_json(object(config.to_json().unwrap())).unwrap();
            assert_eq!((again.vision_attention, again.pos_embed), (config.vision_attention, config.pos_embed));
            (config.vision_attention, config.pos_embed)
        };
        let published = |json: &mut Map<String, Value>| {
            json.retain(|key, _| !["llm_model_type", "fuse_adjacent_images", "pos_embed"].contains(&key.as_str()));
        };
        let (apart, fused) = (VisionAttention::Bidirectional, VisionAttention::BidirectionalFused);
        let (interpolated, first_rows) = (PositionTable::Interpolated, PositionTable::FirstRows);
        assert_eq!(read(&|_| {}), (apart, interpolated));
        assert_eq!(read(&published), (fused, first_rows));
        let without = |key: &'static str| move |json: &mut Map<String, Value>| drop(json.remove(key));
        assert_eq!(read(&without("fuse_adjacent_images")), (apart, interpolated));
        let with = |key: &'static str, value: Value| {
            move |json: &mut Map<String, Value>| {
                published(json);
                json.insert(key.into(), value.clone());
            }
        };
        assert_eq!(read(&with("fuse_adjacent_images", json!(false))), (apart, first_rows));
        assert_eq!(read(&with("pos_embed", json!("interpolate"))), (fused, interpolated));
        assert_eq!(read(&with("vision_attention_mask", json!("causal"))), (VisionAttention::Causal, first_rows));
        let error = VoraConfig::from_json(object(json!({
            "model_type": "vora", "vision_embedding_intermediate_size": 12, "patch_size": 4, "image_size": 8,
            "pos_embed": "flat",
        })));
        let error = format!("{:#}", error.unwrap_err());
        assert_eq!(error, "`pos_embed`: unknown variant `flat`, expected `interpolate` or `first_rows`");
    }

    #[test]
    fn what_is_written_is_read() {
        let mut config = VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8);
        config.lora = Some(LoraConfig::new(3, 1));
        config.vision_attention = VisionAttention::Causal;
        config.llm_name = "some/llm".into();
        let json = object(config.to_json().unwrap());
        assert_eq!(json["model_type"], "vora");
        let read = VoraConfig::from_json(json).unwrap();
        assert_eq!(serde_json::to_value(&read.llm).unwrap(), serde_json::to_value(&config.llm).unwrap());
        assert_eq!(
            (&read.lora, read.vision_attention, &read.llm_name),
            (&config.lora, VisionAttention::Causal, &config.llm_name)
        );
    }

    #[test]
    fn another_model_is_refused_by_name() {
        let error = VoraConfig::from_json(object(json!({"model_type": "llava"}))).unwrap_err().to_string();
        assert_eq!(error, "model_type is `llava`, a VoRA folder says `vora`");
    }
}
