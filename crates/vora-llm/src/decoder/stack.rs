//! The decoder without its head: embedding, layers, final norm, and the loop over the layers.

use std::sync::Arc;

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_torch::dist::Shards;
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

use super::layer::{DecoderLayer, Gathered};
use crate::attention::{AttentionPlan, SharedKeys};
use crate::config::LlmConfig;
use crate::kv_cache::Step;
use crate::norm::rms_norm;
use crate::rotary::{CosSin, Rotary};

/// What a forward leaves.
#[derive(Debug)]
#[non_exhaustive]
pub struct Output {
    /// After the final norm, `[batch, seq, hidden]`.
    pub last_hidden_state: Tensor,
    /// The embeddings, then the output of each layer asked for, `[batch, seq, hidden]` each; as in HF, the one after
    /// the last layer of all is the normed one.
    pub hidden_states: Vec<Tensor>,
}

/// What the layers share in one pass.
#[derive(Debug)]
pub(super) struct Shared<'a, T> {
    pub(super) cos_sin: CosSin,
    full: &'a T,
    windowed: Option<T>, // for layers with a sliding window, where it hides something
}

impl<T> Shared<'_, T> {
    /// The plan, or step, of a layer.
    pub(super) fn by(&self, layer: &DecoderLayer) -> &T {
        self.windowed.as_ref().filter(|_| layer.slides()).unwrap_or(self.full)
    }
}

/// Embedding, layers and final norm: everything under `model.` in a checkpoint.
#[derive(Debug)]
pub struct Decoder {
    pub(super) embed_tokens: Tensor, // [vocab, hidden]
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: RmsNorm,
    rotary: Rotary,
    window: Option<i64>,         // of the layers that have one
    shards: Option<Arc<Shards>>, // where several processes share the layers' frozen weights
}

impl Decoder {
    /// Takes `embed_tokens`, `layers` and `norm`.
    ///
    /// # Errors
    /// See [`LlmConfig::rotation`]; a tensor that cannot be read. Missing and misshapen ones are told by
    /// [`Weights::finish`].
    pub fn load(config: &LlmConfig, weights: &Weights) -> Result<Self> {
        let vocab = [config.vocab_size, config.hidden_size];
        let embed_tokens = weights.pp("embed_tokens").get("weight", &vocab, Init::Required)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer_idx| {
                let weights = weights.pp("layers").pp(layer_idx);
                // Old Llama checkpoints hold the rotary frequencies of every layer; they follow from the config.
                weights.ignore("self_attn.rotary_emb.inv_freq");
                DecoderLayer::load(config, layer_idx, &weights)
            })
            .collect::<Result<_>>()?;
        let norm = rms_norm(config, &weights.pp("norm"), config.hidden_size)?;
        let window = (0..config.num_hidden_layers).find_map(|layer_idx| config.window(layer_idx));
        let shards = weights.shards().cloned();
        Ok(Self { embed_tokens, layers, norm, rotary: Rotary::new(config)?, window, shards })
    }

    /// `[batch, seq, hidden]` -> [`Output`] with `hidden_states[0..=hidden_layers]`; nothing is dropped.
    pub fn forward(&self, inputs_embeds: &Tensor, plan: &AttentionPlan, hidden_layers: usize) -> Output {
        let (shared, mut keys) = (self.shared(plan), SharedKeys::default());
        self.output(inputs_embeds, hidden_layers, |_, layer, x| {
            layer.forward(x, &shared.cos_sin, shared.by(layer), &mut keys)
        })
    }

    /// The layers, first to last, to be looked at one by one.
    pub fn layers(&self) -> &[DecoderLayer] {
        &self.layers
    }

    /// What of the weights of its layers other processes have, where several share them ([`Weights::sharded`]). A pass
    /// through the layers brings each one's together, which all of them do at once.
    pub fn shards(&self) -> Option<&Arc<Shards>> {
        self.shards.as_ref()
    }

    /// What a pass gathers of the layers, without a pass: for a process that has nothing to compute where the others have.
    pub fn gather_forward(&self) {
        self.layers.iter().for_each(|layer| drop(self.gathered(layer)));
    }

    /// The same of the way back of a recomputed pass.
    pub fn gather_backward(&self) {
        self.layers.iter().rev().for_each(|layer| drop(self.gathered(layer)));
    }

    /// The layer with all of its weights, as long as what is returned lives.
    pub(super) fn gathered<'a>(&self, layer: &'a DecoderLayer) -> Option<Gathered<'a>> {
        self.shards.as_ref().map(|_| layer.gathered())
    }

    /// Whether some layers attend to keys and values of others.
    pub fn shares_keys(&self) -> bool {
        self.layers.iter().any(DecoderLayer::borrows_keys)
    }

    /// The rotation that the layers share in a forward with that plan.
    pub fn cos_sin(&self, plan: &AttentionPlan) -> CosSin {
        self.rotary.cos_sin(plan.position_ids(), plan.num_positions())
    }

    /// What a batch with that plan has for all layers.
    pub(super) fn shared<'a>(&self, plan: &'a AttentionPlan) -> Shared<'a, AttentionPlan> {
        let windowed = self.window.and_then(|window| plan.within(window));
        Shared { cos_sin: self.cos_sin(plan), full: plan, windowed }
    }

    /// What a decoding step has for all layers.
    pub(super) fn shared_step<'a>(&self, step: &'a Step) -> Shared<'a, Step> {
        let windowed = self.window.and_then(|window| step.within(window));
        Shared { cos_sin: self.rotary.cos_sin(&step.position_ids, step.seen().end), full: step, windowed }
    }

    /// Through all layers, first to last, whichever pass it is: `each` makes a layer's output of the layer's index, the
    /// layer, and what goes into it.
    pub(super) fn through(
        &self,
        inputs_embeds: &Tensor,
        mut each: impl FnMut(usize, &DecoderLayer, &Tensor) -> Tensor,
    ) -> Tensor {
        let mut x = inputs_embeds.shallow_clone(); // [batch, seq, hidden]
        if let Some(shards) = &self.shards {
            shards.begin_pass();
        }
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let _gathered = self.gathered(layer);
            x = each(layer_idx, layer, &x);
        }
        x
    }

    /// Through all layers and the final norm, with the hidden states asked for.
    pub(super) fn output(
        &self,
        inputs_embeds: &Tensor,
        hidden_layers: usize,
        mut each: impl FnMut(usize, &DecoderLayer, &Tensor) -> Tensor,
    ) -> Output {
        let mut hidden_states = vec![inputs_embeds.shallow_clone()];
        let x = self.through(inputs_embeds, |layer_idx, layer, x| {
            let y = each(layer_idx, layer, x);
            if layer_idx < hidden_layers.min(self.layers.len() - 1) {
                hidden_states.push(y.shallow_clone());
            }
            y
        });
        let last_hidden_state = self.norm.forward(&x);
        if hidden_layers >= self.layers.len() {
            hidden_states.push(last_hidden_state.shallow_clone());
        }
        Output { last_hidden_state, hidden_states }
    }
}
