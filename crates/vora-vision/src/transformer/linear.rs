//! A linear layer of a vision transformer, which knows where it stands.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_torch::weights::Weights;

/// A linear layer that can carry adapters, and its path in the file that it came from.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) path: String,
    pub(crate) layer: vora_lora::Linear,
}

impl Linear {
    /// Takes `weight`, and `bias` where it has one.
    pub(crate) fn load(weights: &Weights, inputs: i64, outputs: i64, bias: bool) -> Result<Self> {
        Ok(Self { path: weights.path().to_owned(), layer: vora_lora::Linear::load(weights, inputs, outputs, bias)? })
    }
}

impl Module for Linear {
    /// `[.., in]` -> `[.., out]`
    fn forward(&self, x: &Tensor) -> Tensor {
        self.layer.forward(x)
    }
}
