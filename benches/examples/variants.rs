//! What it costs to let pictures attend in one way or another, and by which kernel: time, counted operations and memory of
//! one attention, or one layer's with its projections, over rows of words, pictures and words.
//!
//! `cargo xtask bench attention --variants` runs it. All kernels of a layout take turns in every round; medians over the
//! rounds are reported.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tch::{Device, Kind, Tensor};
use vora_llm::{Attention, AttentionPlan, KernelChoice, LlmConfig, Rotary, SharedKeys, VisionAttention, attend};
use vora_text::{Span, Spans};
use vora_torch::nn::attention::{Band, Bands, Run, attention};
use vora_torch::{runtime, weights::Weights};

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
    /// One layer with its projections, bidirectional and causal in turns, in place of attention alone
    #[arg(long)]
    layer: bool,
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
    /// Of a forward and of a forward with its backward: of the processor on one thread of a CPU, else of the clock.
    milliseconds: [f64; 2],
    /// What a forward with its backward held at most beside its inputs; none where the system does not tell it.
    mebibytes: Option<f64>,
    /// 10^9 multiplications and additions that the layout needs: two products of every query and its keys forward, five
    /// more backward; a layer's projections once forward and once for the gradient of what goes in.
    gflop: [f64; 2],
}

type Kernel = Box<dyn Fn(&[Tensor]) -> Tensor>;

fn main() -> Result<()> {
    let args = Args::parse();
    let device = runtime::device(&args.device)?;
    let mut all = Vec::new();
    for dtype in &args.dtype {
        let kind = runtime::kind(dtype, device)?;
        for &tokens in &args.tokens {
            if args.layer {
                all.extend(measure_layer(&args, dtype, kind, tokens, device)?);
                continue;
            }
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
            kernels.push(("own", Box::new(move |x| attention(&x[0], &x[1], &x[2], &bands))));
        }
    } else {
        let window = (layout == "sliding window").then_some(48);
        for (name, choice) in [("own", KernelChoice::Bands), ("per span", KernelChoice::Segments)] {
            let Ok(plan) = AttentionPlan::with_kernel(&spans, mode, device, kind, choice) else { continue };
            let plan = window.and_then(|window| plan.within(window)).unwrap_or(plan);
            kernels.push((name, Box::new(move |x| attend(&x[0], &x[1], &x[2], &plan))));
        }
        let plan = AttentionPlan::with_kernel(&spans, mode, device, kind, KernelChoice::Mask)?;
        let plan = window.and_then(|window| plan.within(window)).unwrap_or(plan);
        mask = plan.mask().context("a plan with a mask")?.shallow_clone();
    }
    let pairs = mask.eq(0.0).sum(Kind::Double).double_value(&[]) * args.heads as f64;
    kernels.push((
        "mask",
        Box::new(move |x| {
            Tensor::scaled_dot_product_attention(&x[0], &x[1], &x[2], Some(&mask), 0.0, false, None, true)
        }),
    ));

    let random = fixtures::Random::new(1);
    let states = [args.heads, args.kv_heads, args.kv_heads].map(|heads| {
        let x = random.normal([args.batch, seq, heads, args.head_dim]).to_kind(kind).to_device(device);
        x.transpose(1, 2).detach()
    });
    let flop = 2.0 * pairs * args.head_dim as f64 / 1e9;
    let all = take_turns(&kernels, &states, args.rounds, device).into_iter().zip(kernels);
    Ok(all
        .map(|((milliseconds, mebibytes), (kernel, _))| Measured {
            layout,
            kernel,
            dtype: dtype.to_owned(),
            picture_tokens: tokens,
            milliseconds,
            mebibytes,
            gflop: [2.0 * flop, 7.0 * flop],
        })
        .collect())
}

