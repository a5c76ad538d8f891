//! Root-mean-square layer norm: computed in f32, returned in the input's kind.

use anyhow::Result;
use tch::{Kind, Tensor, nn::Module};
use vora_torch::weights::{Init, Weights};

/// `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension (Zhang & Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor, // [hidden]
    eps: f64,
}

impl RmsNorm {
    /// Takes `weight` from the checkpoint, or ones where the source makes new weights.
    pub fn load(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.get("weight", &[hidden_size], Init::Ones)?, eps })
    }

    /// As [`RmsNorm::load`], with a `weight` that is trained.
    pub fn load_trained(weights: &Weights, hidden_size: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.parameter("weight", &[hidden_size], Init::Ones)?, eps })
    }

    /// `[hidden]`
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Module for RmsNorm {
    /// `[.., hidden]` -> `[.., hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let x32 = x.to_kind(Kind::Float);
        let mean_square = x32.square().mean_dim(-1, true, Kind::Float); // [.., 1]
        let scaled = (x32 * (mean_square + self.eps).rsqrt()).to_kind(x.kind());
        scaled * self.weight.to_kind(x.kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("rms_norm");
        let weights =
            Weights::from_tensors([("weight".to_owned(), golden["weight"].copy())], tch::Device::Cpu, Kind::Float);
        let norm = RmsNorm::load(&weights, 32, 1e-5).unwrap();
        for (suffix, kind, tolerance) in [("", Kind::Float, 1e-6), ("_bf16", Kind::BFloat16, 0.0)] {
            let x = golden["x"].detach().copy().to_kind(kind).set_requires_grad(true);
            let y = norm.forward(&x);
            assert_eq!(y.kind(), kind);
            fixtures::assert_close_to(&y, &golden[&format!("y{suffix}")], tolerance);
            (y * golden["grad_y"].to_kind(kind)).sum(kind).backward();
            // One rounding of bf16 where the sums run in another order.
            fixtures::assert_close_to(
                &x.grad(),
                &golden[&format!("grad_x{suffix}")],
                if kind == Kind::Float { 1e-5 } else { 2e-2 },
            );
        }
    }
}
