//! The scalings of rotary frequencies: the keys of a config, and the frequencies that follow from them.

use std::f64::consts::PI;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ConfigError;

/// `rope_scaling` or `rope_parameters` as they stand in the file; [`RopeScaling::from_parameters`] makes sense of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
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
    /// Every other key, as it was.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The rope types that a config may name.
const ROPE_TYPES: [&str; 7] = ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"];

/// How the frequencies of positions are scaled to reach beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        /// How many times longer.
        factor: f64,
    },
    /// The base grows with the length once that exceeds `max_position_embeddings` (dynamic NTK). The frequencies are
    /// those for the length of the call: keys that a cache already holds keep the ones that they were made with.
    Dynamic {
        /// How strongly the base grows.
        factor: f64,
        /// Length up to which nothing changes.
        max_position_embeddings: i64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between mixed (Llama 3.1).
    Llama3 {
        /// How many times longer.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are scaled whole.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Length of the first training.
        original_max_position_embeddings: i64,
    },
    /// A ramp over dimensions between scaled and kept frequencies, and warmer attention (Peng et al. 2023).
    Yarn {
        /// How many times longer.
        factor: f64,
        /// Length of the first training.
        original_max_position_embeddings: i64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is scaled whole.
        beta_slow: f64,
        /// Whether the ramp's ends are whole dimensions.
        truncate: bool,
        /// What cos and sin are multiplied by.
        attention_factor: f64,
    },
    /// A factor of its own for every frequency, one list for short and one for long inputs (Ding et al. 2024).
    LongRope {
        /// Up to `original_max_position_embeddings`.
        short_factor: Vec<f64>,
        /// Beyond it.
        long_factor: Vec<f64>,
        /// Length of the first training.
        original_max_position_embeddings: i64,
        /// What cos and sin are multiplied by.
        attention_factor: f64,
    },
    /// The first frequencies of a head divided by `factor`, the others zero: those dimensions do not turn (Gemma 4).
    Proportional {
        /// How many times longer.
        factor: f64,
        /// The share of a head's dimensions that turn.
        partial_rotary_factor: f64,
    },
}

/// How layers turn positions into angles.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rotation {
    /// How the frequencies are scaled.
    pub scaling: RopeScaling,
    /// Their base.
    pub theta: f64,
    /// Width of a head.
    pub head_dim: i64,
}

impl Rotation {
    /// The frequencies for inputs of `seq_len` positions; see [`RopeScaling::inv_freq`].
    pub fn inv_freq(&self, seq_len: i64) -> Vec<f64> {
        self.scaling.inv_freq(self.head_dim, self.theta, seq_len)
    }
}

