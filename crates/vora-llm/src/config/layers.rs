//! What each layer is by the config: its window, its rotation, its sizes, and whose keys and values it attends to.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::llm_config::{LayerOverrides, LlmConfig};
use crate::architecture::{LogitScale, Window};
use crate::rope::{RopeParameters, RopeScaling, Rotation};

/// A layer with a window, as `layer_types` calls it.
pub(super) const SLIDING: &str = "sliding_attention";
/// A layer without one.
pub(super) const FULL: &str = "full_attention";

/// Whose keys and values a layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyValues {
    /// Its own.
    Own,
    /// Its own keys; its values are the same projection, before the keys' norm and rotation (`attention_k_eq_v`).
    OwnKeys,
    /// Those of an earlier layer (`num_kv_shared_layers`).
    Of(usize),
}

/// The sizes of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerSizes {
    /// Width of a head.
    pub head_dim: i64,
    /// Key and value heads.
    pub num_key_value_heads: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Whose keys and values it attends to.
    pub key_values: KeyValues,
}

impl LlmConfig {
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
            Window::ByType { last } => {
                let by_pattern = || !(layer_idx + 1).is_multiple_of(self.sliding_window_pattern.unwrap_or(6));
                (last || layer_idx + 1 < self.num_hidden_layers) && listed().unwrap_or_else(by_pattern)
            }
        };
        self.sliding_window.filter(|_| slides)
    }

    /// The sizes of a layer.
    pub fn layer(&self, layer_idx: usize) -> LayerSizes {
        let key_values = self.key_values(layer_idx);
        let (head_dim, num_key_value_heads) = self.head_sizes(layer_idx);
        let is_wide = self.use_double_wide_mlp.unwrap_or(false) && matches!(key_values, KeyValues::Of(_));
        let intermediate_size = if is_wide { 2 * self.intermediate_size } else { self.intermediate_size };
        LayerSizes { head_dim, num_key_value_heads, intermediate_size, key_values }
    }

    /// Width of a layer's heads, and how many of keys and values it has.
    fn head_sizes(&self, layer_idx: usize) -> (i64, i64) {
        let (head_dim, kv_heads) = (self.head_width(), self.kv_heads());
        if !self.architecture().layers_differ {
            return (head_dim, kv_heads);
        }
        match &self.per_layer_config {
            Some(layers) => {
                let own = layers.get(&layer_idx.to_string());
                let of = |size: fn(&LayerOverrides) -> Option<i64>| own.and_then(size);
                (of(|own| own.head_dim).unwrap_or(head_dim), of(|own| own.num_key_value_heads).unwrap_or(kv_heads))
            }
            None if self.window(layer_idx).is_some() => (head_dim, kv_heads),
            None => {
                let global = self.num_global_key_value_heads.filter(|_| self.keys_are_values());
                (self.global_head_dim.unwrap_or(512), global.unwrap_or(kv_heads))
            }
        }
    }

    /// Key-value heads and their width in every layer that makes keys and values; those of the layers after them are
    /// theirs.
    pub(crate) fn cached_heads(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        let layers = (0..self.num_hidden_layers).map(|layer_idx| self.layer(layer_idx));
        let own = layers.take_while(|layer| !matches!(layer.key_values, KeyValues::Of(_)));
        own.map(|layer| (layer.num_key_value_heads, layer.head_dim))
    }

    fn keys_are_values(&self) -> bool {
        self.attention_k_eq_v.unwrap_or(false)
    }

    fn key_values(&self, layer_idx: usize) -> KeyValues {
        if !self.architecture().layers_differ {
            return KeyValues::Own;
        }
        let first_shared = self.num_hidden_layers.saturating_sub(self.num_kv_shared_layers.unwrap_or(0));
        let slides = |layer_idx: usize| self.window(layer_idx).is_some();
        let shared = (layer_idx >= first_shared)
            .then(|| (0..first_shared).rev().find(|&earlier| slides(earlier) == slides(layer_idx)));
        match shared.flatten() {
            Some(earlier) => KeyValues::Of(earlier),
            None if self.keys_are_values() && !slides(layer_idx) => KeyValues::OwnKeys,
            None => KeyValues::Own,
        }
    }

    /// What queries of this width are multiplied by, so that a call which divides logits by the root of the width divides
    /// them by what this model does; none where that is the same.
    pub(crate) fn query_factor(&self, head_dim: i64) -> Option<f64> {
        let width = head_dim as f64;
        let factor = match self.architecture().logit_scale {
            LogitScale::HeadDim => 1.0,
            LogitScale::QueryPreAttnScalar => (width / self.query_pre_attn_scalar.unwrap_or(head_dim) as f64).sqrt(),
            LogitScale::One => width.sqrt(),
        };
        Some(factor).filter(|&factor| factor != 1.0)
    }

    /// Whether layers with a window have another rotation than those without.
    pub(crate) fn has_two_rotations(&self) -> bool {
        self.architecture().rotations.is_some() && (0..self.num_hidden_layers).any(|i| self.window(i).is_some())
    }

    /// How the layers with a window (`slides`), or those without, rotate q and k: the same in most architectures.
    ///
    /// # Errors
    /// [`ConfigError::RopeType`](crate::ConfigError::RopeType) for a type that is not known, else the key that a known one
    /// lacks.
    pub fn rotation(&self, slides: bool) -> Result<Rotation> {
        let (section, parameters) = match self.architecture().rotations {
            Some(absent) => self.rope_of_type(slides, absent(slides))?,
            None => self.rope_of_all()?,
        };
        let of_type = |layer_idx: &usize| self.window(*layer_idx).is_some() == slides;
        let head_dim = self.layer((0..self.num_hidden_layers).find(of_type).unwrap_or(0)).head_dim;
        let scaling = RopeScaling::from_parameters(&parameters, self.max_position_embeddings, head_dim)
            .with_context(|| format!("in {section}"))?;
        Ok(Rotation { scaling, theta: parameters.rope_theta.unwrap_or(10_000.0), head_dim })
    }

    /// The keys of the rotation that all layers have, and where they stand.
    fn rope_of_all(&self) -> Result<(String, RopeParameters)> {
        let (section, parameters) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(parameters), _) => ("rope_parameters", parameters.clone()),
            (None, Some(parameters)) => ("rope_scaling", parameters.clone()),
            (None, None) => ("rope_theta", RopeParameters::default()),
        };
        if let Some((key, _)) = parameters.extra.iter().find(|(_, value)| value.is_object()) {
            bail!("{section} has rotations of its own for `{key}`: one for all layers is known");
        }
        let newer = self.rope_parameters.as_ref().and_then(|p| p.rope_theta);
        Ok((section.to_owned(), RopeParameters { rope_theta: newer.or(self.rope_theta), ..parameters }))
    }

    /// The keys of the rotation of one type of layers, and where they stand; `absent` is that of a config which says
    /// nothing.
    fn rope_of_type(&self, slides: bool, absent: Value) -> Result<(String, RopeParameters)> {
        let layer_type = if slides { SLIDING } else { FULL };
        let absent: RopeParameters = serde_json::from_value(absent)?;
        let stored = self.rope_parameters.as_ref().and_then(|p| p.extra.get(layer_type)).filter(|own| !own.is_null());
        let section = format!("rope_parameters.{layer_type}");
        let parameters = match stored {
            Some(own) => serde_json::from_value(own.clone()).with_context(|| format!("in {section}"))?,
            // As configs had it until 2025: scaled are the layers without a window alone.
            None => self.rope_scaling.clone().filter(|_| !slides).unwrap_or_else(|| absent.clone()),
        };
        let older = if slides { self.rope_local_base_freq } else { self.rope_theta };
        let older = older.filter(|_| stored.is_none_or(|own| own.get("rope_theta").is_none()));
        let rope_theta = older.or(parameters.rope_theta).or(absent.rope_theta);
        Ok((section, RopeParameters { rope_theta, ..parameters }))
    }
}
