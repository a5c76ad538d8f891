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
    /// Takes `weight` and `bias` from the checkpoint, or ones and zeros where the source makes new weights; frozen, unless
    /// the source is [`Weights::trained`].
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

    /// `weight` and `bias`.
    pub fn tensors(&self) -> [(&'static str, &Tensor); 2] {
        [("weight", &self.weight), ("bias", &self.bias)]
    }
}

impl Module for LayerNorm {
    /// `[.., hidden]` -> `[.., hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let [weight, bias] = [&self.weight, &self.bias].map(|tensor| tensor.to_kind(x.kind())); // frozen ones are in it already
        x.layer_norm(weight.size(), Some(&weight), Some(&bias), self.eps, true)
    }
}
