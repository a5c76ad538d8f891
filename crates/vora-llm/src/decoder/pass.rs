//! A training forward, whose output is to be had for a loss alone.

use anyhow::Result;
use tch::Tensor;

use super::dropout::DropoutSeed;
use super::recompute::{Recompute, forward_recomputed};
use super::stack::{Decoder, Output};
use crate::attention::{AttentionPlan, SharedKeys};

/// A forward that has not gone backward yet: [`Decoder::forward_train`] or [`Decoder::forward_recomputed`].
///
/// A loss over a recomputed forward would by itself reach the hidden states and nothing before them, and the gradient
/// would lack almost everything without a word. So nobody gets the output to take it backward himself:
/// [`Pass::backward`] lends it for as long as the loss is made.
///
/// ```
/// # use tch::{Device, Kind};
/// # use vora_llm::{AttentionPlan, CausalLm, DropoutSeed, LlmConfig, VisionAttention};
/// # use vora_torch::weights::Weights;
/// # fn main() -> anyhow::Result<()> {
/// # let weights = Weights::random(42, Device::Cpu, Kind::Float);
/// # let llm = CausalLm::load(&LlmConfig::tiny(64), &weights.trained())?;
/// # let spans = vora_text::Spans::text(&[3]);
/// # let plan = AttentionPlan::new(&spans, VisionAttention::Causal, Device::Cpu, Kind::Float)?;
/// # let embeds = llm.embed(&tch::Tensor::from_slice(&[5i64, 3, 9]).unsqueeze(0));
/// let pass = llm.decoder().forward_recomputed(&embeds, &plan, 0, DropoutSeed::new(0));
/// pass.backward(|output| Ok(output.last_hidden_state.square().sum(Kind::Float)))?;
/// assert!(weights.parameters().iter().all(|(_, weight)| weight.grad().defined()));
/// # Ok(())
/// # }
/// ```
///
/// What would forget the layers does not compile:
///
/// ```compile_fail,E0616
/// # use tch::{Device, Kind};
/// # use vora_llm::{AttentionPlan, CausalLm, DropoutSeed, LlmConfig, VisionAttention};
/// # use vora_torch::weights::Weights;
/// # fn main() -> anyhow::Result<()> {
/// # let weights = Weights::random(42, Device::Cpu, Kind::Float);
/// # let llm = CausalLm::load(&LlmConfig::tiny(64), &weights.trained())?;
/// # let spans = vora_text::Spans::text(&[3]);
/// # let plan = AttentionPlan::new(&spans, VisionAttention::Causal, Device::Cpu, Kind::Float)?;
/// # let embeds = llm.embed(&tch::Tensor::from_slice(&[5i64, 3, 9]).unsqueeze(0));
/// let pass = llm.decoder().forward_recomputed(&embeds, &plan, 0, DropoutSeed::new(0));
/// pass.output.last_hidden_state.square().sum(Kind::Float).backward(); // private
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a pass that does not go backward leaves no gradient"]
pub struct Pass<'a> {
    pub(super) output: Output,
    layers: Option<Recompute<'a>>, // what its loss does not reach by itself
}

impl Decoder {
    /// As [`Decoder::forward`], with the config's `attention_dropout` and `dropout`; `seed` decides what is dropped. It is
    /// set in libtorch's generator, the process's one, where the config has either.
    pub fn forward_train<'a>(
        &'a self,
        inputs_embeds: &Tensor,
        plan: &'a AttentionPlan,
        hidden_layers: usize,
        seed: DropoutSeed,
    ) -> Pass<'a> {
        let (shared, mut keys) = (self.shared(plan), SharedKeys::default());
        let output = self.output(inputs_embeds, hidden_layers, |layer_idx, layer, x| {
            layer.forward_train(x, &shared.cos_sin, shared.by(layer), &mut keys, seed.at(layer_idx as u64))
        });
        Pass { output, layers: None }
    }

    /// As [`Decoder::forward_train`], in little memory: what goes into each layer is kept, nothing from inside it. The
    /// way back computes each layer once more. Where layers attend to keys and values of others (Gemma 4's
    /// `num_kv_shared_layers`), which one layer alone cannot make anew, everything is kept, as there.
    pub fn forward_recomputed<'a>(
        &'a self,
        inputs_embeds: &Tensor,
        plan: &'a AttentionPlan,
        hidden_layers: usize,
        seed: DropoutSeed,
    ) -> Pass<'a> {
        if self.shares_keys() {
            return self.forward_train(inputs_embeds, plan, hidden_layers, seed);
        }
        let (output, layers) = forward_recomputed(self, inputs_embeds, plan, hidden_layers, seed);
        Pass { output, layers: Some(layers) }
    }
}

impl Pass<'_> {
    /// Takes the scalar that `loss` makes of the output backward, to everything that is trained and to the embeddings.
    ///
    /// # Errors
    /// What `loss` says, in which case nothing goes backward, and what libtorch says of the way back.
    pub fn backward(self, loss: impl FnOnce(&Output) -> Result<Tensor>) -> Result<()> {
        let Self { output, layers } = self;
        let loss = loss(&output)?;
        drop(output); // the graph holds what it needs
        loss.f_backward()?;
        layers.map_or(Ok(()), Recompute::backward)
    }
}
