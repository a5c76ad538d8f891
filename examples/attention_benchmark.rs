//! What it costs that the patches of a picture attend to each other in both directions: one attention over words, a picture
//! and words, forward and backward, beside the causal one.
//!
//! ```sh
//! cargo run --release -p vora-examples --bin attention_benchmark [ROUNDS]
//! ```

use std::time::Instant;

use anyhow::Result;
use vora_llm::tch::{Device, Kind};
use vora_llm::{AttentionPlan, VisionAttention, Weights, attend};
use vora_text::{Span, Spans};
use vora_torch::weights::Init;

fn main() -> Result<()> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(5), |rounds| rounds.parse())?;
    println!("picture tokens  bidirectional      causal  ratio");
    for side in [8, 16] {
        let spans = Spans::new(vec![vec![Span::text(12), Span::image(side, side), Span::text(20)]]);
        let ways = [VisionAttention::Bidirectional, VisionAttention::Causal];
        let plans = ways.map(|way| AttentionPlan::new(&spans, way, Device::Cpu, Kind::Float));
        let [bidirectional, causal] = plans;
        let plans = [bidirectional?, causal?];
        // [batch, heads, seq, head_dim], three query heads to a key-value head
        let new = Weights::random(0, Device::Cpu, Kind::Float);
        let parameter = |name, heads| new.parameter(name, &[1, heads, spans.seq(), 64], Init::Normal { std: 1.0 });
        let (q, k, v) = (parameter("q", 9)?, parameter("k", 3)?, parameter("v", 3)?);
        let mut milliseconds = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            // Both take turns, so that what else the machine does befalls both.
            for (plan, found) in plans.iter().zip(&mut milliseconds) {
                let start = Instant::now();
                attend(&q, &k, &v, plan).sum(Kind::Float).backward();
                found.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let [bidirectional, causal] = milliseconds.map(median);
        let ratio = bidirectional / causal;
        println!("{:14}  {bidirectional:10.2} ms  {causal:7.2} ms  {ratio:5.2}", side * side);
    }
    Ok(())
}

fn median(mut found: Vec<f64>) -> f64 {
    found.sort_by(f64::total_cmp);
    found.get(found.len() / 2).copied().unwrap_or(f64::NAN)
}