impl RopeScaling {
    /// Reads the keys that the named rope type needs, with the defaults of HF transformers, for heads of width `head_dim`
    /// in a model that was trained for `max_position_embeddings` positions.
    ///
    /// # Errors
    /// [`ConfigError::RopeType`] for a type that is not known, else the key that is missing or out of range.
    pub fn from_parameters(p: &RopeParameters, max_position_embeddings: i64, head_dim: i64) -> Result<Self> {
        let name = p.rope_type.as_deref().or(p.older_type.as_deref()).unwrap_or("default");
        let part = p.partial_rotary_factor.unwrap_or(1.0);
        ensure!(
            part == 1.0 || name == "proportional" && (0.0..1.0).contains(&part),
            "partial_rotary_factor is {part}, known is 1, and a smaller one for rope type proportional"
        );
        let need = |key: &str, value: Option<f64>| {
            let value = value.with_context(|| format!("`{key}` is missing, rope type {name} needs it"))?;
            ensure!(value.is_finite() && value > 0.0, "`{key}` is {value}, it must be positive");
            Ok(value)
        };
        let original = p.original_max_position_embeddings.unwrap_or(max_position_embeddings);
        ensure!(original > 0, "`original_max_position_embeddings` is {original}, it must be positive");
        Ok(match name {
            "default" => Self::Default,
            "linear" => Self::Linear { factor: need("factor", p.factor)? },
            "dynamic" => Self::Dynamic { factor: need("factor", p.factor)?, max_position_embeddings },
            "llama3" => Self::Llama3 {
                factor: need("factor", p.factor)?,
                low_freq_factor: need("low_freq_factor", p.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", p.high_freq_factor)?,
                original_max_position_embeddings: original,
            },
            "yarn" => {
                let factor = match p.factor {
                    Some(_) => need("factor", p.factor)?,
                    None => max_position_embeddings as f64 / original as f64,
                };
                let warmth = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
                let attention_factor = p.attention_factor.unwrap_or_else(|| match (p.mscale, p.mscale_all_dim) {
                    (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => warmth(mscale) / warmth(all),
                    _ => warmth(1.0),
                });
                Self::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: p.beta_fast.unwrap_or(32.0),
                    beta_slow: p.beta_slow.unwrap_or(1.0),
                    truncate: p.truncate.unwrap_or(true),
                    attention_factor,
                }
            }
            "longrope" => {
                let factors = |key: &str, list: &Option<Vec<f64>>| {
                    let list =
                        list.clone().with_context(|| format!("`{key}` is missing, rope type {name} needs it"))?;
                    let half = head_dim / 2;
                    ensure!(list.len() as i64 == half, "`{key}` has {} numbers, not {half}", list.len());
                    Ok(list)
                };
                let factor = p.factor.unwrap_or(max_position_embeddings as f64 / original as f64);
                let attention_factor = p.attention_factor.unwrap_or_else(|| {
                    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() }
                });
                Self::LongRope {
                    short_factor: factors("short_factor", &p.short_factor)?,
                    long_factor: factors("long_factor", &p.long_factor)?,
                    original_max_position_embeddings: original,
                    attention_factor,
                }
            }
            "proportional" => Self::Proportional {
                factor: if p.factor.is_some() { need("factor", p.factor)? } else { 1.0 },
                partial_rotary_factor: part,
            },
            _ => return Err(ConfigError::RopeType { found: name.to_owned(), known: &ROPE_TYPES }.into()),
        })
    }

    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::LongRope { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        }
    }

    /// The `head_dim / 2` frequencies for inputs of `seq_len` positions, in radians a position.
    pub fn inv_freq(&self, head_dim: i64, theta: f64, seq_len: i64) -> Vec<f64> {
        let dim = head_dim as f64;
        let half = head_dim / 2;
        let plain = |base: f64| (0..half).map(move |i| base.powf(-2.0 * i as f64 / dim));
        match self {
            Self::Default => plain(theta).collect(),
            Self::Linear { factor } => plain(theta).map(|f| f / factor).collect(),
            Self::Dynamic { factor, max_position_embeddings } => {
                let trained = *max_position_embeddings as f64;
                let length = (seq_len as f64).max(trained);
                let growth = (factor * length / trained - (factor - 1.0)).powf(dim / (dim - 2.0));
                plain(theta * growth).collect()
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = *original_max_position_embeddings as f64;
                let scale = |f: f64| {
                    let rotations = original * f / (2.0 * PI); // within the original length
                    let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                };
                plain(theta).map(scale).collect()
            }
            Self::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
                let original = *original_max_position_embeddings as f64;
                // The dimension that makes this many rotations within the original length.
                let dim_of = |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (dim_of(*beta_fast), dim_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scale = |(i, f): (usize, f64)| {
                    let scaled = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * scaled + f * (1.0 - scaled)
                };
                plain(theta).enumerate().map(scale).collect()
            }
            Self::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
                let factors = if seq_len > *original_max_position_embeddings { long_factor } else { short_factor };
                plain(theta).zip(factors).map(|(f, factor)| f / factor).collect()
            }
            Self::Proportional { factor, partial_rotary_factor } => {
                let turning = (partial_rotary_factor * dim / 2.0).floor() as usize;
                plain(theta).enumerate().map(|(i, f)| if i < turning { f / factor } else { 0.0 }).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rope_type_lacks_is_named() {
        for (json, says) in [
            (r#"{"rope_type": "yarn", "factor": -1.0}"#, "`factor` is -1, it must be positive"),
            (r#"{"type": "llama3", "factor": 8.0}"#, "`low_freq_factor` is missing, rope type llama3 needs it"),
            (r#"{"rope_type": "longrope", "short_factor": [1.0]}"#, "`short_factor` has 1 numbers, not 4"),
            (r#"{"rope_type": "default", "partial_rotary_factor": 0.5}"#, "partial_rotary_factor is 0.5, known is 1"),
        ] {
            let parameters: RopeParameters = serde_json::from_str(json).unwrap();
            let error = format!("{:#}", RopeScaling::from_parameters(&parameters, 512, 8).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }
}
