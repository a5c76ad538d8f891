//! The feed-forward layer of a vision transformer.

use tch::{Tensor, nn::Module};
use vora_torch::nn::fused;

use crate::transformer::activation::Activation;
use vora_torch::nn::Linear;

/// Two layers, or three where one gates another (SwiGLU, Shazeer 2020).
#[derive(Debug)]
pub(crate) enum Mlp {
    /// `fc2(activation(fc1(x)))`
    Plain { fc1: Linear, activation: Activation, fc2: Linear },
    /// `down(activation(gate(x)) * up(x))`
    Gated { gate: Linear, up: Linear, activation: Activation, down: Linear },
}

impl Module for Mlp {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Plain { fc1, activation, fc2 } => fc2.forward(&activation.apply(&fc1.forward(x))),
            Self::Gated { gate, up, activation: Activation::Silu, down } => {
                down.forward(&fused::swiglu(&gate.forward(x), &up.forward(x)))
            }
            Self::Gated { gate, up, activation, down } => {
                down.forward(&(activation.apply(&gate.forward(x)) * up.forward(x)))
            }
        }
    }
}
