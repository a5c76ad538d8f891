//! `LlmConfig`: the keys of a checkpoint's `config.json`, as HF transformers writes them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use vora_gguf::folder::open_json;

use crate::architecture::{Activation, Architecture, AttentionBias, NormOrder, QkNorm};
use crate::rope::RopeParameters;

/// One decoder's sizes and constants. Keys that are not listed here pass into [`extra`](Self::extra) and are written
/// back with the rest, as Chameleon's `vq_config` and `vocabulary_map`. A key that a file leaves out has the value that
/// HF's config class of that `model_type` gives it.
///
/// Chameleon's `model_parallel_size` is such an extra key: the shards that it was trained in had norms of their own,
/// and published files have these repeated for every head already, so nothing is left to do with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")] // the traits themselves are below: they add the defaults of a model type
pub struct LlmConfig {
    /// One of [`MODEL_TYPES`](crate::MODEL_TYPES).
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads; as many as query heads where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<i64>,
    /// Width of a head; `hidden_size / num_attention_heads` where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<i64>,
    /// Positions that the model was trained for.
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: i64,
    /// Added to the mean square in every norm.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// The MLP's activation; `silu` is the only one under this key.
    #[serde(default = "default_hidden_act")]
    pub hidden_act: String,
    /// The same for Gemma, in place of `hidden_act`; `gelu_pytorch_tanh` is the only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_activation: Option<String>,
    /// Base of the rotary frequencies; 10000 where no key gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// How rotary frequencies are scaled, as configs had it until 2025.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeParameters>,
    /// The same in newer configs, `rope_theta` included; it wins over the other two keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Gemma 3: base of the rotary frequencies in layers with a window, as configs had it until 2025; since then
    /// `rope_parameters` has a section for either type of layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_local_base_freq: Option<f64>,
    /// Whether q, k, v and o have a bias (Llama's key; Qwen2 has one on q, k and v whatever this says).
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether gate, up and down have a bias.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Width of sliding-window attention; [`LlmConfig::window`] says which layers have it. Written even where it is
    /// null, since HF takes a Mistral that lacks the key for one with a window of 4096.
    #[serde(default)]
    pub sliding_window: Option<i64>,
    /// Qwen's and SmolLM3's switch for `sliding_window`; off where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_sliding_window: Option<bool>,
    /// The first layer that has Qwen's window, where no `layer_types` say it; 28 where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_window_layers: Option<usize>,
    /// `full_attention` or `sliding_attention` for every layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<String>>,
    /// Gemma without `layer_types`: every n-th layer has no window; 6 where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window_pattern: Option<usize>,
    /// Gemma 4: width of the heads in layers without a window, where no `per_layer_config` says it; 512 where the key is
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub global_head_dim: Option<i64>,
    /// Gemma 4: key and value heads of those layers, with `attention_k_eq_v`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_global_key_value_heads: Option<i64>,
    /// Gemma 4: sizes of single layers, by their index; as newer configs have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_layer_config: Option<BTreeMap<String, LayerOverrides>>,
    /// Gemma 4: whether layers without a window have one projection for keys and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_k_eq_v: Option<bool>,
    /// Gemma 4: how many of the last layers attend to keys and values of the last layer of their type before these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_kv_shared_layers: Option<usize>,
    /// Gemma 4: whether the MLPs of those layers are twice as wide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_double_wide_mlp: Option<bool>,
    /// Gemma 3: attention's logits are divided by the root of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_pre_attn_scalar: Option<i64>,
    /// Gemma: the bound that logits come near to, `cap * tanh(logits / cap)`; none where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_logit_softcapping: Option<f64>,
    /// SmolLM3: 1 for each layer that rotates q and k, 0 for each that skips the rotary embedding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_rope_layers: Option<Vec<i64>>,
    /// SmolLM3 without the list above: every n-th layer skips the rotary embedding; 4 where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_rope_layer_interval: Option<usize>,
    /// Chameleon 34B: what attention and MLP put out is normed, not what goes into them (Swin Transformer V2's order).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swin_norm: Option<bool>,
    /// Chameleon: whether q and k are normed before attention, which they are where the key is absent. HF's configs have
    /// no such key, since published models all do; `false` is for the study of what the norm is good for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<bool>,
    /// Standard deviation of a new model's matrices; 0.02 where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initializer_range: Option<f64>,
    /// Share of attention weights that a training forward drops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_dropout: Option<f64>,
    /// Share of what attention and MLP add to the residual stream that a training forward drops: 0.1 for Chameleon 7B
    /// (arXiv 2405.09818, section 2.3). HF's configs have no such key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// The dtype that the weights were saved in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// The same key's older name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch_dtype: Option<String>,
    /// First token of a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<i64>,
    /// Tokens that end an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token_id: Option<TokenIds>,
    /// Token that fills short rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<i64>,
    /// Every other key, as it was.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl<'de> Deserialize<'de> for LlmConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut keys = Map::deserialize(deserializer)?;
        let model_type = keys.get("model_type").and_then(Value::as_str).unwrap_or_default();
        if let Value::Object(defaults) = (Architecture::of(model_type).absent_keys)() {
            for (key, value) in defaults {
                keys.entry(key).or_insert(value);
            }
        }
        Self::deserialize(Value::Object(keys)).map_err(serde::de::Error::custom)
    }
}

