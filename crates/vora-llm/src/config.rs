//! `LlmConfig`: the keys of a checkpoint's `config.json`, as HF transformers writes them.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::rotary::RopeScaling;

/// The `model_type`s whose blocks are these: RMS norm, rotary positions, grouped-query attention, SwiGLU.
pub const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// One decoder's sizes and constants. Keys that are not listed here pass into [`extra`](Self::extra) and are written
/// back with the rest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlmConfig {
    /// One of [`MODEL_TYPES`].
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
    /// Width of sliding-window attention, where the model has it; see [`LlmConfig::validate`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<i64>,
    /// Qwen's switch for `sliding_window`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_sliding_window: Option<bool>,
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
    pub extra: serde_json::Map<String, serde_json::Value>,
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

/// `rope_scaling` or `rope_parameters` as they stand in the file; [`LlmConfig::rope`] makes sense of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the names and meanings are those of the published methods, told in `RopeScaling`")]
pub struct RopeParameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_type: Option<String>,
    /// The older name of `rope_type`; many files have both.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub older_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta_fast: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta_slow: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub short_factor: Option<Vec<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub long_factor: Option<Vec<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
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

impl LlmConfig {
    /// Reads and validates `config.json` in `folder`.
    ///
    /// # Errors
    /// Names the file and the key that is missing, of another type, or not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: Self = serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        config.validate().with_context(|| format!("in {}", path.display()))?;
        Ok(config)
    }

    /// A Llama of two layers, four query and two key-value heads of eight, with tied embeddings: for tests and smoke
    /// runs.
    pub fn tiny(vocab_size: i64) -> Self {
        Self {
            model_type: "llama".to_owned(),
            vocab_size,
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            head_dim: None,
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            hidden_act: default_hidden_act(),
            rope_theta: Some(10_000.0),
            rope_scaling: None,
            rope_parameters: None,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
            sliding_window: None,
            use_sliding_window: None,
            dtype: None,
            torch_dtype: None,
            bos_token_id: None,
            eos_token_id: None,
            pad_token_id: None,
            extra: serde_json::Map::new(),
        }
    }

    /// Checks what the types cannot: known architecture, activation and rope type, sizes that fit each other.
    pub fn validate(&self) -> Result<()> {
        if !MODEL_TYPES.contains(&self.model_type.as_str()) {
            bail!("model_type is `{}`, known are {}", self.model_type, MODEL_TYPES.join(", "));
        }
        ensure!(self.hidden_act == "silu", "hidden_act is `{}`, known is silu", self.hidden_act);
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
        if let Some(window) = self.sliding_window {
            let unused = self.model_type != "mistral" && !self.use_sliding_window.unwrap_or(false);
            ensure!(
                unused || window >= self.max_position_embeddings,
                "sliding_window is {window}, below max_position_embeddings {}: sliding-window attention is not supported",
                self.max_position_embeddings
            );
        }
        self.rope().map(drop)
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
        match self.model_type.as_str() {
            "qwen2" => (true, false),
            "mistral" => (false, false),
            _ => (self.attention_bias, self.attention_bias),
        }
    }

    /// Whether each head of q and k is normed before its rotation (Qwen3).
    pub fn has_qk_norm(&self) -> bool {
        self.model_type == "qwen3"
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
    /// Names an unknown rope type, or the key that a known one lacks.
    pub fn rope(&self) -> Result<RopeScaling> {
        let (section, parameters) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(parameters), _) => ("rope_parameters", parameters),
            (None, Some(parameters)) => ("rope_scaling", parameters),
            (None, None) => return Ok(RopeScaling::Default),
        };
        RopeScaling::from_parameters(parameters, self).with_context(|| format!("in {section}"))
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
    fn what_is_not_supported_is_named() {
        for (from, to, says) in [
            ("\"model_type\": \"llama\"", "\"model_type\": \"gpt2\"", "`gpt2`, known are llama, mistral, qwen2, qwen3"),
            ("\"silu\"", "\"gelu\"", "hidden_act is `gelu`, known is silu"),
            ("null", "{\"rope_type\": \"warp\"}", "`warp`, known are default, linear, dynamic, llama3, yarn, longrope"),
            ("null", "{\"rope_type\": \"linear\"}", "`factor` is missing"),
            ("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 2", "not a multiple of num_key_value_heads 2"),
            ("\"hidden_size\": 576", "\"hidden_size\": 577", "hidden_size is 577"),
            ("\"vocab_size\": 49152", "\"vocab_size\": 0", "vocab_size is 0"),
            (
                "\"hidden_size\"",
                "\"sliding_window\": 64, \"use_sliding_window\": true, \"hidden_size\"",
                "sliding_window is 64",
            ),
        ] {
            let error = format!("{:#}", parse(&SMOLLM2.replace(from, to)).validate().unwrap_err());
            assert!(error.contains(says), "{error}");
        }
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
