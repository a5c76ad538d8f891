//! Grouped-query attention over spans, with and without a cache of keys and values.

use anyhow::Result;
use tch::{Kind, Tensor, nn::Module};
use vora_lora::Linear;
use vora_torch::Weights;

use crate::config::LlmConfig;
use crate::head_norm::HeadNorm;
use crate::kv_cache::{LayerCache, Step};
use crate::rotary::CosSin;
use crate::spans::{AttentionPlan, Kernel};

/// `softmax(q k^T / sqrt(head_dim) + mask) v`, where `plan` says who sees whom.
///
/// `q` is `[batch, heads, seq, head_dim]`, `k` and `v` are `[batch, kv_heads, seq, head_dim]`, and so is the result as
/// `q`. Each key-value head serves `heads / kv_heads` neighbouring query heads.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, plan: &AttentionPlan) -> Tensor {
    attend_dropping(q, k, v, plan, 0.0)
}

/// As [`attend`], without a random `dropout` of the softmax's weights.
fn attend_dropping(q: &Tensor, k: &Tensor, v: &Tensor, plan: &AttentionPlan, dropout: f64) -> Tensor {
    match &plan.kernel {
        Kernel::Causal => scaled_dot_product(q, k, v, None, true, dropout),
        Kernel::Mask(mask) => scaled_dot_product(q, k, v, Some(mask), false, dropout),
        Kernel::Segments(segments) => {
            let outputs: Vec<Tensor> = segments
                .iter()
                .map(|s| {
                    let seen = |t: &Tensor| t.narrow(2, s.first_key, s.end - s.first_key);
                    let q = q.narrow(2, s.start, s.end - s.start);
                    scaled_dot_product(&q, &seen(k), &seen(v), s.mask.as_ref(), s.causal, dropout)
                })
                .collect();
            Tensor::cat(&outputs, 2)
        }
        Kernel::Documents(rows) => {
            // One split for all documents: its gradient is put together once, that of a narrow for each.
            let [q, k, v] = [q, k, v].map(|t| t.split(1, 0)); // each [1, heads, seq, head_dim]
            let outputs: Vec<Tensor> = rows
                .iter()
                .enumerate()
                .map(|(row, plans)| attend_row([&q[row], &k[row], &v[row]], plans, dropout))
                .collect();
            Tensor::cat(&outputs, 0)
        }
    }
}

/// One row of documents behind each other, `[1, heads, seq, head_dim]`; padding gets zeros.
fn attend_row(qkv: [&Tensor; 3], documents: &[AttentionPlan], dropout: f64) -> Tensor {
    let mut lens: Vec<i64> = documents.iter().map(|plan| plan.row_lens()[0]).collect();
    let padding = qkv[0].size()[2] - lens.iter().sum::<i64>();
    lens.push(padding);
    let [q, k, v] = qkv.map(|t| t.split_with_sizes(&lens, 2));
    let mut outputs: Vec<Tensor> =
        documents.iter().enumerate().map(|(i, plan)| attend_dropping(&q[i], &k[i], &v[i], plan, dropout)).collect();
    outputs.push(q[documents.len()].zeros_like());
    Tensor::cat(&outputs, 2)
}

fn scaled_dot_product(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool, dropout: f64) -> Tensor {
    let (heads, kv_heads) = (q.size()[1], k.size()[1]);
    let grouped = heads != kv_heads;
    let is_flash = mask.is_none() && q.kind() != Kind::Float; // the only one of CUDA's kernels that has groups
    if grouped && !is_flash && q.device().is_cuda() {
        // Else libtorch would fall back to plain matrices: on an H200 a causal call in f32 took 1.2 to 3.5 times what a
        // call with a mask took.
        let (k, v) = (repeat_heads(k, heads / kv_heads), repeat_heads(v, heads / kv_heads));
        return Tensor::scaled_dot_product_attention(q, &k, &v, mask, dropout, causal, None, false);
    }
    Tensor::scaled_dot_product_attention(q, k, v, mask, dropout, causal, None, grouped)
}

