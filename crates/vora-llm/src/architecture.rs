//! The backbones: one row each, with what follows from a `model_type` and is no key of its config.
//!
//! Another backbone whose blocks are made of these parts is another row.

use serde_json::{Value, json};

use crate::error::ConfigError;

/// The `model_type`s whose blocks are these: RMS norm, rotary positions, grouped-query attention, a gated MLP. SmolLM and
/// SmolLM2 are `llama`, Qwen2.5 is `qwen2`; Gemma's are those of its decoders alone, without pictures.
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
    /// Those that `layer_types` lists; without a list, all but every n-th (`sliding_window_pattern`; 6 where the key is
    /// absent).
    ByType {
        /// Whether the last layer may have one; else it has none, whatever the list says.
        last: bool,
    },
}

/// Where the norms of attention and MLP stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormOrder {
    /// Before them.
    Before,
    /// After them.
    After,
    /// Before and after them.
    Around,
}

/// What goes through the gate of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `silu`, under the key `hidden_act`.
    Silu,
    /// `gelu_pytorch_tanh`, under the key `hidden_activation`.
    GeluTanh,
}

/// What attention's logits are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogitScale {
    /// The root of a head's width.
    HeadDim,
    /// The root of `query_pre_attn_scalar`.
    QueryPreAttnScalar,
    /// Nothing.
    One,
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
    /// Whether attention and MLP have a norm after them beside the one before them.
    pub(crate) norms_around: bool,
    /// Whether norms multiply by `1 + weight`.
    pub(crate) norm_plus_one: bool,
    /// Whether values are normed as keys are, without a weight.
    pub(crate) v_norm: bool,
    /// Whether the output of each layer is multiplied by a number of its own, `layer_scalar`.
    pub(crate) layer_scalar: bool,
    /// Whether embeddings are multiplied by the root of their width.
    pub(crate) scales_embeddings: bool,
    /// Whether `final_logit_softcapping` bounds the logits.
    pub(crate) softcaps: bool,
    pub(crate) activation: Activation,
    pub(crate) logit_scale: LogitScale,
    /// Where full and sliding layers have rotations of their own, what HF's config class says of those (`true`: sliding) of
    /// which the config says nothing.
    pub(crate) rotations: Option<fn(bool) -> Value>,
    /// Whether head sizes, key-value heads, keys, values and MLPs can differ from layer to layer.
    pub(crate) layers_differ: bool,
    /// Whether a head is always `hidden_size / num_attention_heads` wide.
    pub(crate) head_dim_follows: bool,
    /// Whether [`PackedDecoder`](crate::PackedDecoder) has kernels for its layers.
    pub(crate) packs: bool,
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
    norms_around: false,
    norm_plus_one: false,
    v_norm: false,
    layer_scalar: false,
    scales_embeddings: false,
    softcaps: false,
    activation: Activation::Silu,
    logit_scale: LogitScale::HeadDim,
    rotations: None,
    layers_differ: false,
    head_dim_follows: false,
    packs: true,
};

const GEMMA3: Architecture = Architecture {
    model_type: "gemma3_text",
    hf_class: Some("Gemma3ForCausalLM"),
    absent_sizes: || sizes(262_208, 2304, 9216, 26, 8),
    absent_keys: || {
        json!({
            "max_position_embeddings": 131_072, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
            "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true,
        })
    },
    mlp_bias: false,
    qk_norm: Some(QkNorm::Rms),
    window: Window::ByType { last: true },
    norms_around: true,
    norm_plus_one: true,
    scales_embeddings: true,
    softcaps: true,
    activation: Activation::GeluTanh,
    logit_scale: LogitScale::QueryPreAttnScalar,
    rotations: Some(|slides| json!({"rope_type": "default", "rope_theta": if slides { 1e4 } else { 1e6 }})),
    packs: false,
    ..LLAMA
};

const GEMMA4: Architecture = Architecture {
    model_type: "gemma4_text",
    hf_class: Some("Gemma4ForCausalLM"),
    absent_sizes: || sizes(262_144, 2304, 9216, 30, 8),
    absent_keys: || {
        json!({
            "max_position_embeddings": 131_072, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 512,
            "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true, "hidden_size_per_layer_input": 256,
        })
    },
    window: Window::ByType { last: false },
    norm_plus_one: false,
    v_norm: true,
    layer_scalar: true,
    logit_scale: LogitScale::One,
    rotations: Some(|slides| match slides {
        true => json!({"rope_type": "default", "rope_theta": 1e4}),
        false => json!({"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}),
    }),
    layers_differ: true,
    ..GEMMA3
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
    GEMMA3,
    GEMMA4,
    Architecture {
        model_type: "gemma4_unified_text",
        hf_class: Some("Gemma4UnifiedForCausalLM"),
        absent_keys: || {
            json!({
                "max_position_embeddings": 262_144, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
                "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true,
            })
        },
        ..GEMMA4
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
