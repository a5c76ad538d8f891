//! One layer: attention and MLP around the residual stream.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_lora::{Active, Linear};
use vora_torch::dist::ShardedWeight;
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

use super::dropout::DropoutSeed;
use crate::architecture::NormOrder;
use crate::attention::{Attention, AttentionPlan, SharedKeys};
use crate::config::{KeyValues, LlmConfig};
use crate::head_norm::HeadNorm;
use crate::kv_cache::{LayerCache, Step};
use crate::kv_pages::{LayerPages, Places};
use crate::mlp::Mlp;
use crate::norm::rms_norm;
use crate::rotary::CosSin;

/// Attention, then the MLP: what either makes of the residual stream is added to it.
///
/// The stream is normed on the way in, by `input_layernorm` and `post_attention_layernorm`. With `swin_norm` it goes in as it
/// is, and what comes out is normed by these two. Gemma norms both ways, and its MLP by `pre_feedforward_layernorm` and
/// `post_feedforward_layernorm`; Gemma 4 multiplies the stream behind a layer by its `layer_scalar`.
#[derive(Debug)]
pub struct DecoderLayer {
    attention_norms: Norms,
    self_attn: Attention,
    mlp_norms: Norms,
    mlp: Mlp,
    layer_scalar: Option<Tensor>, // [1], never trained
    cache_idx: usize,             // whose keys and values it attends to in a cache: its own, or an earlier layer's
    slides: bool,                 // whether it has the decoder's window
    dropout: f64,                 // of what attention and MLP add, in training
}

/// The norms around attention or MLP, with their names on disk.
#[derive(Debug)]
struct Norms {
    before: Option<(&'static str, RmsNorm)>,
    after: Option<(&'static str, RmsNorm)>,
}

impl Norms {
    fn load(config: &LlmConfig, weights: &Weights, [before, after]: [Option<&'static str>; 2]) -> Result<Self> {
        let norm = |name| anyhow::Ok((name, rms_norm(config, &weights.pp(name), config.hidden_size)?));
        let load = |name: Option<&'static str>| name.map(norm).transpose();
        Ok(Self { before: load(before)?, after: load(after)? })
    }

    /// `[.., hidden]` -> what goes in
    fn before(&self, x: &Tensor) -> Tensor {
        self.before.as_ref().map_or_else(|| x.shallow_clone(), |(_, norm)| norm.forward(x))
    }

    /// `[.., hidden]` -> what is added to the residual stream
    fn after(&self, x: Tensor) -> Tensor {
        match &self.after {
            Some((_, norm)) => norm.forward(&x),
            None => x,
        }
    }

    fn iter(&self) -> impl Iterator<Item = &(&'static str, RmsNorm)> {
        self.before.iter().chain(&self.after)
    }
}

/// A layer whose shared weights are whole for as long as this lives: see [`DecoderLayer::gathered`].
pub(super) struct Gathered<'a>(&'a DecoderLayer);

impl Drop for Gathered<'_> {
    fn drop(&mut self) {
        self.0.shared_weights().for_each(ShardedWeight::release);
    }
}

impl DecoderLayer {
    /// Takes one `model.layers.N`.
    ///
    /// # Errors
    /// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Self> {
        let (input, post_attention) = (Some("input_layernorm"), Some("post_attention_layernorm"));
        let (attention, mlp) = match config.norm_order() {
            NormOrder::Before => ([input, None], [post_attention, None]),
            NormOrder::After => ([None, input], [None, post_attention]),
            NormOrder::Around => {
                let (pre, post) = (Some("pre_feedforward_layernorm"), Some("post_feedforward_layernorm"));
                ([input, post_attention], [pre, post])
            }
        };
        // A buffer in HF, which no optimizer gets to see.
        let scalar = || weights.trained_but(["layer_scalar".to_owned()]).get("layer_scalar", &[1], Init::Ones);
        Ok(Self {
            attention_norms: Norms::load(config, weights, attention)?,
            self_attn: Attention::load(config, layer_idx, &weights.pp("self_attn"))?,
            mlp_norms: Norms::load(config, weights, mlp)?,
            mlp: Mlp::load(config, layer_idx, &weights.pp("mlp"))?,
            layer_scalar: config.architecture().layer_scalar.then(scalar).transpose()?,
            cache_idx: match config.layer(layer_idx).key_values {
                KeyValues::Of(earlier) => earlier,
                KeyValues::Own | KeyValues::OwnKeys => layer_idx,
            },
            slides: config.window(layer_idx).is_some(),
            dropout: config.dropout.unwrap_or(0.0),
        })
    }

    /// `[batch, seq, hidden]` -> `[batch, seq, hidden]`; a layer with a sliding window takes a plan within it. `keys` goes from
    /// layer to layer in one pass.
    ///
    /// # Panics
    /// Where the layer has no keys of its own, and the one that has did not come first.
    pub fn forward(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, keys: &mut SharedKeys) -> Tensor {
        self.around(x, 0.0, plan.adapters(), |x| self.self_attn.forward(x, cos_sin, plan, keys))
    }

    /// As [`DecoderLayer::forward`], without what dropout takes, which `seed` decides.
    ///
    /// # Panics
    /// As [`DecoderLayer::forward`].
    pub fn forward_train(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        plan: &AttentionPlan,
        keys: &mut SharedKeys,
        seed: DropoutSeed,
    ) -> Tensor {
        if self.dropout > 0.0 || self.self_attn.drops() {
            seed.begin();
        }
        self.around(x, self.dropout, plan.adapters(), |x| self.self_attn.forward_train(x, cos_sin, plan, keys))
    }

