//! A language model goes on with a text, without a chat around it.
//!
//! ```sh
//! cargo run -p vora-examples --bin generate_text -- MODEL_FOLDER "Once upon a time"
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use vora_llm::tch::{Device, Kind, no_grad};
use vora_llm::{CausalLm, GenerationConfig, LlmConfig, Weights, greedy};
use vora_text::Tokenizer;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: generate_text MODEL_FOLDER TEXT";
    let (folder, text) = (args.next().context(usage)?, args.next().context(usage)?);
    let folder = Path::new(&folder);

    let weights = Weights::open(folder, Device::Cpu, Kind::Float)?;
    let llm = CausalLm::load(&LlmConfig::open(folder)?, &weights)?;
    weights.finish()?; // whatever the folder lacks, or has too much
    let tokenizer = Tokenizer::open(folder)?;

    let prompt = tokenizer.encode(&text)?;
    let config = GenerationConfig::new(prompt.len() + 32).with_eos_token_id(tokenizer.eos_ids());
    let texts = no_grad(|| llm.generate(&[prompt], &config, greedy))?;
    println!("{}", tokenizer.decode(&texts[0], true)?);
    Ok(())
}
