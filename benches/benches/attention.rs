//! What bidirectional vision attention costs beside causal: one attention layer of SmolLM2-135M (9 heads, 3 key-value
//! heads of 64) over 4 rows of words, one picture, words, by picture size and kind, forward and with backward.
//!
//! `cargo xtask bench attention`, or `cargo bench -p benches -- cpu/f32`; criterion draws the curves into
//! `target/criterion/<group>/report/lines.svg`.

use std::time::Duration;

use anyhow::Result;
use criterion::{BenchmarkId, Criterion, Throughput};
use tch::{Device, Kind, Tensor};
use vora_llm::{AttentionPlan, VisionAttention, attend};
use vora_text::{Span, Spans};
use vora_torch::runtime;

const BATCH: i64 = 4;
const HEADS: i64 = 9;
const KV_HEADS: i64 = 3;
const HEAD_DIM: i64 = 64;

/// Patches on a side: 64, 256 and 1024 tokens a picture.
const SIDES: [i64; 3] = [8, 16, 32];

fn main() -> Result<()> {
    let device = runtime::device("auto")?;
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for kind in [Kind::Float, Kind::BFloat16] {
        forward_and_backward(&mut criterion, device, kind)?;
    }
    criterion.final_summary();
    Ok(())
}

#[allow(clippy::disallowed_methods, reason = "nothing draws beside it, and what is drawn changes no time")]
fn forward_and_backward(criterion: &mut Criterion, device: Device, kind: Kind) -> Result<()> {
    let place = if device.is_cuda() { "cuda" } else { "cpu" };
    let kind_name = if kind == Kind::Float { "f32" } else { "bf16" };
    for pass in ["forward", "forward_backward"] {
        let mut group = criterion.benchmark_group(format!("{place}/{kind_name}/attention/{pass}"));
        for side in SIDES {
            let row = vec![Span::text(12), Span::image(side, side), Span::text(20)];
            let spans = Spans::new(vec![row; BATCH as usize]);
            let seq = spans.seq();
            tch::manual_seed(0);
            let states = |heads| {
                let x = Tensor::randn([BATCH, seq, heads, HEAD_DIM], (Kind::Float, device)).to_kind(kind);
                x.transpose(1, 2).set_requires_grad(pass == "forward_backward") // [batch, heads, seq, head_dim]
            };
            let (q, k, v) = (states(HEADS), states(KV_HEADS), states(KV_HEADS));
            group.throughput(Throughput::Elements((BATCH * seq) as u64));
            for (name, mode) in [("bidirectional", VisionAttention::Bidirectional), ("causal", VisionAttention::Causal)]
            {
                let plan = AttentionPlan::new(&spans, mode, device, kind)?;
                group.bench_function(BenchmarkId::new(name, side * side), |bencher| {
                    bencher.iter(|| {
                        let output = attend(&q, &k, &v, &plan);
                        if pass == "forward_backward" {
                            Tensor::run_backward(&[output.sum(Kind::Float)], &[&q, &k, &v], false, false);
                        }
                        runtime::synchronize(device);
                    });
                });
            }
        }
        group.finish();
    }
    Ok(())
}
