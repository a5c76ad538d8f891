//! The feed-forward layer of a vision transformer.

use tch::{Tensor, nn::Module};
use vora_torch::nn::fused;

use crate::transformer::activation::Activation;
use crate::transformer::linear::Linear;

/// Two layers, or three where one gates another (SwiGLU, Shazeer 2020).
#[derive(Debug)]
pub(crate) enum Mlp {
    /// `fc2(activation(fc1(x)))`
    Plain { fc1: Linear, activation: Activation, fc2: Linear },
    /// `down(activation(gate(x)) * up(x))`
    Gated { gates: Gates, activation: Activation, down: Linear },
}

/// Gate and what it gates in two layers or in one.
#[derive(Debug)]
pub(crate) enum Gates {
    Apart([Linear; 2]),
    Together(Linear),
}

impl Mlp {
    /// Its linears, but for one that is two.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (first, last) = match self {
            Self::Plain { fc1, fc2, .. } => (std::slice::from_ref(fc1), fc2),
            Self::Gated { gates: Gates::Apart(layers), down, .. } => (layers.as_slice(), down),
            Self::Gated { gates: Gates::Together(_), down, .. } => ([].as_slice(), down),
        };
        first.iter().chain([last])
    }

    /// The same, to change them.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let (first, last) = match self {
            Self::Plain { fc1, fc2, .. } => (std::slice::from_mut(fc1), fc2),
            Self::Gated { gates: Gates::Apart(layers), down, .. } => (layers.as_mut_slice(), down),
            Self::Gated { gates: Gates::Together(_), down, .. } => ([].as_mut_slice(), down),
        };
        first.iter_mut().chain([last])
    }
}

impl Module for Mlp {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let (gates, activation, down) = match self {
            Self::Plain { fc1, activation, fc2 } => return fc2.forward(&activation.apply(&fc1.forward(x))),
            Self::Gated { gates, activation, down } => (gates, activation, down),
        };
        let [gate, up] = match gates {
            Gates::Apart(layers) => layers.each_ref().map(|layer| layer.forward(x)),
            Gates::Together(layer) => {
                let both = layer.forward(x); // [batch, tokens, 2 * inner]
                let inner = both.size()[2] / 2;
                [0, 1].map(|i| both.narrow(2, i * inner, inner))
            }
        };
        down.forward(&match activation {
            Activation::Silu => fused::swiglu(&gate, &up),
            activation => activation.apply(&gate) * up,
        })
    }
}
