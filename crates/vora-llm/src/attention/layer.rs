//! Self-attention of one decoder layer, with and without a cache of keys and values.

use anyhow::Result;
use tch::{Tensor, nn::Module};
use vora_lora::{Active, Linear};
use vora_torch::nn::RmsNorm;
use vora_torch::nn::attention::attention;
use vora_torch::weights::Weights;

use super::attend::{attend, attend_dropping, repeat_heads, scaled_dot_product};
use super::plan::AttentionPlan;
use crate::config::{KeyValues, LlmConfig};
use crate::head_norm::HeadNorm;
use crate::kv_cache::{LayerCache, Step, StepKernel};
use crate::kv_pages::{LayerPages, Places};
use crate::rotary::CosSin;

/// Self-attention of one decoder layer.
#[derive(Debug)]
pub struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) q_norm: Option<HeadNorm>,
    pub(crate) own: Option<KeyValue>, // none: it attends to keys and values of an earlier layer
    num_heads: i64,
    num_kv_heads: i64,
    head_dim: i64,
    rotates: bool,
    slides: bool,              // whether it has the rotation of layers with a window
    query_factor: Option<f64>, // for a model that divides logits by something else than the root of head_dim
    dropout: f64,              // of the softmax's weights, in training
}

/// What a layer makes keys and values with.
#[derive(Debug)]
pub(crate) struct KeyValue {
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Option<Linear>, // none: values are the projection of the keys
    pub(crate) k_norm: Option<HeadNorm>,
    v_norm: Option<RmsNorm>, // without a weight
    is_shared: bool,         // with later layers
}

/// Keys and values of one pass that later layers attend to as well, `[batch, kv_heads, seq, head_dim]` each. A cache holds
/// them by itself.
#[derive(Debug, Default)]
pub struct SharedKeys {
    full: Option<[Tensor; 2]>,
    sliding: Option<[Tensor; 2]>,
}

impl SharedKeys {
    fn of(&mut self, slides: bool) -> &mut Option<[Tensor; 2]> {
        if slides { &mut self.sliding } else { &mut self.full }
    }
}