/// One layer's attention with its projections, whose weights stay as they are: bidirectional and causal take turns.
fn measure_layer(args: &Args, dtype: &str, kind: Kind, tokens: i64, device: Device) -> Result<Vec<Measured>> {
    let side = (tokens as f64).sqrt() as i64;
    let row = vec![Span::text(WORDS[0]), Span::image(side, side), Span::text(WORDS[1])];
    let spans = Spans::new(vec![row; args.batch as usize]);
    let (seq, hidden) = (spans.seq(), args.heads * args.head_dim);
    let config = LlmConfig {
        hidden_size: hidden,
        num_attention_heads: args.heads,
        num_key_value_heads: Some(args.kv_heads),
        head_dim: Some(args.head_dim),
        ..LlmConfig::default()
    };
    let rotary = Rotary::new(&config)?;
    let (mut kernels, mut pairs): (Vec<(&'static str, Kernel)>, _) = (Vec::new(), Vec::new());
    let ways = [("bidirectional", VisionAttention::Bidirectional), ("causal", VisionAttention::Causal)];
    for (layout, mode) in ways {
        let layer = Attention::load(&config, 0, &Weights::random(3, device, kind))?;
        let plan = AttentionPlan::new(&spans, mode, device, kind)?;
        let cos_sin = rotary.cos_sin(plan.position_ids(), plan.num_positions());
        let mask = AttentionPlan::with_kernel(&spans, mode, device, kind, KernelChoice::Mask)?;
        let seen = mask.mask().context("a plan with a mask")?.eq(0.0).sum(Kind::Double).double_value(&[]);
        pairs.push(seen * hidden as f64);
        kernels.push((layout, Box::new(move |x| layer.forward(&x[0], &cos_sin, &plan, &mut SharedKeys::default()))));
    }
    let x = fixtures::Random::new(1).normal([args.batch, seq, hidden]).to_kind(kind).to_device(device);
    let projections = (args.batch * seq * hidden * 2 * (args.heads + args.kv_heads) * args.head_dim) as f64;
    let all = take_turns(&kernels, &[x], args.rounds, device).into_iter().zip(kernels).zip(pairs);
    Ok(all
        .map(|(((milliseconds, mebibytes), (layout, _)), pairs)| Measured {
            layout,
            kernel: "layer",
            dtype: dtype.to_owned(),
            picture_tokens: tokens,
            milliseconds,
            mebibytes,
            gflop: [(1.0, 2.0), (2.0, 7.0)].map(|(of, products)| 2.0 * (of * projections + products * pairs) / 1e9),
        })
        .collect())
}

/// Milliseconds of each kernel's forward and of its forward with backward, medians over rounds in which all take turns, and
/// what it holds at most.
fn take_turns(
    kernels: &[(&'static str, Kernel)],
    states: &[Tensor],
    rounds: usize,
    device: Device,
) -> Vec<([f64; 2], Option<f64>)> {
    let leaves: Vec<_> = states.iter().map(|t| t.detach().set_requires_grad(true)).collect();
    let held: Vec<_> = kernels.iter().map(|(_, kernel)| peak(device, || pass(kernel, &leaves, device))).collect();
    let mut times = vec![[Vec::new(), Vec::new()]; kernels.len()];
    for round in 0..rounds + 2 {
        for ((_, kernel), times) in kernels.iter().zip(&mut times) {
            for (states, times) in [states, &leaves].into_iter().zip(times) {
                let start = seconds(device);
                pass(kernel, states, device);
                if round >= 2 {
                    times.push((seconds(device) - start) * 1e3);
                }
            }
        }
    }
    let median = |times: &Vec<f64>| {
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let mebibytes = held.into_iter().map(|held| held.map(|bytes| bytes as f64 / f64::from(1 << 20)));
    times.iter().map(|times| times.each_ref().map(median)).zip(mebibytes).collect()
}

/// A clock: on one thread of a CPU the processor's time, so that what else the machine does matters little.
fn seconds(device: Device) -> f64 {
    let is_alone = !device.is_cuda() && runtime::threads() == 1;
    let clock = if is_alone { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes into the struct that it is given.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// One forward, and its backward where the states want gradients.
fn pass(kernel: &Kernel, states: &[Tensor], device: Device) {
    let output = kernel(states);
    if states[0].requires_grad() {
        Tensor::run_backward(&[output.sum(output.kind())], states, false, false);
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
