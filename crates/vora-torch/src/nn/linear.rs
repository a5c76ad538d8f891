//! A linear layer.

use anyhow::Result;
use tch::{Tensor, nn::Module};

use crate::weights::{Init, Weights};

/// `y = x W^T + b`
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,       // [out, in]
    bias: Option<Tensor>, // [out]
}

impl Linear {
    /// Takes both from the checkpoint, or new ones where there are none, as f32 leaves that training changes.
    ///
    /// # Errors
    /// Where the checkpoint cannot be read; a tensor that does not fit is told by [`Weights::finish`].
    pub fn trained(weights: &Weights, inputs: i64, outputs: i64, bias: bool) -> Result<Self> {
        Ok(Self {
            weight: weights.parameter("weight", &[outputs, inputs], Init::KaimingUniform)?,
            bias: bias.then(|| weights.parameter("bias", &[outputs], Init::Zeros)).transpose()?,
        })
    }

    /// `weight`, and `bias` where it has one.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        [("weight", &self.weight)].into_iter().chain(self.bias.as_ref().map(|bias| ("bias", bias)))
    }
}

impl Module for Linear {
    /// `[.., in]` -> `[.., out]`
    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}