    /// As [`DecoderLayer::forward`], and keeps keys and values in `cache`.
    pub(super) fn prefill(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, cache: &mut LayerCache) -> Tensor {
        self.around(x, 0.0, plan.adapters(), |x| self.self_attn.prefill(x, cos_sin, plan, cache))
    }

    /// `[batch, 1, hidden]` -> `[batch, 1, hidden]`; each new token attends to what `cache` holds of its row, and itself.
    pub(super) fn decode_step(&self, x: &Tensor, cos_sin: &CosSin, step: &Step, cache: &mut LayerCache) -> Tensor {
        self.around(x, 0.0, &step.adapters, |x| self.self_attn.decode_step(x, cos_sin, step, cache))
    }

    /// As [`DecoderLayer::prefill`] of the part of a sequence that `plan` is of, with keys and values in pages.
    pub(super) fn prefill_pages(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        plan: &AttentionPlan,
        kept: (&mut LayerPages, &Places),
    ) -> Tensor {
        self.around(x, 0.0, plan.adapters(), |x| self.self_attn.prefill_pages(x, cos_sin, plan, kept))
    }

    /// As [`DecoderLayer::decode_step`], with keys and values in pages.
    pub(super) fn decode_pages(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        step: &Step,
        kept: (&mut LayerPages, &Places),
    ) -> Tensor {
        self.around(x, 0.0, &step.adapters, |x| self.self_attn.decode_pages(x, cos_sin, step, kept))
    }

    /// What attention puts into its softmax, without the mask: `[batch, seq, hidden]`, as it goes into the layer, ->
    /// `[batch, heads, seq, seq]`. Logits that grow without bound foretell a training that diverges (arXiv 2309.14322).
    ///
    /// # Panics
    /// As [`DecoderLayer::forward`].
    pub fn attention_logits(&self, x: &Tensor, cos_sin: &CosSin, keys: &mut SharedKeys) -> Tensor {
        self.self_attn.logits(&self.attention_norms.before(x), cos_sin, keys)
    }

    /// Brings together the weights that several processes share, all of which call this at once.
    pub(super) fn gathered(&self) -> Gathered<'_> {
        ShardedWeight::gather_all(self.shared_weights());
        Gathered(self)
    }

    fn shared_weights(&self) -> impl Iterator<Item = &ShardedWeight> {
        self.linears().into_iter().filter_map(|(_, linear)| linear.sharded())
    }

    /// Whether its attention is within the decoder's window.
    pub(super) fn slides(&self) -> bool {
        self.slides
    }

    /// The layer of a cache that holds its keys and values.
    pub(super) fn cache_idx(&self) -> usize {
        self.cache_idx
    }

    /// Whether it attends to keys and values of an earlier layer.
    pub(super) fn borrows_keys(&self) -> bool {
        self.self_attn.own.is_none()
    }

    /// The residual stream around whichever form of attention.
    fn around(&self, x: &Tensor, dropout: f64, adapters: &Active, attention: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let drop = |x: Tensor| if dropout > 0.0 { x.dropout(dropout, true) } else { x };
        let h = x + self.attention_norms.after(drop(attention(&self.attention_norms.before(x)))); // [batch, seq, hidden]
        let mlp = drop(self.mlp.forward(&self.mlp_norms.before(&h), adapters));
        let y = h + self.mlp_norms.after(mlp);
        match &self.layer_scalar {
            Some(scalar) => y * scalar,
            None => y,
        }
    }

    /// The linear layers by their names on disk, in the order of Llama's `named_modules`.
    pub(super) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        let (a, m) = (&self.self_attn, &self.mlp);
        let mut linears = vec![("self_attn.q_proj", &a.q_proj)];
        if let Some(own) = &a.own {
            linears.push(("self_attn.k_proj", &own.k_proj));
            linears.extend(own.v_proj.as_ref().map(|v_proj| ("self_attn.v_proj", v_proj)));
        }
        linears.extend([
            ("self_attn.o_proj", &a.o_proj),
            ("mlp.gate_proj", &m.gate_proj),
            ("mlp.up_proj", &m.up_proj),
            ("mlp.down_proj", &m.down_proj),
        ]);
        linears
    }

    pub(super) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        let mut linears = vec![("self_attn.q_proj", &mut a.q_proj)];
        if let Some(own) = &mut a.own {
            linears.push(("self_attn.k_proj", &mut own.k_proj));
            linears.extend(own.v_proj.as_mut().map(|v_proj| ("self_attn.v_proj", v_proj)));
        }
        linears.extend([
            ("self_attn.o_proj", &mut a.o_proj),
            ("mlp.gate_proj", &mut m.gate_proj),
            ("mlp.up_proj", &mut m.up_proj),
            ("mlp.down_proj", &mut m.down_proj),
        ]);
        linears
    }

    /// The tensors that belong to no linear layer by their names on disk: those of all norms, and the layer's scalar.
    pub(super) fn other_tensors(&self) -> Vec<(String, &Tensor)> {
        let norms = self.attention_norms.iter().chain(self.mlp_norms.iter());
        let mut tensors: Vec<_> = norms.map(|(name, norm)| (format!("{name}.weight"), norm.weight())).collect();
        let k_norm = self.self_attn.own.as_ref().and_then(|own| own.k_norm.as_ref());
        for (name, norm) in [("q_norm", self.self_attn.q_norm.as_ref()), ("k_norm", k_norm)] {
            for (tensor_name, tensor) in norm.into_iter().flat_map(HeadNorm::tensors) {
                tensors.push((format!("self_attn.{name}.{tensor_name}"), tensor));
            }
        }
        tensors.extend(self.layer_scalar.iter().map(|scalar| ("layer_scalar".to_owned(), scalar)));
        tensors
    }
}
