//! Decoding on the CPU, packed in each width and plain, by turns: tokens for each CPU-second of the thread, medians.
//!
//! `OMP_NUM_THREADS=1 cargo run --release -p benches --example decode -- FOLDER` takes a checkpoint's folder; without one it
//! makes a model of SmolLM2-135M's sizes. Rows have 352 tokens behind them, as amid 128 new ones after a prompt of 288.
#![allow(clippy::print_stdout, reason = "a program says what it measured")]

use std::path::PathBuf;

use anyhow::{Result, ensure};
use benches::cpu_seconds;
use clap::Parser;
use tch::{Device, Kind, Tensor};
use vora_llm::{AttentionPlan, CausalLm, LlmConfig, PackedDecoder, PackedStep, VisionAttention};
use vora_text::Spans;
use vora_torch::nn::decode::{LoraId, Pages, Width};
use vora_torch::weights::Weights;

const SEEN: i64 = 352;
const PAGE_LEN: i64 = 64;

/// Prints tokens per CPU-second of decoding
#[derive(Debug, Parser)]
struct Args {
    /// A checkpoint's folder
    folder: Option<PathBuf>,
    /// Turns, in each of which every variant makes some steps
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Steps of a turn
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Rows of a batch
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    batches: Vec<usize>,
}

/// SmolLM2-135M's.
fn sizes() -> LlmConfig {
    LlmConfig {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        num_attention_heads: 9,
        num_key_value_heads: Some(3),
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        ..LlmConfig::tiny(49_152)
    }
}

fn plain(llm: &CausalLm, rows: usize, steps: usize) -> Result<f64> {
    let mut cache = llm.new_cache(rows as i64, SEEN + steps as i64 + 1)?;
    let ids = Tensor::zeros([rows as i64, SEEN], (Kind::Int64, Device::Cpu));
    let plan = AttentionPlan::new(&Spans::text(&vec![SEEN; rows]), VisionAttention::Causal, Device::Cpu, llm.kind())?;
    let _ = llm.prefill(&llm.embed(&ids), &plan, &mut cache)?;
    let start = cpu_seconds()?;
    for _ in 0..steps {
        let _ = llm.decode_step(&ids.narrow(1, 0, 1), &mut cache)?;
    }
    Ok(cpu_seconds()? - start)
}

fn packed(decoder: &mut PackedDecoder, config: &LlmConfig, kind: Kind, rows: usize, steps: usize) -> Result<f64> {
    let max_pages = ((SEEN + steps as i64) / PAGE_LEN + 1) as usize;
    let size = [(rows * max_pages) as i64, config.kv_heads(), PAGE_LEN, config.head_width()];
    let tensors = || (0..config.num_hidden_layers).map(|_| Tensor::full(size, 0.1, (kind, Device::Cpu))).collect();
    let (keys, values): (Vec<Tensor>, Vec<Tensor>) = (tensors(), tensors());
    let pages = Pages::new(&keys, &values)?;
    let tables: Vec<i32> = (0..(rows * max_pages) as i32).collect();
    let (ids, adapters) = (vec![5; rows], vec![LoraId::NONE; rows]);
    let start = cpu_seconds()?;
    for step in 0..steps as i64 {
        let lens = vec![SEEN + step; rows];
        let step = PackedStep {
            tables: &tables,
            lens: &lens,
            position_ids: &lens,
            adapters: &adapters,
            ..PackedStep::default()
        };
        let _ = decoder.decode_step(&ids, &pages, &step)?;
    }
    Ok(cpu_seconds()? - start)
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.turns > 0 && args.steps > 0, "turns and steps are at least 1");
    let config = args.folder.as_deref().map_or_else(|| Ok(sizes()), LlmConfig::open)?;
    let load = |kind| match &args.folder {
        Some(folder) => CausalLm::load(&config, &Weights::open(folder, Device::Cpu, kind)?),
        None => CausalLm::load(&config, &Weights::random(1, Device::Cpu, kind)),
    };
    let models = [load(Kind::Float)?, load(Kind::BFloat16)?];
    let mut decoders = Vec::new();
    for width in Width::ALL {
        let llm = &models[usize::from(width != Width::F32)];
        let Some(decoder) = PackedDecoder::new(llm, width)? else { continue };
        println!("{width}: {} MB beside the model's weights", decoder.num_bytes() / 1_000_000);
        decoders.push(decoder);
    }
    for &rows in &args.batches {
        let mut seconds: Vec<(String, Vec<f64>)> = Vec::new();
        let mut push = |name: String, taken: f64| match seconds.iter_mut().find(|(known, _)| *known == name) {
            Some((_, all)) => all.push(taken),
            None => seconds.push((name, vec![taken])),
        };
        for _ in 0..args.turns {
            for llm in &models {
                push(format!("plain {:?}", llm.kind()), plain(llm, rows, args.steps)?);
            }
            for decoder in &mut decoders {
                let kind = if decoder.width() == Width::F32 { Kind::Float } else { Kind::BFloat16 };
                push(format!("packed {}", decoder.width()), packed(decoder, &config, kind, rows, args.steps)?);
            }
        }
        for (name, mut all) in seconds {
            all.sort_by(f64::total_cmp);
            let tokens = (rows * args.steps) as f64;
            println!("batch {rows}, {name}: {:.1} tokens a CPU-second", tokens / all[all.len() / 2]);
        }
    }
    Ok(())
}
