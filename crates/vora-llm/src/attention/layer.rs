//! Self-attention of one decoder layer, with and without a cache of keys and values.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_lora::{Active, Linear};
use vora_torch::nn::attention::attention;
use vora_torch::weights::Weights;

use super::attend::{attend, attend_dropping, repeat_heads, scaled_dot_product};
use super::plan::AttentionPlan;
use crate::config::LlmConfig;
use crate::head_norm::HeadNorm;
use crate::kv_cache::{LayerCache, Step, StepKernel};
use crate::kv_pages::{LayerPages, Places};
use crate::rotary::CosSin;

/// Self-attention of one decoder layer.
#[derive(Debug)]
pub struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) q_norm: Option<HeadNorm>,
    pub(crate) k_norm: Option<HeadNorm>,
    num_heads: i64,
    num_kv_heads: i64,
    head_dim: i64,
    rotates: bool,
    dropout: f64, // of the softmax's weights, in training
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` where the model has them.
    ///
    /// # Errors
    /// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_width());
        let (num_heads, num_kv_heads) = (config.num_attention_heads, config.kv_heads());
        let (qkv_bias, o_bias) = config.attention_biases();
        Ok(Self {
            q_proj: Linear::load(&weights.pp("q_proj"), hidden, num_heads * head_dim, qkv_bias)?,
            k_proj: Linear::load(&weights.pp("k_proj"), hidden, num_kv_heads * head_dim, qkv_bias)?,
            v_proj: Linear::load(&weights.pp("v_proj"), hidden, num_kv_heads * head_dim, qkv_bias)?,
            o_proj: Linear::load(&weights.pp("o_proj"), num_heads * head_dim, hidden, o_bias)?,
            q_norm: HeadNorm::load(config, &weights.pp("q_norm"), num_heads)?,
            k_norm: HeadNorm::load(config, &weights.pp("k_norm"), num_kv_heads)?,
            num_heads,
            num_kv_heads,
            head_dim,
            rotates: config.has_rope(layer_idx),
            dropout: config.attention_dropout.unwrap_or(0.0),
        })
    }

    /// `[batch, seq, hidden]` -> `[batch, seq, hidden]`
    pub fn forward(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, plan.adapters());
        self.output(&attend(&q, &k, &v, plan), plan.adapters())
    }

    /// As [`Attention::forward`], without the attention weights that dropout takes.
    pub fn forward_train(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, plan.adapters());
        self.output(&attend_dropping(&q, &k, &v, plan, self.dropout), plan.adapters())
    }

    /// Whether it drops anything in training.
    pub(crate) fn drops(&self) -> bool {
        self.dropout > 0.0
    }

    /// `q k^T / sqrt(head_dim)`, before mask and softmax, with adapters on every token: `[batch, seq, hidden]` -> `[batch, heads, seq, seq]`
    pub fn logits(&self, x: &Tensor, cos_sin: &CosSin) -> Tensor {
        let [q, k, _] = self.project(x, cos_sin, &Active::All);
        let k = repeat_heads(&k, self.num_heads / self.num_kv_heads);
        q.matmul(&k.transpose(2, 3)) / (self.head_dim as f64).sqrt()
    }

    /// As [`Attention::forward`], and keeps keys and values.
    pub(crate) fn prefill(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, cache: &mut LayerCache) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, plan.adapters());
        cache.fill(&k, &v);
        self.output(&attend(&q, &k, &v, plan), plan.adapters())
    }

    /// As [`Attention::forward`] for the part of a sequence that `plan` is of, `seen` of whose keys lie in `pages` then.
    pub(crate) fn prefill_pages(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        plan: &AttentionPlan,
        (pages, places): (&mut LayerPages, &Places),
    ) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, plan.adapters());
        pages.keep(&k, &v, places);
        let part = plan.part_of_row();
        let (k, v) = if part.start == 0 { (k, v) } else { pages.seen(places, 0..part.end) };
        self.output(&attend(&q, &k, &v, plan), plan.adapters())
    }

    /// `[batch, 1, hidden]` -> `[batch, 1, hidden]`; each new token attends to what the cache holds of its row,
    /// and itself.
    pub(crate) fn decode_step(&self, x: &Tensor, cos_sin: &CosSin, step: &Step, cache: &mut LayerCache) -> Tensor {
        self.step(x, cos_sin, step, |k, v| cache.append(k, v, step))
    }

    /// As [`Attention::decode_step`], with keys and values in pages.
    pub(crate) fn decode_pages(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        step: &Step,
        (pages, places): (&mut LayerPages, &Places),
    ) -> Tensor {
        self.step(x, cos_sin, step, |k, v| {
            pages.keep(k, v, places);
            pages.seen(places, step.seen())
        })
    }

    /// A step, with what it attends to by `append`, which keeps the new keys and values.
    fn step(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        step: &Step,
        append: impl FnOnce(&Tensor, &Tensor) -> (Tensor, Tensor),
    ) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, &step.adapters);
        let (k, v) = append(&k, &v);
        let attended = match &step.kernel {
            StepKernel::Bands(bands) => attention(&q, &k, &v, bands),
            StepKernel::Mask(mask) => scaled_dot_product(&q, &k, &v, Some(mask), false, 0.0),
            StepKernel::Plain => scaled_dot_product(&q, &k, &v, None, false, 0.0),
        };
        self.output(&attended, &step.adapters)
    }

    /// `[batch, seq, hidden]` -> q as `[batch, heads, seq, head_dim]`, k and v as `[batch, kv_heads, seq, head_dim]`; q
    /// and k normed and rotated where the model does so
    fn project(&self, x: &Tensor, cos_sin: &CosSin, adapters: &Active) -> [Tensor; 3] {
        let (batch, seq, _) = x.size3().expect("x is [batch, seq, hidden]");
        let split = |x: Tensor, heads| x.view([batch, seq, heads, self.head_dim]);
        let mut q = split(self.q_proj.forward_on(x, adapters), self.num_heads); // [batch, seq, heads, head_dim]
        let mut k = split(self.k_proj.forward_on(x, adapters), self.num_kv_heads);
        let v = split(self.v_proj.forward_on(x, adapters), self.num_kv_heads);
        if let Some(norm) = &self.q_norm {
            q = norm.forward(&q);
        }
        if let Some(norm) = &self.k_norm {
            k = norm.forward(&k);
        }
        if self.rotates {
            (q, k) = (cos_sin.rotate(&q), cos_sin.rotate(&k));
        }
        [q, k, v].map(|t| t.transpose(1, 2))
    }

    /// `[batch, heads, seq, head_dim]` -> `[batch, seq, hidden]`
    fn output(&self, attended: &Tensor, adapters: &Active) -> Tensor {
        let (batch, heads, seq, head_dim) = attended.size4().expect("attended is [batch, heads, seq, head_dim]");
        let joined = attended.transpose(1, 2).reshape([batch, seq, heads * head_dim]);
        self.o_proj.forward_on(&joined, adapters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};
    use vora_text::Spans;

    use crate::VisionAttention;
    use crate::rotary::Rotary;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("attention");
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        let config = LlmConfig { attention_bias: true, ..LlmConfig::tiny(64) };
        let attention = Attention::load(&config, 0, &weights).unwrap();
        weights.finish().unwrap();
        let plan =
            AttentionPlan::new(&Spans::text(&[11, 11]), VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap();
        let rotary = Rotary::new(&config).unwrap();
        let cos_sin = rotary.cos_sin(plan.position_ids(), plan.num_positions());
        fixtures::assert_close_to(&attention.forward(&golden["x"], &cos_sin, &plan), &golden["y"], 1e-5);
        // The same by its definition.
        let logits = attention.logits(&golden["x"], &cos_sin); // [batch, heads, seq, seq]
        let future = Tensor::ones([11, 11], F32).triu(1).to_kind(Kind::Bool);
        let seen = logits.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Float);
        let [_, _, v] = attention.project(&golden["x"], &cos_sin, &Active::All);
        fixtures::assert_close_to(
            &attention.output(&seen.matmul(&repeat_heads(&v, 2)), &Active::All),
            &golden["y"],
            1e-5,
        );
    }
}
