//! Root-mean-square layer norm: computed in f32, returned in the input's kind.

use anyhow::Result;
use tch::{Kind, Tensor, nn::Module};

use crate::weights::{Init, Weights};

/// `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension (Zhang & Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor, // [hidden]
    eps: f64,
}

impl RmsNorm {
    /// A frozen norm: `weight` from the checkpoint, or ones where the source makes new weights.
    pub fn load(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.get("weight", &[hidden_size], Init::Ones)?, eps })
    }

    /// A trained norm: `weight` is an f32 parameter.
    pub fn load_trained(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.parameter("weight", &[hidden_size], Init::Ones)?, eps })
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
        let x32 = x.to_kind(Kind::Float);
        let mean_square = x32.square().mean_dim(-1, true, Kind::Float); // [.., 1]
        (x32 * (mean_square + self.eps).rsqrt()).to_kind(x.kind()) * self.weight.to_kind(x.kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn rows_come_out_with_the_weight_as_their_rms() {
        let weights = Weights::from_tensors(
            [("weight".to_owned(), Tensor::from_slice(&[1f32, 2.0, -0.5, 4.0]))],
            Device::Cpu,
            Kind::Float,
        );
        let norm = RmsNorm::load_trained(&weights, 4, 0.0).unwrap();
        let y = norm.forward(&Tensor::from_slice(&[3f32, -3.0, 3.0, 3.0]).view([1, 4]));
        fixtures::assert_close(&y, &Tensor::from_slice(&[1f32, -2.0, -0.5, 4.0]).view([1, 4]));
        y.sum(Kind::Float).backward();
        assert_eq!(weights.parameters()[0].1.grad().size(), [4]);
        let half =
            RmsNorm::load(&weights, 4, 1e-5).unwrap().forward(&Tensor::ones([2, 4], (Kind::BFloat16, Device::Cpu)));
        assert_eq!(half.kind(), Kind::BFloat16);
    }
}
