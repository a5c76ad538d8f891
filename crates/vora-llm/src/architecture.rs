//! The backbones: one row each, with what follows from a `model_type` and is no key of its config.
//!
//! Another backbone whose blocks are made of these parts is another row.

use serde_json::{Value, json};

use crate::error::ConfigError;

/// The `model_type`s whose blocks are these: RMS norm, rotary positions, grouped-query attention, SwiGLU. SmolLM and
/// SmolLM2 are `llama`, Qwen2.5 is `qwen2`.
pub const MODEL_TYPES: [&str; ARCHITECTURES.len()] = {
    let mut model_types = [""; ARCHITECTURES.len()];
    let mut row = 0;
    while row < ARCHITECTURES.len() {
        model_types[row] = ARCHITECTURES[row].model_type;
        row += 1;
    }
    model_types
};

/// Which norm an architecture has on q and k.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum QkNorm {
    /// RMS norm with one weight for all heads (Qwen3).
    Rms,
    /// Layer norm with a weight and a bias for every head (Chameleon).
    Layer,
}

/// Which of attention's matrices have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttentionBias {
    /// All four or none, as `attention_bias` says.
    ByKey,
    /// None.
    Never,
    /// q, k and v, whatever `attention_bias` says.
    Qkv,
}

/// Which layers have a sliding window, where `sliding_window` gives its width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    /// None.
    Never,
    /// All of them.
    Always,
    /// With `use_sliding_window`, those that `layer_types` lists; without a list, from `max_window_layers` on.
    FromLayer,
    /// With `use_sliding_window`, those that `layer_types` lists; without a list, those without a rotary embedding.
    WithoutRope,
}

/// One backbone.
#[derive(Debug)]
pub(crate) struct Architecture {
    pub(crate) model_type: &'static str,
    /// HF's class for such a decoder alone; none where it is part of another model.
    hf_class: Option<&'static str>,
    /// The sizes that HF's config class has for absent keys. A config of a decoder alone must say them; a LLaVA's need
    /// not.
    absent_sizes: fn() -> Value,
    /// What HF's config class says of absent keys, where it is not what Llama's says.
    pub(crate) absent_keys: fn() -> Value,
    pub(crate) attention_bias: AttentionBias,
    /// Whether gate, up and down can have a bias.
    pub(crate) mlp_bias: bool,
    pub(crate) qk_norm: Option<QkNorm>,
    /// Whether `qk_norm: false` leaves that norm out.
    pub(crate) qk_norm_is_optional: bool,
    pub(crate) window: Window,
    /// Whether `no_rope_layers` or `no_rope_layer_interval` take the rotary embedding from some layers.
    pub(crate) skips_rope: bool,
    /// Whether `swin_norm` can move the norms after attention and MLP.
    pub(crate) can_norm_after: bool,
    /// Whether a head is always `hidden_size / num_attention_heads` wide.
    pub(crate) head_dim_follows: bool,
}

const LLAMA: Architecture = Architecture {
    model_type: "llama",
    hf_class: Some("LlamaForCausalLM"),
    absent_sizes: || sizes(32_000, 4096, 11_008, 32, 32),
    absent_keys: || json!({}),
    attention_bias: AttentionBias::ByKey,
    mlp_bias: true,
    qk_norm: None,
    qk_norm_is_optional: false,
    window: Window::Never,
    skips_rope: false,
    can_norm_after: false,
    head_dim_follows: false,
};

const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture {
        model_type: "mistral",
        hf_class: Some("MistralForCausalLM"),
        absent_sizes: || sizes(32_000, 4096, 14_336, 32, 32),
        absent_keys: || json!({"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096}),
        attention_bias: AttentionBias::Never,
        mlp_bias: false,
        window: Window::Always,
        ..LLAMA
    },
    Architecture {
        model_type: "qwen2",
        hf_class: Some("Qwen2ForCausalLM"),
        absent_sizes: || sizes(151_936, 4096, 22_016, 32, 32),
        absent_keys: || json!({"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096}),
        attention_bias: AttentionBias::Qkv,
        mlp_bias: false,
        window: Window::FromLayer,
        ..LLAMA
    },
    Architecture {
        model_type: "qwen3",
        hf_class: Some("Qwen3ForCausalLM"),
        absent_sizes: || sizes(151_936, 4096, 22_016, 32, 32),
        absent_keys: || {
            json!({
                "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128,
            })
        },
        mlp_bias: false,
        qk_norm: Some(QkNorm::Rms),
        window: Window::FromLayer,
        ..LLAMA
    },
    Architecture {
        model_type: "smollm3",
        hf_class: Some("SmolLM3ForCausalLM"),
        absent_sizes: || sizes(128_256, 2048, 11_008, 36, 16),
        absent_keys: || {
            json!({
                "max_position_embeddings": 32_768, "num_key_value_heads": 4, "rope_theta": 2e6,
                "tie_word_embeddings": true,
            })
        },
        window: Window::WithoutRope,
        skips_rope: true,
        ..LLAMA
    },
    Architecture {
        model_type: "chameleon",
        hf_class: None,
        absent_sizes: || json!({}),
        absent_keys: || json!({"max_position_embeddings": 4096, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}),
        qk_norm: Some(QkNorm::Layer),
        qk_norm_is_optional: true,
        can_norm_after: true,
        head_dim_follows: true,
        ..LLAMA
    },
];

fn sizes(vocab: i64, hidden: i64, intermediate: i64, layers: i64, heads: i64) -> Value {
    json!({
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    })
}

/// HF's class for a decoder of this `model_type`; none for a Chameleon, which is no decoder alone, and for what is not
/// among [`MODEL_TYPES`].
pub fn hf_class(model_type: &str) -> Option<&'static str> {
    Architecture::find(model_type).ok()?.hf_class
}

/// The sizes that HF's config class of this `model_type` has for absent keys, as where a LLaVA's config leaves them out;
/// an empty object where there is no such class.
pub fn absent_sizes(model_type: &str) -> Value {
    Architecture::find(model_type).map_or_else(|_| json!({}), |row| (row.absent_sizes)())
}

impl Architecture {
    /// The row of a `model_type`.
    pub(crate) fn find(model_type: &str) -> Result<&'static Self, ConfigError> {
        let row = ARCHITECTURES.iter().find(|row| row.model_type == model_type);
        row.ok_or_else(|| ConfigError::ModelType { found: model_type.to_owned(), known: &MODEL_TYPES })
    }

    /// The same; Llama's for a `model_type` that [`find`](Self::find) refuses.
    pub(crate) fn of(model_type: &str) -> &'static Self {
        Self::find(model_type).unwrap_or(&LLAMA)
    }
}
