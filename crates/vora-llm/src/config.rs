//! `LlmConfig`: the keys of a checkpoint's `config.json`, as HF transformers writes them.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use vora_gguf::folder::open_json;

use crate::architecture::{Architecture, AttentionBias, QkNorm, Window};
use crate::error::ConfigError;
use crate::rope::{RopeParameters, RopeScaling};

/// The layer types that a config may name.
const LAYER_TYPES: [&str; 2] = ["full_attention", SLIDING];
const SLIDING: &str = "sliding_attention";

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
    /// The MLP's activation; `silu` is the only one.
    #[serde(default = "default_hidden_act")]
    pub hidden_act: String,
    /// Base of the rotary frequencies; 10000 where no key gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// How rotary frequencies are scaled, as configs had it until 2025.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeParameters>,
    /// The same in newer configs, `rope_theta` included; it wins over the other two keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
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
        Self::serialize(self, serializer)
    }
}

/// One token id or several: configs have both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
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
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
            sliding_window: None,
            use_sliding_window: None,
            max_window_layers: None,
            layer_types: None,
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
        let config: Self = serde_json::from_value(json).with_context(|| format!("in {}", origin.display()))?;
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

    /// Checks what the types cannot: known architecture, activation and rope type, sizes that fit each other, options
    /// that this architecture has.
    ///
    /// # Errors
    /// Names the key, what it says, and what it may say: [`ConfigError`] where it is something that others implement.
    pub fn validate(&self) -> Result<()> {
        Architecture::find(&self.model_type)?;
        if self.hidden_act != "silu" {
            return Err(ConfigError::HiddenAct { found: self.hidden_act.clone() }.into());
        }
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers as i64),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            ensure!(size > 0, "{key} is {size}, it must be at least 1");
        }
        ensure!(
            self.num_attention_heads % self.kv_heads() == 0,
            "num_attention_heads is {}, not a multiple of num_key_value_heads {}",
            self.num_attention_heads,
            self.kv_heads()
        );
        ensure!(
            self.head_dim.is_some() || self.hidden_size % self.num_attention_heads == 0,
            "hidden_size is {}, not a multiple of num_attention_heads {}, and there is no head_dim",
            self.hidden_size,
            self.num_attention_heads
        );
        let head_dim = self.head_width();
        ensure!(head_dim > 0 && head_dim % 2 == 0, "head_dim is {head_dim}, it must be even for rotary positions");
        ensure!(
            self.rms_norm_eps > 0.0 && self.rms_norm_eps.is_finite(),
            "rms_norm_eps is {}, it must be positive",
            self.rms_norm_eps
        );
        let std = self.init_std();
        ensure!(std > 0.0 && std.is_finite(), "initializer_range is {std}, it must be positive");
        self.validate_attention()?;
        self.validate_layers()?;
        for (key, dropped) in [("attention_dropout", self.attention_dropout), ("dropout", self.dropout)] {
            let dropped = dropped.unwrap_or(0.0);
            ensure!((0.0..1.0).contains(&dropped), "{key} is {dropped}, it must be at least 0 and below 1");
        }
        if let Some(part) = self.extra.get("partial_rotary_factor").filter(|part| !part.is_null()) {
            ensure!(part.as_f64() == Some(1.0), "partial_rotary_factor is {part}, known is 1");
        }
        self.rope().map(drop)
    }

    /// Biases and norms that the architecture does not have.
    fn validate_attention(&self) -> Result<()> {
        let (model_type, row) = (self.model_type.as_str(), self.architecture());
        let has = match row.attention_bias {
            AttentionBias::ByKey => None,
            AttentionBias::Never => Some("no such biases"),
            AttentionBias::Qkv => Some("biases on q, k and v whatever it says, and none on o"),
        };
        if let Some(has) = has {
            ensure!(!self.attention_bias, "attention_bias is true, but {model_type} has {has}");
        }
        ensure!(row.mlp_bias || !self.mlp_bias, "mlp_bias is true, but {model_type} has no such biases");
        ensure!(
            row.can_norm_after || !self.has_swin_norm(),
            "swin_norm is true, but {model_type} norms before its blocks"
        );
        if let Some(qk_norm) = self.qk_norm {
            let has = self.head_norm().is_some();
            ensure!(
                qk_norm == has,
                "qk_norm is {qk_norm}, but {model_type} {}",
                if has { "always has that norm" } else { "has no such norm" }
            );
        }
        let own_head_dim = self.hidden_size / self.num_attention_heads;
        ensure!(
            !row.head_dim_follows || self.head_width() == own_head_dim,
            "head_dim is {}, but {model_type}'s is hidden_size / num_attention_heads, {own_head_dim}",
            self.head_width()
        );
        Ok(())
    }

    /// What differs between layers: windows and rotations.
    fn validate_layers(&self) -> Result<()> {
        let (model_type, layers) = (self.model_type.as_str(), self.num_hidden_layers);
        if let Some(window) = self.sliding_window {
            ensure!(window > 0, "sliding_window is {window}, it must be at least 1");
            let (used, hides) = (self.use_sliding_window, window < self.max_position_embeddings);
            match self.architecture().window {
                Window::Always => ensure!(
                    used != Some(false),
                    "use_sliding_window is false, but {model_type} knows no such switch: a sliding_window of null turns it off"
                ),
                Window::Never => ensure!(
                    used == Some(false) || !hides,
                    "sliding_window is {window}, below max_position_embeddings {}, but {model_type} has no window",
                    self.max_position_embeddings
                ),
                Window::FromLayer | Window::WithoutRope => {}
            }
        }
        if let Some(types) = &self.layer_types {
            ensure!(types.len() == layers, "layer_types has {} entries, num_hidden_layers is {layers}", types.len());
            for (layer_idx, layer_type) in types.iter().enumerate() {
                ensure!(
                    LAYER_TYPES.contains(&layer_type.as_str()),
                    "layer_types[{layer_idx}] is `{layer_type}`, known are {}",
                    LAYER_TYPES.join(", ")
                );
                let window = self.window(layer_idx);
                ensure!(
                    (layer_type == SLIDING) == window.is_some(),
                    "layer_types[{layer_idx}] is `{layer_type}`, but this layer of {model_type} has {}",
                    window.map_or("no window".to_owned(), |window| format!("a window of {window}"))
                );
            }
        }
        if let Some(list) = &self.no_rope_layers {
            let any = list.iter().take(layers).any(|&rotates| rotates == 0);
            if self.architecture().skips_rope {
                ensure!(
                    list.len() >= layers,
                    "no_rope_layers has {} entries, num_hidden_layers is {layers}",
                    list.len()
                );
            } else {
                ensure!(!any, "no_rope_layers has a 0, but {model_type} rotates in every layer");
            }
        }
        ensure!(self.no_rope_layer_interval != Some(0), "no_rope_layer_interval is 0, it must be at least 1");
        Ok(())
    }

    /// Its row in the table of backbones.
    fn architecture(&self) -> &'static Architecture {
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

    /// Whether the norms come after attention and MLP, not before.
    pub fn has_swin_norm(&self) -> bool {
        self.swin_norm.unwrap_or(false)
    }

    /// Whether a layer rotates q and k.
    pub fn has_rope(&self, layer_idx: usize) -> bool {
        if !self.architecture().skips_rope {
            return true;
        }
        match &self.no_rope_layers {
            Some(list) => list.get(layer_idx) != Some(&0),
            None => !(layer_idx + 1).is_multiple_of(self.no_rope_layer_interval.unwrap_or(4)),
        }
    }

    /// The window of a layer's attention, where it has one: a token attends to itself and the `window - 1` before it.
    pub fn window(&self, layer_idx: usize) -> Option<i64> {
        let used = self.use_sliding_window.unwrap_or(false);
        let listed = || self.layer_types.as_ref().map(|types| types.get(layer_idx).is_some_and(|t| t == SLIDING));
        let slides = match self.architecture().window {
            Window::Never => false,
            Window::Always => true,
            Window::FromLayer => used && listed().unwrap_or_else(|| layer_idx >= self.max_window_layers.unwrap_or(28)),
            Window::WithoutRope => used && listed().unwrap_or_else(|| !self.has_rope(layer_idx)),
        };
        self.sliding_window.filter(|_| slides)
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

    /// Base of the rotary frequencies.
    pub fn rope_base(&self) -> f64 {
        let newer = self.rope_parameters.as_ref().and_then(|p| p.rope_theta);
        newer.or(self.rope_theta).unwrap_or(10_000.0)
    }

    /// The scaling of rotary frequencies that the config asks for.
    ///
    /// # Errors
    /// [`ConfigError::RopeType`] for a type that is not known, else the key that a known one lacks.
    pub fn rope(&self) -> Result<RopeScaling> {
        let (section, parameters) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(parameters), _) => ("rope_parameters", parameters),
            (None, Some(parameters)) => ("rope_scaling", parameters),
            (None, None) => return Ok(RopeScaling::Default),
        };
        if let Some((key, _)) = parameters.extra.iter().find(|(_, value)| value.is_object()) {
            bail!("{section} has rotations of its own for `{key}`: one for all layers is known");
        }
        RopeScaling::from_parameters(parameters, self.max_position_embeddings, self.head_width())
            .with_context(|| format!("in {section}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOLLM2: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 2 }"#;

    fn parse(text: &str) -> LlmConfig {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_gguf_file_alone_has_a_config() {
        let golden = |name: &str| fixtures::root().join("golden").join(name);
        let error = format!("{:#}", LlmConfig::open(&golden("gguf_kinds.gguf")).unwrap_err());
        assert!(error.contains("gguf_kinds.gguf: general.architecture is `test`, known are llama"), "{error}");
        let error = format!("{:#}", LlmConfig::open(&golden("none.gguf")).unwrap_err());
        assert!(error.contains("cannot read") && error.contains("none.gguf"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(golden("gguf_qwen3.gguf"), folder.path().join("model.gguf")).unwrap();
        assert_eq!(LlmConfig::open(folder.path()).unwrap().model_type, "qwen3");
        // What lies beside it goes first.
        let json = serde_json::to_string(&LlmConfig::tiny(8)).unwrap();
        std::fs::write(folder.path().join("config.json"), json).unwrap();
        assert_eq!(LlmConfig::open(folder.path()).unwrap(), LlmConfig::tiny(8));
    }

    #[test]
    fn published_keys_load_and_the_rest_is_kept() {
        let config = parse(SMOLLM2);
        config.validate().unwrap();
        assert_eq!((config.head_width(), config.kv_heads(), config.rope_base()), (64, 3, 100_000.0));
        assert_eq!(config.eos_token_ids(), [2]);
        assert_eq!(config.saved_dtype(), Some("bfloat16"));
        assert_eq!(config.rope().unwrap(), RopeScaling::Default);
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(written["architectures"][0], "LlamaForCausalLM");
        assert_eq!(parse(&written.to_string()), config);
        assert_eq!(parse(&SMOLLM2.replace("\"eos_token_id\": 2", "\"eos_token_id\": [2, 7]")).eos_token_ids(), [2, 7]);
    }

    #[test]
    fn absent_keys_are_those_of_hfs_config_class() {
        let of = |model_type: &str| parse(&SMOLLM2.replace("\"llama\"", &format!("\"{model_type}\"")));
        assert_eq!(of("mistral").sliding_window, Some(4096));
        assert_eq!((of("qwen3").head_width(), of("llama").head_width()), (128, 64));
        let sparse = r#"{"model_type": "MODEL", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8,
            "num_hidden_layers": 4, "num_attention_heads": 32}"#;
        let sparse = |model_type: &str| parse(&sparse.replace("MODEL", model_type));
        assert_eq!((sparse("chameleon").rms_norm_eps, sparse("llama").rms_norm_eps), (1e-5, 1e-6));
        let smollm3 = sparse("smollm3");
        assert!(smollm3.tie_word_embeddings && !sparse("qwen2").tie_word_embeddings);
        assert_eq!((smollm3.rope_base(), smollm3.max_position_embeddings, smollm3.kv_heads()), (2e6, 32_768, 4));
        assert_eq!([0, 1, 2, 3].map(|layer_idx| smollm3.has_rope(layer_idx)), [true, true, true, false]);
        // A null is no absent key, and stays one in what is written.
        let written = serde_json::to_string(&LlmConfig { sliding_window: None, ..sparse("mistral") }).unwrap();
        assert_eq!(parse(&written).sliding_window, None);
    }

    #[test]
    fn layers_have_the_windows_that_hf_gives_them() {
        let base = LlmConfig { num_hidden_layers: 3, sliding_window: Some(8), ..LlmConfig::tiny(64) };
        let types = |types: [&str; 3]| Some(types.map(str::to_owned).to_vec());
        let of = |model_type: &str| LlmConfig { model_type: model_type.into(), ..base.clone() };
        let on = |model_type: &str| LlmConfig { use_sliding_window: Some(true), ..of(model_type) };
        let (some, none) = (Some(8), None);
        for (config, windows) in [
            (of("mistral"), [some; 3]),
            (LlmConfig { sliding_window: None, ..of("mistral") }, [none; 3]),
            (of("qwen2"), [none; 3]),
            (on("qwen2"), [none; 3]), // max_window_layers is 28
            (LlmConfig { max_window_layers: Some(1), ..on("qwen2") }, [none, some, some]),
            (LlmConfig { layer_types: types([SLIDING, "full_attention", SLIDING]), ..on("qwen3") }, [some, none, some]),
            (LlmConfig { no_rope_layers: Some(vec![1, 0, 1]), ..on("smollm3") }, [none, some, none]),
            (LlmConfig { use_sliding_window: Some(false), ..of("llama") }, [none; 3]),
        ] {
            config.validate().unwrap();
            assert_eq!([0, 1, 2].map(|layer_idx| config.window(layer_idx)), windows, "{config:?}");
        }
        for (config, says) in [
            (LlmConfig { layer_types: types([SLIDING, "full_attention", SLIDING]), ..of("mistral") }, {
                "layer_types[1] is `full_attention`, but this layer of mistral has a window of 8"
            }),
            (LlmConfig { layer_types: types([SLIDING; 3]), ..of("qwen2") }, "layer_types[0] is `sliding_attention`"),
            (LlmConfig { layer_types: types(["chunked_attention"; 3]), ..on("qwen3") }, "known are full_attention"),
            (LlmConfig { layer_types: Some(vec![]), ..on("qwen3") }, "layer_types has 0 entries"),
            (LlmConfig { use_sliding_window: Some(false), ..of("mistral") }, "use_sliding_window is false"),
            (LlmConfig { sliding_window: Some(0), ..of("mistral") }, "sliding_window is 0"),
            (LlmConfig { model_type: "chameleon".into(), ..base.clone() }, "chameleon has no window"),
            (LlmConfig { no_rope_layers: Some(vec![1, 0, 1]), ..on("qwen3") }, "no_rope_layers has a 0, but qwen3"),
            (LlmConfig { no_rope_layers: Some(vec![1]), ..on("smollm3") }, "no_rope_layers has 1 entries"),
            (LlmConfig { no_rope_layer_interval: Some(0), ..on("smollm3") }, "no_rope_layer_interval is 0"),
        ] {
            let error = format!("{:#}", config.validate().unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn both_spellings_of_rope_load() {
        let old = SMOLLM2.replace("null", r#"{"type": "linear", "rope_type": "linear", "factor": 4.0}"#);
        assert_eq!(parse(&old).rope().unwrap(), RopeScaling::Linear { factor: 4.0 });
        let new = SMOLLM2.replace(
            r#""rope_theta": 100000, "rope_scaling": null"#,
            r#""rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}"#,
        );
        assert_eq!(parse(&new).rope_base(), 5000.0);
        assert_eq!(parse(&new).rope().unwrap(), RopeScaling::Default);
    }

    #[test]
    fn qwen2_has_biases_on_q_k_v() {
        let config = parse(&SMOLLM2.replace("\"model_type\": \"llama\"", "\"model_type\": \"qwen2\""));
        assert_eq!(config.attention_biases(), (true, false));
        assert_eq!(parse(SMOLLM2).attention_biases(), (false, false));
    }

    #[test]
    fn chameleons_norm_of_q_and_k_may_be_left_out() {
        let chameleon = SMOLLM2.replace("\"llama\"", "\"chameleon\"");
        let without = parse(&chameleon.replace("\"chameleon\"", "\"chameleon\", \"qk_norm\": false"));
        without.validate().unwrap();
        assert_eq!((parse(&chameleon).head_norm(), without.head_norm()), (Some(QkNorm::Layer), None));
        let written = |config: &LlmConfig| serde_json::to_value(config).unwrap().get("qk_norm").cloned();
        assert_eq!((written(&parse(&chameleon)), written(&without)), (None, Some(Value::Bool(false))));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (from, to, says) in [
            ("\"model_type\": \"llama\"", "\"model_type\": \"gpt2\"", {
                "`gpt2`, known are llama, mistral, qwen2, qwen3, smollm3, chameleon"
            }),
            ("\"silu\"", "\"gelu\"", "hidden_act is `gelu`, known is silu"),
            ("null", "{\"rope_type\": \"warp\"}", "`warp`, known are default, linear, dynamic, llama3, yarn, longrope"),
            ("null", "{\"rope_type\": \"linear\"}", "`factor` is missing"),
            ("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 2", "not a multiple of num_key_value_heads 2"),
            ("\"hidden_size\": 576", "\"hidden_size\": 577", "hidden_size is 577"),
            ("\"vocab_size\": 49152", "\"vocab_size\": 0", "vocab_size is 0"),
            (
                "\"hidden_size\"",
                "\"sliding_window\": 64, \"use_sliding_window\": true, \"hidden_size\"",
                "sliding_window is 64, below max_position_embeddings 8192, but llama has no window",
            ),
            ("\"llama\"", "\"mistral\", \"attention_bias\": true", "attention_bias is true, but mistral has no such"),
            ("\"llama\"", "\"qwen2\", \"attention_bias\": true", "qwen2 has biases on q, k and v whatever it says"),
            ("\"llama\"", "\"qwen3\", \"mlp_bias\": true", "mlp_bias is true, but qwen3"),
            ("\"llama\"", "\"llama\", \"swin_norm\": true", "swin_norm is true, but llama"),
            ("\"llama\"", "\"llama\", \"qk_norm\": true", "qk_norm is true, but llama has no such norm"),
            ("\"llama\"", "\"qwen3\", \"qk_norm\": false", "qk_norm is false, but qwen3 always has that norm"),
            ("\"llama\"", "\"llama\", \"initializer_range\": -0.02", "initializer_range is -0.02, it must be"),
            ("\"llama\"", "\"chameleon\", \"head_dim\": 32", "head_dim is 32, but chameleon's is"),
            ("\"llama\"", "\"llama\", \"dropout\": 1.0", "dropout is 1, it must be"),
            ("\"llama\"", "\"llama\", \"attention_dropout\": -0.1", "attention_dropout is -0.1, it must be"),
            ("\"llama\"", "\"llama\", \"partial_rotary_factor\": 0.5", "partial_rotary_factor is 0.5, known is 1"),
            (
                "null",
                "{\"full_attention\": {\"rope_type\": \"default\"}}",
                "rope_scaling has rotations of its own for `full_attention`",
            ),
        ] {
            let error = format!("{:#}", parse(&SMOLLM2.replace(from, to)).validate().unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn what_others_implement_is_told_apart_from_what_is_wrong() {
        let refused = |from: &str, to: &str| {
            let error = parse(&SMOLLM2.replace(from, to)).validate().unwrap_err();
            error.downcast_ref::<ConfigError>().cloned()
        };
        assert!(
            matches!(refused("\"llama\"", "\"gpt2\""), Some(ConfigError::ModelType { found, .. }) if found == "gpt2")
        );
        let rope = refused("null", "{\"rope_type\": \"warp\"}"); // through the context that names the section
        assert!(matches!(rope, Some(ConfigError::RopeType { found, .. }) if found == "warp"));
        assert_eq!(refused("\"silu\"", "\"gelu\""), Some(ConfigError::HiddenAct { found: "gelu".into() }));
        assert_eq!(refused("\"vocab_size\": 49152", "\"vocab_size\": 0"), None);
    }

    #[test]
    fn open_names_file_and_key() {
        let folder = std::env::temp_dir().join(format!("vora-llm-config-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let error = format!("{:#}", LlmConfig::open(&folder).unwrap_err());
        assert!(error.contains("cannot read") && error.contains("config.json"), "{error}");
        std::fs::write(folder.join("config.json"), SMOLLM2.replace("\"vocab_size\": 49152,", "")).unwrap();
        let error = format!("{:#}", LlmConfig::open(&folder).unwrap_err());
        assert!(error.contains("config.json") && error.contains("missing field `vocab_size`"), "{error}");
        std::fs::write(folder.join("config.json"), SMOLLM2).unwrap();
        assert_eq!(LlmConfig::open(&folder).unwrap().hidden_size, 576);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
