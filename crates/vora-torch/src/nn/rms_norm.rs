//! Root-mean-square layer norm: computed in f32, returned in the input's dtype.

use anyhow::Result;
use tch::{Kind, Tensor, nn::Module};

use crate::nn::fused;
use crate::weights::{Init, Weights};

/// `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension (Zhang & Sennrich 2019); Gemma 3's multiplies by
/// `1 + weight`.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor, // [hidden]
    eps: f64,
    plus_one: bool,
}

impl RmsNorm {
    /// A frozen norm: `weight` from the checkpoint, or ones where the source makes new weights.
    ///
    /// # Errors
    /// Where the checkpoint cannot be read; a weight that does not fit is told by [`Weights::finish`].
    pub fn load(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.get("weight", &[hidden_size], Init::Ones)?, eps, plus_one: false })
    }

    /// A frozen norm that multiplies by `1 + weight`: the weight of a new one is zero.
    ///
    /// # Errors
    /// As [`RmsNorm::load`].
    pub fn load_plus_one(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.get("weight", &[hidden_size], Init::Zeros)?, eps, plus_one: true })
    }

    /// A norm without a weight, which takes nothing from `weights` but where they are and their dtype.
    pub fn unscaled(weights: &Weights, hidden_size: i64, eps: f64) -> Self {
        Self { weight: Tensor::ones([hidden_size], (weights.kind(), weights.device())), eps, plus_one: false }
    }

    /// A trained norm: `weight` is an f32 parameter.
    ///
    /// # Errors
    /// As [`RmsNorm::load`].
    pub fn load_trained(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.parameter("weight", &[hidden_size], Init::Ones)?, eps, plus_one: false })
    }

    /// `[hidden]`
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The same norm with another `eps`.
    #[must_use]
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }
}

impl Module for RmsNorm {
    /// `[.., hidden]` -> `[.., hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        match self.plus_one {
            // In f32, as the reference does: a weight near zero keeps its digits.
            true => {
                let weight = self.weight.to_kind(Kind::Float) + 1.0;
                fused::rms_norm(&x.to_kind(Kind::Float), &weight, self.eps).to_kind(x.kind())
            }
            false => fused::rms_norm(x, &self.weight, self.eps),
        }
    }
}
