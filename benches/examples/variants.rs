//! What it costs to let pictures attend in one way or another, and by which kernel: time, counted operations and memory of
//! one attention over rows of words, pictures and words.
//!
//! `cargo xtask bench attention --variants` runs it. All kernels of a layout take turns in every round; medians over the
//! rounds are reported.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tch::{Device, Kind, Tensor};
use vora_llm::{AttentionPlan, KernelChoice, VisionAttention, attend};
use vora_text::{Span, Spans};
use vora_torch::nn::attention::{Band, Bands, Run, attention};
use vora_torch::runtime;

/// Words before and after the pictures of a row.
const WORDS: [i64; 2] = [12, 20];

/// Measures ways to attend and the kernels that serve them
#[derive(Debug, Parser)]
struct Args {
    /// Picture tokens of a row
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256, 1024])]
    tokens: Vec<i64>,
    /// Rows
    #[arg(long, default_value_t = 4)]
    batch: i64,
    /// Query heads
    #[arg(long, default_value_t = 9)]
    heads: i64,
    /// Key and value heads
    #[arg(long, default_value_t = 3)]
    kv_heads: i64,
    /// Width of a head
    #[arg(long, default_value_t = 64)]
    head_dim: i64,
    /// f32 or bf16
    #[arg(long, value_delimiter = ',', default_values = ["f32", "bf16"])]
    dtype: Vec<String>,
    /// Rounds behind two that are not counted
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Where to write what was measured, as JSON
    #[arg(long)]
    json: PathBuf,
}

/// One way to attend to one size of picture, by one kernel.
#[derive(Debug, Serialize)]
struct Measured {
    layout: &'static str,
    kernel: &'static str,
    dtype: String,
    picture_tokens: i64,
    /// Of a forward and of a forward with its backward.
    milliseconds: [f64; 2],
    /// What a forward with its backward held at most beside its inputs; none where the system does not tell it.
    mebibytes: Option<f64>,
    /// 10^9 multiplications and additions that the layout needs: two products of every query and its keys forward, five
    /// more backward.
    gflop: [f64; 2],
}

type Kernel = Box<dyn Fn(&[Tensor; 3]) -> Tensor>;

fn main() -> Result<()> {
    let args = Args::parse();
    let device = runtime::device(&args.device)?;
    let mut all = Vec::new();
    for dtype in &args.dtype {
        let kind = runtime::kind(dtype, device)?;
        for &tokens in &args.tokens {
            for layout in ["bidirectional", "causal", "fused pictures", "prefix-LM", "sliding window"] {
                all.extend(measure(&args, layout, dtype, kind, tokens, device)?);
            }
        }
    }
    fs::write(&args.json, serde_json::to_string_pretty(&all)?)
        .with_context(|| format!("cannot write {}", args.json.display()))
}

fn measure(
    args: &Args,
    layout: &'static str,
    dtype: &str,
    kind: Kind,
    tokens: i64,
    device: Device,
) -> Result<Vec<Measured>> {
    let side = (tokens as f64).sqrt() as i64;
    let picture = match layout {
        "fused pictures" => vec![Span::image(side, side / 2); 2],
        _ => vec![Span::image(side, side)],
    };
    let row = [vec![Span::text(WORDS[0])], picture, vec![Span::text(WORDS[1])]].concat();
    let spans = Spans::new(vec![row; args.batch as usize]);
    let seq = spans.seq();
    let mode = match layout {
        "causal" => VisionAttention::Causal,
        "fused pictures" => VisionAttention::BidirectionalFused,
        _ => VisionAttention::Bidirectional,
    };
    let mut kernels: Vec<(&'static str, Kernel)> = Vec::new();
    let mask;
    if layout == "prefix-LM" {
        let prefix = seq - WORDS[1];
        let runs = vec![
            Run { queries: 0..prefix, bands: vec![Band::all(0..prefix)] },
            Run { queries: prefix..seq, bands: vec![Band::causal(0..seq)] },
        ];
        let bands = Bands::new(&vec![runs; args.batch as usize])?;
        mask = bands.mask(seq, seq, device, kind);
        if !device.is_cuda() {
            kernels.push(("own", Box::new(move |[q, k, v]| attention(q, k, v, &bands))));
        }
    } else {
        let window = (layout == "sliding window").then_some(48);
        for (name, choice) in [("own", KernelChoice::Bands), ("per span", KernelChoice::Segments)] {
            let Ok(plan) = AttentionPlan::with_kernel(&spans, mode, device, kind, choice) else { continue };
            let plan = window.and_then(|window| plan.within(window)).unwrap_or(plan);
            kernels.push((name, Box::new(move |[q, k, v]| attend(q, k, v, &plan))));
        }
        let plan = AttentionPlan::with_kernel(&spans, mode, device, kind, KernelChoice::Mask)?;
        let plan = window.and_then(|window| plan.within(window)).unwrap_or(plan);
        mask = plan.mask().context("a plan with a mask")?.shallow_clone();
    }
    let pairs = mask.eq(0.0).sum(Kind::Double).double_value(&[]) * args.heads as f64;
    kernels.push((
        "mask",
        Box::new(move |[q, k, v]| Tensor::scaled_dot_product_attention(q, k, v, Some(&mask), 0.0, false, None, true)),
    ));

    let random = fixtures::Random::new(1);
    let states = [args.heads, args.kv_heads, args.kv_heads].map(|heads| {
        let x = random.normal([args.batch, seq, heads, args.head_dim]).to_kind(kind).to_device(device);
        x.transpose(1, 2).detach()
    });
    let leaves = states.each_ref().map(|t| t.detach().set_requires_grad(true));
    let held: Vec<_> = kernels.iter().map(|(_, kernel)| peak(device, || pass(kernel, &leaves, device))).collect();
    let mut times = vec![[Vec::new(), Vec::new()]; kernels.len()];
    for round in 0..args.rounds + 2 {
        for ((_, kernel), times) in kernels.iter().zip(&mut times) {
            for (states, times) in [&states, &leaves].into_iter().zip(times) {
                let start = Instant::now();
                pass(kernel, states, device);
                if round >= 2 {
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
    }
    let flop = 2.0 * pairs * args.head_dim as f64 / 1e9;
    let median = |times: &Vec<f64>| {
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    Ok(kernels
        .iter()
        .zip(&times)
        .zip(held)
        .map(|(((kernel, _), times), held)| Measured {
            layout,
            kernel,
            dtype: dtype.to_owned(),
            picture_tokens: tokens,
            milliseconds: times.each_ref().map(median),
            mebibytes: held.map(|bytes| bytes as f64 / f64::from(1 << 20)),
            gflop: [2.0 * flop, 7.0 * flop],
        })
        .collect())
}

/// One forward, and its backward where the states want gradients.
fn pass(kernel: &Kernel, states: &[Tensor; 3], device: Device) {
    let output = kernel(states);
    if states[0].requires_grad() {
        Tensor::run_backward(&[output.sum(output.kind())], &states.each_ref(), false, false);
    }
    runtime::synchronize(device);
}

/// Bytes that the process held at most during `run`, beyond what it held before.
fn peak(device: Device, run: impl FnOnce()) -> Option<u64> {
    if device.is_cuda() {
        run();
        return None; // its peak is the highest of all so far
    }
    // SAFETY: it gives free memory back to the system, and touches no other.
    unsafe { libc::malloc_trim(0) };
    fs::write("/proc/self/clear_refs", "5").ok()?; // the peak begins anew
    let before = runtime::memory(device)?;
    run();
    Some(runtime::peak_memory(device)?.saturating_sub(before))
}