/// `[batch, kv_heads, seq, head_dim]` -> `[batch, kv_heads * times, seq, head_dim]`
fn repeat_heads(x: &Tensor, times: i64) -> Tensor {
    let (batch, kv_heads, seq, head_dim) = x.size4().expect("x is [batch, kv_heads, seq, head_dim]");
    x.unsqueeze(2).expand([batch, kv_heads, times, seq, head_dim], false).reshape([
        batch,
        kv_heads * times,
        seq,
        head_dim,
    ])
}

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
        let [q, k, v] = self.project(x, cos_sin);
        self.output(&attend(&q, &k, &v, plan))
    }

    /// As [`Attention::forward`], without the attention weights that dropout takes.
    pub fn forward_train(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin);
        self.output(&attend_dropping(&q, &k, &v, plan, self.dropout))
    }

    /// Whether it drops anything in training.
    pub(crate) fn drops(&self) -> bool {
        self.dropout > 0.0
    }

    /// `q k^T / sqrt(head_dim)`, before mask and softmax: `[batch, seq, hidden]` -> `[batch, heads, seq, seq]`
    pub fn logits(&self, x: &Tensor, cos_sin: &CosSin) -> Tensor {
        let [q, k, _] = self.project(x, cos_sin);
        let k = repeat_heads(&k, self.num_heads / self.num_kv_heads);
        q.matmul(&k.transpose(2, 3)) / (self.head_dim as f64).sqrt()
    }

    /// As [`Attention::forward`], and keeps keys and values.
    pub(crate) fn prefill(&self, x: &Tensor, cos_sin: &CosSin, plan: &AttentionPlan, cache: &mut LayerCache) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin);
        cache.fill(&k, &v);
        self.output(&attend(&q, &k, &v, plan))
    }

    /// `[batch, 1, hidden]` -> `[batch, 1, hidden]`; every row sees what the cache holds of it, and itself.
    pub(crate) fn decode_step(&self, x: &Tensor, cos_sin: &CosSin, step: &Step, cache: &mut LayerCache) -> Tensor {
        let [q, k, v] = self.project(x, cos_sin);
        let (k, v) = cache.append(&k, &v, step);
        self.output(&scaled_dot_product(&q, &k, &v, step.mask.as_ref(), false, 0.0))
    }

    /// `[batch, seq, hidden]` -> q as `[batch, heads, seq, head_dim]`, k and v as `[batch, kv_heads, seq, head_dim]`; q
    /// and k normed and rotated where the model does so
    fn project(&self, x: &Tensor, cos_sin: &CosSin) -> [Tensor; 3] {
        let (batch, seq, _) = x.size3().expect("x is [batch, seq, hidden]");
        let split = |x: Tensor, heads| x.view([batch, seq, heads, self.head_dim]);
        let mut q = split(self.q_proj.forward(x), self.num_heads); // [batch, seq, heads, head_dim]
        let mut k = split(self.k_proj.forward(x), self.num_kv_heads);
        let v = split(self.v_proj.forward(x), self.num_kv_heads);
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
    fn output(&self, attended: &Tensor) -> Tensor {
        let (batch, heads, seq, head_dim) = attended.size4().expect("attended is [batch, heads, seq, head_dim]");
        self.o_proj.forward(&attended.transpose(1, 2).reshape([batch, seq, heads * head_dim]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    use crate::rotary::Rotary;
    use crate::spans::{KernelChoice, Span, Spans, VisionAttention};

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
        let [_, _, v] = attention.project(&golden["x"], &cos_sin);
        fixtures::assert_close_to(&attention.output(&seen.matmul(&repeat_heads(&v, 2))), &golden["y"], 1e-5);
    }

    /// `q` [2, 4, seq, 8], `k` and `v` [2, 2, seq, 8]
    fn random_qkv(seq: i64) -> [Tensor; 3] {
        let random = fixtures::Random::new(7);
        [4, 2, 2].map(|heads| random.normal([2, heads, seq, 8]).set_requires_grad(true))
    }

    /// Output and gradients of one kernel; a plan whose rows are padded is compared up to `seq`.
    fn run(plan: &AttentionPlan, upto: &[i64]) -> Vec<Tensor> {
        let [q, k, v] = random_qkv(plan.position_ids().size()[1]);
        let y = attend(&q, &k, &v, plan);
        assert!(bool::try_from(y.isfinite().all()).unwrap());
        let real: Vec<Tensor> =
            upto.iter().enumerate().map(|(row, &len)| y.get(row as i64).narrow(1, 0, len)).collect();
        let loss = real.iter().map(|t| t.square().sum(Kind::Float)).reduce(|a, b| a + b).unwrap();
        loss.backward();
        real.into_iter().chain([q.grad(), k.grad(), v.grad()]).collect()
    }

    #[test]
    fn all_kernels_agree() {
        let image = Span::image(3, 4);
        let text = |len| Span::text(len);
        for (rows, mode, choices) in [
            (
                vec![vec![text(9)], vec![text(9)]],
                VisionAttention::Bidirectional,
                vec![KernelChoice::Causal, KernelChoice::Segments],
            ),
            (vec![vec![text(9)], vec![text(5)]], VisionAttention::Bidirectional, vec![KernelChoice::Causal]),
            (
                vec![vec![text(2), image], vec![text(3), image, text(2)]],
                VisionAttention::Causal,
                vec![KernelChoice::Causal],
            ),
            (
                vec![vec![text(2), image, text(4), image, image, text(1)]; 2],
                VisionAttention::Bidirectional,
                vec![KernelChoice::Segments],
            ),
            (
                vec![vec![text(2), image, text(4), image, image, text(1)]; 2],
                VisionAttention::BidirectionalFused,
                vec![KernelChoice::Segments],
            ),
            (vec![vec![image, text(7)], vec![image]], VisionAttention::Bidirectional, vec![KernelChoice::Segments]),
            (
                vec![
                    vec![
                        text(9),
                        text(2).in_document(1),
                        image.in_document(1),
                        text(3).in_document(1).on_branch(0),
                        text(2).in_document(1).on_branch(1),
                        image.in_document(2),
                        image.in_document(2),
                    ],
                    vec![image.in_document(4), text(5).in_document(3)],
                ],
                VisionAttention::Bidirectional,
                vec![KernelChoice::Documents],
            ),
        ] {
            let lens: Vec<i64> = Spans { rows: rows.clone() }.row_lens().collect();
            let spans = Spans { rows: rows.clone() };
            let plan = |choice, window: Option<i64>| {
                let plan = AttentionPlan::with_kernel(&spans, mode, Device::Cpu, Kind::Float, choice).unwrap();
                match window {
                    None => Some(plan),
                    Some(window) => plan.within(window),
                }
            };
            for window in [None, Some(1), Some(2), Some(3), Some(5), Some(8), Some(14)] {
                let Some(mask) = plan(KernelChoice::Mask, window) else { continue };
                let expected = run(&mask, &lens);
                for &choice in &choices {
                    for (found, expected) in run(&plan(choice, window).unwrap(), &lens).iter().zip(&expected) {
                        fixtures::assert_close_to(found, expected, 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn repeated_heads_are_grouped_heads() {
        let [q, k, v] = random_qkv(6);
        let grouped = scaled_dot_product(&q, &k, &v, None, true, 0.0);
        let repeated = scaled_dot_product(&q, &repeat_heads(&k, 2), &repeat_heads(&v, 2), None, true, 0.0);
        fixtures::assert_close_to(&grouped, &repeated, 1e-6);
    }
}