impl KeyValue {
    /// Takes `k_proj`, `v_proj` and `k_norm`, as far as the layer has them.
    fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Option<Self>> {
        let (hidden, layer) = (config.hidden_size, config.layer(layer_idx));
        if let KeyValues::Of(_) = layer.key_values {
            return Ok(None);
        }
        let (bias, _) = config.attention_biases();
        let (heads, head_dim) = (layer.num_key_value_heads, layer.head_dim);
        let linear = |name: &str| Linear::load(&weights.pp(name), hidden, heads * head_dim, bias);
        let k_norm = weights.pp("k_norm");
        let v_norm = || RmsNorm::unscaled(weights, head_dim, config.rms_norm_eps);
        Ok(Some(Self {
            k_proj: linear("k_proj")?,
            v_proj: (layer.key_values == KeyValues::Own).then(|| linear("v_proj")).transpose()?,
            k_norm: HeadNorm::load(config, &k_norm, heads, head_dim)?,
            v_norm: config.architecture().v_norm.then(v_norm),
            is_shared: (0..config.num_hidden_layers).any(|i| config.layer(i).key_values == KeyValues::Of(layer_idx)),
        }))
    }
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` where the model has them.
    ///
    /// # Errors
    /// A tensor that cannot be read; missing and misshapen ones are told by [`Weights::finish`].
    pub fn load(config: &LlmConfig, layer_idx: usize, weights: &Weights) -> Result<Self> {
        let (hidden, num_heads, layer) = (config.hidden_size, config.num_attention_heads, config.layer(layer_idx));
        let head_dim = layer.head_dim;
        let (q_bias, o_bias) = config.attention_biases();
        Ok(Self {
            q_proj: Linear::load(&weights.pp("q_proj"), hidden, num_heads * head_dim, q_bias)?,
            o_proj: Linear::load(&weights.pp("o_proj"), num_heads * head_dim, hidden, o_bias)?,
            q_norm: HeadNorm::load(config, &weights.pp("q_norm"), num_heads, head_dim)?,
            own: KeyValue::load(config, layer_idx, weights)?,
            num_heads,
            num_kv_heads: layer.num_key_value_heads,
            head_dim,
            rotates: config.has_rope(layer_idx),
            slides: config.window(layer_idx).is_some(),
            query_factor: config.query_factor(head_dim),
            dropout: config.attention_dropout.unwrap_or(0.0),
        })
    }

    /// `[batch, seq, hidden]` -> `[batch, seq, hidden]`
    ///
    /// # Panics
    /// Where the layer has no keys of its own, and the one that has did not leave any in `keys`.
    pub fn forward(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, keys: &mut SharedKeys) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, plan.adapters(), keys);
        self.output(&attend(&q, &k, &v, plan), plan.adapters())
    }

    /// As [`Attention::forward`], without the attention weights that dropout takes.
    ///
    /// # Panics
    /// As [`Attention::forward`].
    pub fn forward_train(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, keys: &mut SharedKeys) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin, plan.adapters(), keys);
        self.output(&attend_dropping(&q, &k, &v, plan, self.dropout), plan.adapters())
    }

    /// Whether it drops anything in training.
    pub(crate) fn drops(&self) -> bool {
        self.dropout > 0.0
    }

    /// What the softmax is taken of, before the mask, with adapters on every token: `[batch, seq, hidden]` -> `[batch, heads, seq, seq]`
    ///
    /// # Panics
    /// As [`Attention::forward`].
    pub fn logits(&self, x: &Tensor, cos_sin: &CosSin, keys: &mut SharedKeys) -> Tensor {
        let [q, k, _] = self.project(x, cos_sin, &Active::All, keys);
        let k = repeat_heads(&k, self.num_heads / self.num_kv_heads);
        q.matmul(&k.transpose(2, 3)) / (self.head_dim as f64).sqrt()
    }

    /// As [`Attention::forward`], and keeps keys and values.
    pub(crate) fn prefill(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, cache: &mut LayerCache) -> Tensor {
        let q = self.query(x, cos_sin, plan.adapters());
        let [k, v] = match self.own_keys(x, cos_sin, plan.adapters()) {
            Some([k, v]) => {
                cache.fill(&k, &v);
                [k, v]
            }
            None => cache.first(q.size()[2]),
        };
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
        let q = self.query(x, cos_sin, plan.adapters());
        let own = self.own_keys(x, cos_sin, plan.adapters());
        if let Some([k, v]) = &own {
            pages.keep(k, v, places);
        }
        let part = plan.part_of_row();
        let [k, v] = match own {
            Some(own) if part.start == 0 => own,
            _ => pages.seen(places, 0..part.end),
        };
        self.output(&attend(&q, &k, &v, plan), plan.adapters())
    }

    /// `[batch, 1, hidden]` -> `[batch, 1, hidden]`; each new token attends to what the cache holds of its row,
    /// and itself.
    pub(crate) fn decode_step(&self, x: &Tensor, cos_sin: &CosSin, step: &Step, cache: &mut LayerCache) -> Tensor {
        self.step(x, cos_sin, step, |own| {
            if let Some([k, v]) = own {
                cache.append(&k, &v, step);
            }
            cache.seen(step)
        })
    }

    /// As [`Attention::decode_step`], with keys and values in pages.
    pub(crate) fn decode_pages(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        step: &Step,
        (pages, places): (&mut LayerPages, &Places),
    ) -> Tensor {
        self.step(x, cos_sin, step, |own| {
            if let Some([k, v]) = own {
                pages.keep(&k, &v, places);
            }
            pages.seen(places, step.seen())
        })
    }

    /// A step, with what it attends to by `seen`, which keeps the new keys and values that are the layer's own.
    fn step(
        &self,
        x: &Tensor,
        cos_sin: &CosSin,
        step: &Step,
        seen: impl FnOnce(Option<[Tensor; 2]>) -> [Tensor; 2],
    ) -> Tensor {
        let q = self.query(x, cos_sin, &step.adapters);
        let [k, v] = seen(self.own_keys(x, cos_sin, &step.adapters));
        let attended = match &step.kernel {
            StepKernel::Bands(bands) => attention(&q, &k, &v, bands),
            StepKernel::Mask(mask) => scaled_dot_product(&q, &k, &v, Some(mask), false, 0.0),
            StepKernel::Plain => scaled_dot_product(&q, &k, &v, None, false, 0.0),
        };
        self.output(&attended, &step.adapters)
    }

    /// `[batch, seq, hidden]` -> q as `[batch, heads, seq, head_dim]`, k and v as `[batch, kv_heads, seq, head_dim]`: the
    /// layer's own, or those that another left in `keys`
    fn project(&self, x: &Tensor, cos_sin: &CosSin, adapters: &Active, keys: &mut SharedKeys) -> [Tensor; 3] {
        let q = self.query(x, cos_sin, adapters);
        let shared = keys.of(self.slides);
        let [k, v] = match self.own_keys(x, cos_sin, adapters) {
            Some(own) => {
                if self.own.as_ref().is_some_and(|own| own.is_shared) {
                    *shared = Some(own.each_ref().map(Tensor::shallow_clone));
                }
                own
            }
            None => {
                let shared = shared.as_ref().expect("the layer whose keys these are comes first");
                shared.each_ref().map(Tensor::shallow_clone)
            }
        };
        [q, k, v]
    }

    /// `[batch, seq, hidden]` -> `[batch, heads, seq, head_dim]`, normed and rotated where the model does so
    fn query(&self, x: &Tensor, cos_sin: &CosSin, adapters: &Active) -> Tensor {
        let q = self.heads(&self.q_proj, x, adapters, self.num_heads); // [batch, seq, heads, head_dim]
        let q = self.normed_and_rotated(q, self.q_norm.as_ref(), cos_sin);
        let q = match self.query_factor {
            Some(factor) => q * factor,
            None => q,
        };
        q.transpose(1, 2)
    }

    /// `[batch, seq, hidden]` -> keys, normed and rotated where the model does so, and values, `[batch, kv_heads, seq,
    /// head_dim]` each; none where they are an earlier layer's
    fn own_keys(&self, x: &Tensor, cos_sin: &CosSin, adapters: &Active) -> Option<[Tensor; 2]> {
        let KeyValue { k_proj, v_proj, k_norm, v_norm, .. } = self.own.as_ref()?;
        let k = self.heads(k_proj, x, adapters, self.num_kv_heads); // [batch, seq, kv_heads, head_dim]
        let v = match v_proj {
            Some(v_proj) => self.heads(v_proj, x, adapters, self.num_kv_heads),
            None => k.shallow_clone(),
        };
        let k = self.normed_and_rotated(k, k_norm.as_ref(), cos_sin);
        let v = match v_norm {
            Some(norm) => norm.forward(&v),
            None => v,
        };
        Some([k, v].map(|t| t.transpose(1, 2)))
    }

    /// `[batch, seq, hidden]` -> `[batch, seq, heads, head_dim]`
    fn heads(&self, linear: &Linear, x: &Tensor, adapters: &Active, heads: i64) -> Tensor {
        let (batch, seq, _) = x.size3().expect("x is [batch, seq, hidden]");
        linear.forward_on(x, adapters).view([batch, seq, heads, self.head_dim])
    }

    /// `[batch, seq, heads, head_dim]` -> the same
    fn normed_and_rotated(&self, x: Tensor, norm: Option<&HeadNorm>, cos_sin: &CosSin) -> Tensor {
        let x = match norm {
            Some(norm) => norm.forward(&x),
            None => x,
        };
        if self.rotates { cos_sin.rotate(&x, self.slides) } else { x }
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
        fixtures::assert_close_to(
            &attention.forward(&golden["x"], &cos_sin, &plan, &mut SharedKeys::default()),
            &golden["y"],
            1e-5,
        );
        // The same by its definition.
        let logits = attention.logits(&golden["x"], &cos_sin, &mut SharedKeys::default()); // [batch, heads, seq, seq]
        let future = Tensor::ones([11, 11], F32).triu(1).to_kind(Kind::Bool);
        let seen = logits.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Float);
        let [_, _, v] = attention.project(&golden["x"], &cos_sin, &Active::All, &mut SharedKeys::default());
        fixtures::assert_close_to(
            &attention.output(&seen.matmul(&repeat_heads(&v, 2)), &Active::All),
            &golden["y"],
            1e-5,
        );
    }
}
