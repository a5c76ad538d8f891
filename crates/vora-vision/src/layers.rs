//! The small frozen layers that vision transformers are made of.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_torch::weights::{Init, Weights};

/// A [`LayerNorm`], or an RMS norm.
pub(crate) type Norm = Box<dyn Module>;

/// `y = x W^T + b`
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,       // [out, in]
    bias: Option<Tensor>, // [out]
}

impl Linear {
    pub(crate) fn load(weights: &Weights, inputs: i64, outputs: i64, bias: bool) -> Result<Self> {
        Ok(Self {
            weight: weights.get("weight", &[outputs, inputs], Init::Required)?,
            bias: bias.then(|| weights.get("bias", &[outputs], Init::Zeros)).transpose()?,
        })
    }

    /// Its outputs in `N` equal parts, as layers over the same memory.
    pub(crate) fn split<const N: usize>(&self) -> [Self; N] {
        std::array::from_fn(|i| {
            let part = |tensor: &Tensor| {
                let len = tensor.size()[0] / N as i64;
                tensor.narrow(0, i as i64 * len, len)
            };
            Self { weight: part(&self.weight), bias: self.bias.as_ref().map(part) }
        })
    }
}

impl Module for Linear {
    /// `[.., in]` -> `[.., out]`
    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// `y = (x - mean) / sqrt(var + eps) * weight + bias`, over the last dimension.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor, // [hidden]
    bias: Tensor,   // [hidden]
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn load(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
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
