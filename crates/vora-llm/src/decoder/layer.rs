//! One layer: attention and MLP around the residual stream.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_lora::{Active, Linear};
use vora_torch::nn::RmsNorm;
use vora_torch::weights::Weights;

use super::dropout::DropoutSeed;
use crate::attention::{Attention, AttentionPlan};
use crate::config::LlmConfig;
use crate::head_norm::HeadNorm;
use crate::kv_cache::{LayerCache, Step};
use crate::kv_pages::{LayerPages, Places};
use crate::mlp::Mlp;
use crate::rotary::CosSin;

/// `h = x + self_attn(input_layernorm(x))`, then `h + mlp(post_attention_layernorm(h))`; with `swin_norm`, each norm
/// comes after its block: `h = x + input_layernorm(self_attn(x))`, then `h + post_attention_layernorm(mlp(h))`.
#[derive(Debug)]
pub struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
    swin_norm: bool,
    slides: bool, // whether it has the decoder's window
    dropout: f64, // of what attention and MLP add, in training
}

impl DecoderLayer {
    /// Takes one `model.layers.N`.
    ///
    /// # Errors
    /// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(config, layer_idx, &weights.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(config, &weights.pp("mlp"))?,
            swin_norm: config.has_swin_norm(),
            slides: config.window(layer_idx).is_some(),
            dropout: config.dropout.unwrap_or(0.0),
        })
    }

    /// `[batch, seq, hidden]` -> `[batch, seq, hidden]`; a layer with a sliding window takes a plan within it.
    pub fn forward(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan) -> Tensor {
        self.around(x, 0.0, plan.adapters(), |x| self.self_attn.forward(x, cos_sin, plan))
    }

    /// As [`DecoderLayer::forward`], without what dropout takes, which `seed` decides.
    pub fn forward_train(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, seed: DropoutSeed) -> Tensor {
        if self.dropout > 0.0 || self.self_attn.drops() {
            seed.begin();
        }
        self.around(x, self.dropout, plan.adapters(), |x| self.self_attn.forward_train(x, cos_sin, plan))
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
    pub fn attention_logits(&self, x: &Tensor, cos_sin: &CosSin) -> Tensor {
        if self.swin_norm {
            return self.self_attn.logits(x, cos_sin);
        }
        self.self_attn.logits(&self.input_layernorm.forward(x), cos_sin)
    }

    /// Whether its attention is within the decoder's window.
    pub(super) fn slides(&self) -> bool {
        self.slides
    }

    /// The residual stream around whichever form of attention.
    fn around(&self, x: &Tensor, dropout: f64, adapters: &Active, attention: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let drop = |x: Tensor| if dropout > 0.0 { x.dropout(dropout, true) } else { x };
        if self.swin_norm {
            let h = x + self.input_layernorm.forward(&drop(attention(x))); // [batch, seq, hidden]
            let mlp = self.post_attention_layernorm.forward(&drop(self.mlp.forward(&h, adapters)));
            return h + mlp;
        }
        let h = x + drop(attention(&self.input_layernorm.forward(x))); // [batch, seq, hidden]
        let mlp = drop(self.mlp.forward(&self.post_attention_layernorm.forward(&h), adapters));
        h + mlp
    }

    /// The linear layers by their names on disk, in the order of HF's `named_modules`.
    pub(super) fn linears(&self) -> [(&'static str, &Linear); 7] {
        let (a, m) = (&self.self_attn, &self.mlp);
        [
            ("self_attn.q_proj", &a.q_proj),
            ("self_attn.k_proj", &a.k_proj),
            ("self_attn.v_proj", &a.v_proj),
            ("self_attn.o_proj", &a.o_proj),
            ("mlp.gate_proj", &m.gate_proj),
            ("mlp.up_proj", &m.up_proj),
            ("mlp.down_proj", &m.down_proj),
        ]
    }

    pub(super) fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        [
            ("self_attn.q_proj", &mut a.q_proj),
            ("self_attn.k_proj", &mut a.k_proj),
            ("self_attn.v_proj", &mut a.v_proj),
            ("self_attn.o_proj", &mut a.o_proj),
            ("mlp.gate_proj", &mut m.gate_proj),
            ("mlp.up_proj", &mut m.up_proj),
            ("mlp.down_proj", &mut m.down_proj),
        ]
    }

    /// The tensors of all norms by their names on disk.
    pub(super) fn norm_tensors(&self) -> Vec<(String, &Tensor)> {
        let mut tensors = vec![
            ("input_layernorm.weight".to_owned(), self.input_layernorm.weight()),
            ("post_attention_layernorm.weight".to_owned(), self.post_attention_layernorm.weight()),
        ];
        for (name, norm) in [("q_norm", &self.self_attn.q_norm), ("k_norm", &self.self_attn.k_norm)] {
            for (tensor_name, tensor) in norm.iter().flat_map(HeadNorm::tensors) {
                tensors.push((format!("self_attn.{name}.{tensor_name}"), tensor));
            }
        }
        tensors
    }
}
