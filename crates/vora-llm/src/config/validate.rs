//! What of a config is refused, and by which words.

use anyhow::{Result, bail, ensure};
use serde_json::Value;
use vora_files::tell_once;

use super::layers::{FULL, KeyValues, SLIDING};
use super::llm_config::LlmConfig;
use crate::architecture::{Activation, Architecture, AttentionBias, Window};
use crate::error::ConfigError;

/// The layer types that a config may name.
const LAYER_TYPES: [&str; 2] = [FULL, SLIDING];

impl LlmConfig {
    /// Checks what the types cannot: known architecture, activation and rope type, sizes that fit each other, options
    /// that this architecture has.
    ///
    /// # Errors
    /// Names the key, what it says, and what it may say: [`ConfigError`] where it is something that others implement.
    pub fn validate(&self) -> Result<()> {
        Architecture::find(&self.model_type)?;
        let (key, found, known) = match self.architecture().activation {
            Activation::Silu => ("hidden_act", Some(&self.hidden_act), "silu"),
            Activation::GeluTanh => ("hidden_activation", self.hidden_activation.as_ref(), "gelu_pytorch_tanh"),
        };
        if let Some(found) = found.filter(|found| *found != known) {
            return Err(ConfigError::HiddenAct { key, found: found.clone(), known }.into());
        }
        self.validate_gemma()?;
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
            self.head_dim.is_some() || self.hidden_size % self.num_attention_heads == 0,
            "hidden_size is {}, not a multiple of num_attention_heads {}, and there is no head_dim",
            self.hidden_size,
            self.num_attention_heads
        );
        for layer_idx in 0..self.num_hidden_layers {
            let layer = self.layer(layer_idx);
            let (heads, kv_heads, head_dim) = (self.num_attention_heads, layer.num_key_value_heads, layer.head_dim);
            ensure!(
                kv_heads > 0 && heads % kv_heads == 0,
                "num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}"
            );
            ensure!(head_dim > 0 && head_dim % 2 == 0, "head_dim is {head_dim}, it must be even for rotary positions");
        }
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
        self.rotation(false)?;
        if self.has_two_rotations() {
            self.rotation(true)?;
        }
        Ok(())
    }

    /// What Gemma's configs may ask for and is not built here.
    fn validate_gemma(&self) -> Result<()> {
        let (row, extra) = (self.architecture(), |key: &str| self.extra.get(key));
        if row.activation != Activation::GeluTanh {
            return Ok(());
        }
        let all = extra("use_bidirectional_attention").filter(|all| *all == "all" || *all == true);
        ensure!(
            all.is_none(),
            "use_bidirectional_attention is {}: every token would attend to all, as in an embedding model; a decoder's says \
             \"vision\", false or null",
            all.unwrap_or_default()
        );
        if let Some(scalar) = self.query_pre_attn_scalar {
            ensure!(scalar > 0, "query_pre_attn_scalar is {scalar}, it must be at least 1");
        }
        if let Some(cap) = self.final_logit_softcapping {
            ensure!(cap > 0.0 && cap.is_finite(), "final_logit_softcapping is {cap}, it must be positive");
        }
        ensure!(self.sliding_window_pattern != Some(0), "sliding_window_pattern is 0, it must be at least 1");
        if !row.layers_differ {
            return Ok(());
        }
        let per_layer = extra("hidden_size_per_layer_input").and_then(Value::as_i64).unwrap_or(0);
        ensure!(
            per_layer == 0,
            "hidden_size_per_layer_input is {per_layer}: embeddings by layer are not built here; take a Gemma 4 whose \
             config says 0"
        );
        ensure!(
            extra("enable_moe_block").is_none_or(|moe| *moe == false || moe.is_null()),
            "enable_moe_block is true: experts are not built here; take a dense Gemma 4, whose config says false"
        );
        self.validate_shared()
    }

    /// Whether layers that share keys and values have a layer to take them from, and `per_layer_config` is understood.
    fn validate_shared(&self) -> Result<()> {
        let (layers, shared) = (self.num_hidden_layers, self.num_kv_shared_layers.unwrap_or(0));
        ensure!(shared <= layers, "num_kv_shared_layers is {shared}, num_hidden_layers is {layers}");
        for (layer_idx, own) in self.per_layer_config.iter().flatten() {
            let known = layer_idx.parse::<usize>().is_ok_and(|layer_idx| layer_idx < layers);
            ensure!(known, "per_layer_config has a layer `{layer_idx}`, num_hidden_layers is {layers}");
            if let Some(key) = own.extra.keys().next() {
                bail!("per_layer_config.{layer_idx} has `{key}`, known are head_dim and num_key_value_heads");
            }
        }
        for layer_idx in layers - shared..layers {
            let layer = self.layer(layer_idx);
            let KeyValues::Of(earlier) = layer.key_values else {
                bail!(
                    "num_kv_shared_layers is {shared}, but no layer before those is of layer {layer_idx}'s type, whose \
                     keys and values it could share"
                )
            };
            let from = self.layer(earlier);
            ensure!(
                (layer.head_dim, layer.num_key_value_heads) == (from.head_dim, from.num_key_value_heads),
                "layer {layer_idx} shares keys and values of layer {earlier}, whose heads have other sizes"
            );
        }
        Ok(())
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
                Window::FromLayer | Window::WithoutRope | Window::ByType { .. } => {}
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
                if layer_type == SLIDING && self.last_layer_is_full(layer_idx) {
                    tell_once(format!(
                        "layer_types[{layer_idx}] is `{SLIDING}`: the last layer of a {model_type} has no window, as in \
                         transformers"
                    ));
                    continue;
                }
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

    /// Whether this is the last layer of an architecture in which that one has no window.
    fn last_layer_is_full(&self, layer_idx: usize) -> bool {
        layer_idx + 1 == self.num_hidden_layers && self.architecture().window == (Window::ByType { last: false })
    }
}
