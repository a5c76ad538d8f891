//! Layer norm, with a bias.

use anyhow::Result;
use tch::{Tensor, nn::Module};

use crate::weights::{Init, Weights};

/// `y = (x - mean) / sqrt(var + eps) * weight + bias`, over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor, // [hidden]
    bias: Tensor,   // [hidden]
    eps: f64,
}

impl LayerNorm {
    /// Takes `weight` and `bias` from the checkpoint, or ones and zeros where the source makes new weights; frozen.
    ///
    /// # Errors
    /// Where the checkpoint cannot be read; a tensor that does not fit is told by [`Weights::finish`].
    pub fn load(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: weights.get("weight", &[hidden_size], Init::Ones)?,
            bias: weights.get("bias", &[hidden_size], Init::Zeros)?,
            eps,
        })
    }
}

impl Module for LayerNorm {
    /// `[.., hidden]` -> `[.., hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}
