//! The norm of each head of q and k before its rotation, which bounds the logits of attention.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

use crate::architecture::QkNorm;
use crate::config::LlmConfig;
use crate::norm::rms_norm;

/// Added to the variance by Chameleon's layer norm, whatever the config says (HF's `ChameleonLayerNorm`).
const LAYER_NORM_EPS: f64 = 1e-5;

/// A norm over `head_dim`.
#[derive(Debug)]
pub enum HeadNorm {
    /// `x / rms(x) * weight`
    Rms(RmsNorm),
    /// `(x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias`
    Layer {
        /// `[heads, head_dim]`
        weight: Tensor,
        /// `[heads, head_dim]`
        bias: Tensor,
    },
}

impl HeadNorm {
    /// Takes `weight` and, for a layer norm, `bias`, of `q_norm` or `k_norm`, over heads of width `head_dim`; none where the
    /// model has no such norm.
    ///
    /// # Errors
    /// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, weights: &Weights, heads: i64, head_dim: i64) -> Result<Option<Self>> {
        Ok(match config.head_norm() {
            None => None,
            Some(QkNorm::Rms) => Some(Self::Rms(rms_norm(config, weights, head_dim)?)),
            Some(QkNorm::Layer) => Some(Self::Layer {
                weight: weights.get("weight", &[heads, head_dim], Init::Ones)?,
                bias: weights.get("bias", &[heads, head_dim], Init::Zeros)?,
            }),
        })
    }

    /// Its tensors by their names on disk.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Rms(norm) => vec![("weight", norm.weight())],
            Self::Layer { weight, bias } => vec![("weight", weight), ("bias", bias)],
        }
    }
}

impl Module for HeadNorm {
    /// `[batch, seq, heads, head_dim]` -> the same
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer { weight, bias } => {
                let head_dim = weight.size()[1];
                let normed = x.layer_norm([head_dim], None::<&Tensor>, None, LAYER_NORM_EPS, false);
                bias.to_kind(x.kind()).addcmul(&normed, &weight.to_kind(x.kind()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn every_head_has_its_own_weight_and_bias() {
        let config =
            LlmConfig { model_type: "chameleon".into(), hidden_size: 4, num_attention_heads: 2, ..LlmConfig::tiny(8) };
        let pair = |a: f32, b: f32| Tensor::from_slice(&[a, a, b, b]).view([2, 2]);
        let weights = Weights::from_tensors(
            [("weight".to_owned(), pair(1.0, 3.0)), ("bias".to_owned(), pair(0.0, 10.0))],
            Device::Cpu,
            Kind::Float,
        );
        let norm = HeadNorm::load(&config, &weights, 2, 2).unwrap().unwrap();
        weights.finish().unwrap();
        // Mean 6, deviation 2, in both heads.
        let x = Tensor::from_slice(&[4f32, 8.0, 8.0, 4.0]).view([1, 1, 2, 2]);
        let expected = Tensor::from_slice(&[-1f32, 1.0, 13.0, 7.0]).view([1, 1, 2, 2]);
        fixtures::assert_close_to(&norm.forward(&x), &expected, 1e-5);
        assert_eq!(norm.forward(&x.to_kind(Kind::BFloat16)).size(), [1, 1, 2, 2]);
    }
}
