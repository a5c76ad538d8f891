//! The gated feed-forward block: SwiGLU, or GELU in its place.

use anyhow::Result;
use tch::Tensor;
use vora_lora::{Active, Linear};
use vora_torch::nn::fused;
use vora_torch::weights::Weights;

use crate::architecture::Activation;
use crate::config::LlmConfig;

/// `down_proj(silu(gate_proj(x)) * up_proj(x))` (Shazeer 2020); Gemma has GELU's approximation by tanh for `silu`.
#[derive(Debug)]
pub struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    /// Takes `gate_proj`, `up_proj` and `down_proj` of a layer.
    ///
    /// # Errors
    /// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Self> {
        let (hidden, bias) = (config.hidden_size, config.mlp_bias);
        let intermediate = config.layer(layer_idx).intermediate_size;
        Ok(Self {
            gate_proj: Linear::load(&weights.pp("gate_proj"), hidden, intermediate, bias)?,
            up_proj: Linear::load(&weights.pp("up_proj"), hidden, intermediate, bias)?,
            down_proj: Linear::load(&weights.pp("down_proj"), intermediate, hidden, bias)?,
            activation: config.architecture().activation,
        })
    }

    /// `[.., hidden]` -> `[.., hidden]`, with adapters on the tokens of `adapters`
    pub fn forward(&self, x: &Tensor, adapters: &Active) -> Tensor {
        let (gate, up) = (self.gate_proj.forward_on(x, adapters), self.up_proj.forward_on(x, adapters));
        let gated = match self.activation {
            Activation::Silu => fused::swiglu(&gate, &up),
            Activation::GeluTanh => gate.gelu("tanh") * up,
        }; // [.., intermediate]
        self.down_proj.forward_on(&gated, adapters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("mlp");
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        let config = LlmConfig { mlp_bias: true, ..LlmConfig::tiny(64) };
        let mlp = Mlp::load(&config, 0, &weights).unwrap();
        weights.finish().unwrap();
        let x = golden["x"].detach().copy().set_requires_grad(true);
        let y = mlp.forward(&x, &Active::All);
        fixtures::assert_close_to(&y, &golden["y"], 1e-5);
        (y * &golden["grad_y"]).sum(Kind::Float).backward();
        fixtures::assert_close_to(&x.grad(), &golden["grad_x"], 1e-5);
    }
}
