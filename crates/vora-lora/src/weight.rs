//! What a linear multiplies with: a plain tensor, or one that is kept in few bits.

use anyhow::Result;
use tch::Tensor;
use vora_torch::weights::{Init, QuantizedWeight, Weights};

/// A weight `[out, in]`.
#[derive(Debug)]
pub(crate) enum Weight {
    Plain(Tensor), // frozen, or a trained f32 master
    Quantized(Box<QuantizedWeight>),
}

impl Weight {
    /// Takes `weight`, in few bits where the source says so and it is frozen.
    pub(crate) fn load(weights: &Weights, in_features: i64, out_features: i64) -> Result<Self> {
        let weight = weights.get("weight", &[out_features, in_features], Init::Required)?;
        Ok(match weights.quantization().filter(|_| !weight.requires_grad()) {
            Some(quantization) => {
                let quantized = QuantizedWeight::new(&weight, quantization)?;
                weights.forget("weight");
                Self::Quantized(Box::new(quantized))
            }
            None => Self::Plain(weight),
        })
    }

    /// `[out, in]`
    pub(crate) fn size(&self) -> [i64; 2] {
        match self {
            Self::Plain(weight) => {
                let (out_features, in_features) = weight.size2().expect("W is [out, in]");
                [out_features, in_features]
            }
            Self::Quantized(weight) => weight.size(),
        }
    }

    /// The tensor itself, or a new one that the bits stand for.
    pub(crate) fn whole(&self) -> Tensor {
        match self {
            Self::Plain(weight) => weight.shallow_clone(),
            Self::Quantized(weight) => weight.dequantized(weight.kind()),
        }
    }

    /// `x W^T + b` in the dtype of `x`: `[.., in]` -> `[.., out]`
    pub(crate) fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Self::Plain(weight) => x.linear(&weight.to_kind(x.kind()), bias),
            Self::Quantized(weight) => weight.linear(x, bias),
        }
    }
}
