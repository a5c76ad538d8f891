//! Grouped-query attention over spans: the calls that a plan asks of libtorch.

use tch::{Kind, Tensor};

use vora_torch::nn::attention::attention;

use super::plan::{AttentionPlan, Kernel};

/// `softmax(q k^T / sqrt(head_dim) + mask) v`, where `plan` says which tokens may attend to which.
///
/// `q` is `[batch, heads, seq, head_dim]`, `k` and `v` are `[batch, kv_heads, seq, head_dim]`, and so is the result as
/// `q`. Each key-value head serves `heads / kv_heads` neighbouring query heads.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, plan: &AttentionPlan) -> Tensor {
    attend_dropping(q, k, v, plan, 0.0)
}

/// As [`attend`], without a random `dropout` of the softmax's weights.
pub(super) fn attend_dropping(q: &Tensor, k: &Tensor, v: &Tensor, plan: &AttentionPlan, dropout: f64) -> Tensor {
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
        Kernel::Bands(bands) if dropout == 0.0 => attention(q, k, v, bands),
        Kernel::Bands(bands) => {
            let mask = bands.mask(q.size()[2], k.size()[2], q.device(), q.kind());
            scaled_dot_product(q, k, v, Some(&mask), false, dropout)
        }
    }
}

pub(super) fn scaled_dot_product(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    dropout: f64,
) -> Tensor {
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
pub(super) fn repeat_heads(x: &Tensor, times: i64) -> Tensor {
    let (batch, kv_heads, seq, head_dim) = x.size4().expect("x is [batch, kv_heads, seq, head_dim]");
    x.unsqueeze(2).expand([batch, kv_heads, times, seq, head_dim], false).reshape([
        batch,
        kv_heads * times,
        seq,
        head_dim,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;
    use vora_text::{Span, Spans};

    use crate::{KernelChoice, VisionAttention};

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
                vec![KernelChoice::Causal, KernelChoice::Segments, KernelChoice::Bands],
            ),
            (
                vec![vec![text(9)], vec![text(5)]],
                VisionAttention::Bidirectional,
                vec![KernelChoice::Causal, KernelChoice::Bands],
            ),
            (
                vec![vec![text(2), image], vec![text(3), image, text(2)]],
                VisionAttention::Causal,
                vec![KernelChoice::Causal, KernelChoice::Bands],
            ),
            (
                vec![vec![text(2), image, text(4), image, image, text(1)]; 2],
                VisionAttention::Bidirectional,
                vec![KernelChoice::Segments, KernelChoice::Bands],
            ),
            (
                vec![vec![text(2), image, text(4), image, image, text(1)]; 2],
                VisionAttention::BidirectionalFused,
                vec![KernelChoice::Segments, KernelChoice::Bands],
            ),
            (
                vec![vec![image, text(7)], vec![image]],
                VisionAttention::Bidirectional,
                vec![KernelChoice::Segments, KernelChoice::Bands],
            ),
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
                vec![KernelChoice::Bands],
            ),
        ] {
            let lens: Vec<i64> = Spans::new(rows.clone()).row_lens().collect();
            let spans = Spans::new(rows.clone());
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