impl Serialize for LlmConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.architecture().activation == Activation::Silu {
            return Self::serialize(self, serializer);
        }
        let mut keys = Self::serialize(self, serde_json::value::Serializer).map_err(serde::ser::Error::custom)?;
        if let Value::Object(keys) = &mut keys {
            keys.remove("hidden_act"); // which is `hidden_activation` there
        }
        keys.serialize(serializer)
    }
}

/// What `per_layer_config` says of one layer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct LayerOverrides {
    /// Width of its heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<i64>,
    /// Its key and value heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<i64>,
    /// Every other key, none of which is known.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// One token id or several: configs have both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a token id, or a list of them")]
pub enum TokenIds {
    /// A single id.
    One(i64),
    /// Any of these.
    Many(Vec<i64>),
}

fn default_max_position_embeddings() -> i64 {
    2048
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_hidden_act() -> String {
    "silu".to_owned()
}

impl Default for LlmConfig {
    /// HF's `LlamaConfig()`: the sizes of Llama 2 7B.
    fn default() -> Self {
        Self {
            model_type: "llama".to_owned(),
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: default_max_position_embeddings(),
            rms_norm_eps: default_rms_norm_eps(),
            hidden_act: default_hidden_act(),
            hidden_activation: None,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            rope_local_base_freq: None,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
            sliding_window: None,
            use_sliding_window: None,
            max_window_layers: None,
            layer_types: None,
            sliding_window_pattern: None,
            global_head_dim: None,
            num_global_key_value_heads: None,
            per_layer_config: None,
            attention_k_eq_v: None,
            num_kv_shared_layers: None,
            use_double_wide_mlp: None,
            query_pre_attn_scalar: None,
            final_logit_softcapping: None,
            no_rope_layers: None,
            no_rope_layer_interval: None,
            swin_norm: None,
            qk_norm: None,
            initializer_range: None,
            attention_dropout: None,
            dropout: None,
            dtype: None,
            torch_dtype: None,
            bos_token_id: None,
            eos_token_id: None,
            pad_token_id: None,
            extra: Map::new(),
        }
    }
}

impl LlmConfig {
    /// Reads and validates `config.json` of a checkpoint folder, or the metadata of a GGUF file: `path` is one, or a
    /// folder with one and no `config.json`.
    ///
    /// # Errors
    /// Names the file and the key that is missing, of another type, or not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let (json, origin) = open_json(path, "config.json")?;
        // Before its keys: those of other models than language models are others.
        if let Some(model_type) = json.get("model_type").and_then(Value::as_str) {
            Architecture::find(model_type).with_context(|| format!("in {}", origin.display()))?;
        }
        let config: Self = vora_files::object(&json).with_context(|| format!("in {}", origin.display()))?;
        config.validate().with_context(|| format!("in {}", origin.display()))?;
        Ok(config)
    }

    /// A Llama of two layers, four query and two key-value heads of eight, with tied embeddings: for tests and smoke
    /// runs.
    pub fn tiny(vocab_size: i64) -> Self {
        Self {
            vocab_size,
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            rope_theta: Some(10_000.0),
            tie_word_embeddings: true,
            ..Self::default()
        }
    }

    /// Its row in the table of backbones.
    pub(crate) fn architecture(&self) -> &'static Architecture {
        Architecture::of(&self.model_type)
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of one head.
    pub fn head_width(&self) -> i64 {
        self.head_dim.unwrap_or_else(|| self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Whether q, k and v have a bias, and whether o has one.
    pub fn attention_biases(&self) -> (bool, bool) {
        match self.architecture().attention_bias {
            AttentionBias::Qkv => (true, false),
            AttentionBias::ByKey | AttentionBias::Never => (self.attention_bias, self.attention_bias),
        }
    }

    /// What each head of q and k is normed with before its rotation.
    pub fn head_norm(&self) -> Option<QkNorm> {
        let row = self.architecture();
        row.qk_norm.filter(|_| !row.qk_norm_is_optional || self.qk_norm.unwrap_or(true))
    }

    /// Standard deviation of a new model's matrices: as in HF, 0.02 where the key is absent or zero.
    pub fn init_std(&self) -> f64 {
        self.initializer_range.filter(|&std| std != 0.0).unwrap_or(0.02)
    }

    /// What embeddings are multiplied by, where they are.
    pub(crate) fn embedding_scale(&self) -> Option<f64> {
        self.architecture().scales_embeddings.then(|| (self.hidden_size as f64).sqrt())
    }

    /// The bound of the logits, where they have one.
    pub fn softcap(&self) -> Option<f64> {
        self.final_logit_softcapping.filter(|_| self.architecture().softcaps)
    }

    /// Whether the norms come after attention and MLP, not before.
    pub fn has_swin_norm(&self) -> bool {
        self.swin_norm.unwrap_or(false)
    }

    /// Where the norms of attention and MLP stand.
    pub(crate) fn norm_order(&self) -> NormOrder {
        match self.architecture().norms_around {
            true => NormOrder::Around,
            false if self.has_swin_norm() => NormOrder::After,
            false => NormOrder::Before,
        }
    }

    /// Ids that end an answer; none where the config names none.
    pub fn eos_token_ids(&self) -> Vec<i64> {
        match &self.eos_token_id {
            None => Vec::new(),
            Some(TokenIds::One(id)) => vec![*id],
            Some(TokenIds::Many(ids)) => ids.clone(),
        }
    }

    /// The dtype that the weights were saved in, under either name of the key.
    pub fn saved_dtype(&self) -> Option<&str> {
        self.dtype.as_deref().or(self.torch_dtype.as_deref())
    }
}
