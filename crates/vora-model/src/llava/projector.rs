//! What stands between encoder and decoder: one linear layer, or two with a GELU between them.

use anyhow::Result;
use tch::nn::Module;
use tch::{Kind, Tensor};
use vora_torch::nn::Linear;
use vora_torch::weights::Weights;

use super::{LlavaConfig, MmProjectorType};

/// `y = W x + b`, or `y = W_2 gelu(W_1 x + b_1) + b_2`: Hugging Face's `LlavaMultiModalProjector`.
///
/// All of it is trained, in f32; what comes out has the dtype of the weights' source.
#[derive(Debug)]
pub(super) struct MultiModalProjector {
    linear_1: Linear,         // [hidden, layers * encoder_hidden]
    linear_2: Option<Linear>, // [hidden, hidden]
    kind: Kind,
}

impl MultiModalProjector {
    /// Takes `linear_1.{weight,bias}` and, where there are two layers, `linear_2.{weight,bias}`.
    pub(super) fn load(config: &LlavaConfig, encoder_hidden_size: i64, weights: &Weights) -> Result<Self> {
        let (inputs, hidden) = (encoder_hidden_size * config.features.num_layers(), config.llm.hidden_size);
        let bias = config.multimodal_projector_bias;
        let linear = |name, inputs| Linear::trained(&weights.pp(name), inputs, hidden, bias);
        Ok(Self {
            linear_1: linear("linear_1", inputs)?,
            linear_2: match config.mm_projector_type {
                MmProjectorType::Linear => None,
                MmProjectorType::Mlp2xGelu => Some(linear("linear_2", hidden)?),
            },
            kind: weights.kind(),
        })
    }

    /// Its tensors by their names on disk, in the model's dtype where that loses nothing, else in f32.
    pub(super) fn tensors(&self) -> Vec<(String, Tensor)> {
        let linears = [("linear_1", Some(&self.linear_1)), ("linear_2", self.linear_2.as_ref())];
        let named: Vec<(String, &Tensor)> = linears
            .into_iter()
            .filter_map(|(name, linear)| Some((name, linear?)))
            .flat_map(|(name, linear)| linear.tensors().map(move |(part, tensor)| (format!("{name}.{part}"), tensor)))
            .collect();
        let exact = |tensor: &Tensor| tensor.to_kind(self.kind).to_kind(Kind::Float).equal(tensor);
        let kind = if named.iter().all(|(_, tensor)| exact(tensor)) { self.kind } else { Kind::Float };
        named.into_iter().map(|(name, tensor)| (name, tensor.detach().to_kind(kind))).collect()
    }
}

impl Module for MultiModalProjector {
    /// `[batch, tokens, layers * encoder_hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, features: &Tensor) -> Tensor {
        let mut x = self.linear_1.forward(&features.to_kind(Kind::Float));
        if let Some(linear_2) = &self.linear_2 {
            x = linear_2.forward(&x.gelu("none"));
        }
        x.to_kind(self.kind)
    }
}
