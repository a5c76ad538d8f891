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

    #[test]
    fn a_weight_may_count_from_one_or_be_left_out() {
        let weights = || Weights::from_tensors([], Device::Cpu, Kind::Float);
        let x = fixtures::Random::new(3).normal([2, 4]);
        let plain = RmsNorm::unscaled(&weights(), 4, 1e-6).forward(&x);
        let of_one = Tensor::from_slice(&[0f32, 1.0, -0.5, -1.0]);
        let stored = Weights::from_tensors([("weight".to_owned(), of_one.copy())], Device::Cpu, Kind::Float);
        let norm = RmsNorm::load_plus_one(&stored, 4, 1e-6).unwrap();
        stored.finish().unwrap();
        fixtures::assert_close(&norm.forward(&x), &(&plain * (of_one + 1.0)));
        let new = RmsNorm::load_plus_one(&Weights::random(0, Device::Cpu, Kind::Float), 4, 1e-6).unwrap();
        fixtures::assert_close(&new.forward(&x), &plain);
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("rms_norm");
        let weights = Weights::from_tensors([("weight".to_owned(), golden["weight"].copy())], Device::Cpu, Kind::Float);
        let norm = RmsNorm::load(&weights, 32, 1e-5).unwrap();
        for (suffix, kind) in [("", Kind::Float), ("_bf16", Kind::BFloat16)] {
            let x = golden["x"].detach().copy().to_kind(kind).set_requires_grad(true);
            let y = norm.forward(&x);
            assert_eq!(y.kind(), kind);
            (&y * golden["grad_y"].to_kind(kind)).sum(kind).backward();
            // In bf16 sums in another order may round to its neighbour.
            let tolerance = if kind == Kind::Float { 1e-5 } else { 2e-2 };
            fixtures::assert_close_to(&y, &golden[&format!("y{suffix}")], tolerance);
            fixtures::assert_close_to(&x.grad(), &golden[&format!("grad_x{suffix}")], tolerance);
        }
    }
}
